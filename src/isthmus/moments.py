"""Activations of every space, gathered in one pass into means and covariances within and between models.

Suffixes: S samples, N models, U units of a space with all its copies.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from isthmus.batches import check_data, read_batches
from isthmus.errors import DataError, InputError, SymmetryError
from isthmus.members import as_modules
from isthmus.progress import progress
from isthmus.symmetry import Site, Space, Symmetry
from isthmus.trace import trace
from isthmus.trace.reader import Reader, first_float, program_for
from isthmus.transform import to_front

# Rows of one float32 product; its sum is then added in float64, so rounding does not grow with the number of samples.
CHUNK = 4096


@dataclass(frozen=True, eq=False)
class SpaceMoments:
    """Moments of one space over all samples, read at the nodes that stand for it.

    Attributes:
        count: Samples: inputs × positions × nodes.
        mean: Mean activation of every unit of every model.
        covariance: Covariance of every unit of every model with every other, divided by `count`.
    """

    count: int
    mean: Float[Tensor, "models units"]
    covariance: Float[Tensor, "models units models units"]

    def between(self, first: int, second: int) -> Float[Tensor, "units units"]:
        """Covariance of the units of one model with those of another.

        The same numbers in the same layout whichever other models were read beside these two, in this order.
        """
        return self.covariance[first, :, second, :].contiguous()

    def correlation(self, first: int, second: int) -> Float[Tensor, "units units"]:
        """Correlation of the units of one model with those of another; 0 for a unit that never varies."""
        scale = self.deviation
        product = scale[first, :, None] * scale[second, None, :]
        return torch.where(
            product > 0, self.between(first, second) / product.clamp_min(torch.finfo(torch.float64).tiny), 0.0
        )

    def joined(self, other: "SpaceMoments") -> "SpaceMoments":
        """The moments of both sets of samples together."""
        count = self.count + other.count
        share = other.count / count
        step = (other.mean - self.mean).flatten()
        apart = share * (1 - share) * torch.outer(step, step).reshape(self.covariance.shape)
        covariance = torch.lerp(self.covariance, other.covariance, share) + apart
        return SpaceMoments(count, torch.lerp(self.mean, other.mean, share), covariance)

    @property
    def deviation(self) -> Float[Tensor, "models units"]:
        """Standard deviation of every unit of every model."""
        models, units = self.mean.shape
        flat = self.covariance.reshape(models * units, models * units)
        return flat.diagonal().clamp_min(0).sqrt().reshape(models, units)


@dataclass(frozen=True, eq=False)
class JointMoments:
    """Moments of one space that may have another number of units in each model.

    Attributes:
        count: Samples, as in `SpaceMoments`.
        mean: Mean activation of every unit, one tensor a model.
        covariance: Covariance of all units of all models, those of the first model first.
    """

    count: int
    mean: tuple[Float[Tensor, " _"], ...]
    covariance: Float[Tensor, "total total"]

    def between(self, first: int, second: int) -> Float[Tensor, "rows columns"]:
        """Covariance of the units of one model with those of another, as `SpaceMoments.between`."""
        starts = np.cumsum([0, *(len(mean) for mean in self.mean)])
        rows, columns = (slice(starts[model], starts[model + 1]) for model in (first, second))
        return self.covariance[rows, columns].contiguous()

    def of_one_size(self) -> SpaceMoments:
        """The same moments, where the space is of one size in all models."""
        models, units = len(self.mean), len(self.mean[0])
        return SpaceMoments(self.count, torch.stack(self.mean), self.covariance.reshape(models, units, models, units))


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of every space that can be read, by space name.

    Attributes:
        spaces: The moments; units of a nested space are counted over all its copies.
        at: Where they were read: `"post"`, what consumers of a space receive, or `"pre"`, what enters nonlinearities.
        samples: Inputs read.
    """

    spaces: Mapping[str, SpaceMoments]
    at: str
    samples: int

    def __getitem__(self, space: str) -> SpaceMoments:
        if space not in self.spaces:
            raise SymmetryError(f"no activations stand for space {space}: match it by weights")
        return self.spaces[space]

    def joined(self, other: "Moments") -> "Moments":
        """The moments of both sets of inputs together; both must be of the same models and places."""
        spaces = {name: own.joined(other[name]) for name, own in self.spaces.items()}
        return Moments(spaces, self.at, self.samples + other.samples)


