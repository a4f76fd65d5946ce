"""A finished run, loaded again with everything that it was made of."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from isthmus.average import AVERAGES
from isthmus.checkpoint.fitting import load_module
from isthmus.errors import CheckpointError, DataError
from isthmus.match import align
from isthmus.merging.fold import fold_norm_gains
from isthmus.merging.merge import merge
from isthmus.merging.outcome import outcome_of
from isthmus.merging.repair import repair_as_asked
from isthmus.registry import configure
from isthmus.report.page import read_report
from isthmus.report.schema import RunReport
from isthmus.runs.inputs import Inputs, load_inputs
from isthmus.runs.recipe import Recipe, read_recipe
from isthmus.symmetry.alignment import Alignment
from isthmus.symmetry.symmetry import Symmetry
from isthmus.tracing.trace import trace


@dataclass(eq=False)
class FinishedRun:
    """A finished run, loaded again.

    Attributes:
        folder: Where it lies.
        recipe: What was merged and how.
        inputs: The models and the data, in float32.
        symmetry: The models' symmetry, with its graph.
        alignment: The one that was found.
        merged: The network that came out.
        naive: The average of the models as they are, repaired in the same way.
        bare: The mean in the common frame, and the naive average, before any repair; None where they are undefined.
        parents: The models, their norms' gains folded where the alignment asks for it, as are those of all averages.
        report: The content of `report.json`.
    """

    folder: Path
    recipe: Recipe
    inputs: Inputs
    symmetry: Symmetry
    alignment: Alignment
    merged: nn.Module
    naive: nn.Module
    bare: Mapping[str, nn.Module | None]
    parents: list[nn.Module]
    report: RunReport


def load_run(folder: Path) -> FinishedRun:
    """The run in a folder, with everything that it was made of.

    Raises:
        CheckpointError: The folder holds no finished run.
        DataError: The run had no data.
        InputError: A file has changed since.
    """
    report = read_report(folder / "report.json")
    for name in ("recipe.yaml", "model.safetensors", "alignment.safetensors"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} holds no {name}: give the folder of a finished isthmus merge")
    recipe = read_recipe(folder / "recipe.yaml")
    if recipe.data is None:
        raise DataError(f"{folder} was merged without data: explaining reads units on it; merge again with --data")
    inputs = load_inputs(recipe)
    inputs.models = [model.float() for model in inputs.models]
    example = inputs.example.mapped(lambda x: x.float() if x.is_floating_point() else x)
    symmetry = trace(inputs.models[0], *example.args, kwargs=example.kwargs)
    alignment = Alignment.load(folder / "alignment.safetensors", symmetry)
    if gained := report.gained_biases:
        # With zeros in the same places the models compute what they did, in the graph of the network that came out.
        inputs.models = [_with_biases(model, gained) for model in inputs.models]
        symmetry = trace(inputs.models[0], *example.args, kwargs=example.kwargs)
        alignment = _carried_over(alignment, symmetry)
    merged = load_module(folder / "model.safetensors", inputs.models[0])
    plain = merge(inputs.models, None, "mean", recipe.coefficients)
    aligned = merge(inputs.models, alignment, configure("average", "mean", AVERAGES), recipe.coefficients)
    still = align(inputs.models, symmetry, "identity")
    naive = repair_as_asked(plain, recipe.repair, inputs.calibration, inputs.models, still, recipe.coefficients)

    def folded(model: nn.Module) -> nn.Module:
        return fold_norm_gains(model, symmetry) if alignment.folded else model

    return FinishedRun(
        folder,
        recipe,
        inputs,
        symmetry,
        alignment,
        merged.float().eval(),
        folded(naive),
        {"naive": folded(plain), "aligned": None if outcome_of(aligned).needs_repair else aligned},
        [folded(model) for model in inputs.models],
        report,
    )


def _with_biases(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """A copy of the model with biases of zeros where a repair has put some.

    Raises:
        CheckpointError: A name is of no layer that could have gained one.
    """
    grown = copy.deepcopy(model)
    for name in names:
        path, _, own = name.rpartition(".")
        layer = dict(grown.named_modules()).get(path)
        weight = getattr(layer, "weight", None)
        if own != "bias" or layer is None or not isinstance(weight, torch.Tensor):
            raise CheckpointError(f"the report names a gained bias {name!r}, and there is no such layer: merge again")
        rows = weight.shape[1] * getattr(layer, "groups", 1) if getattr(layer, "transposed", False) else weight.shape[0]
        layer.bias = nn.Parameter(torch.zeros(rows))
    return grown


def _carried_over(alignment: Alignment, symmetry: Symmetry) -> Alignment:
    """The same transforms, on the symmetry of models that have more tensors and the same spaces.

    Raises:
        CheckpointError: The spaces are others.
    """
    told = [
        [(space.name, space.size, space.copies, space.parent) for space in each]
        for each in (alignment.symmetry, symmetry)
    ]
    if sorted(told[0], key=str) != sorted(told[1], key=str):
        raise CheckpointError("the biases that the repair put in change the model's spaces: merge with --repair reset")
    return replace(alignment, symmetry=symmetry)
