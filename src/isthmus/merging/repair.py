"""Repair: what averaging did to the statistics of activations, put right from data. No gradient is used.

Averaging pulls the pre-activations of merged units together: their variance collapses with depth. `reset` measures the
running statistics of normalisation layers again; `repair` gives every unit the statistics of its parents. A repair is a
frozen dataclass, and one line in `REPAIRS`.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from isthmus.average.coefficients import CoefficientsLike, check_coefficients
from isthmus.data.batches import Data, check_data
from isthmus.errors import DataError, InputError, ModelError, TransformError, check_kind, kind_of
from isthmus.graph.reader import Observer, observe
from isthmus.merging.outcome import note_outcome, outcome_of
from isthmus.observe.given import ModelLike, as_modules, check_alignment, check_models, check_symmetry, find_symmetry
from isthmus.observe.layers import shared_weights
from isthmus.observe.running_statistics import normalisation_layers, reset_statistics
from isthmus.registry import configure
from isthmus.symmetry.alignment import Alignment
from isthmus.symmetry.groups import keeps_function
from isthmus.symmetry.symmetry import Symmetry
from isthmus.symmetry.transform import move_state

# Standard deviations below this share of the largest are taken for units that never vary; they are only shifted.
DEAD_DEVIATION_SHARE = 1e-6


@runtime_checkable
class Repair(Protocol):
    """A way of putting statistics right: a frozen dataclass whose fields are its options.

    Attributes:
        name: Its name in `REPAIRS`.
        text: What was done, in the words of a report.
        needs: What it needs beside the merged model and data: `""` or `"parents"`.
    """

    name: ClassVar[str]
    text: ClassVar[str]
    needs: ClassVar[str]

    def __call__(
        self,
        merged: nn.Module,
        data: Data,
        parents: Sequence[nn.Module],
        alignment: Alignment | None,
        coefficients: CoefficientsLike,
    ) -> nn.Module:
        """A new module with repaired statistics."""
        ...

    def changes(self, model: nn.Module) -> bool:
        """Whether there is anything in the model that it could repair."""
        ...


@dataclass(frozen=True)
class Reset:
    """Estimates the running mean and variance of every BatchNorm anew; a network without one comes back as it is."""

    name: ClassVar[str] = "reset"
    text: ClassVar[str] = "BatchNorm statistics measured again"
    needs: ClassVar[str] = ""

    def __call__(
        self,
        merged: nn.Module,
        data: Data,
        parents: Sequence[nn.Module],
        alignment: Alignment | None,
        coefficients: CoefficientsLike,
    ) -> nn.Module:
        """A new module with statistics measured on the data.

        Raises:
            ModelError: Statistics are undefined outside of BatchNorm modules.
        """
        repaired = copy.deepcopy(merged).eval()
        if outcome_of(merged).needs_repair and not normalisation_layers(repaired):
            raise ModelError(
                "the merged model's running statistics are undefined, and it has no BatchNorm module to measure them "
                "with: align by permutations, or use the model's own reset"
            )
        reset_statistics(repaired, data)
        return repaired

    def changes(self, model: nn.Module) -> bool:
        """Whether the model keeps running statistics."""
        return bool(normalisation_layers(model))


@dataclass(frozen=True)
class Rescale:
    """REPAIR: every hidden unit's pre-activation gets the mean and the standard deviation of its parents.

    Source: Jordan, Sedghi, Saukh, Entezari, Neyshabur, REPAIR, ICLR 2023.
    """

    name: ClassVar[str] = "repair"
    text: ClassVar[str] = "REPAIR: the parents' mean and spread of every unit restored"
    needs: ClassVar[str] = "parents"

    def __call__(
        self,
        merged: nn.Module,
        data: Data,
        parents: Sequence[nn.Module],
        alignment: Alignment | None,
        coefficients: CoefficientsLike,
    ) -> nn.Module:
        """A new module with the change folded into weights and biases.

        Raises:
            ModelError: A bias is needed where the layer can hold none.
            TransformError: The alignment is of linear maps.
        """
        return _rescale(merged, data, parents, alignment, coefficients)

    def changes(self, model: nn.Module) -> bool:
        """Any model has pre-activations."""
        return True


REPAIRS: dict[str, type[Repair]] = {"reset": Reset, "repair": Rescale}


def repair(
    merged: nn.Module,
    data: Data | None = None,
    method: str | Repair = "reset",
    *,
    parents: Sequence[ModelLike] | None = None,
    alignment: Alignment | None = None,
    coefficients: CoefficientsLike = None,
) -> nn.Module:
    """A new module with the statistics of the merged one repaired on training data (no labels are used).

    `"reset"` estimates the running mean and variance of every BatchNorm anew; a network without BatchNorm comes back as
    it is. `"repair"` (REPAIR) gives every hidden unit's pre-activation the mean and the standard deviation that its
    parents have on average, and folds the change into weights and biases: layers without a bias gain one where nothing
    else can take the shift, and their names are in the result's `gained_biases`.

    Args:
        merged: What `merge` returned.
        data: Re-iterable batches of training data.
        method: `"reset"`, `"repair"`, or a configured repair.
        parents: For `"repair"`: the models that were merged.
        alignment: For `"repair"`: the alignment they were merged with; None if they were averaged as they are.
        coefficients: For `"repair"`: the coefficients that the models were merged with.

    Raises:
        DataError: No data, empty data, or data that can be read only once.
        InputError: Unknown method, `"repair"` without parents or with another number of them than was aligned, or an
            argument of the wrong kind.
        ModelError: A bias is needed where the layer can hold none, or statistics are undefined outside of BatchNorm
            modules; or parents are of another architecture, or hold NaN or infinite weights.
        SymmetryError: `"repair"` with an alignment of other models.
        TransformError: `"repair"` after linear maps, under which moved parents do not compute what they did.
    """
    check_kind(merged, nn.Module, "merged", "give one module, what isthmus.merge returned")
    chosen = _configured_repair(method)
    data = check_data(data)
    given: Sequence[nn.Module] = ()
    if chosen.needs == "parents":
        if parents is None:
            raise InputError(f"method={chosen.name!r} needs parents=, the models that were merged")
        check_models(parents, "parents")
        if alignment is not None:
            check_alignment(alignment, len(parents), "parents")
            check_symmetry(alignment.symmetry, merged)
        given = as_modules(parents, merged)
    return repair_checked(merged, data, chosen, given, alignment, coefficients)


def repair_checked(
    merged: nn.Module,
    data: Data,
    method: Repair,
    parents: Sequence[nn.Module] = (),
    alignment: Alignment | None = None,
    coefficients: CoefficientsLike = None,
) -> nn.Module:
    """As `repair`, of checked parents in `eval()` and an alignment of theirs.

    Raises:
        IsthmusError: What the repair raises.
    """
    repaired = method(merged, data, parents, alignment, coefficients)
    note_outcome(repaired, needs_repair=False)
    return repaired


def _configured_repair(method: str | Repair) -> Repair:
    """The repair that a name, or a configured object, stands for.

    Raises:
        InputError: An unknown name, or something else.
    """
    if isinstance(method, str):
        return configure("repair", method, REPAIRS)
    if isinstance(method, type) or not isinstance(method, Repair):
        raise InputError(f"method is {kind_of(method)}: give a name in REPAIRS or a configured repair, such as Reset()")
    return method


def repair_as_asked(
    merged: nn.Module,
    method: str | None,
    data: Data | None,
    parents: Sequence[nn.Module],
    alignment: Alignment | None,
    coefficients: CoefficientsLike = None,
) -> nn.Module:
    """The merged model repaired as a run asks for; itself where nothing is asked for, or nothing is left to repair.

    Statistics that the average measured on the merged network itself are not reset: it fitted its layers to them.

    Args:
        merged: What `merge` returned.
        method: A name in `REPAIRS`, or None to leave the model as it is.
        data: Re-iterable batches of training data; None if there is none, and then nothing is repaired.
        parents: The models that were merged, checked and in `eval()`.
        alignment: The alignment they were merged with; None if they were averaged as they are.
        coefficients: The coefficients that they were merged with.

    Raises:
        DataError: The merge left undefined statistics, and nothing is to be repaired or there is no data.
        IsthmusError: What `repair` raises.
    """
    noted = outcome_of(merged)
    if method is None or data is None:
        if noted.needs_repair:
            raise DataError(
                "the merged model's BatchNorm statistics are undefined, since a linear map met running variances: "
                "give data and repair='reset' (--data and --repair reset)"
            )
        return merged
    if method == Reset.name and noted.statistics_measured:
        return merged
    return repair_checked(merged, data, _configured_repair(method), parents, alignment, coefficients)


@dataclass(frozen=True)
class Point:
    """A place where a unit's pre-activation is rescaled: the node, its channel axis, and the tensors that can take it.

    Attributes:
        node: Graph node of the pre-activation.
        channel: Its dimension of units.
        weight: The tensor that takes the scale.
        channel_of_weight: The weight's dimension of units.
        bias: The tensor that takes the shift, or None where the layer has to gain one.
    """

    node: str
    channel: int
    weight: str
    channel_of_weight: int
    bias: str | None


def _rescale(
    merged: nn.Module,
    data: Data,
    parents: Sequence[nn.Module],
    alignment: Alignment | None,
    coefficients: CoefficientsLike,
) -> nn.Module:
    """A copy in which every hidden pre-activation has the interpolated mean and standard deviation of its parents."""
    weights = check_coefficients(coefficients, len(parents), merged.state_dict())
    repaired = copy.deepcopy(merged).eval()
    reset_statistics(repaired, data)
    symmetry = find_symmetry(repaired, alignment.symmetry if alignment else None, None, data)
    if alignment is not None and not keeps_function(alignment):
        raise TransformError(
            "REPAIR measures the moved parents, and under linear maps they do not compute what they did: use "
            "method='reset'"
        )
    points = _rescaling_points(symmetry)
    note_outcome(repaired, gained_biases=())
    if not points:
        return repaired
    means: dict[str, Tensor] = {}
    deviations: dict[str, Tensor] = {}
    for index, parent in enumerate(parents):
        state: Mapping[str, Tensor] = parent.state_dict()
        if alignment is not None:
            state = move_state(alignment.folded_state(state, index), alignment.transforms[index], symmetry)
        measured = Statistics(points)
        observe(symmetry.traced.program, state, data, measured.observers, "measuring a parent")
        for point in points:
            mean, deviation = measured.of(point)
            weight = weights.of(point.weight)[index]
            means[point.node] = means.get(point.node, 0.0) + weight * mean
            deviations[point.node] = deviations.get(point.node, 0.0) + weight * deviation
    own = Statistics(points, {p.node: (means[p.node], deviations[p.node]) for p in points})
    observe(symmetry.traced.program, repaired.state_dict(), data, own.observers, "rescaling")
    _write_rescaling(repaired, points, own, means, deviations)
    # Rescaled BatchNorms make up for what changed before them; all others are measured behind it.
    rescaled = {point.weight for point in points}
    layers = set(normalisation_layers(repaired))
    layers -= {module for path, module in repaired.named_modules() if f"{path}.weight" in rescaled}
    reset_statistics(repaired, data, [layer for layer in normalisation_layers(repaired) if layer in layers])
    return repaired


def _rescaling_points(symmetry: Symmetry) -> list[Point]:
    """Where hidden units are rescaled: at every BatchNorm that can take it, and at products with a parameter.

    A product that only a BatchNorm reads is left out, since that normalises it anyway.
    """
    graph = symmetry.traced
    carriers = graph.activations
    normalised = {norm.source for norm in graph.batch_norms}
    users = {node.name: len(node.users) for node in graph.program.graph.nodes}
    points = [
        Point(norm.node, 1, norm.weight, 0, norm.bias)
        for norm in graph.batch_norms
        if norm.node in carriers and norm.weight and norm.bias
    ]
    points += [
        Point(product.node, product.channel, product.weight, product.output, product.bias)
        for product in graph.contractions
        if product.node in carriers and not (product.node in normalised and users[product.node] == 1)
    ]
    shared = shared_weights(graph.program)
    return [point for point in points if point.weight not in shared]  # a shared tensor cannot serve two places


class Statistics:
    """Means and standard deviations of the units at every point, and the rescaling of what passes there.

    Args:
        points: Where to measure.
        targets: Mean and standard deviation that each point's value is given before it goes on, batch by batch, so that
            later points are measured behind repaired ones; None lets values pass as they are.
    """

    def __init__(self, points: Sequence[Point], targets: Mapping[str, tuple[Tensor, Tensor]] | None = None) -> None:
        self.points = {point.node: point for point in points}
        self.targets = targets
        self.sums: dict[str, Tensor] = {}
        self.count: dict[str, int] = {}

    @property
    def observers(self) -> dict[str, Observer]:
        """An observer for every point's node."""
        return {node: partial(self.observe, node) for node in self.points}

    def observe(self, node: str, value: Tensor) -> Tensor | None:
        """Adds a batch at one point; returns the rescaled value where there are targets."""
        units = value.movedim(self.points[node].channel, 0).reshape(value.shape[self.points[node].channel], -1)
        mean = units.mean(dim=1, dtype=torch.float64)
        variance = (units.double() - mean[:, None]).square().mean(dim=1)
        # Batches are averaged as running statistics are; within a batch the variance is about the batch's own mean.
        size = units.shape[1]
        moments = torch.stack([mean, variance + mean.square()]) * size
        self.sums[node] = self.sums.get(node, 0.0) + moments
        self.count[node] = self.count.get(node, 0) + size
        if self.targets is None:
            return None
        target_mean, target_deviation = self.targets[node]
        scale = _scale_between(variance.sqrt(), target_deviation)
        shape = [1] * value.ndim
        shape[self.points[node].channel] = -1
        shift = target_mean - scale * mean
        return value * scale.to(value.dtype).view(shape) + shift.to(value.dtype).view(shape)

    def of(self, point: Point) -> tuple[Float[Tensor, " units"], Float[Tensor, " units"]]:
        """Mean and standard deviation of a point's units over all batches."""
        mean, square = self.sums[point.node] / self.count[point.node]
        return mean, (square - mean.square()).clamp_min(0).sqrt()


