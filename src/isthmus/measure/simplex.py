"""Walking between three models and more: loss and accuracy over their simplex, and over the plane through three."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from isthmus.average.mean import Mean
from isthmus.data.batches import Data, check_data
from isthmus.errors import InputError, ModelError, check_kind
from isthmus.measure.connect import Curve, check_loss, check_points, check_reset, score_mixed
from isthmus.merging.merge import merge_checked
from isthmus.observe.given import ModelLike, as_modules, check_mixed, check_models
from isthmus.observe.running_statistics import reset_statistics
from isthmus.observe.score import Loss, evaluate_checked
from isthmus.progress import progress
from isthmus.wording.short import counted, figure, told

EDGE_POINTS = 5  # places on an edge of a triangle: 15 in all, and its centre


@dataclass(frozen=True)
class Simplex:
    """Loss and accuracy where the weights of all models are mixed, Σ c_m W_m with c_m ≥ 0 and Σ c_m = 1.

    Attributes:
        coefficients: The c_m of every place, shape [places, models]: vertices, edges and centre are among them.
        losses: Mean loss of every place, statistics re-estimated there if `repair` is "reset".
        accuracies: Share of right predictions; empty where targets are no classes.
        raw_losses: Mean loss with running statistics mixed as the weights are.
        raw_accuracies: The accuracies beside the raw losses.
        repair: How statistics were repaired at every place: "reset" or None.
    """

    coefficients: tuple[tuple[float, ...], ...]
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    raw_losses: tuple[float, ...]
    raw_accuracies: tuple[float, ...]
    repair: str | None

    def __repr__(self) -> str:
        return told(self, counted(self.models, "model"), counted(len(self.losses), "place"), _range_of(self.losses))

    @property
    def models(self) -> int:
        """How many models there are."""
        return len(self.coefficients[0])

    @property
    def centre(self) -> int:
        """The number of the place where all models count alike."""
        return max(range(len(self.coefficients)), key=lambda place: min(self.coefficients[place]))

    @property
    def barrier(self) -> float:
        """Largest rise of the loss above the vertices' own losses, mixed as the weights are, over all places."""
        return _largest(_rises_of(self.coefficients, self.losses))

    @property
    def error_barrier(self) -> float:
        """Largest rise of the error (1 − accuracy) above the vertices' own errors, mixed as the weights are."""
        return _largest(_rises_of(self.coefficients, [1 - a for a in self.accuracies]))

    @property
    def centre_barrier(self) -> float:
        """The rise of the loss at the centre above the vertices' mean."""
        rises = _rises_of(self.coefficients, self.losses)
        return rises[self.centre] if rises else float("nan")

    @property
    def centre_error_barrier(self) -> float:
        """The rise of the error at the centre above the vertices' mean; NaN where targets are no classes."""
        rises = _rises_of(self.coefficients, [1 - a for a in self.accuracies])
        return rises[self.centre] if rises else float("nan")

    def edge(self, a: int, b: int) -> Curve:
        """The line from model `a` (λ = 0) to model `b` (λ = 1), of the places on it: what `connect` measures there.

        Raises:
            InputError: Not two different models of the simplex.
        """
        if a == b or not (0 <= a < self.models and 0 <= b < self.models):
            raise InputError(f"edge({a}, {b}): name two different models, numbered 0 to {self.models - 1}")
        others = [m for m in range(self.models) if m not in (a, b)]
        on_edge = [i for i, c in enumerate(self.coefficients) if not any(c[m] for m in others)]
        order = sorted(on_edge, key=lambda i: self.coefficients[i][b])

        def along(values: tuple[float, ...]) -> tuple[float, ...]:
            return tuple(values[i] for i in order) if values else ()

        return Curve(
            lambdas=tuple(self.coefficients[i][b] for i in order),
            losses=along(self.losses),
            accuracies=along(self.accuracies),
            raw_losses=along(self.raw_losses),
            raw_accuracies=along(self.raw_accuracies),
            repair=self.repair,
        )

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain JSON values."""
        barriers = ("barrier", "centre_barrier", "error_barrier", "centre_error_barrier")
        lists = {name: list(getattr(self, name)) for name in ("losses", "accuracies", "raw_losses", "raw_accuracies")}
        return {
            "coefficients": [list(place) for place in self.coefficients],
            **lists,
            "repair": self.repair,
            **{name: getattr(self, name) for name in barriers},
        }


@dataclass(frozen=True)
class Plane:
    """Loss and accuracy on a grid in the plane through three models, in coordinates of equal scale.

    Attributes:
        x: Where the grid's columns stand, in the direction of B − A; the unit is the Euclidean distance of parameters.
        y: Where its rows stand, in the direction of the part of C − A that is orthogonal to B − A.
        models: The coordinates (x, y) of A, B and C; A is the origin. A column and a row run through each.
        losses: Mean loss, shape [rows, columns].
        accuracies: Share of right predictions, of the same shape; empty where targets are no classes.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    models: tuple[tuple[float, float], ...]
    losses: tuple[tuple[float, ...], ...]
    accuracies: tuple[tuple[float, ...], ...]

    def __repr__(self) -> str:
        losses = _range_of([loss for row in self.losses for loss in row])
        return told(self, f"{len(self.y)} × {len(self.x)} points", losses)

    def coefficients(self, x: float, y: float) -> tuple[float, ...]:
        """The c_m of the weights Σ c_m W_m at a point; they sum to one, and some are below 0 outside the triangle."""
        return _barycentric(self.models, x, y)

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain JSON values."""
        return {
            "x": list(self.x),
            "y": list(self.y),
            "models": [list(place) for place in self.models],
            "losses": [list(row) for row in self.losses],
            "accuracies": [list(row) for row in self.accuracies],
        }


def _range_of(losses: Sequence[float]) -> str | None:
    """The least and the largest loss, in words; None where there is none."""
    return f"losses {figure(min(losses))} … {figure(max(losses))}" if losses else None


def walk_simplex(
    models: Sequence[ModelLike],
    data: Data | None,
    points: int | None = None,
    repair: str | None = "reset",
    calibration: Data | None = None,
    *,
    loss: Loss | None = None,
    module: nn.Module | None = None,
) -> Simplex:
    """Loss and accuracy on `data` where the weights of three models or more, all in one frame, are mixed.

    Three models span a triangle, which is walked on a grid of `points` places an edge, and at its centre. For
    more models such a grid would grow too large: there the places are the vertices, the middle of every edge, the
    centre of every triangle, and the centre of all.

    Args:
        models: Modules or state dicts, each as `apply` returned it.
        data: Re-iterable labelled batches to score on.
        points: For three models, how many places on an edge, both ends among them: 5 by default, which makes 15 and
            the centre. None for more.
        repair: `"reset"` re-estimates BatchNorm statistics at every place, as `connect` does; None leaves the mixed
            ones.
        calibration: Training data for `"reset"`, never the data that is scored on.
        loss: Mean loss from outputs and targets; cross-entropy by default.
        module: The architecture, where all models are state dicts.

    Raises:
        DataError: Data without targets, empty, or readable only once; or no `calibration` for a network with BatchNorm.
        InputError: Fewer than three models, fewer than two points, points for more than three models, an unknown
            repair, or an argument of the wrong kind.
        ModelError: The models are of different architecture, or hold NaN or infinite weights; or a mix of them does.

    Source: Ainsworth, Hayase, Srinivasa, Git Re-Basin, ICLR 2023, section 5, which merges more than two models, and
        Ito, Yamada, Kumagai, Analysis of Linear Mode Connectivity via Permutation-Based Weight Matching, ICLR 2025, on
        three; the barrier over a simplex is the pairwise one's extension, ours.
    """
    check_models(models)
    if len(models) < 3:
        raise InputError(f"{len(models)} models: a simplex needs three at least; connect() walks the line between two")
    if points is not None and len(models) > 3:
        raise InputError(f"points={points} with {len(models)} models: only a triangle has a grid; leave it out")
    if points is not None:
        check_points(points, "an edge needs its two ends at least")
    check_data(data)
    check_loss(loss)
    modules = as_modules(models, module)
    resets = check_reset(modules[0], repair, calibration)
    places = _triangle_grid(points or EDGE_POINTS) if len(models) == 3 else _face_centres(len(models))
    scores = [
        score_mixed(modules, place, data, calibration if resets else None, loss=loss)
        for place in progress(places, "walking the simplex")
    ]
    return Simplex(
        coefficients=tuple(places),
        losses=tuple(repaired.loss for _, repaired in scores),
        accuracies=tuple(repaired.accuracy for _, repaired in scores if repaired.accuracy is not None),
        raw_losses=tuple(raw.loss for raw, _ in scores),
        raw_accuracies=tuple(raw.accuracy for raw, _ in scores if raw.accuracy is not None),
        repair="reset" if resets else None,
    )


def _triangle_grid(points: int) -> list[tuple[float, ...]]:
    """The barycentric grid of a triangle with so many places an edge, row by row from model 0, then its centre.

    The centre is a place of the grid itself if `points` − 1 is a multiple of three, and is not repeated then.
    """
    steps = points - 1
    rows = [(steps - i, i - j, j) for i in range(points) for j in range(i + 1)]
    places: list[tuple[float, ...]] = [tuple(count / steps for count in row) for row in rows]
    return places if steps % 3 == 0 else [*places, (1 / 3, 1 / 3, 1 / 3)]


def _face_centres(models: int) -> list[tuple[float, ...]]:
    """The vertices, the middles of all edges, the centres of all triangles, and the centre of all models."""
    faces = [face for size in (1, 2, 3) for face in itertools.combinations(range(models), size)]
    faces += [tuple(range(models))] if models > 3 else []
    return [tuple(1 / len(face) if m in face else 0.0 for m in range(models)) for face in faces]


def _rises_of(coefficients: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """How far the value of every place lies above the vertices' own, mixed with its coefficients; [] without values."""
    if not values:
        return []
    vertices = {place.index(1.0): value for place, value in zip(coefficients, values, strict=True) if 1.0 in place}
    return [
        value - math.fsum(c * vertices[m] for m, c in enumerate(place) if c)
        for place, value in zip(coefficients, values, strict=True)
    ]