class Accumulator:
    """Shifted sums of one space: numbers close to zero keep their digits whatever the units' means are.

    Every model and every pair of models is summed on its own: what is read of two models is the same, bit for bit,
    whichever other models are read beside them.
    """

    def __init__(self, units: Sequence[int], device: torch.device) -> None:
        self.units = list(units)
        self.count = 0
        self.shifts: list[Tensor] = []
        self.totals = [torch.zeros(size, dtype=torch.float64, device=device) for size in self.units]
        self.products = {
            (first, second): torch.zeros(self.units[first], self.units[second], dtype=torch.float64, device=device)
            for first, second in itertools.combinations_with_replacement(range(len(self.units)), 2)
        }

    def add(self, values: Sequence[Float[Tensor, "samples _"]]) -> None:
        """Adds the same samples of every model; the mean of the first ones becomes the shift."""
        count = len(values[0])
        # Units first: that is how convolutions leave them, so that shifting is the only copy.
        rows = [each.T.to(torch.promote_types(each.dtype, torch.float32)) for each in values]
        if not self.shifts:
            self.shifts = [each[:, :CHUNK].mean(dim=1, dtype=torch.float64).to(each.dtype) for each in rows]
        for start in range(0, count, CHUNK):
            size = min(CHUNK, count - start)
            parts = [
                torch.sub(each[:, start : start + size], shift[:, None], out=shift.new_empty(len(shift), size))
                for each, shift in zip(rows, self.shifts, strict=True)
            ]
            for total, part in zip(self.totals, parts, strict=True):
                total += part.sum(dim=1).double()
            for (first, second), product in self.products.items():
                dtype = torch.promote_types(parts[first].dtype, parts[second].dtype)
                product += (parts[first].to(dtype) @ parts[second].T.to(dtype)).double()
        self.count += count

    def finish(self) -> JointMoments:
        """The moments of all samples added."""
        assert self.shifts
        offsets = [total / self.count for total in self.totals]
        models = range(len(self.units))
        blocks = {
            (first, second): product / self.count - torch.outer(offsets[first], offsets[second])
            for (first, second), product in self.products.items()
        }
        for model in models:  # a product with its own transpose is symmetric but for rounding
            blocks[model, model] = (blocks[model, model] + blocks[model, model].T) / 2
        covariance = torch.cat(
            [torch.cat([blocks[a, b] if a <= b else blocks[b, a].T for b in models], dim=1) for a in models]
        )
        mean = [shift.double() + offset for shift, offset in zip(self.shifts, offsets, strict=True)]
        return JointMoments(self.count, tuple(each.cpu() for each in mean), covariance.cpu())


def collect(
    models: Sequence[nn.Module],
    symmetry: Symmetry | None = None,
    data: Any = None,
    *,
    at: str = "post",
    inputs: tuple[Any, ...] | None = None,
) -> Moments:
    """Means and covariances of every space's activations, within and between models, in one pass over the data.

    The models run in `eval()`; they and the data are left as they were. A unit's samples are its values at every input
    and every position, such as the pixels of a feature map, at every node that stands for the space. Positions that
    other spaces move, such as the units of another branch in an outer product, are averaged: before the models are
    matched, it is not known which of them correspond.

    Args:
        models: Models of one architecture.
        symmetry: What `trace` returned for it; found from `inputs` or the data's first batch if left out.
        data: Re-iterable batches; targets are not used.
        at: `"post"` reads what the space's consumers receive, `"pre"` what enters its nonlinearities; where the graph
            shows no such place, it is the other.
        inputs: Example inputs for tracing.

    Raises:
        DataError: No data, empty data, or data that can be read only once.
        InputError: Unknown `at`, or no models.
        ModelError: The models are not of one architecture, or hold NaN or infinite weights.
        SymmetryError: The symmetry is of another architecture.
    """
    check_at(at)
    check_data(data)
    modules = as_modules(models)
    symmetry = symmetry_of(modules[0], symmetry, inputs, data)
    found, samples = read_spaces(modules, [symmetry] * len(modules), data, at)
    return Moments({name: joint.of_one_size() for name, joint in found.items()}, at, samples)


