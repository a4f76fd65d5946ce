"""Connecting: loss and accuracy along the straight line between two models, and the barrier on it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from isthmus.average.mean import Mean
from isthmus.data.batches import Data, check_data
from isthmus.errors import DataError, InputError, check_kind, check_whole, kind_of
from isthmus.merging.merge import merge_checked
from isthmus.observe.given import as_modules, check_mixed
from isthmus.observe.running_statistics import normalisation_layers, reset_statistics, running_statistics
from isthmus.observe.score import Loss, Score, evaluate_checked
from isthmus.progress import progress
from isthmus.registry import did_you_mean
from isthmus.wording.short import counted, figure, told


@dataclass(frozen=True)
class Curve:
    """Loss and accuracy along the line from the first model (λ = 0) to the second (λ = 1).

    Attributes:
        lambdas: Where it was measured.
        losses: Mean loss, statistics re-estimated at every λ if `repair` was "reset".
        accuracies: Share of right predictions; empty where targets are no classes.
        raw_losses: Mean loss with interpolated running statistics, as they are.
        raw_accuracies: The accuracies of the raw curve.
        repair: How statistics were repaired along the line: "reset" or None.
    """

    lambdas: tuple[float, ...]
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    raw_losses: tuple[float, ...]
    raw_accuracies: tuple[float, ...]
    repair: str | None

    def __repr__(self) -> str:
        points = counted(len(self.lambdas), "point")
        return told(self, points, f"barrier {figure(self.barrier)}", f"error barrier {figure(self.error_barrier)}")

    @property
    def barrier(self) -> float:
        """Largest rise of the loss above the straight line between its ends, over all λ."""
        return _barrier_of(self.lambdas, self.losses)

    @property
    def error_barrier(self) -> float:
        """Largest rise of the error (1 − accuracy) above the straight line between its ends, over all λ."""
        return _barrier_of(self.lambdas, [1 - a for a in self.accuracies])

    @property
    def midpoint_barrier(self) -> float:
        """The rise of the loss above its ends' mean at λ = ½, which some papers tabulate; NaN if ½ was not measured."""
        return _rise_at_half(self.lambdas, self.losses)

    @property
    def midpoint_error_barrier(self) -> float:
        """The rise of the error above its ends' mean at λ = ½; NaN if ½ was not measured."""
        return _rise_at_half(self.lambdas, [1 - a for a in self.accuracies])

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain JSON values."""
        barriers = ("barrier", "midpoint_barrier", "error_barrier", "midpoint_error_barrier")
        return {**vars(self), **{name: getattr(self, name) for name in barriers}}


def _barrier_of(lambdas: Any, values: Any) -> float:
    """Largest rise of `values` above the straight line between first and last; NaN if there are none or one is NaN."""
    if not len(values) or any(map(math.isnan, values)):
        return float("nan")
    return max(v - ((1 - x) * values[0] + x * values[-1]) for x, v in zip(lambdas, values, strict=True))


def _rise_at_half(lambdas: Any, values: Any) -> float:
    """The rise of `values` at ½ above the mean of the first and the last; NaN where there is none."""
    if not len(values) or 0.5 not in lambdas:
        return float("nan")
    return values[list(lambdas).index(0.5)] - (values[0] + values[-1]) / 2


def connect(
    model_a: nn.Module,
    model_b: nn.Module,
    data: Data | None = None,
    points: int = 11,
    repair: str | None = "reset",
    calibration: Data | None = None,
    *,
    loss: Loss | None = None,
) -> Curve:
    """Loss and accuracy on `data` along the line (1 − λ)·A + λ·B, both models in one frame.

    Args:
        model_a: The model at λ = 0.
        model_b: The model at λ = 1, as `apply` returned it.
        data: Re-iterable labelled batches to score on.
        points: How many λ, evenly spaced, both ends among them; an odd number includes λ = ½.
        repair: `"reset"` re-estimates BatchNorm statistics at every λ; None leaves the interpolated ones.
        calibration: Training data for `"reset"`, never the data that is scored on.
        loss: Mean loss from outputs and targets; cross-entropy by default.

    Raises:
        DataError: Data without targets, empty, or readable only once; or no `calibration` for a network with BatchNorm.
        InputError: Fewer than two points, an unknown repair, or an argument of the wrong kind.
        ModelError: The models are of different architecture, or hold NaN or infinite weights; or a mix of them does.
    """
    for name, model in (("model_a", model_a), ("model_b", model_b)):
        check_kind(model, nn.Module, name, "give two modules, connect(a, b, data)")
    check_points(points, "a line needs its two ends at least")
    check_data(data)
    check_loss(loss)
    a, b = as_modules([model_a, model_b])
    resets = check_reset(a, repair, calibration)
    return connect_checked(a, b, data, points, calibration if resets else None, loss=loss)


def connect_checked(
    a: nn.Module, b: nn.Module, data: Data | None, points: int, calibration: Data | None, *, loss: Loss | None = None
) -> Curve:
    """As `connect`, of checked modules in `eval()`.

    Args:
        a: The model at λ = 0.
        b: The model at λ = 1.
        data: Labelled batches to score on.
        points: How many λ.
        calibration: Training data to re-estimate statistics on; None leaves the interpolated ones.
        loss: Mean loss from outputs and targets; cross-entropy by default.

    Raises:
        DataError: Data without targets, or empty.
        ModelError: A mix of the models holds NaN or infinite numbers.
    """
    lambdas = tuple(index / (points - 1) for index in range(points))
    places = progress([(1 - x, x) for x in lambdas], "walking the line")
    scores = [score_mixed([a, b], place, data, calibration, loss=loss) for place in places]
    return Curve(
        lambdas=lambdas,
        losses=tuple(repaired.loss for _, repaired in scores),
        accuracies=tuple(repaired.accuracy for _, repaired in scores if repaired.accuracy is not None),
        raw_losses=tuple(raw.loss for raw, _ in scores),
        raw_accuracies=tuple(raw.accuracy for raw, _ in scores if raw.accuracy is not None),
        repair=None if calibration is None else "reset",
    )


def check_reset(model: nn.Module, repair: str | None, calibration: Data | None) -> bool:
    """Whether statistics are to be re-estimated where weights are mixed: `repair` says so, and there are some.

    Raises:
        DataError: They are, and `calibration` is missing or readable only once.
        InputError: An unknown repair.
    """
    if repair is not None and not (isinstance(repair, str) and repair == "reset"):
        hint = did_you_mean(repair, ["reset"]) if isinstance(repair, str) else ""
        raise InputError(f"repair={repair!r}{hint}: between models, statistics are 'reset' or left as they are (None)")
    if repair is None or not normalisation_layers(model):
        return False
    if calibration is None:
        raise DataError("repair='reset' re-estimates BatchNorm statistics: give calibration=, or repair=None")
    check_data(calibration)
    return True


def check_points(points: int, why: str) -> None:
    """Refuses fewer points than two.

    Raises:
        InputError: There are fewer, or it is no whole number.
    """
    check_whole(points, "points")
    if points < 2:
        raise InputError(f"points={points}: {why}")


def check_loss(loss: Loss | None) -> None:
    """Refuses a loss that is no function.

    Raises:
        InputError: It cannot be called.
    """
    if loss is not None and not callable(loss):
        raise InputError(f"loss is {kind_of(loss)}: give a function of outputs and targets, or leave it out")


def score_mixed(
    models: Sequence[nn.Module],
    coefficients: Sequence[float],
    data: Data | None,
    calibration: Data | None,
    *,
    loss: Loss | None = None,
) -> tuple[Score, Score]:
    """The score of the weights Σ c_m W_m, raw and repaired.

    Args:
        models: Checked modules of one architecture, in `eval()` and in one frame.
        coefficients: One c_m a model, summing to one.
        data: Labelled batches to score on.
        calibration: Training data to re-estimate BatchNorm statistics on; None leaves the mixed ones, and both scores
            are the same.
        loss: Mean loss from outputs and targets; cross-entropy by default.

    Returns:
        The score with statistics mixed as the weights are, and the score with re-estimated ones.

    Raises:
        DataError: Data without targets, or empty.
        ModelError: The mix holds NaN or infinite numbers.
    """
    model = merge_checked(models, None, Mean(), coefficients)
    check_mixed(model)
    raw = evaluate_checked(model, data, loss=loss)
    if calibration is None:
        return raw, raw
    reset_statistics(model, calibration)
    check_mixed(model, running_statistics(model))
    return raw, evaluate_checked(model, data, loss=loss)


def interpolate(a: nn.Module, b: nn.Module, x: float) -> nn.Module:
    """A new module with the weights (1 − x)·A + x·B of checked modules, integer buffers from A."""
    return merge_checked([a, b], None, Mean(), [1 - x, x])
