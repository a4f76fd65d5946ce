"""What a run reads: checkpoints, data and an example input, loaded and checked before anything is written."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isthmus.checkpoint import hash_file, load_state
from isthmus.data import Batches, DataSet, load_data
from isthmus.errors import DataError, InputError
from isthmus.members import as_modules
from isthmus.models import load_model, sample_shape
from isthmus.recipe import Recipe

# Shapes of one sample that are tried when nothing says what the model reads, by the rank of its first weight.
USUAL_SHAPES = {2: ((),), 3: ((128,),), 4: ((32, 32), (28, 28), (224, 224), (8, 8)), 5: ((16, 32, 32),)}


@dataclass(eq=False)
class Inputs:
    """What a run reads, loaded and checked.

    Attributes:
        architecture: What `--model` named.
        models: The models, in `eval()`.
        data: The data set, or None.
        calibration: Training batches for statistics and activations, or None.
        example: A batch of two, for tracing.
        assumed: What was assumed about the example, or "" where it is known.
    """

    architecture: nn.Module
    models: list[nn.Module]
    data: DataSet | None
    calibration: Batches | None
    example: tuple[Tensor, ...]
    assumed: str


def load_inputs(recipe: Recipe) -> Inputs:
    """Everything that a recipe names, read and checked; nothing is written.

    Raises:
        CheckpointError: A checkpoint cannot be read.
        DataError: The data cannot be read or does not fit the model.
        InputError: A file is not the one that the recipe's hash names.
        ModelError: The model cannot be built, or a checkpoint is not of its architecture.
    """
    with torch.random.fork_rng([]):  # the caller's random state stays as it is
        torch.manual_seed(recipe.seed)
        return read_inputs(recipe)


def read_inputs(recipe: Recipe) -> Inputs:
    """As `load_inputs`, drawing from the global random state."""
    architecture = load_model(recipe.architecture).eval()
    states = []
    for member in recipe.models:
        state = load_state(member.model)
        found = hash_file(member.model) if member.sha256 else None
        if found != member.sha256:
            raise InputError(
                f"{member.model} has changed since the recipe was written: remove its sha256 to use it as it is"
            )
        states.append(state)
    models = as_modules(states, architecture, names=[member.model for member in recipe.models])
    if recipe.dtype is not None:
        models = [model.to(getattr(torch, recipe.dtype)) for model in models]
    data = calibration = None
    if recipe.data is not None:
        data = load_data(recipe.data.name, recipe.data.folder)
        calibration = data.train(recipe.data.batch_size, seed=recipe.seed).take(recipe.data.samples)
    example, assumed = example_input(models[0], recipe.input, data)
    return Inputs(architecture, models, data, calibration, example, assumed)


def example_input(
    model: nn.Module, shape: Sequence[int] | None, data: DataSet | None
) -> tuple[tuple[Tensor, ...], str]:
    """A batch of two inputs on which the model runs, and what was assumed to make it.

    The shape is the one given, else the data's, else the one that the model states, else one that its first weight
    suggests.

    Raises:
        DataError: The model does not run on the data.
        InputError: The model does not run on the given shape, or on any that can be guessed.
    """
    reference = next((t for t in model.state_dict().values() if t.is_floating_point()), torch.zeros(()))
    if shape is None and data is not None:
        batch = next(iter(data.test(2)))[0]
        batch = batch.to(reference.dtype) if batch.is_floating_point() else batch
        failure = why_not(model, batch)
        if failure:
            raise DataError(
                f"the model does not run on {data.name} (samples {data.sample_shape}: {failure}): check --model"
            )
        return (batch,), ""
    stated = sample_shape(model) if shape is None else tuple(shape)
    if stated is not None:
        batch = torch.randn(2, *stated, dtype=reference.dtype)
        failure = why_not(model, batch)
        if failure:
            raise InputError(
                f"the model does not run on inputs of shape {stated} ({failure}): give --input, such as 3,32,32"
            )
        return (batch,), ""
    weight = next((t for t in model.state_dict().values() if t.ndim >= 2), None)
    for rest in USUAL_SHAPES.get(weight.ndim, ()) if weight is not None else ():
        assert weight is not None
        guess = (weight.shape[1], *rest)
        batch = torch.randn(2, *guess, dtype=reference.dtype)
        if not why_not(model, batch):
            return (batch,), f"inputs of shape {guess}, from the first weight's shape {tuple(weight.shape)}"
    raise InputError("no input is known on which the model runs: give --input, such as 3,32,32, or --data")


def why_not(model: nn.Module, batch: Tensor) -> str:
    """Why the model does not run on a batch, in one line; empty where it does."""
    try:
        with torch.no_grad():
            model(batch)
    except Exception as error:  # a foreign model may raise anything on inputs that do not fit
        return " ".join(str(error).split())[:160] or type(error).__name__
    return ""
