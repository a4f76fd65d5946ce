"""Explaining a finished run: what became of every unit and singular direction, into its report and onto its page."""

import copy
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from isthmus.average import AVERAGES
from isthmus.batches import is_labelled
from isthmus.checkpoint import load_module, write_text
from isthmus.connect import connect
from isthmus.data import Batches
from isthmus.errors import CheckpointError, DataError, InputError
from isthmus.explain.claims import judge_claims, top_share
from isthmus.explain.gallery import Gallery, draw_gallery, draw_matches, spaced, takes_images
from isthmus.explain.parametrisations import PARAMETRISATIONS
from isthmus.explain.questions import answer_questions
from isthmus.explain.similarity import cka_matrix
from isthmus.explain.spectrum import Spectra, measure_spectra
from isthmus.explain.taylor import taylor_barrier
from isthmus.explain.units import MERGED, NAIVE, SpaceUnits, Units, measure_units
from isthmus.facts import finite
from isthmus.fold import fold_norm_gains
from isthmus.inputs import Inputs, load_inputs
from isthmus.match import StraightThrough, align
from isthmus.merge import merge
from isthmus.moments import collect
from isthmus.pipeline import mend
from isthmus.progress import progress
from isthmus.recipe import Recipe, read_recipe
from isthmus.registry import configure, did_you_mean
from isthmus.report import write_report
from isthmus.report.page import read_report
from isthmus.symmetry import Symmetry
from isthmus.trace import trace
from isthmus.transform import Alignment, apply

# Inputs of the estimates by derivatives, which cost some ten times a pass over the data, or as many as hold so many
# targets: a window of text has one at every position. Twice differentiated, a batch takes several times its memory.
TAYLOR_INPUTS, TAYLOR_TARGETS, TAYLOR_BATCH = 1000, 10_000, 50


@dataclass(frozen=True)
class Wishes:
    """What to explain, and how thoroughly.

    Attributes:
        images: Inputs of the test split on which units are scored and loss barriers measured.
        units: How many best, middle and worst units of a space are drawn; 0 draws none.
        spaces: Of how many spaces, evenly spaced from the first to the last.
        method: The parametrisation of the pictures.
        steps: Steps of gradient ascent; the method's own number if None.
        claims: Whether the claims on weight matching are judged, for which two models are matched in three more ways.
    """

    images: int = 2000
    units: int = 2
    spaces: int = 6
    method: str = "fourier"
    steps: int | None = None
    claims: bool = True

    def check(self) -> None:
        """Refuses what cannot be done.

        Raises:
            InputError: A number is too small, or the method has no such name.
        """
        if self.images < 50 or self.units < 0 or self.spaces < 1:
            raise InputError(
                f"images {self.images}, units {self.units}, spaces {self.spaces}: give at least 50, 0 and 1"
            )
        if self.method not in PARAMETRISATIONS:
            known = ", ".join(PARAMETRISATIONS)
            raise InputError(
                f"no parametrisation {self.method!r}{did_you_mean(self.method, PARAMETRISATIONS)}: use {known}"
            )


