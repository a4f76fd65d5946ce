"""Explaining a finished run: what became of every unit and singular direction, into its report and onto its page."""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from isthmus.checkpoint.writing import write_text
from isthmus.data.batches import is_labelled
from isthmus.data.sets import Batches
from isthmus.errors import InputError
from isthmus.explain.claims import judge_claims
from isthmus.explain.gallery import Gallery, draw_gallery, draw_matches, spaced, takes_images
from isthmus.explain.layer_similarity import cka_matrix
from isthmus.explain.parametrisations import PARAMETRISATIONS
from isthmus.explain.questions import answer_questions
from isthmus.explain.spectrum import Spectra, measure_spectra
from isthmus.explain.taylor import taylor_barrier
from isthmus.explain.units import MERGED, NAIVE, UnitFates, measure_units
from isthmus.match import align
from isthmus.match.ste import STE
from isthmus.measure.connect import connect
from isthmus.merging.merge import merge
from isthmus.merging.repair import repair_as_asked
from isthmus.observe.collect import collect
from isthmus.progress import progress
from isthmus.registry import did_you_mean
from isthmus.report.page import write_report
from isthmus.report.schema import RunReport
from isthmus.runs.explained_facts import describe_space, describe_spectra
from isthmus.runs.facts import plain_json
from isthmus.runs.load_run import FinishedRun, load_run
from isthmus.symmetry.alignment import apply

# Inputs of the estimates by derivatives, which cost some ten times a pass over the data, or as many as hold so many
# targets: a window of text has one at every position. Twice differentiated, a batch takes several times its memory.
TAYLOR_INPUTS, TAYLOR_TARGETS, TAYLOR_BATCH = 1000, 10_000, 50


@dataclass(frozen=True)
class ExplainOptions:
    """What to explain, and how thoroughly.

    Attributes:
        images: Inputs of the test split on which units are scored and loss barriers measured.
        units: How many best, middle and worst units of a space are drawn; 0 draws none.
        spaces: How many spaces get pictures, evenly spaced from the first to the last.
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


def explain_run(folder: Path, wishes: ExplainOptions | None = None) -> RunReport:
    """Adds to a run folder's report what became of units and singular directions; returns the report.

    `report.json` gains the key `explain`, `features.json` holds the pictures, and the page is written anew. Units are
    scored on the test split, which chose nothing; statistics and derivatives are taken on the run's training data.

    Raises:
        CheckpointError: The folder holds no finished run, or cannot be written.
        DataError: The run had no data, or it cannot be read.
        InputError: A file has changed since the run, or a wish cannot be met.
    """
    wishes = wishes or ExplainOptions()
    wishes.check()
    start = time.perf_counter()
    run = load_run(Path(folder))
    assert run.inputs.data is not None
    assert run.inputs.calibration is not None
    scored = run.inputs.data.test(run.inputs.calibration.batch_size, seed=run.recipe.seed).take(wishes.images)
    units = measure_units(run.parents, run.alignment, run.merged, scored, naive=run.naive)
    ratios = _variance_ratios(run, units, scored)
    gallery = _draw(run, units, scored, wishes)
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
        "not_drawn": _not_drawn(run, units, wishes),
        "spectra": None if spectra is None else describe_spectra(spectra),
        **(
            _judge(run, spectra, scored)
            if pair and wishes.claims and spectra is not None
            else {"taylor": None, "claims": []}
        ),
        "questions": [
            claim.to_dict() for claim in answer_questions(units.spaces, ratios, repaired=bool(run.report.repair))
        ],
        "cka": _compare_layers(run, scored),
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
    report = replace(run.report, explain=told)
    write_text(run.folder / "features.json", json.dumps(features))
    write_text(run.folder / "report.json", json.dumps(plain_json(report), indent=1, ensure_ascii=False))
    write_report(run.folder)
    return report


def _variance_ratios(run: FinishedRun, units: UnitFates, scored: Batches) -> dict[str, dict[str, float | None]]:
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


def _draw(run: FinishedRun, units: UnitFates, scored: Batches, wishes: ExplainOptions) -> Gallery | None:
    """The gallery; None where the networks take no images, or none is wished for.

    Spaces whose units a linear map mixes are left out, unless there are no others.
    """
    unmixed = [name for name, own in units.spaces.items() if not own.mixes]
    if not wishes.units or not units.spaces or not takes_images(run.symmetry.traced.program):
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


def _not_drawn(run: FinishedRun, units: UnitFates, wishes: ExplainOptions) -> str | None:
    """Why units are not drawn that the wishes ask for, in a sentence; None if all can be."""
    if not wishes.units or not units.spaces:
        return None
    if not takes_images(run.symmetry.traced.program):
        return "No unit is drawn: the networks take no images."
    mixed = [name for name, own in units.spaces.items() if own.mixes]
    if len(mixed) in (0, len(units.spaces)):
        return None
    return (
        f"Of {len(units.spaces)} spaces {len(mixed)} are not drawn: a linear map mixes their units, so that none of a "
        "model's stands in a slot."
    )


def _compare_layers(run: FinishedRun, scored: Batches) -> list[dict[str, Any]]:
    """CKA between the layers of the first two models, and of each with the merged network."""
    names = ("A", "B")
    networks = {"A": run.inputs.models[0], "B": run.inputs.models[1], MERGED: run.merged}
    found = []
    for first, second in progress([names, ("A", MERGED), ("B", MERGED)], "comparing layers"):
        matrix = cka_matrix([networks[first], networks[second]], run.symmetry, scored)
        layers = list(matrix.layers)
        found.append({"models": [first, second], "rows": layers, "columns": layers, "values": matrix.values.tolist()})
    return found


def _judge(run: FinishedRun, spectra: Spectra, scored: Batches) -> dict[str, Any]:
    """The Taylor estimate and the verdicts on the claims, for which the models are matched in three ways."""
    calibration = run.inputs.calibration
    assert calibration is not None
    models, recipe = run.inputs.models, run.recipe
    ways: dict[str, Any] = {"weight_matching": "weight_matching", "activation_matching": "activation_matching"}
    if is_labelled(calibration):
        ways["ste"] = STE(start="identity")
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
            mean = merge(models, alignment, "mean")
            mean = repair_as_asked(mean, recipe.repair, calibration, models, alignment, recipe.coefficients)
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