def collect_joint(
    models: Sequence[nn.Module], symmetries: Sequence[Symmetry], data: Any, *, at: str = "post"
) -> tuple[dict[str, JointMoments], int]:
    """As `collect`, for models whose spaces have the same names and may have other sizes.

    Args:
        models: Models in `eval()`.
        symmetries: Every model's own, each with its graph.
        data: Re-iterable batches that every model takes; targets are not used.
        at: `"post"` or `"pre"`.

    Returns:
        The moments by space name, and the number of inputs read.

    Raises:
        DataError: No data, empty data, or data that can be read only once.
        InputError: Unknown `at`.
        SymmetryError: A space is read at other places in one model than in another.
    """
    check_at(at)
    check_data(data)
    return read_spaces(models, symmetries, data, at)


def check_at(at: str) -> None:
    """Refuses an unknown place to read activations at.

    Raises:
        InputError: It is neither `"post"` nor `"pre"`.
    """
    if at not in ("post", "pre"):
        raise InputError(f"at={at!r}: activations are read at 'post' or 'pre'")


def read_spaces(
    models: Sequence[nn.Module], symmetries: Sequence[Symmetry], data: Any, at: str
) -> tuple[dict[str, JointMoments], int]:
    """The moments of every space that can be read, all models side by side, and the number of inputs read.

    Raises:
        SymmetryError: A space is read at other places in one model than in another.
    """
    readings = [readings_by_node(symmetry, at) for symmetry in symmetries]
    states = [dict(model.state_dict()) for model in models]
    references = [first_float(state) for state in states]
    read = {reading.space for found in readings[0].values() for _, reading in found}
    sums = {
        space.name: Accumulator(
            [symmetry[space.name].copies * symmetry[space.name].size for symmetry in symmetries], references[0].device
        )
        for space in symmetries[0]
        if space.name in read
    }
    samples = 0
    for batch in progress(read_batches(data), "collecting activations", data):
        rows: dict[tuple[str, int], list[Tensor]] = {}
        for state, reference, symmetry, found in zip(states, references, symmetries, readings, strict=True):
            own = batch.to(reference.device, reference.dtype).clone()
            observers = {node: observer(here, rows) for node, here in found.items()}
            Reader(program_for(symmetry.program.program, own), observers).read(state, own)
        for (space, _), values in rows.items():
            if len(values) != len(models) or len({len(each) for each in values}) > 1:
                raise SymmetryError(
                    f"space {space} is read at other places in one model than in another: match by weights"
                )
            sums[space].add(values)
        samples += batch.size
    return {name: accumulator.finish() for name, accumulator in sums.items()}, samples


def readings_by_node(symmetry: Symmetry, at: str) -> dict[str, list[tuple[int, "Reading"]]]:
    """For every node at which a space is read: how, each reading with its number within the space."""
    graph = symmetry.program
    first, second = (graph.post, graph.pre) if at == "post" else (graph.pre, graph.post)
    found: dict[str, list[tuple[int, Reading]]] = {}
    for space in symmetry:
        number = 0
        for node in first[space.name] or second[space.name]:
            for reading in readings_of(symmetry, space, graph.activations[node]):
                found.setdefault(node, []).append((number, reading))
                number += 1
    return found


@dataclass(frozen=True, eq=False)
class Reading:
    """How a space's units are read from a node's value.

    Attributes:
        space: The space's name.
        site: Where its units lie.
        averaged: Further dimensions that other spaces move.
        repeats_averaged: Whether other spaces move a unit's places along the site's own dimensions.
    """

    space: str
    site: Site
    averaged: tuple[int, ...]
    repeats_averaged: bool

    def of(self, value: Tensor) -> Float[Tensor, "samples units"]:
        """A node's value as samples of the space's units, all copies side by side."""
        copies, size, repeat = self.site.positions.shape
        if self.averaged:
            value = value.mean(dim=self.averaged, keepdim=True)
        flat = to_front(value, self.site.dims)
        where = self.site.positions.transpose(2, 0, 1).reshape(-1)
        if not np.array_equal(where, np.arange(len(flat))):
            flat = flat.index_select(0, torch.from_numpy(where).to(value.device))
        flat = flat.reshape(repeat, copies * size, -1)
        if self.repeats_averaged:
            flat = flat.mean(dim=0, keepdim=True)
        return flat.permute(0, 2, 1).reshape(-1, copies * size)


