"""Loss and accuracy along the line between two checkpoints."""

from typing import Any

from isthmus.errors import DataError, InputError
from isthmus.measure.connect import connect
from isthmus.runs.facts import describe_alignment, describe_proof, provenance
from isthmus.runs.inputs import load_inputs
from isthmus.runs.prepare import prepare
from isthmus.runs.recipe import Recipe
from isthmus.symmetry.alignment import apply


def run_connect(recipe: Recipe, *, points: int = 11, split: str = "test", raw: bool = False) -> dict[str, Any]:
    """Loss and accuracy along the line between two models, as they are and aligned; returns both curves.

    Raises:
        DataError: There is no data, or it does not fit.
        InputError: Not exactly two checkpoints, or an unknown split.
    """
    recipe.check()
    if len(recipe.models) != 2:
        raise InputError(f"{len(recipe.models)} checkpoints: a line connects two")
    if split not in ("train", "test"):
        raise InputError(f"split {split!r}: score on 'test' or 'train'")
    if recipe.data is None:
        raise DataError("connecting models measures their loss: give --data NAME or --data FILE.npz")
    inputs = load_inputs(recipe)
    assert inputs.data is not None
    assert inputs.calibration is not None
    scored = inputs.data.test() if split == "test" else inputs.calibration
    mode = None if raw else "reset"
    symmetry, proof, alignment = prepare(recipe, inputs)
    moved = [apply(alignment, model, index) for index, model in enumerate(inputs.models)]
    naive, aligned = (
        connect(pair[0], pair[1], scored, points, mode, inputs.calibration) for pair in (inputs.models, moved)
    )
    return {
        **provenance(recipe, inputs, "").to_json(),
        "method": describe_alignment(recipe, alignment),
        "proof": describe_proof(proof),
        "free_units": symmetry.free_units,
        "split": split,
        "curves": [{"models": [0, 1], "naive": naive.to_dict(), "aligned": aligned.to_dict()}],
    }
