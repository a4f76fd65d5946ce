"""Matching by some singular directions only: does the barrier follow the distance, or the directions?"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from isthmus.data.batches import Data, check_data
from isthmus.errors import InputError
from isthmus.explain.spectrum import measure_spectra, plain
from isthmus.explain.taylor import in_float
from isthmus.explain.weights import Factors, as_pair, factorise, weights_of, with_graph
from isthmus.match import align
from isthmus.match.weight_matching import WeightMatching
from isthmus.measure.connect import connect
from isthmus.observe.given import as_modules
from isthmus.observe.score import Loss
from isthmus.progress import progress
from isthmus.state import State, upcast
from isthmus.symmetry.alignment import Alignment, apply
from isthmus.symmetry.symmetry import Symmetry
from isthmus.wording.short import told_by_fields

PARTS = ("top", "rest")


def match_directions(
    models: Sequence[nn.Module | State],
    symmetry: Symmetry | None,
    keep: int | float,
    part: str = "top",
    *,
    others: bool = False,
    restarts: int = 3,
    seed: int = 0,
    data: Any = None,
    module: nn.Module | None = None,
) -> Alignment:
    """Weight matching that sees only some singular directions of every weight matrix.

    Every weight is replaced by the sum of its singular directions in `part`; weight matching runs on these, and the
    alignment it finds holds for the true models.

    Args:
        models: Two models or more of one architecture.
        symmetry: What `trace` returned; None finds it from `data`.
        keep: How many directions the top part has: a number (a matrix of fewer has no rest), or a share of the matrix's
            directions (rounded, at least one).
        part: `"top"`, the directions of the largest singular values, or `"rest"`, all others.
        others: Whether trained tensors that are no weight matrix (biases, norms, embeddings) are seen as they are; else
            they are not seen at all.
        restarts: Starts of weight matching.
        seed: Seeds weight matching.
        data: Re-iterable batches, to trace with where there is no symmetry.
        module: The architecture, where all models are state dicts.

    Returns:
        The alignment; its objective is the filtered weights'. `details` holds `part`, `keep`, and `energy`, the
        share of the weight matrices' squared norm in the part, one number a model.

    Raises:
        InputError: An unknown part, `keep` out of range, or a part that holds no direction.
        ModelError: The models are not of one architecture, or hold NaN or infinite weights.
        SymmetryError: The symmetry is of another architecture.

    Source: this project's own intervention, on the claim of Ito, Yamada, Kumagai, ICLR 2025, that weight matching works
        by aligning the largest singular directions.
    """
    _check_part(keep, part)
    modules = as_modules(models, module)
    symmetry = with_graph(modules[0], symmetry, data)
    weights, _ = weights_of(symmetry, modules[0])
    trained = {name for name, _ in modules[0].named_parameters(remove_duplicate=False)}
    filtered, energy = [], []
    for model in modules:
        state = upcast(model.state_dict())
        if not others:
            state = {name: torch.zeros_like(tensor) if name in trained else tensor for name, tensor in state.items()}
        part_norm = whole_norm = 0.0
        for weight in weights:
            factors = factorise(weight.blocks(model.state_dict()))
            chosen = _chosen_directions(factors, keep, part)
            blocks = (factors.left * (factors.values * chosen).unsqueeze(1)) @ factors.right
            state[weight.name] = weight.restored(blocks, upcast(model.state_dict())[weight.name])
            part_norm += float((factors.values * chosen).square().sum())
            whole_norm += float(factors.values.square().sum())
        symmetry.tie(state)
        filtered.append(state)
        energy.append(part_norm / whole_norm if whole_norm else 0.0)
    if not any(energy):
        raise InputError(f"keep={keep}, part={part!r}: no singular direction is left to match; keep fewer")
    architecture = in_float(modules[0])
    found = align(filtered, symmetry, WeightMatching(restarts=restarts), seed=seed, module=architecture)
    told = {"part": part, "keep": keep, "others": others, "energy": energy}
    return replace(found, method="match_directions", details={**found.details, **told})


def _check_part(keep: int | float, part: str) -> None:
    """Refuses an unknown part or a number of directions that no matrix has.

    Raises:
        InputError: It is one.
    """
    if part not in PARTS:
        raise InputError(f"part={part!r}: choose from {', '.join(PARTS)}")
    fits = 0 < keep <= 1 if isinstance(keep, float) else keep >= 1
    if isinstance(keep, bool) or not fits:
        raise InputError(f"keep={keep!r}: give a number of directions, 1 or more, or a share above 0 and up to 1.0")


def _chosen_directions(factors: Factors, keep: int | float, part: str) -> Float[Tensor, "blocks ranks"]:
    """1 for each direction in the part, else 0; over all blocks of a matrix together."""
    count = factors.values.numel()
    top = max(1, round(keep * count)) if isinstance(keep, float) else min(keep, count)
    order = factors.values.flatten().argsort(descending=True, stable=True)
    chosen = torch.zeros(count, dtype=torch.float64)
    chosen[order[:top] if part == "top" else order[top:]] = 1
    return chosen.view_as(factors.values)


@dataclass(frozen=True)
class MatchedPart:
    """What matching by a part of the singular directions led to.

    Attributes:
        part: `"top"`, `"rest"`, `"all"` (plain weight matching) or `"none"` (no matching).
        keep: Directions of the top part, a number or a share; None for `"all"` and `"none"`.
        energy: Share of the weight matrices' squared norm in the part, the mean of both models.
        distance: L2 distance after matching, over all trained tensors.
        distance_ratio: That over the distance before.
        barrier: Rise of the loss at λ = ½ above the mean of both ends.
        error_barrier: Rise of the error at λ = ½ above the mean of both ends; NaN where targets are no classes.
        overlaps: R of the whole network at each threshold, after matching.
    """

    part: str
    keep: int | float | None
    energy: float
    distance: float
    distance_ratio: float
    barrier: float
    error_barrier: float
    overlaps: Mapping[float, float]

    __repr__ = told_by_fields


@dataclass(frozen=True)
class EqualDistance:
    """The barriers that both parts lead to at one L2 distance, read off straight lines between measured points."""

    distance: float
    top: float
    rest: float

    __repr__ = told_by_fields


@dataclass(frozen=True)
class Intervention:
    """Matching by top or by remaining singular directions, for several sizes of the top part.

    Attributes:
        rows: No matching, plain weight matching, then every size and part.
        repair: How running statistics were repaired at the midpoint: `"reset"` or None.
    """

    rows: tuple[MatchedPart, ...]
    repair: str | None

    __repr__ = told_by_fields

    def part(self, part: str) -> tuple[MatchedPart, ...]:
        """The rows of one part, nearest first."""
        return tuple(sorted((row for row in self.rows if row.part == part), key=lambda row: row.distance))

    @property
    def at_equal_distance(self) -> tuple[EqualDistance, ...]:
        """Both parts' barriers at every measured distance that lies within what both parts reached.

        Empty where the distances that the two parts reach do not meet: then no barrier can be compared.
        """
        lines = {name: self.part(name) for name in PARTS}
        if not all(lines.values()):
            return ()
        low = max(line[0].distance for line in lines.values())
        high = min(line[-1].distance for line in lines.values())
        places = sorted({row.distance for line in lines.values() for row in line if low <= row.distance <= high})
        read = {name: ([row.distance for row in line], [row.barrier for row in line]) for name, line in lines.items()}
        return tuple(
            EqualDistance(place, float(np.interp(place, *read["top"])), float(np.interp(place, *read["rest"])))
            for place in places
        )

    @property
    def nearest(self) -> tuple[MatchedPart, MatchedPart] | None:
        """The measured top and rest whose distances are nearest to each other; None where a part was not measured."""
        pairs = [(top, rest) for top in self.part("top") for rest in self.part("rest")]
        return min(pairs, key=lambda pair: abs(pair[0].distance - pair[1].distance), default=None)

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain JSON values."""
        rows = [
            {
                **asdict(row),
                "barrier": plain(row.barrier),
                "error_barrier": plain(row.error_barrier),
                "distance_ratio": plain(row.distance_ratio),
                "overlaps": {str(key): plain(value) for key, value in row.overlaps.items()},
            }
            for row in self.rows
        ]
        equal = [asdict(each) for each in self.at_equal_distance]
        return {"repair": self.repair, "rows": rows, "at_equal_distance": equal}