def _scale_between(deviation: Tensor, target: Tensor) -> Tensor:
    """The factor that turns one standard deviation into another; 1 for units that never vary."""
    alive = deviation > DEAD_DEVIATION_SHARE * deviation.max().clamp_min(torch.finfo(torch.float64).tiny)
    return torch.where(alive, target / deviation.clamp_min(torch.finfo(torch.float64).tiny), 1.0)


def _write_rescaling(
    model: nn.Module,
    points: Sequence[Point],
    measured: Statistics,
    means: Mapping[str, Tensor],
    deviations: Mapping[str, Tensor],
) -> None:
    """Puts every point's scale and shift into the tensors that produce it, in place; notes the biases gained."""
    gained = []
    tensors = dict(model.named_parameters())
    with torch.no_grad():
        for point in points:
            mean, deviation = measured.of(point)
            scale = _scale_between(deviation, deviations[point.node])
            shift = means[point.node] - scale * mean
            weight = tensors[point.weight]
            shape = [1] * weight.ndim
            shape[point.channel_of_weight] = -1
            weight.copy_(weight.double() * scale.view(shape))
            if point.bias is None:
                gained.append(_gain_bias(model, point.weight, shift.to(weight.dtype)))
            else:
                bias = tensors[point.bias]
                bias.copy_(bias.double() * scale + shift)
    note_outcome(model, gained_biases=gained)


def _gain_bias(model: nn.Module, weight: str, values: Float[Tensor, " units"]) -> str:
    """Gives the layer of a weight a bias, and returns its name.

    Raises:
        ModelError: The layer has no place for a bias.
    """
    path, _, own = weight.rpartition(".")
    layer = model.get_submodule(path)
    if own != "weight" or not isinstance(layer, nn.Linear | _ConvNd) or layer.bias is not None:
        raise ModelError(f"{weight}: its layer has no bias and no place for one; use repair(method='reset')")
    layer.bias = nn.Parameter(values)
    return f"{path}.bias" if path else "bias"
