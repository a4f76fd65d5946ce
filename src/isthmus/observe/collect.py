"""Activations of every space, gathered in one pass over the data.

Suffixes: S samples, N models, U units of a space with all its copies.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from isthmus.data.batches import Data, check_data, read_batches
from isthmus.errors import InputError, SymmetryError
from isthmus.graph.reader import observe_batch
from isthmus.observe.given import Inputs, as_modules, symmetry_of
from isthmus.observe.moments import Accumulator, JointMoments, Moments
from isthmus.progress import progress
from isthmus.state import first_float
from isthmus.symmetry.spaces import Site, Space
from isthmus.symmetry.symmetry import Symmetry
from isthmus.symmetry.transform import to_front


def collect(
    models: Sequence[nn.Module],
    symmetry: Symmetry | None = None,
    data: Data | None = None,
    *,
    at: str = "post",
    inputs: Inputs | None = None,
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
        inputs: Example inputs for tracing, `(x,)` or `x`.

    Raises:
        DataError: No data, empty data, or data that can be read only once.
        InputError: Unknown `at`, no models, or something else than models, a symmetry and inputs.
        ModelError: The models are not of one architecture, or hold NaN or infinite weights.
        SymmetryError: The symmetry is of another architecture.
    """
    check_at(at)
    check_data(data)
    modules = as_modules(models)
    return collect_checked(modules, symmetry_of(modules[0], symmetry, inputs, data), data, at=at)


def collect_checked(models: Sequence[nn.Module], symmetry: Symmetry, data: Data | None, *, at: str = "post") -> Moments:
    """As `collect`, of checked modules in `eval()` and their symmetry with its graph.

    Raises:
        DataError: Empty data, or batches of an unknown form.
    """
    found, samples = _read_spaces(models, [symmetry] * len(models), data, at)
    return Moments({name: joint.of_one_size() for name, joint in found.items()}, at, samples)


def collect_joint(
    models: Sequence[nn.Module], symmetries: Sequence[Symmetry], data: Data | None, *, at: str = "post"
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
        SymmetryError: A space is read at other places in one model than in another.
    """
    return _read_spaces(models, symmetries, data, at)


def check_at(at: str) -> None:
    """Refuses an unknown place to read activations at.

    Raises:
        InputError: It is neither `"post"` nor `"pre"`.
    """
    if at not in ("post", "pre"):
        raise InputError(f"at={at!r}: activations are read at 'post' or 'pre'")


def _read_spaces(
    models: Sequence[nn.Module], symmetries: Sequence[Symmetry], data: Data | None, at: str
) -> tuple[dict[str, JointMoments], int]:
    """The moments of every space that can be read, all models side by side, and the number of inputs read.

    Raises:
        SymmetryError: A space is read at other places in one model than in another.
    """
    readings = [_readings_by_node(symmetry, at) for symmetry in symmetries]
    states = [dict(model.state_dict()) for model in models]
    read = {reading.space for found in readings[0].values() for _, reading in found}
    sums = {
        space.name: Accumulator(
            [symmetry[space.name].copies * symmetry[space.name].size for symmetry in symmetries],
            first_float(states[0]).device,
        )
        for space in symmetries[0]
        if space.name in read
    }
    samples = 0
    for batch in progress(read_batches(data), "collecting activations", data):
        rows: dict[tuple[str, int], list[Tensor]] = {}
        for state, symmetry, found in zip(states, symmetries, readings, strict=True):
            observers = {node: _observer(here, rows) for node, here in found.items()}
            observe_batch(symmetry.traced.program, state, batch, observers)
        for (space, _), values in rows.items():
            if len(values) != len(models) or len({len(each) for each in values}) > 1:
                raise SymmetryError(
                    f"space {space} is read at other places in one model than in another: match by weights"
                )
            sums[space].add(values)
        samples += batch.size
    return {name: accumulator.finish() for name, accumulator in sums.items()}, samples


def _readings_by_node(symmetry: Symmetry, at: str) -> dict[str, list[tuple[int, "Reading"]]]:
    """For every node at which a space is read: how, each reading with its number within the space."""
    graph = symmetry.traced
    first, second = (graph.post, graph.pre) if at == "post" else (graph.pre, graph.post)
    found: dict[str, list[tuple[int, Reading]]] = {}
    for space in symmetry:
        number = 0
        for node in first[space.name] or second[space.name]:
            for reading in _readings_of(symmetry, space, graph.activations[node]):
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


def _readings_of(symmetry: Symmetry, space: Space, places: Sequence[tuple[str, Site]]) -> list[Reading]:
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
                repeats_averaged |= _moves_repeats(place, site)
        found.append(Reading(name, site, tuple(sorted(averaged)), repeats_averaged))
    return found


def _moves_repeats(other: Site, site: Site) -> bool:
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


def _observer(
    readings: Sequence[tuple[int, Reading]], rows: dict[tuple[str, int], list[Tensor]]
) -> Callable[[Tensor], None]:
    """What to do with a node's value: keep the units of each space that is read there."""

    def keep(value: Tensor) -> None:
        for number, reading in readings:
            rows.setdefault((reading.space, number), []).append(reading.of(value))

    return keep