@dataclass(eq=False)
class Run:
    """A finished run, loaded again.

    Attributes:
        folder: Where it lies.
        recipe: What was merged and how.
        inputs: The models and the data, in float32.
        symmetry: The models' symmetry, with its graph.
        alignment: The one that was found.
        merged: The network that came out.
        naive: The average of the models as they are, mended in the same way.
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
    report: dict[str, Any]


def explain_run(folder: Path, wishes: Wishes | None = None) -> dict[str, Any]:
    """Adds to a run folder's report what became of units and singular directions; returns the report.

    `report.json` gains the key `explain`, `features.json` holds the pictures, and the page is written anew. Units are
    scored on the test split, which chose nothing; statistics and derivatives are taken on the run's training data.

    Raises:
        CheckpointError: The folder holds no finished run, or cannot be written.
        DataError: The run had no data, or it cannot be read.
        InputError: A file has changed since the run, or a wish cannot be met.
    """
    wishes = wishes or Wishes()
    wishes.check()
    start = time.perf_counter()
    run = load_run(Path(folder))
    assert run.inputs.data is not None
    assert run.inputs.calibration is not None
    scored = run.inputs.data.test(run.inputs.calibration.batch_size, seed=run.recipe.seed).take(wishes.images)
    units = measure_units(run.parents, run.alignment, run.merged, scored, naive=run.naive)
    ratios = variance_ratios(run, units, scored)
    gallery = draw(run, units, scored, wishes)
    pair = len(run.inputs.models) == 2
    spectra = (
        measure_spectra(run.inputs.models, run.alignment, run.merged, run.inputs.calibration, run.symmetry)
        if pair
        else None
    )
    told = {
        "data": {
            "name": run.inputs.data.name,
            "split": "test",
            "images": units.images,
            "noun": run.inputs.data.sample_noun,
        },
        "models": list(next(iter(units.spaces.values())).names) if units.spaces else [],
        "threshold": next(iter(units.spaces.values())).threshold if units.spaces else None,
        "spaces": [describe_space(own, ratios[name], gallery) for name, own in units.spaces.items()],
        "skipped": dict(units.skipped),
        "not_drawn": not_drawn(run, units, wishes),
        "spectra": None if spectra is None else describe_spectra(spectra),
        **(
            judge(run, spectra, scored)
            if pair and wishes.claims and spectra is not None
            else {"taylor": None, "claims": []}
        ),
        "questions": [
            claim.to_dict() for claim in answer_questions(units.spaces, ratios, repaired=bool(run.report.get("repair")))
        ],
        "cka": compare_layers(run, scored),
        "options": asdict(wishes),
    }
    told["seconds"] = time.perf_counter() - start
    features = {
        "method": wishes.method,
        "seconds": 0.0 if gallery is None else gallery.seconds,
        "spaces": {
            name: {
                "match": draw_matches(own, units.moments.spaces[name]) if len(run.inputs.models) > 1 else {},
                "units": {} if gallery is None else gallery.pictures.get(name, {}),
            }
            for name, own in units.spaces.items()
        },
    }
    report = {**run.report, "explain": told}
    write_text(run.folder / "features.json", json.dumps(features))
    write_text(run.folder / "report.json", json.dumps(finite(report), indent=1, ensure_ascii=False))
    write_report(run.folder)
    return report


def load_run(folder: Path) -> Run:
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
    if gained := report.get("gained_biases"):
        # With zeros in the same places the models compute what they did, in the graph of the network that came out.
        inputs.models = [with_biases(model, gained) for model in inputs.models]
        symmetry = trace(inputs.models[0], *example.args, kwargs=example.kwargs)
        alignment = carried_over(alignment, symmetry)
    merged = load_module(folder / "model.safetensors", inputs.models[0])
    plain = merge(inputs.models, None, "mean", recipe.coefficients)
    framed = merge(inputs.models, alignment, configure("average", "mean", AVERAGES), recipe.coefficients)
    still = align(inputs.models, symmetry, "identity")
    naive = mend(plain, recipe, inputs, still)

    def folded(model: nn.Module) -> nn.Module:
        return fold_norm_gains(model, symmetry) if alignment.folded else model

    return Run(
        folder,
        recipe,
        inputs,
        symmetry,
        alignment,
        merged.float().eval(),
        folded(naive),
        {"naive": folded(plain), "aligned": None if framed.needs_repair else framed},
        [folded(model) for model in inputs.models],
        report,
    )


def with_biases(model: nn.Module, names: list[str]) -> nn.Module:
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


def carried_over(alignment: Alignment, symmetry: Symmetry) -> Alignment:
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


def variance_ratios(run: Run, units: Units, scored: Batches) -> dict[str, dict[str, float | None]]:
    """By space, the variance of merged units over their models': naive and aligned before repair, and of the result."""
    count = len(run.inputs.models)
    bare = {
        name: None if model is None else collect([model], run.symmetry, scored, at=units.moments.at)
        for name, model in run.bare.items()
    }
    found: dict[str, dict[str, float | None]] = {}
    for name in units.spaces:
        variances = units.moments[name].deviation.square().mean(dim=1)
        theirs = float(variances[:count].mean())
        own: dict[str, float | None] = {
            kind: None if moments is None or not theirs else float(moments[name].deviation.square().mean()) / theirs
            for kind, moments in bare.items()
        }
        found[name] = {**own, "mended": float(variances[count]) / theirs if theirs else None}
    return found


