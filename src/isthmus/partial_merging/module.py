"""The module of one trunk and several heads: runs the two parts of the graphs, and measures their statistics."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, fx, nn

from isthmus.data.batches import Batch, read_batches
from isthmus.errors import DataError, InputError, TraceError
from isthmus.graph.capture import Program
from isthmus.graph.operations import BATCH_NORM_OVERLOADS, overload_name
from isthmus.graph.reader import program_for, run
from isthmus.observe.score import Score, evaluate
from isthmus.partial_merging.cut import Cut
from isthmus.progress import progress
from isthmus.state import State
from isthmus.symmetry.alignment import Alignment
from isthmus.symmetry.spaces import Site
from isthmus.symmetry.traced_graph import BatchNorm
from isthmus.symmetry.transform import Transform, from_front, move_site, to_front
from isthmus.wording.short import counted, told


@dataclass(frozen=True, eq=False)
class ReadBack:
    """How a model's own units are read from a merged value, at one place.

    Attributes:
        site: Where units lie.
        length: Positions along the site's dimensions.
        order: Which merged position each own one reads, where it reads only one.
        transform: The map, where it reads several.
    """

    site: Site
    length: int
    order: Int[Tensor, " positions"] | None
    transform: Transform

    def of(self, value: Tensor) -> Tensor:
        """The model's own value; a new tensor.

        Raises:
            TraceError: The value has other dimensions than the traced one.
        """
        if int(np.prod([value.shape[d] for d in self.site.dims])) != self.length:
            raise TraceError(f"{self.site.parameter} is of another size on these inputs: trace on inputs of their size")
        if self.order is None:
            return move_site(value, self.site, self.transform)
        order = self.order.to(value.device)
        if len(self.site.dims) == 1:
            return value.index_select(self.site.dims[0], order)
        return from_front(to_front(value, self.site.dims).index_select(0, order), value.shape, self.site.dims)


@dataclass(frozen=True, eq=False)
class Part:
    """What belongs to one model: its graph, where it is cut, and how it reads its units from the trunk.

    Attributes:
        program: The captured graph.
        cut: Its two parts.
        batch_norms: Its normalisations by running statistics.
        read_back: For every node of the border, how the model's units are read.
    """

    program: Program
    cut: Cut
    batch_norms: Sequence[BatchNorm]
    read_back: Mapping[str, Sequence[ReadBack]]


class Tensors(nn.Module):
    """Copies of some of a model's tensors under their own names, parameters as parameters.

    Args:
        model: The model.
        names: Which tensors.
        values: Other values for them.
    """

    def __init__(self, model: nn.Module, names: frozenset[str], values: State | None = None) -> None:
        super().__init__()
        parameters = dict(model.named_parameters())
        for name, tensor in model.state_dict().items():
            if name not in names:
                continue
            value = (values[name] if values is not None else tensor).detach().to(tensor.dtype, copy=True)
            module: nn.Module = self
            *path, own = name.split(".")
            for step in path:
                if step not in dict(module.named_children()):
                    module.add_module(step, nn.Module())
                module = module.get_submodule(step)
            if name in parameters:
                module.register_parameter(own, nn.Parameter(value, parameters[name].requires_grad))
            else:
                module.register_buffer(own, value)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}


class PartialZip(nn.Module):
    """Several models with one trunk; what `partial_zip` returns.

    It takes what the models take and returns a tuple of their outputs. It computes what they compute in `eval()`, and
    gradients reach the trunk and the heads. It keeps the models' graphs, and through them the models.

    Attributes:
        trunk: The merged tensors.
        heads: Every model's own.
        alignment: How the trunk's spaces were merged.
    """

    def __init__(self, parts: Sequence[Part], trunk: Tensors, heads: Sequence[Tensors], alignment: Alignment) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.trunk = trunk
        self.heads = nn.ModuleList(heads)
        self.alignment = alignment
        self.eval()

    def __repr__(self) -> str:
        """One line; the modules themselves lie in `trunk` and `heads`."""
        trunk = counted(sum(tensor.numel() for tensor in self.trunk.parameters()), "parameter")
        return told(self, counted(len(self), "model"), f"a trunk of {trunk}", f"joined by {self.alignment.method}")

    def __len__(self) -> int:
        return len(self.parts)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PartialZip":
        """Copies the tensors; the graphs never change and are shared."""
        heads = [copy.deepcopy(own, memo) for own in self.owns]
        return PartialZip(self.parts, copy.deepcopy(self.trunk, memo), heads, self.alignment)

    @property
    def owns(self) -> list[Tensors]:
        """Every model's own tensors."""
        return [own for own in self.heads if isinstance(own, Tensors)]

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The outputs of all heads, in the order of the models."""
        return self._run(Batch(args, kwargs), range(len(self)))

    def head(self, index: int) -> "Head":
        """The trunk with one head, as a module that answers as that model does; it shares its tensors.

        Raises:
            InputError: There is no such head.
        """
        if not 0 <= index < len(self):
            raise InputError(f"head {index}: there are heads 0 … {len(self) - 1}")
        return Head(self, index).eval()

    def evaluate(self, data: Sequence[Any]) -> list[Score]:
        """Every head's score, each on labelled data of its own.

        Raises:
            DataError: Data without targets, empty, or readable only once.
            InputError: Another number of data sets than heads.
        """
        if len(data) != len(self):
            raise InputError(f"{len(data)} data sets for {len(self)} heads: give one a head, in order")
        return [evaluate(self.head(index), each) for index, each in enumerate(data)]

    def reset(self, data: Any, *, heads: bool = False) -> "PartialZip":
        """A new module with the running statistics of the trunk's BatchNorms, and maybe the heads', measured anew.

        As in training, every BatchNorm normalises by the batch meanwhile; what is stored is the plain average.

        Raises:
            DataError: No data, empty data, or a batch of one value a channel, which has no variance.
        """
        names = set(self.trunk.tensors())
        meters = [Meter(self.parts[0].batch_norms, names)]
        for part, own in zip(self.parts, self.owns, strict=True):
            meters.append(Meter(part.batch_norms if heads else (), set(own.tensors())))
        with torch.no_grad():
            for batch in progress(read_batches(data, like=self.state_dict()), "estimating statistics", data):
                self._run(batch, range(len(self)) if heads else (), meters)
        fresh = copy.deepcopy(self)
        for meter, own in zip(meters, [fresh.trunk, *fresh.owns], strict=True):
            meter.write(own.tensors())
        return fresh

    def _run(self, batch: Batch, wanted: Sequence[int], meters: Sequence["Meter"] | None = None) -> tuple[Any, ...]:
        """The outputs of some heads; meters are those of the trunk and of every head."""
        border: list[dict[str, Tensor]] = [{} for _ in self.parts]

        def keep(name: str, value: Tensor) -> None:
            for index in wanted:
                steps = self.parts[index].read_back.get(name)
                if steps is not None:
                    own = value
                    for step in steps:
                        own = step.of(own)
                    border[index][name] = own

        first = self.parts[0]
        program = program_for(first.program, batch)
        observers = {name: partial(keep, name) for index in wanted for name in self.parts[index].read_back}
        instead = meters[0].replacements(program) if meters else {}
        run(program, self.trunk.tensors(), batch, observers, only=first.cut.trunk, instead=instead)
        outputs = []
        for index in wanted:
            part, own = self.parts[index], self.owns[index]
            program = program_for(part.program, batch)
            instead = meters[index + 1].replacements(program) if meters else {}
            answer = run(program, own.tensors(), batch, only=part.cut.head, given=border[index], instead=instead)
            outputs.append(answer)
            border[index] = {}
        return tuple(outputs)


class Head(nn.Module):
    """One head of a partial zip, with the trunk below it."""

    def __init__(self, zipped: PartialZip, index: int) -> None:
        super().__init__()
        self.zipped = zipped
        self.index = index

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model of that number would answer."""
        return self.zipped._run(Batch(args, kwargs), [self.index])[0]


