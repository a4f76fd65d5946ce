"""What a run found, as the parts of its report."""

import datetime
import math
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isthmus.checkpoint.hashes import hash_file
from isthmus.observe.score import Score
from isthmus.report.schema import (
    AverageFacts,
    DataFacts,
    JsonPart,
    MethodFacts,
    ParentFile,
    ProofFacts,
    Provenance,
    RunReport,
    ScoreFacts,
)
from isthmus.runs.inputs import Inputs
from isthmus.runs.recipe import Recipe
from isthmus.symmetry.alignment import Alignment
from isthmus.symmetry.symmetry import Symmetry
from isthmus.symmetry.transform import Permutation, flat_indices
from isthmus.tracing.proof import Proof

# Samples of the test split on which the networks between the models are scored, and on whose number of training samples
# their statistics are re-estimated: a merge of two networks scores 44 such.
WALKED_SAMPLES = 2000


def provenance(recipe: Recipe, inputs: Inputs, command: str) -> Provenance:
    """What was run, on what, with which versions."""
    data = None
    if recipe.data is not None and inputs.data is not None and inputs.calibration is not None:
        data = DataFacts(
            name=inputs.data.name,
            noun=inputs.data.sample_noun,
            score_split="test",
            score_samples=len(inputs.data.y_test),
            walked_samples=min(WALKED_SAMPLES, len(inputs.data.y_test)),
            calibration_split="train",
            calibration_samples=min(recipe.data.samples, len(inputs.data.y_train)),
        )
    return Provenance(
        isthmus=version("isthmus"),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command,
        seed=recipe.seed,
        versions={"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        model=recipe.architecture,
        models=tuple(
            ParentFile(str(Path(member.model).resolve()), hash_file(member.model)) for member in recipe.models
        ),
        data=data,
        assumed=inputs.assumed,
    )


def describe_alignment(recipe: Recipe, alignment: Alignment) -> MethodFacts:
    """The matching's facts."""
    return MethodFacts(
        name=recipe.align.method,
        options=recipe.align.options,
        objective=alignment.objective,
        upper_bound=alignment.upper_bound,
        converged=alignment.converged,
        seconds=alignment.seconds,
        details=dict(alignment.details),
        folded=alignment.folded,
    )


def describe_proof(proof: Proof | None) -> ProofFacts | None:
    """The proof's facts; None where there is none."""
    if proof is None:
        return None
    return ProofFacts(
        max_error=proof.max_error,
        tolerance=proof.tolerance,
        trials=proof.trials,
        weakest_control=proof.weakest_control,
        no_ops=list(proof.no_ops),
        dtype=proof.dtype,
    )


def describe_symmetry(symmetry: Symmetry, alignment: Alignment | None = None) -> dict[str, Any]:
    """Spaces, frozen axes, and how many units of each space an alignment moved."""
    touched = sum(math.prod(symmetry.shapes[name]) for name in symmetry.sites)
    everything = sum(math.prod(shape) for name, shape in symmetry.shapes.items() if name not in symmetry.tied)
    return {
        "free_units": symmetry.free_units,
        "moved_share": touched / everything if everything else 0.0,
        "spaces": [
            {
                "name": space.name,
                "size": space.size,
                "copies": space.copies,
                "parent": space.parent,
                "group": space.group.value,
                "sites": [
                    {"parameter": site.parameter, "dims": list(site.dims), "role": site.role} for site in space.sites
                ],
                "moved": None if alignment is None else _moved_shares(alignment, space.name),
            }
            for space in symmetry
        ],
        "frozen": [vars(item) for item in symmetry.frozen],
        "untouched": list(symmetry.untouched),
        "gains": [{"parameter": gain.parameter, "obstacle": gain.obstacle} for gain in symmetry.gains],
        "gauges": [{"space": gauge.space, "kind": gauge.kind} for gauge in symmetry.gauges],
    }


def _moved_shares(alignment: Alignment, name: str) -> list[float | None]:
    """For every model, the share of a space's units that do not stay where they were; None under a linear map."""
    shares: list[float | None] = []
    space = alignment.symmetry[name]
    for transforms in alignment.transforms:
        if isinstance(transforms[name], Permutation):
            flat = flat_indices(transforms, alignment.symmetry, space)
            shares.append(float((flat != np.arange(len(flat))).mean()))
        else:
            shares.append(None)
    return shares


def describe_score(score: Score) -> ScoreFacts:
    """A score's figures."""
    return ScoreFacts(score.loss, score.accuracy, score.count)


def plain_json(value: Any) -> Any:
    """The value as plain JSON: parts of reports become objects, tuples lists, and numbers that are not finite null."""
    if isinstance(value, JsonPart | RunReport):
        return plain_json(value.to_json())
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def describe_average(recipe: Recipe, models: int) -> AverageFacts:
    """The average, with one weight a model as scaled for averaging, and by module path where some differ."""
    weights = recipe.coefficients or {"": [1.0] * models}
    shares = {path: [value / sum(each) for value in each] for path, each in weights.items()}
    return AverageFacts(recipe.merge_method, recipe.parameters, shares.pop(""), shares)