def readings_of(symmetry: Symmetry, space: Space, places: Sequence[tuple[str, Site]]) -> list[Reading]:
    """How to read a space at a node with these places of spaces."""
    above: set[str] = set()
    outer = space
    while outer.parent is not None:
        outer = symmetry[outer.parent]
        above.add(outer.name)
    found = []
    for name, site in places:
        if name != space.name:
            continue
        averaged: set[int] = set()
        repeats_averaged = False
        for other, place in places:
            averaged |= set(place.dims) - set(site.dims)
            nests = other in above and set(place.dims) <= set(site.dims)
            if place is not site and not nests:
                repeats_averaged |= moves_repeats(place, site)
        found.append(Reading(name, site, tuple(sorted(averaged)), repeats_averaged))
    return found


def moves_repeats(other: Site, site: Site) -> bool:
    """Whether another site's units tell apart the places of one unit of a site."""
    if not set(other.dims) & set(site.dims):
        return False
    if other.dims != site.dims:
        return site.positions.shape[2] > 1
    copies, size, _ = other.positions.shape
    unit = np.full(1 + max(int(other.positions.max()), int(site.positions.max())), -1)
    unit[other.positions.reshape(copies * size, -1)] = np.arange(copies * size)[:, None]
    beside = unit[site.positions]
    return bool((beside != beside[..., :1]).any())


def observer(
    readings: Sequence[tuple[int, Reading]], rows: dict[tuple[str, int], list[Tensor]]
) -> Callable[[Tensor], None]:
    """What to do with a node's value: keep the units of each space that is read there."""

    def keep(value: Tensor) -> None:
        for number, reading in readings:
            rows.setdefault((reading.space, number), []).append(reading.of(value))

    return keep


def symmetry_of(model: nn.Module, symmetry: Symmetry | None, inputs: tuple[Any, ...] | None, data: Any) -> Symmetry:
    """The symmetry that was given, with its graph if one can be had, or the one found on `inputs` or the first batch.

    Raises:
        InputError: Neither a symmetry nor anything to trace with.
        SymmetryError: The symmetry that was given is not the model's.
    """
    if symmetry is not None:
        check_symmetry(symmetry, model)
        if symmetry.program is not None:
            return symmetry
    found = None
    if inputs is not None:
        found = trace(model, *inputs)
    elif data is not None:
        batch = next(read_batches(data))
        first = first_float(model.state_dict())
        batch = batch.head(2).to(first.device, first.dtype)
        found = trace(model, *batch.args, kwargs=batch.kwargs)
    if symmetry is None:
        if found is None:
            raise InputError("no symmetry: give symmetry=isthmus.trace(model, inputs), or inputs=(x,) to trace it here")
        return found
    if found is None:
        return symmetry
    if found.hash != symmetry.hash:
        raise SymmetryError(
            "the model's graph has another symmetry than the one given: trace it again, or leave it out"
        )
    return replace(symmetry, program=found.program)


def check_symmetry(symmetry: Symmetry, model: nn.Module) -> None:
    """Refuses a symmetry of another architecture.

    Raises:
        SymmetryError: The names or shapes of the model's tensors are not those of the traced one.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    traced = {name: tuple(shape) for name, shape in symmetry.shapes.items()}
    for name in [*traced, *shapes]:
        if shapes.get(name) != traced.get(name):
            raise SymmetryError(
                f"the symmetry is not this model's: {name} has shape {shapes.get(name)}, traced {traced.get(name)}; "
                "trace this model"
            )


def require_samples(moments: Moments, needed: int, why: str) -> None:
    """Refuses moments of too few samples.

    Raises:
        DataError: Fewer samples than needed.
    """
    if moments.samples < needed:
        raise DataError(f"{moments.samples} samples, {why} needs at least {needed}: give more data")