class Meter:
    """Measures running statistics in passing, each BatchNorm normalising by the batch.

    Args:
        norms: A graph's BatchNorms.
        names: Tensors whose statistics are to be measured.
    """

    def __init__(self, norms: Sequence[BatchNorm], names: set[str]) -> None:
        self.norms = {norm.node: norm for norm in norms if norm.mean in names and norm.variance in names}
        self.sums: dict[str, list[Tensor]] = {}

    def replacements(self, program: Program) -> dict[str, Callable[..., Tensor]]:
        """What to run in place of every BatchNorm that is measured."""
        return {
            node.name: partial(self.normalise, self.norms[node.name], node)
            for node in program.graph.nodes
            if node.name in self.norms
        }

    def normalise(self, norm: BatchNorm, node: fx.Node, *args: Any, **_: Any) -> Tensor:
        """The node's value with the batch's own statistics, which are noted.

        Raises:
            DataError: One value a channel has no variance.
            TraceError: An operation that is no BatchNorm as modules call it.
        """
        if overload_name(node) not in BATCH_NORM_OVERLOADS:
            raise TraceError(f"{node.name}: statistics of {node.target} cannot be measured")
        x, weight, bias = args[:3]
        if x.numel() <= x.shape[1]:
            raise DataError("a batch of one sample has no variance: use larger batches, or drop it")
        units = x.movedim(1, 0).flatten(1).double()
        self.sums.setdefault(norm.node, []).append(torch.stack([units.mean(dim=1), units.var(dim=1)]))
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, norm.epsilon)

    def write(self, tensors: State) -> None:
        """Puts the averages over all batches into the tensors, in place."""
        for node, batches in self.sums.items():
            mean, variance = torch.stack(batches).mean(dim=0)
            norm = self.norms[node]
            assert norm.mean is not None
            assert norm.variance is not None
            tensors[norm.mean].copy_(mean)
            tensors[norm.variance].copy_(variance)
