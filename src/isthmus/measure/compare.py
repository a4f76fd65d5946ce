"""Comparing: matching methods × averages × repairs on the same models, beside their parents and the ensemble."""

import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from isthmus.average import AVERAGES
from isthmus.average.base import Average
from isthmus.data.batches import Data, check_data, is_labelled
from isthmus.errors import DataError, InputError, IsthmusError, check_seed
from isthmus.match.aligning import METHODS, configured_method
from isthmus.match.base import Match, MatchingProblem, match_folded
from isthmus.merging.merge import configured_average, merge_checked
from isthmus.merging.repair import REPAIRS, repair_as_asked
from isthmus.observe.given import ModelLike, as_modules, check_mixed, check_models, symmetry_of
from isthmus.observe.score import Ensemble, Score, evaluate_checked
from isthmus.progress import progress
from isthmus.registry import check_choice, configure_text, spell
from isthmus.symmetry.alignment import Alignment
from isthmus.symmetry.symmetry import Symmetry
from isthmus.wording.short import counted, figure, told, told_by_fields

RAW = "raw"
DEFAULT_AVERAGES = ("mean", "pleas")


@dataclass(frozen=True)
class Row:
    """One way of merging, and what came of it.

    Attributes:
        method: Matching method.
        average: How the aligned weights were averaged.
        repair: `"raw"`, `"reset"` or `"repair"`.
        loss: Mean loss of the merged model on the scored data; None if it could not be made.
        accuracy: Share of right predictions; None where targets are no classes.
        barrier: The loss above the mean loss of the parents.
        error_barrier: The error above the mean error of the parents.
        seconds: Wall time of matching, averaging and repairing.
        memory: Largest growth of the process's memory meanwhile, in bytes; None where it cannot be read.
        note: Why there are no figures, or "".
    """

    method: str
    average: str
    repair: str
    loss: float | None = None
    accuracy: float | None = None
    barrier: float | None = None
    error_barrier: float | None = None
    seconds: float | None = None
    memory: int | None = None
    note: str = ""

    __repr__ = told_by_fields