@dataclass(frozen=True, eq=False)
class Bench:
    """What every row of an intervention is measured with."""

    models: Sequence[nn.Module]
    symmetry: Symmetry
    data: Data
    repair: str | None
    calibration: Data | None
    loss: Loss | None = None
    thresholds: Sequence[float] = field(default=(0.0, 0.3))

    def row(self, alignment: Alignment | None, part: str, keep: int | float | None, energy: float) -> MatchedPart:
        """Distance, barrier and R of one alignment."""
        a, b = self.models
        spectra = measure_spectra(self.models, alignment, symmetry=self.symmetry, thresholds=self.thresholds)
        if alignment is not None:
            a, b = apply(alignment, a, 0), apply(alignment, b, 1)
        curve = connect(a, b, self.data, 3, self.repair, self.calibration, loss=self.loss)
        return MatchedPart(
            part,
            keep,
            energy,
            spectra.distance_after,
            spectra.distance_ratio,
            curve.midpoint_barrier,
            curve.midpoint_error_barrier,
            {overlap.threshold: overlap.after for overlap in spectra.overlaps},
        )


def intervene(
    models: Sequence[nn.Module],
    symmetry: Symmetry | None,
    keeps: Sequence[int | float],
    data: Any,
    *,
    repair: str | None = "reset",
    calibration: Any = None,
    others: bool = False,
    restarts: int = 3,
    seed: int = 0,
    loss: Loss | None = None,
) -> Intervention:
    """Matches two models by their top singular directions, or by all others, and compares distances and barriers.

    If alignment of the large directions is what lowers the barrier, and not distance as such, then the top part has the
    lower barrier at an equal distance.

    Args:
        models: Two modules of one architecture.
        symmetry: What `trace` returned; None finds it from `data`.
        keeps: Sizes of the top part, as in `match_directions`.
        data: Re-iterable labelled batches to score on.
        repair: `"reset"` re-estimates BatchNorm statistics at the midpoint; None leaves the interpolated ones.
        calibration: Training data for `"reset"`, never the data that is scored on.
        others: As in `match_directions`.
        restarts: Starts of weight matching.
        seed: Seeds weight matching.
        loss: Mean loss from outputs and targets; cross-entropy by default.

    Raises:
        DataError: Data without targets, empty, or readable only once; or no `calibration` for a network with BatchNorm.
        InputError: Not two models, no sizes, or one that leaves a part without directions.
        ModelError: The models are not of one architecture, or hold NaN or infinite weights.

    Source: this project's own; see `match_directions`.
    """
    if not keeps:
        raise InputError("keeps is empty: give at least one size of the top part")
    for keep in keeps:
        _check_part(keep, "top")
    check_data(data)
    modules = as_pair(models)
    symmetry = with_graph(modules[0], symmetry, data)
    bench = Bench(modules, symmetry, data, repair, calibration, loss)
    whole = align(modules, symmetry, WeightMatching(restarts=restarts), seed=seed)
    rows = [bench.row(None, "none", None, 0.0), bench.row(whole, "all", None, 1.0)]
    for keep in progress(keeps, "matching parts"):
        for part in PARTS:
            found = match_directions(modules, symmetry, keep, part, others=others, restarts=restarts, seed=seed)
            energy: Any = found.details["energy"]
            rows.append(bench.row(found, part, keep, sum(energy) / len(energy)))
    return Intervention(tuple(rows), repair)
