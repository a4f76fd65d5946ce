"""From a recipe to a finished run folder: read, check, trace, prove, align, merge, mend, measure, write."""

import contextlib
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from isthmus.average import AVERAGES
from isthmus.batches import Batch
from isthmus.checkpoint import hash_file, load_weights, new_folder, save_state, write_text
from isthmus.companions import copy_config, save_hugging_face
from isthmus.compare import DEFAULT_AVERAGES, RAW, choose_methods, compare
from isthmus.connect import connect
from isthmus.cycles import cycle_error, pairwise_barriers
from isthmus.errors import DataError, InputError, IsthmusError, ModelError
from isthmus.example import example_input, sample_shapes
from isthmus.facts import (
    WALKED_SAMPLES,
    describe_alignment,
    describe_coefficients,
    describe_proof,
    describe_score,
    describe_symmetry,
    finite,
    model_card,
    provenance,
    spoken,
    verdict,
)
from isthmus.groups import keeps_function
from isthmus.inputs import Inputs, load_data_of, load_inputs
from isthmus.match import METHODS, Match, align
from isthmus.merge import merge
from isthmus.models import absolute_spec, load_model
from isthmus.models.hugging_face import is_hugging_face
from isthmus.models.structure import parameters_on_meta
from isthmus.recipe import Data, Recipe
from isthmus.registry import configure, configure_text
from isthmus.repair import REPAIRS, repair
from isthmus.report import write_report
from isthmus.running_statistics import normalisation_layers
from isthmus.score import Ensemble, evaluate
from isthmus.simplex import walk_simplex
from isthmus.symmetry import Symmetry
from isthmus.trace import Proof, trace, verify
from isthmus.transform import Alignment, apply

# Between more models than this there are too many lines to walk all of them.
MOST_MODELS_WALKED = 5


def trace_inputs(recipe: Recipe, inputs: Inputs) -> tuple[Symmetry, Proof | None]:
    """The symmetry of the first model, and its proof unless the recipe leaves it out."""
    model, example = inputs.models[0], inputs.example
    symmetry = trace(model, *example.args, kwargs=example.kwargs)
    if not recipe.verify:
        return symmetry, None
    return symmetry, verify(model, symmetry, *example.args, kwargs=example.kwargs, seed=recipe.seed)


def prepare(recipe: Recipe, inputs: Inputs) -> tuple[Symmetry, Proof | None, Alignment]:
    """The symmetry, its proof unless the recipe leaves it out, and the alignment."""
    symmetry, proof = trace_inputs(recipe, inputs)
    method = configure("matching method", recipe.align.method, METHODS, recipe.align.options)
    data = inputs.calibration if method.needs or method.name == "auto" else None
    return symmetry, proof, align(inputs.models, symmetry, method, data=data, seed=recipe.seed)