def _largest(rises: Sequence[float]) -> float:
    """The largest rise; NaN if there are none or one is NaN."""
    return float("nan") if not rises or any(map(math.isnan, rises)) else max(rises)


def walk_plane(
    models: Sequence[ModelLike],
    data: Data | None,
    points: int = 9,
    margin: float = 0.25,
    calibration: Data | None = None,
    *,
    loss: Loss | None = None,
    module: nn.Module | None = None,
) -> Plane:
    """Loss and accuracy on `data` in the plane through three models, inside their triangle and around it.

    The plane's points are A + x·u + y·v, with u = (B − A) / ‖B − A‖ and v the direction of what is left of C − A
    without its part along u; lengths count trained parameters only, not running statistics. BatchNorm statistics are
    re-estimated at every point: mixed ones mean nothing outside the triangle, where a variance may turn negative.

    Args:
        models: Three modules or state dicts, A, B and C, as `apply` returned them.
        data: Re-iterable labelled batches to score on.
        points: About how many columns and rows. They are evenly spaced, but those nearest to a model are moved so that
            a column and a row run through each.
        margin: How far the grid goes beyond the triangle, as a share of the triangle's width and height.
        calibration: Training data for BatchNorm statistics, never the data that is scored on.
        loss: Mean loss from outputs and targets; cross-entropy by default.
        module: The architecture, where all models are state dicts.

    Raises:
        DataError: Data without targets, empty, or readable only once; or no `calibration` for a network with BatchNorm.
        InputError: Not three models, three that lie on one line, fewer than two points, a negative margin, or an
            argument of the wrong kind.
        ModelError: The models are of different architecture, or hold NaN or infinite weights; or a mix of them does.

    Source: Garipov, Izmailov, Podoprikhin, Vetrov, Wilson, Loss Surfaces, Mode Connectivity, and Fast Ensembling of
        DNNs, NeurIPS 2018, figure 1 and appendix. That the columns and rows are moved to the models is ours.
    """
    check_models(models)
    if len(models) != 3:
        raise InputError(f"{len(models)} models: a plane runs through three")
    check_points(points, "a grid needs two columns and two rows at least")
    check_kind(margin, (int, float), "margin", "give a share of the triangle's width, zero or more")
    if not (math.isfinite(margin) and margin >= 0):
        raise InputError(f"margin={margin}: give a share of the triangle's width, zero or more")
    check_data(data)
    check_loss(loss)
    modules = as_modules(models, module)
    resets = check_reset(modules[0], "reset", calibration)
    corners = _plane_coordinates(modules)
    x, y = (_grid_lines([corner[axis] for corner in corners], points, margin) for axis in (0, 1))
    scores = []
    for row, column in progress(list(itertools.product(y, x)), "walking the plane"):
        merged = merge_checked(modules, None, Mean(), _barycentric(corners, column, row))
        if resets:
            reset_statistics(merged, calibration)
        check_mixed(merged)
        scores.append(evaluate_checked(merged, data, loss=loss))
    rows = [scores[start : start + len(x)] for start in range(0, len(scores), len(x))]
    classes = all(score.accuracy is not None for score in scores)
    return Plane(
        x=x,
        y=y,
        models=corners,
        losses=tuple(tuple(score.loss for score in row) for row in rows),
        accuracies=tuple(tuple(s.accuracy for s in row if s.accuracy is not None) for row in rows) if classes else (),
    )


