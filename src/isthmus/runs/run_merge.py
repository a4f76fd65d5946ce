"""From a recipe to a finished run folder: read, check, trace, prove, align, merge, repair, measure, write."""

import itertools
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from isthmus.average import AVERAGES
from isthmus.checkpoint.fitting import load_weights
from isthmus.checkpoint.folders import new_folder
from isthmus.checkpoint.writing import save_state, write_text
from isthmus.match import align
from isthmus.measure.cycles import pairwise_barriers
from isthmus.measure.simplex import walk_simplex
from isthmus.merging.merge import merge
from isthmus.merging.outcome import outcome_of
from isthmus.merging.repair import REPAIRS, repair, repair_as_asked
from isthmus.models.hugging_face import is_hugging_face
from isthmus.observe.score import Ensemble, evaluate
from isthmus.registry import configure
from isthmus.report.schema import RunReport, RunScores
from isthmus.runs.card import model_card, verdict
from isthmus.runs.facts import (
    WALKED_SAMPLES,
    describe_alignment,
    describe_average,
    describe_proof,
    describe_score,
    describe_symmetry,
    provenance,
)
from isthmus.runs.folder import copy_config, save_hugging_face, write_run
from isthmus.runs.inputs import Inputs, load_inputs
from isthmus.runs.prepare import prepare
from isthmus.runs.recipe import Recipe
from isthmus.symmetry.alignment import Alignment, apply
from isthmus.symmetry.groups import keeps_function

# Between more models than this there are too many lines to walk all of them.
MOST_MODELS_WALKED = 5


def run_merge(recipe: Recipe, out: Path, *, force: bool = False, command: str = "") -> RunReport:
    """Merges what the recipe names into a run folder, and returns its report.

    The folder holds `model.safetensors`, `alignment.safetensors`, `recipe.yaml`, `report.json`, `report.html` and
    `README.md`; it appears whole or not at all.

    Raises:
        CheckpointError: A checkpoint cannot be read, or the folder cannot be written.
        IsthmusError: Anything else that `load_inputs` and the steps of the run raise.
    """
    recipe.check()
    with new_folder(out, force) as folder:
        start = time.perf_counter()
        inputs = load_inputs(recipe)
        symmetry, proof, alignment = prepare(recipe, inputs)
        average = configure("average", recipe.merge_method, AVERAGES, recipe.parameters)
        base = None if recipe.base_model is None else load_weights(recipe.base_model, inputs.architecture)
        merged = merge(
            inputs.models, alignment, average, recipe.coefficients, data=inputs.calibration, base=base, seed=recipe.seed
        )
        repaired = repair_as_asked(
            merged, recipe.repair, inputs.calibration, inputs.models, alignment, recipe.coefficients
        )
        if recipe.out_dtype is not None:
            repaired = repaired.to(getattr(torch, recipe.out_dtype))
        scores, curves, simplex = _measure(recipe, inputs, alignment, merged, repaired)
        report = RunReport(
            provenance=provenance(recipe, inputs, command),
            method=describe_alignment(recipe, alignment),
            average=describe_average(recipe, len(inputs.models)),
            repair=recipe.repair if repaired is not merged else None,
            gained_biases=outcome_of(repaired).gained_biases,
            proof=describe_proof(proof),
            symmetry=describe_symmetry(symmetry, alignment),
            scores=scores,
            curves=curves,
            simplex=simplex,
            seconds=time.perf_counter() - start,
            verdict="",
        )
        report = replace(report, verdict=verdict(report))
        if is_hugging_face(repaired):
            left_out = save_hugging_face(repaired, recipe, folder, report.gained_biases or ())
            report = replace(report, transformers_class=type(repaired).__name__, left_out=left_out)
        else:
            save_state(repaired.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
            copy_config(recipe.models[0].model, folder)
        alignment.save(folder / "alignment.safetensors")
        write_run(folder, recipe, report)
        write_text(folder / "README.md", model_card(recipe, report))
    return report


def _measure(
    recipe: Recipe, inputs: Inputs, alignment: Alignment, merged: nn.Module, repaired: nn.Module
) -> tuple[RunScores | None, list[dict[str, Any]] | None, dict[str, Any] | None]:
    """Scores of parents, ensemble, naive average and result on the test split, curves, and the simplex of three.

    Scores are of the whole test split. Between the models, where dozens of networks are scored, it is samples of it
    drawn at random (`WALKED_SAMPLES`), the same at every place. Three and more models: each line is walked at its ends
    and its middle only. Between three, the lines are the edges of their triangle, so that its centre is the one place
    more.
    """
    if inputs.data is None:
        return None, None, None
    test = inputs.data.test()
    naive = merge(inputs.models, None, "mean", recipe.coefficients)
    scores = RunScores(
        parents=tuple(describe_score(evaluate(model, test)) for model in inputs.models),
        ensemble=describe_score(evaluate(Ensemble(inputs.models), test)),
        naive=describe_score(evaluate(naive, test)),
        aligned=describe_score(evaluate(merged, test)) if not outcome_of(merged).needs_repair else None,
        merged=describe_score(evaluate(repaired, test)),
    )
    if recipe.repair is not None and REPAIRS[recipe.repair]().changes(naive):
        naive = repair(
            naive, inputs.calibration, recipe.repair, parents=inputs.models, coefficients=recipe.coefficients
        )
        scores = replace(scores, naive_mended=describe_score(evaluate(naive, test)))
    if len(inputs.models) > MOST_MODELS_WALKED or not keeps_function(alignment):
        return scores, None, None
    walked_on = inputs.data.test(seed=recipe.seed).take(WALKED_SAMPLES)
    calibration = None if inputs.calibration is None else inputs.calibration.take(WALKED_SAMPLES)
    if len(inputs.models) == 3:
        moved = [apply(alignment, model, index) for index, model in enumerate(inputs.models)]
        walked = {
            kind: walk_simplex(models, walked_on, 3, "reset", calibration)
            for kind, models in (("naive", inputs.models), ("aligned", moved))
        }
        curves = [
            {"models": [a, b], **{kind: simplex.edge(a, b).to_dict() for kind, simplex in walked.items()}}
            for a, b in itertools.combinations(range(3), 2)
        ]
        return scores, curves, {kind: simplex.to_dict() for kind, simplex in walked.items()}
    points = 11 if len(inputs.models) == 2 else 3
    still = align(inputs.models, alignment.symmetry, "identity")
    naive, aligned = (
        pairwise_barriers(inputs.models, frame, walked_on, calibration, points) for frame in (still, alignment)
    )
    curves = [
        {"models": list(pair), "naive": naive[pair].to_dict(), "aligned": aligned[pair].to_dict()} for pair in naive
    ]
    return scores, curves, None