def run_merge(recipe: Recipe, out: Path, *, force: bool = False, command: str = "") -> dict[str, Any]:
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
        mended = mend(merged, recipe, inputs, alignment)
        if recipe.out_dtype is not None:
            mended = mended.to(getattr(torch, recipe.out_dtype))
        scores, curves, simplex = measure(recipe, inputs, alignment, merged, mended)
        report = {
            **provenance(recipe, inputs, command),
            "method": describe_alignment(recipe, alignment),
            "average": {
                "name": recipe.merge_method,
                "options": recipe.parameters,
                **describe_coefficients(recipe, len(inputs.models)),
            },
            "repair": recipe.repair if mended is not merged else None,
            "gained_biases": getattr(mended, "gained_biases", []),
            "proof": describe_proof(proof),
            "symmetry": describe_symmetry(symmetry, alignment),
            "scores": scores,
            "curves": curves,
            "simplex": simplex,
        }
        report["seconds"] = time.perf_counter() - start
        report["verdict"] = verdict(report)
        if is_hugging_face(mended):
            report["transformers_class"] = type(mended).__name__
            report["left_out"] = save_hugging_face(mended, recipe, folder, report["gained_biases"])
        else:
            save_state(mended.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
            copy_config(recipe.models[0].model, folder)
        alignment.save(folder / "alignment.safetensors")
        write_run(folder, recipe, report)
        write_text(folder / "README.md", model_card(recipe, report))
    return report


def run_align(recipe: Recipe, out: Path, *, force: bool = False, command: str = "") -> dict[str, Any]:
    """Writes every model, carried into the common frame, and the alignment into a folder; returns the report.

    Raises:
        CheckpointError: A checkpoint cannot be read, or the folder cannot be written.
        IsthmusError: Anything else that `load_inputs` and the steps of the run raise.
    """
    recipe.check()
    with new_folder(out, force) as folder:
        start = time.perf_counter()
        inputs = load_inputs(recipe)
        symmetry, proof, alignment = prepare(recipe, inputs)
        names = aligned_names([member.model for member in recipe.models])
        if is_hugging_face(inputs.architecture):
            names = [name.removesuffix(".safetensors") for name in names]
        for index, (model, name) in enumerate(zip(inputs.models, names, strict=True)):
            moved = apply(alignment, model, index)
            if is_hugging_face(moved):
                save_hugging_face(moved, recipe, folder / name)
            else:
                save_state(moved.state_dict(), folder / name, metadata={"format": "pt"})
        alignment.save(folder / "alignment.safetensors")
        report = {
            **provenance(recipe, inputs, command),
            "method": describe_alignment(recipe, alignment),
            "proof": describe_proof(proof),
            "symmetry": describe_symmetry(symmetry, alignment),
            "aligned": names,
        }
        report["seconds"] = time.perf_counter() - start
        kept = "each computes the function it had before."
        if not keeps_function(alignment):
            kept = "its linear maps do not commute with nonlinearities, so they do not compute what they did before."
        report["verdict"] = f"{len(names)} models aligned by {spoken(recipe.align.method)}; {kept}"
        write_run(folder, recipe, report)
    return report


def write_run(folder: Path, recipe: Recipe, report: Mapping[str, Any]) -> None:
    """Writes the recipe with all hashes, the report and its page."""
    members = [
        member.model_copy(update={"model": str(Path(member.model).resolve()), "sha256": entry["sha256"]})
        for member, entry in zip(recipe.models, report["models"], strict=True)
    ]
    complete = recipe.model_copy(update={"models": members, "architecture": absolute_spec(recipe.architecture)})
    if recipe.data is not None and Path(recipe.data.name).suffix == ".npz":
        path = Path(recipe.data.name).resolve()
        complete.data = recipe.data.model_copy(update={"name": str(path), "sha256": hash_file(path)})
    write_text(folder / "recipe.yaml", complete.to_yaml())
    write_text(folder / "report.json", json.dumps(finite(report), indent=1, ensure_ascii=False))
    write_report(folder)


def mend(merged: nn.Module, recipe: Recipe, inputs: Inputs, alignment: Alignment) -> nn.Module:
    """The merged model repaired as the recipe says.

    Raises:
        DataError: The merge left statistics that need data, and there is none, or the recipe repairs nothing.
    """
    if recipe.repair is None or inputs.calibration is None:
        if merged.needs_repair:
            raise DataError("the merged model's BatchNorm statistics are undefined: give --data and --repair reset")
        return merged
    if recipe.repair == "reset" and merged.statistics_measured:
        return merged  # the average measured them on the merged network itself, and fitted its layers to them
    return repair(
        merged,
        inputs.calibration,
        recipe.repair,
        parents=inputs.models,
        alignment=alignment,
        coefficients=recipe.coefficients,
    )


def measure(
    recipe: Recipe, inputs: Inputs, alignment: Alignment, merged: nn.Module, mended: nn.Module
) -> tuple[dict[str, Any] | None, list[dict[str, Any]] | None, dict[str, Any] | None]:
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
    scores = {
        "parents": [describe_score(evaluate(model, test)) for model in inputs.models],
        "ensemble": describe_score(evaluate(Ensemble(inputs.models), test)),
        "naive": describe_score(evaluate(naive, test)),
        "naive_mended": None,
        "aligned": describe_score(evaluate(merged, test)) if not merged.needs_repair else None,
        "merged": describe_score(evaluate(mended, test)),
    }
    if recipe.repair is not None and (normalisation_layers(naive) or recipe.repair == "repair"):
        naive = repair(
            naive, inputs.calibration, recipe.repair, parents=inputs.models, coefficients=recipe.coefficients
        )
        scores["naive_mended"] = describe_score(evaluate(naive, test))
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


def aligned_names(paths: Sequence[str]) -> list[str]:
    """A file name for every aligned model: the source's own where they differ, numbered where not."""
    stems = [Path(path).stem if Path(path).suffix else Path(path).name for path in paths]
    if len(set(stems)) == len(stems) and "alignment" not in stems:
        return [f"{stem}.safetensors" for stem in stems]
    return [f"{index}-{stem}.safetensors" for index, stem in enumerate(stems)]


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
    mending = None if raw else "reset"
    symmetry, proof, alignment = prepare(recipe, inputs)
    moved = [apply(alignment, model, index) for index, model in enumerate(inputs.models)]
    naive, aligned = (
        connect(pair[0], pair[1], scored, points, mending, inputs.calibration) for pair in (inputs.models, moved)
    )
    return {
        **provenance(recipe, inputs, ""),
        "method": describe_alignment(recipe, alignment),
        "proof": describe_proof(proof),
        "free_units": symmetry.free_units,
        "split": split,
        "curves": [{"models": [0, 1], "naive": naive.to_dict(), "aligned": aligned.to_dict()}],
    }


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
        **provenance(recipe, inputs, ""),
        "proof": describe_proof(proof),
        "free_units": symmetry.free_units,
        "split": split,
        "cycles": [walk_cycles(each, inputs, symmetry, scored, recipe.seed) for each in chosen],
        "seconds": time.perf_counter() - start,
        "comparison": comparison.to_dict(),
        "table": comparison.to_markdown(),
    }


