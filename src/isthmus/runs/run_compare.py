"""Every method, average and repair on the same checkpoints."""

import time
from collections.abc import Sequence
from typing import Any

from isthmus.average import AVERAGES
from isthmus.checkpoint.fitting import load_weights
from isthmus.errors import DataError, InputError
from isthmus.match import METHODS, align
from isthmus.match.base import Match
from isthmus.measure.compare import DEFAULT_AVERAGES, RAW, choose_methods, compare
from isthmus.measure.cycles import cycle_error, pairwise_barriers
from isthmus.merging.repair import REPAIRS
from isthmus.registry import configure_text
from isthmus.runs.facts import describe_proof, provenance
from isthmus.runs.inputs import Inputs, load_inputs
from isthmus.runs.prepare import trace_inputs
from isthmus.runs.recipe import Recipe
from isthmus.symmetry.symmetry import Symmetry


def run_compare(
    recipe: Recipe,
    *,
    methods: Sequence[str] | None = None,
    averages: Sequence[str] | None = None,
    repairs: Sequence[str] | None = None,
    split: str = "test",
    cycles: bool = False,
) -> dict[str, Any]:
    """Merges the recipe's models in every way asked for, and returns the scores of all.

    With `cycles`, of three models or more, also how far every method's pairwise matchings are from fitting together,
    and the barriers between the models that it moved.

    Raises:
        DataError: There is no data, or it does not fit.
        InputError: An unknown method, average, repair or split.
    """
    recipe.check()
    if split not in ("train", "test"):
        raise InputError(f"split {split!r}: score on 'test' or 'train'")
    if recipe.data is None:
        raise DataError("comparing ways to merge measures each: give --data NAME or --data FILE.npz")
    for kind, names, table in (("matching method", methods, METHODS), ("average", averages, AVERAGES)):
        for name in names or ():
            configure_text(kind, name, table)
    if cycles and len(recipe.models) < 3:
        raise InputError(f"--cycles with {len(recipe.models)} models: a cycle needs three at least")
    inputs = load_inputs(recipe)
    assert inputs.data is not None
    assert inputs.calibration is not None
    symmetry, proof = trace_inputs(recipe, inputs)
    base = None if recipe.base_model is None else load_weights(recipe.base_model, inputs.architecture)
    start = time.perf_counter()
    scored = inputs.data.test() if split == "test" else inputs.calibration
    comparison = compare(
        inputs.models,
        scored,
        inputs.calibration,
        symmetry,
        methods=methods,
        averages=averages or DEFAULT_AVERAGES,
        repairs=repairs or (RAW, *REPAIRS),
        base=base,
        seed=recipe.seed,
    )
    chosen = [each for each in choose_methods(methods, inputs.calibration) if each.exact] if cycles else []
    return {
        **provenance(recipe, inputs, "").to_json(),
        "proof": describe_proof(proof),
        "free_units": symmetry.free_units,
        "split": split,
        "cycles": [_walk_cycles(each, inputs, symmetry, scored, recipe.seed) for each in chosen],
        "seconds": time.perf_counter() - start,
        "comparison": comparison.to_dict(),
        "table": comparison.to_markdown(),
    }


def _walk_cycles(method: Match, inputs: Inputs, symmetry: Symmetry, scored: Any, seed: int) -> dict[str, Any]:
    """A method's cycle error, and the rise of loss and error half way between every two of the models it moved."""
    error = cycle_error(inputs.models, symmetry, method, inputs.calibration, seed)
    alignment = align(inputs.models, symmetry, method, inputs.calibration, seed)
    curves = pairwise_barriers(inputs.models, alignment, scored, inputs.calibration, points=3)
    lines = [
        {"models": list(pair), "barrier": curve.midpoint_barrier, "error_barrier": curve.midpoint_error_barrier}
        for pair, curve in curves.items()
    ]
    return {**error.to_dict(), "lines": lines}