def draw(run: Run, units: Units, scored: Batches, wishes: Wishes) -> Gallery | None:
    """The gallery; None where the networks take no images, or none is wished for.

    Spaces whose units a linear map mixes are left out, unless there are no others.
    """
    unmixed = [name for name, own in units.spaces.items() if not own.mixes]
    if not wishes.units or not units.spaces or not takes_images(run.symmetry.program.program):
        return None
    names = next(iter(units.spaces.values())).names
    networks = dict(zip(names, run.parents, strict=True)) | {MERGED: run.merged, NAIVE: run.naive}
    data = run.inputs.data
    assert data is not None
    return draw_gallery(
        networks,
        run.symmetry,
        units,
        scored,
        spaces=spaced(unmixed or list(units.spaces), wishes.spaces),
        each=wishes.units,
        method=wishes.method,
        steps=wishes.steps,
        seed=run.recipe.seed,
        mean=data.mean,
        std=data.std,
    )


def not_drawn(run: Run, units: Units, wishes: Wishes) -> str | None:
    """Why units are not drawn that the wishes ask for, in a sentence; None if all can be."""
    if not wishes.units or not units.spaces:
        return None
    if not takes_images(run.symmetry.program.program):
        return "No unit is drawn: the networks take no images."
    mixed = [name for name, own in units.spaces.items() if own.mixes]
    if len(mixed) in (0, len(units.spaces)):
        return None
    return (
        f"Of {len(units.spaces)} spaces {len(mixed)} are not drawn: a linear map mixes their units, so that none of a "
        "model's stands in a slot."
    )


def compare_layers(run: Run, scored: Batches) -> list[dict[str, Any]]:
    """CKA between the layers of the first two models, and of each with the merged network."""
    names = ("A", "B")
    networks = {"A": run.inputs.models[0], "B": run.inputs.models[1], MERGED: run.merged}
    found = []
    for first, second in progress([names, ("A", MERGED), ("B", MERGED)], "comparing layers"):
        matrix = cka_matrix([networks[first], networks[second]], run.symmetry, scored)
        layers = list(matrix.layers)
        found.append({"models": [first, second], "rows": layers, "columns": layers, "values": matrix.values.tolist()})
    return found


