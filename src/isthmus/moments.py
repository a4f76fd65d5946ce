"""Activations of every space, gathered in one pass into means and covariances within and between models.

Suffixes: S samples, N models, U units of a space with all its copies.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn

from isthmus.batches import Batch, read_batches
from isthmus.errors import DataError, InputError, SymmetryError
from isthmus.progress import progress
from isthmus.symmetry import Site, Space, Symmetry
from isthmus.trace import trace
from isthmus.trace.capture import Program
from isthmus.transform import to_front

# Rows of one float32 product; its sum is then added in float64, so rounding does not grow with the number of samples.
CHUNK = 4096


class Reader(fx.Interpreter):
    """Runs a captured graph on numbers and hands the values of some nodes to observers.

    Args:
        program: The captured graph.
        observers: For each node to watch, what to do with its value; a returned tensor replaces the value.
        until: Stop once all watched nodes have run, and return None; else run to the end.
    """

    def __init__(self, program: Program, observers: Mapping[str, Callable[[Tensor], Tensor | None]], *, until: bool = True):
        super().__init__(program.exported.graph_module, garbage_collect_values=True)
        self.program = program
        self.observers = observers
        order = [node.name for node in program.graph.nodes]
        self.last = max((order.index(name) for name in observers), default=-1) if until else len(order)
        self.position = {name: index for index, name in enumerate(order)}

    def run_node(self, n: fx.Node) -> Any:
        if self.position[n.name] > self.last and n.op != "placeholder":
            return None
        value = super().run_node(n)
        observer = self.observers.get(n.name)
        if observer is not None:
            replaced = observer(value)
            value = value if replaced is None else replaced
        return value

    def read(self, state: Mapping[str, Tensor], batch: Batch) -> Any:
        """The graph's outputs on a batch, with the weights of `state`."""
        names, inputs = self.program.parameters, iter([*batch.args, *batch.kwargs.values()])
        arguments = []
        for node in self.program.graph.nodes:
            if node.op != "placeholder":
                continue
            if node.name in names:
                arguments.append(state[names[node.name]])
            elif node.name in self.program.constants:
                arguments.append(self.program.constants[node.name])
            else:
                arguments.append(next(inputs))
        with torch.no_grad():
            return self.run(*arguments, enable_io_processing=False)


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
        """Covariance of the units of one model with those of another."""
        return self.covariance[first, :, second, :]

    def correlation(self, first: int, second: int) -> Float[Tensor, "units units"]:
        """Correlation of the units of one model with those of another; 0 for a unit that never varies."""
        scale = self.deviation
        product = scale[first, :, None] * scale[second, None, :]
        return torch.where(product > 0, self.between(first, second) / product.clamp_min(torch.finfo(torch.float64).tiny), 0.0)

    @property
    def deviation(self) -> Float[Tensor, "models units"]:
        """Standard deviation of every unit of every model."""
        models, units = self.mean.shape
        flat = self.covariance.reshape(models * units, models * units)
        return flat.diagonal().clamp_min(0).sqrt().reshape(models, units)


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