@dataclass(frozen=True)
class Comparison:
    """The rows of a comparison, and what they are measured against.

    Attributes:
        parents: The models' own scores.
        ensemble: Score of the mean of their class scores.
        rows: One row for each way of merging, in the order of the methods.
    """

    parents: tuple[Score, ...]
    ensemble: Score
    rows: tuple[Row, ...] = field(default=())

    def __repr__(self) -> str:
        best = self.best
        winner = f"best {best.method} + {best.average} + {best.repair}, loss {figure(best.loss)}" if best else None
        return told(self, counted(len(self.parents), "parent"), counted(len(self.rows), "row"), winner)

    @property
    def best(self) -> Row | None:
        """The row with the lowest loss."""
        scored = [row for row in self.rows if row.loss is not None and math.isfinite(row.loss)]
        return min(scored, key=lambda row: row.loss if row.loss is not None else math.inf, default=None)

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain JSON values."""
        return asdict(self)

    def to_markdown(self) -> str:
        """The table as Markdown."""
        lines = [
            "| method | average | repair | accuracy | loss | barrier | seconds | memory |",
            "|---|---|---|--:|--:|--:|--:|--:|",
        ]
        lines += [
            f"| parent {index} | | | {_share(score.accuracy)} | {score.loss:.4f} | | | |"
            for index, score in enumerate(self.parents)
        ]
        lines.append(f"| ensemble | | | {_share(self.ensemble.accuracy)} | {self.ensemble.loss:.4f} | | | |")
        for row in self.rows:
            start = f"| {row.method} | {row.average} | {row.repair} |"
            if row.note:
                lines.append(f"{start} {row.note} | | | | |")
                continue
            memory = "–" if row.memory is None else f"{row.memory / 2**20:.0f} MiB"
            lines.append(
                f"{start} {_share(row.accuracy)} | {row.loss:.4f} | {row.barrier:.4f} | {row.seconds:.1f} | {memory} |"
            )
        return "\n".join(lines) + "\n"


def compare(
    models: Sequence[ModelLike],
    data: Data | None,
    calibration: Data | None = None,
    symmetry: Symmetry | None = None,
    *,
    methods: Sequence[str | Match] | None = None,
    averages: Sequence[str | Average] = DEFAULT_AVERAGES,
    repairs: Sequence[str] = (RAW, *REPAIRS),
    base: ModelLike | None = None,
    seed: int = 0,
    module: nn.Module | None = None,
) -> Comparison:
    """Merges the same models in every way asked for, and scores each result on `data`.

    A way that cannot be taken, such as REPAIR after linear maps, has its reason as the row's note; nothing is left out.

    Args:
        models: Two or more modules or state dicts of one architecture.
        data: Labelled batches to score on.
        calibration: Training batches for methods, averages and repairs that need them; never the data scored on.
        symmetry: What `trace` returned; found from the calibration data if left out.
        methods: Names in `METHODS`, with options as in `orthogonal_matching?start=activations`, or configured methods;
            by default all whose needs are met.
        averages: Names in `AVERAGES`, likewise, or configured averages.
        repairs: `"raw"`, `"reset"`, `"repair"`.
        base: The common ancestor, for averages that need it.
        seed: Seeds everything random.
        module: The architecture, where all models are state dicts.

    Raises:
        DataError: Data without targets, or no calibration where a repair needs it.
        InputError: Fewer than two models, an unknown method, average or repair, or an argument of the wrong kind.
        ModelError: The models or the base are not of one architecture, or hold NaN or infinite weights.
        SymmetryError: The symmetry is of another architecture.
    """
    check_models(models)
    if len(models) < 2:
        raise InputError("one model: comparing ways to merge needs at least two")
    for each in repairs:
        check_choice("repair", each, (RAW, *REPAIRS))
    check_seed(seed)
    check_data(data)
    if calibration is not None:
        check_data(calibration)
    if calibration is None and any(each != RAW for each in repairs):
        raise DataError("repairs measure statistics: give calibration=, training batches, or repairs=['raw']")
    ways = [
        configure_text("average", each, AVERAGES) if isinstance(each, str) else configured_average(each)
        for each in averages
    ]
    chosen = choose_methods(methods, calibration)
    modules = as_modules(models, module)
    ancestor = None if base is None else as_modules([base], modules[0], names=["base"])[0]
    symmetry = symmetry_of(modules[0], symmetry, None, calibration if calibration is not None else data)
    parents = tuple(evaluate_checked(model, data) for model in modules)
    ensemble = evaluate_checked(Ensemble(modules).eval(), data)
    kinds = [each for each in repairs if each == RAW or REPAIRS[each]().changes(modules[0])]
    rows: list[Row] = []
    for method in progress(chosen, "comparing methods"):
        found, matching = _measured(partial(_match, method, MatchingProblem(modules, symmetry, calibration, seed)))
        for average in ways:
            made, averaging = found, Spent()
            if isinstance(found, Alignment):
                made, averaging = _measured(
                    partial(merge_checked, modules, found, average, data=calibration, base=ancestor, seed=seed)
                )
            for kind in kinds:
                row, repaired, repairing = Row(spell(method), spell(average), kind), made, Spent()
                if isinstance(made, nn.Module):
                    repaired, repairing = _measured(
                        partial(repair_as_asked, made, None if kind == RAW else kind, calibration, modules, found)
                    )
                if not isinstance(repaired, nn.Module):
                    rows.append(replace(row, note=str(repaired)))
                else:
                    spent = (matching, averaging, repairing)
                    check_mixed(repaired)
                    rows.append(_score_row(row, evaluate_checked(repaired, data), parents, spent))
    return Comparison(parents, ensemble, tuple(rows))


def choose_methods(methods: Sequence[str | Match] | None, data: Data | None) -> list[Match]:
    """The configured methods; by default all whose needs the data meets."""
    if methods is not None:
        return [
            configure_text("matching method", each, METHODS) if isinstance(each, str) else configured_method(each)
            for each in methods
        ]
    met = {""} if data is None else {"", "data", "labels"} if is_labelled(data) else {"", "data"}
    return [method for name, build in METHODS.items() if name != "auto" and (method := build()).needs in met]


def _match(method: Match, problem: MatchingProblem) -> Alignment:
    """The alignment by a method, if it has what it needs.

    Raises:
        IsthmusError: It has not, or what the method raises.
    """
    problem.require(method.needs, method.name)
    return match_folded(method, problem)


def _measured(step: Callable[[], Any]) -> tuple[Any, "Spent"]:
    """What a step returns, or the message of a deliberate error, which becomes the row's note; and what it took."""
    with _measuring() as spent:
        try:
            found = step()
        except IsthmusError as error:
            found = str(error)
    return found, spent


def _score_row(start: Row, score: Score, parents: Sequence[Score], spent: Sequence["Spent"]) -> Row:
    """A row with its figures."""
    mean_loss = sum(parent.loss for parent in parents) / len(parents)
    accuracies = [parent.accuracy for parent in parents if parent.accuracy is not None]
    error_barrier = None
    if score.accuracy is not None and len(accuracies) == len(parents):
        error_barrier = sum(accuracies) / len(accuracies) - score.accuracy
    grown = [each.memory for each in spent if each.memory is not None]
    return replace(
        start,
        loss=score.loss,
        accuracy=score.accuracy,
        barrier=score.loss - mean_loss,
        error_barrier=error_barrier,
        seconds=sum(each.seconds for each in spent),
        memory=max(grown) if grown else None,
    )


@dataclass(eq=False)
class Spent:
    """What a step took: seconds, and the largest growth of the process's memory in bytes, where it can be read."""

    seconds: float = 0.0
    memory: int | None = None


@contextmanager
def _measuring() -> Iterator[Spent]:
    """Measures the time and, on Linux, the memory that its body takes."""
    spent, start, before = Spent(), time.perf_counter(), _resident_bytes()
    peak, done = [before or 0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], _resident_bytes() or 0)

    watcher = threading.Thread(target=watch, daemon=True) if before is not None else None
    if watcher:
        watcher.start()
    try:
        yield spent
    finally:
        done.set()
        if watcher:
            watcher.join()
        spent.seconds = time.perf_counter() - start
        after = _resident_bytes()
        if before is not None and after is not None:
            spent.memory = max(0, max(peak[0], after) - before)


def _resident_bytes() -> int | None:
    """The process's resident memory, or None where the system does not tell."""
    status = Path("/proc/self/statm")
    if not status.exists():
        return None

    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _share(value: float | None) -> str:
    """A share as text."""
    return "–" if value is None else f"{100 * value:.2f} %"