def judge(run: Run, spectra: Spectra, scored: Batches) -> dict[str, Any]:
    """The Taylor estimate and the verdicts on the claims, for which the models are matched in three ways."""
    calibration = run.inputs.calibration
    assert calibration is not None
    models, recipe = run.inputs.models, run.recipe
    ways: dict[str, Any] = {"weight_matching": "weight_matching", "activation_matching": "activation_matching"}
    if is_labelled(calibration):
        ways["ste"] = StraightThrough(start="identity")
    fitting = calibration if len(calibration) > 1 else calibration.halved()  # ste holds a batch out
    alignments = {"naive": align(models, run.symmetry, "identity")}
    for name, way in progress(list(ways.items()), "matching in other ways"):
        own = run.alignment.method == name and not recipe.align.options and name != "ste"
        alignments[name] = run.alignment if own else align(models, run.symmetry, way, fitting, recipe.seed)
    barriers, measured = {}, {}
    for name, alignment in progress(list(alignments.items()), "measuring barriers"):
        moved = [apply(alignment, model, index) for index, model in enumerate(models)]
        barriers[name] = connect(moved[0], moved[1], scored, 3, "reset", calibration).midpoint_barrier
        if name == "weight_matching":
            mean = mend(merge(models, alignment, "mean"), recipe, run.inputs, alignment)
            measured[name] = measure_spectra(models, alignment, mean, calibration, run.symmetry)
        elif name != "naive":
            measured[name] = measure_spectra(models, alignment, None, None, run.symmetry)
    found = alignments["weight_matching"]
    moved = [apply(found, model, index) for index, model in enumerate(models)]
    few = calibration.take(min(TAYLOR_INPUTS, max(1, TAYLOR_TARGETS // calibration.y[0].numel())))
    taylor = taylor_barrier(moved[0], moved[1], few.in_batches(TAYLOR_BATCH))
    claims = judge_claims(
        measured["weight_matching"],
        taylor,
        barriers,
        activation_matching=measured["activation_matching"],
        ste=measured.get("ste"),
    )
    return {
        "taylor": {
            "estimate": taylor.estimate,
            "first_order": taylor.first_order,
            "second_order": taylor.second_order,
            "real": taylor.real,
            "inputs": len(few.indices),
        },
        "barriers": barriers,
        "claims": [claim.to_dict() for claim in claims],
    }


def describe_spectra(spectra: Spectra) -> dict[str, Any]:
    """Spectra, R by threshold, and distances, layer by layer, as plain JSON values."""
    layers = []
    for layer in spectra.layers:
        share, chance = top_share(layer) if layer.input_shares else (None, None)
        layers.append(
            {
                "name": layer.name,
                "a": list(layer.values_a),
                "b": list(layer.values_b),
                "merged": None if layer.values_merged is None else list(layer.values_merged),
                "r_before": [overlap.before for overlap in layer.overlaps],
                "r_after": [overlap.after for overlap in layer.overlaps],
                "alignment": list(layer.directions),
                "rank_correlation": layer.rank_correlation,
                "input_share": share,
                "input_chance": chance,
                "distance_before": layer.distance_before,
                "distance_after": layer.distance_after,
                "unchanged": layer.unchanged,
            }
        )
    return {
        "thresholds": [overlap.threshold for overlap in spectra.overlaps],
        "distance_before": spectra.distance_before,
        "distance_after": spectra.distance_after,
        "overlaps": [
            {"threshold": each.threshold, "before": each.before, "after": each.after} for each in spectra.overlaps
        ],
        "layers": layers,
        "skipped": dict(spectra.skipped),
    }


def describe_space(own: SpaceUnits, ratios: Mapping[str, float | None], gallery: Gallery | None) -> dict[str, Any]:
    """One space's scores as plain JSON values."""
    shown = gallery.chosen.get(own.space, ()) if gallery is not None else ()
    order = [*[f"{name}'s" for name in own.names]]
    kinds = ["shared", *order, *sorted({*own.labels, *own.naive_labels} - {"shared", "lost", *order}), "lost"]

    def middle(values: torch.Tensor) -> float:
        return float(values.median())

    crossed = None
    if shown and shown[0].cross_activation:
        crossed = {
            key: [float(torch.tensor(each).nanmedian()) for each in zip(*rows, strict=True)]
            for key, rows in (
                ("merged", [each.cross_activation for each in shown]),
                ("naive", [each.naive_cross_activation for each in shown]),
            )
        }
    overlaps = None
    if own.overlap is not None and own.shuffled_overlap is not None:
        overlaps = {
            "merged": own.overlap.mean(dim=1).tolist(),
            "naive": None if own.naive_overlap is None else own.naive_overlap.mean(dim=1).tolist(),
            "shuffled": fmean(own.shuffled_overlap.flatten().tolist()),
        }
    return {
        "name": own.space,
        "units": own.merged.shape[1],
        "correlation": {
            "before": middle(own.before),
            "matched": middle(own.matched),
            "merged": [middle(each) for each in own.merged],
            "naive": None if own.naive is None else [middle(each) for each in own.naive],
            "shuffled": middle(own.shuffled.flatten()),
        },
        "labels": {kind: own.labels.count(kind) for kind in kinds},
        "naive_labels": {kind: own.naive_labels.count(kind) for kind in kinds} if own.naive_labels else None,
        "top_overlap": overlaps,
        "variance_ratio": dict(ratios),
        "cross_activation": crossed,
        "per_unit": {
            "sources": [[unit if unit >= 0 else None for unit in row] for row in own.sources.tolist()],
            "label": list(own.labels),
            "r_matched": own.matched.tolist(),
            "r_models": own.merged.tolist(),
            "r_naive": None if own.naive is None else own.naive.tolist(),
            "r_shuffled": own.shuffled.tolist(),
            "norm_ratio": own.norm_ratio.tolist(),
            "top_overlap": None if own.overlap is None else own.overlap.tolist(),
        },
        "gallery": [
            {"unit": each.unit, "group": each.group, "cross_activation": list(each.cross_activation) or None}
            for each in shown
        ],
    }