def _plane_coordinates(modules: Sequence[nn.Module]) -> tuple[tuple[float, float], ...]:
    """The coordinates of A, B and C in their plane: (0, 0), (‖B − A‖, 0), and C's part along B − A and across it.

    Raises:
        InputError: The models lie on one line, as far as their precision can tell.
        ModelError: They have no parameters.
    """
    a, b, c = (_parameter_vector(module) for module in modules)
    u, w = b - a, c - a
    width = float(u.norm())
    along = float(w @ u) / width if width else 0.0
    height = float((w - (along / width) * u).norm()) if width else 0.0
    # A weight is known to half an eps of itself, so a model to half an eps of its length at worst.
    precision = max(torch.finfo(p.dtype).eps for p in modules[0].parameters() if p.is_floating_point())
    blur = precision * max(float(vector.norm()) for vector in (a, b, c))
    if width <= blur or height <= blur:
        raise InputError("the three models lie on one line or on one point: a plane needs three that do not")
    return (0.0, 0.0), (width, 0.0), (along, height)


def _parameter_vector(module: nn.Module) -> Float[Tensor, " parameters"]:
    """All trained parameters in one float64 vector, tied ones once.

    Raises:
        ModelError: There are none.
    """
    parts = [p.detach().double().flatten().cpu() for p in module.parameters() if p.is_floating_point()]
    if not parts:
        raise ModelError("the models have no parameters: there is no distance between them")
    return torch.cat(parts)


def _grid_lines(through: Sequence[float], points: int, margin: float) -> tuple[float, ...]:
    """About `points` evenly spaced places from end to end, margins included, with the places in `through` among them.

    An even place that lies within half a step of one in `through` gives way to it, unless it is an end.
    """
    low, high = min(through), max(through)
    even = np.linspace(low - margin * (high - low), high + margin * (high - low), points).tolist()
    half = (even[1] - even[0]) / 2
    inner = [place for place in even[1:-1] if all(abs(place - fixed) >= half for fixed in through)]
    return tuple(sorted({even[0], *inner, even[-1], *through}))


def _barycentric(corners: Sequence[tuple[float, float]], x: float, y: float) -> tuple[float, ...]:
    """The c_m with Σ c_m = 1 for which (x, y) = Σ c_m · corner m, for corners (0, 0), (width, 0), (along, height)."""
    _, (width, _), (along, height) = corners
    third = y / height
    second = (x - third * along) / width
    return 1 - second - third, second, third
