"""What a run reads: checkpoints, data and an example input, loaded and checked before anything is written."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from isthmus.checkpoint.fitting import load_weights
from isthmus.checkpoint.hashes import hash_file
from isthmus.data.batches import Batch
from isthmus.data.load import BLOCK, load_data
from isthmus.data.sets import Batches, DataSet
from isthmus.errors import InputError
from isthmus.models import load_model, window
from isthmus.models.hugging_face import check_config, describes_model, is_hugging_face
from isthmus.observe.given import as_modules
from isthmus.runs.example import example_input
from isthmus.runs.recipe import DataOptions, Recipe


@dataclass(eq=False)
class Inputs:
    """What a run reads, loaded and checked.

    Attributes:
        architecture: What `--model` named.
        models: The models, in `eval()`.
        data: The data set, or None.
        calibration: Training batches for statistics and activations, or None.
        example: A batch of two for tracing, positional and keyword inputs.
        assumed: What was assumed about the example, or "" where it is known.
    """

    architecture: nn.Module
    models: list[nn.Module]
    data: DataSet | None
    calibration: Batches | None
    example: Batch
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
        return _read_inputs(recipe)


def _read_inputs(recipe: Recipe) -> Inputs:
    """As `load_inputs`, drawing from the global random state."""
    architecture = load_model(recipe.architecture).eval()
    states = []
    for member in recipe.models:
        if is_hugging_face(architecture) and describes_model(Path(member.model)):
            check_config(architecture, member.model)
        state = load_weights(member.model, architecture)
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
        data = load_data_of(recipe.data, architecture)
        calibration = data.train(recipe.data.batch_size, seed=recipe.seed).take(recipe.data.samples)
        if len(calibration) == 1:  # methods that judge what they found hold a batch out
            calibration = calibration.halved()
    example, assumed = example_input(models[0], recipe.input, data)
    return Inputs(architecture, models, data, calibration, example, assumed)


def load_data_of(data: DataOptions, architecture: nn.Module) -> DataSet:
    """The data set that a recipe names; of a text, in windows as long as the architecture's.

    Raises:
        DataError: It cannot be read, or is too short for one window.
    """
    return load_data(data.name, data.folder, block=window(architecture) or BLOCK)