class Accumulator:
    """Shifted sums of one space: numbers close to zero keep their digits whatever the units' means are."""

    def __init__(self, models: int, units: int, device: torch.device) -> None:
        self.shape = (models, units)
        self.count = 0
        self.shift: Tensor | None = None
        self.total = torch.zeros(models * units, dtype=torch.float64, device=device)
        self.products = torch.zeros(models * units, models * units, dtype=torch.float64, device=device)

    def add(self, values: Float[Tensor, "samples columns"]) -> None:
        """Adds samples of all models side by side; the first batch's mean becomes the shift."""
        values = values if values.dtype == torch.float64 else values.float()
        if self.shift is None:
            self.shift = values.mean(dim=0, dtype=torch.float64).to(values.dtype)
        for chunk in (values - self.shift).split(CHUNK):
            self.total += chunk.sum(dim=0, dtype=torch.float64)
            self.products += (chunk.T @ chunk).double()
        self.count += len(values)

    def finish(self) -> SpaceMoments:
        """The moments of all samples added."""
        assert self.shift is not None
        offset = self.total / self.count
        covariance = self.products / self.count - torch.outer(offset, offset)
        covariance = (covariance + covariance.T) / 2
        mean = self.shift.double() + offset
        models, units = self.shape
        return SpaceMoments(
            self.count,
            mean.reshape(models, units).cpu(),
            covariance.reshape(models, units, models, units).cpu(),
        )


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
    and every position, such as the pixels of a feature map, at every node that stands for the space.

    Args:
        models: Models of one architecture.
        symmetry: What `trace` returned for it; found from `inputs` or the data's first batch if left out.
        data: Re-iterable batches; targets are not used.
        at: `"post"` reads what the space's consumers receive, `"pre"` what enters its nonlinearities.
        inputs: Example inputs for tracing.

    Raises:
        DataError: No data, empty data, or data that can be read only once.
        InputError: Unknown `at`, or no models.
        SymmetryError: The symmetry was loaded from JSON and has no graph.
    """
    if at not in ("post", "pre"):
        raise InputError(f"at={at!r}: activations are read at 'post' or 'pre'")
    if not models:
        raise InputError("no models: give at least one")
    symmetry = symmetry_of(models[0], symmetry, inputs, data)
    graph = symmetry.program
    read_at: Mapping[str, tuple[str, ...]] = graph.post if at == "post" else graph.pre
    spaces = [space for space in symmetry if read_at.get(space.name)]
    nodes = {node for space in spaces for node in read_at[space.name]}
    states = [dict(model.state_dict()) for model in models]
    reference = next(iter(states[0].values()))
    sums = {
        s.name: Accumulator(len(models), s.copies * s.size, reference.device) for s in spaces
    }
    dtype = next((t.dtype for t in states[0].values() if t.is_floating_point()), torch.float32)
    samples = 0
    for batch in progress(read_batches(data), "collecting activations", data):
        batch = batch.to(reference.device, dtype)
        program = graph.program.for_inputs(batch.args, batch.kwargs)
        rows: dict[tuple[str, str], list[Tensor]] = {}
        for state in states:
            observers = {
                node: observer(graph.activations[node], spaces, read_at, rows, node) for node in nodes
            }
            Reader(program, observers).read(state, batch.clone())
        for (name, _), values in rows.items():
            sums[name].add(torch.cat(values, dim=1))
        samples += batch.size
    return Moments({name: accumulator.finish() for name, accumulator in sums.items()}, at, samples)


def observer(
    places: Sequence[tuple[str, Site]],
    spaces: Sequence[Space],
    read_at: Mapping[str, tuple[str, ...]],
    rows: dict[tuple[str, str], list[Tensor]],
    node: str,
) -> Callable[[Tensor], None]:
    """What to do with a node's value: keep the units of each space that the node stands for."""
    wanted = {space.name for space in spaces if node in read_at[space.name]}

    def keep(value: Tensor) -> None:
        for index, (name, site) in enumerate(places):
            if name in wanted:
                rows.setdefault((name, f"{node}/{index}"), []).append(read_units(value, site))

    return keep


def read_units(value: Tensor, site: Site) -> Float[Tensor, "samples units"]:
    """A node's value as samples of a space's units, all copies side by side."""
    copies, size, repeat = site.positions.shape
    where = torch.from_numpy(site.positions.transpose(2, 0, 1).reshape(-1)).to(value.device)
    flat = to_front(value, site.dims).index_select(0, where).reshape(repeat, copies * size, -1)
    return flat.permute(0, 2, 1).reshape(-1, copies * size)


def symmetry_of(model: nn.Module, symmetry: Symmetry | None, inputs: tuple[Any, ...] | None, data: Any) -> Symmetry:
    """The symmetry that was given, with its graph, or the one found on `inputs` or the data's first batch.

    Raises:
        InputError: Neither a symmetry nor anything to trace with.
    """
    if symmetry is not None and symmetry.program is not None:
        return symmetry
    if inputs is not None:
        return trace(model, *inputs)
    if data is not None:
        batch = next(read_batches(data))
        first = next((x for x in model.state_dict().values() if x.is_floating_point()), torch.zeros(()))
        batch = batch.head(2).to(first.device, first.dtype)
        return trace(model, *batch.args, kwargs=batch.kwargs)
    if symmetry is not None:
        return symmetry
    raise InputError("no symmetry: give symmetry=isthmus.trace(model, inputs), or inputs=(x,) to trace it here")


def require_samples(moments: Moments, needed: int, why: str) -> None:
    """Refuses moments of too few samples.

    Raises:
        DataError: Fewer samples than needed.
    """
    if moments.samples < needed:
        raise DataError(f"{moments.samples} samples, {why} needs at least {needed}: give more data")