def walk_cycles(method: Match, inputs: Inputs, symmetry: Symmetry, scored: Any, seed: int) -> dict[str, Any]:
    """A method's cycle error, and the rise of loss and error half way between every two of the models it moved."""
    error = cycle_error(inputs.models, symmetry, method, inputs.calibration, seed)
    alignment = align(inputs.models, symmetry, method, inputs.calibration, seed)
    curves = pairwise_barriers(inputs.models, alignment, scored, inputs.calibration, points=3)
    lines = [
        {"models": list(pair), "barrier": curve.midpoint_barrier, "error_barrier": curve.midpoint_error_barrier}
        for pair, curve in curves.items()
    ]
    return {**error.to_dict(), "lines": lines}


def build_example(
    architecture: str, shape: Sequence[int] | str | None, data: Data | None, *, weights: bool
) -> tuple[nn.Module, Batch, str]:
    """A model, inputs on which it runs, and what was assumed to make these.

    Args:
        architecture: What `load_model` builds.
        shape: Shape of one sample, or None.
        data: The data set that the model is to run on, or None.
        weights: Whether the parameters need numbers. Without, the model is built with them only if it cannot be built
            or run otherwise: some networks compute something from their parameters' numbers while they are built.

    Raises:
        DataError: The data cannot be read, or the model does not run on it.
        InputError: No input is known on which the model runs.
        ModelError: The model cannot be built, or has no parameters.
    """
    torch.manual_seed(0)
    try:
        with contextlib.nullcontext() if weights else parameters_on_meta():
            model = load_model(architecture).eval()
        if not model.state_dict():
            raise ModelError(f"{architecture} has no parameters: there is nothing to inspect")
        return model, *example_input(model, shape, None if data is None else load_data_of(data, model))
    except IsthmusError:
        if weights:
            raise
        return build_example(architecture, shape, data, weights=True)


def inspect_model(
    architecture: str, shape: Sequence[int] | str | None, data: Data | None, *, prove: bool = True
) -> dict[str, Any]:
    """A model's spaces and frozen axes, and the proof that they are right.

    Without a proof no weights are needed: parameters are then made on the meta device, where the model allows it, so
    that one of any size can be inspected.

    Raises:
        DataError: The data cannot be read, or the model does not run on it.
        InputError: No input is known on which the model runs.
        ModelError: The model cannot be built.
        TraceError: The model cannot be captured.
    """
    model, example, assumed = build_example(architecture, shape, data, weights=prove)
    start = time.perf_counter()
    symmetry = trace(model, *example.args, kwargs=example.kwargs)
    traced = time.perf_counter() - start
    proof = verify(model, symmetry, *example.args, kwargs=example.kwargs) if prove else None
    return {
        "isthmus": version("isthmus"),
        "model": architecture,
        "input": sample_shapes(example),
        "assumed": assumed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": traced,
        "symmetry": describe_symmetry(symmetry),
        "proof": describe_proof(proof),
    }
