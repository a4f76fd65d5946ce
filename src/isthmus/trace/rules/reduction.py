"""Symmetric reductions: sums, means, extremes and norms over whole axes."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from torch import fx

from isthmus.trace.execute import Rule, Tracing, freeze_value, output_shapes
from isthmus.trace.labels import Value, reduce, rigid_value, support
from isthmus.trace.rules.pointwise import PERMUTATION_LEVEL, limit_value, pointwise

LINEAR = {"aten.mean", "aten.sum"}


def reduction(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Value:
    """Reductions in which the order of elements does not matter."""
    x: Value = vars(a)["self"]
    dims = dimensions(a, len(x.shape))
    name = str(getattr(node.target, "overloadpacket", node.target))
    reduced = {d % len(x.shape) for d in dims} if x.shape else set()
    for layer in x.layers:
        # A mean over positions is linear in the units; anything that mixes units, or an extreme, is not.
        if name not in LINEAR or set(support(layer)) & reduced:
            tracing.units.limit(layer.ravel(), PERMUTATION_LEVEL)
    return reduce(tracing.units, x, dims, keepdim=bool(getattr(a, "keepdim", False)))


def dimensions(a: SimpleNamespace, ndim: int) -> Sequence[int]:
    """The dimensions that a reduction names; all where it names none."""
    dim = getattr(a, "dim", None)
    if dim is None or dim == []:
        return range(ndim)
    return [dim] if isinstance(dim, int) else list(dim)


def extreme_with_index(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Any:
    """`max(dim)` and the like: the values are a reduction; the indices name positions, which fixes the axis."""
    if getattr(a, "other", None) is not None:
        return pointwise(tracing, node, a)  # the larger of two tensors, element by element
    if getattr(a, "dim", None) is None:
        return reduction(tracing, node, a)
    x: Value = vars(a)["self"]
    if any(user.args[1] != 0 and user.users for user in node.users):
        freeze_value(tracing.units, x, "its index is taken by an extreme")
    limit_value(tracing.units, x, PERMUTATION_LEVEL)
    values = reduce(tracing.units, x, [a.dim], keepdim=bool(getattr(a, "keepdim", False)))
    return [values, rigid_value(tracing.units, values.shape)]


def index_of_extreme(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Any:
    """`argmax` and `argmin`: an index names a position, which fixes the axis."""
    freeze_value(tracing.units, vars(a)["self"], "its index is taken by an extreme")
    shape = output_shapes(node)
    assert isinstance(shape, tuple)
    return rigid_value(tracing.units, shape)


REDUCTIONS: dict[str, Rule] = {
    "aten.mean": reduction,
    "aten.sum": reduction,
    "aten.amax": reduction,
    "aten.amin": reduction,
    "aten.prod": reduction,
    "aten.var": reduction,
    "aten.std": reduction,
    "aten.logsumexp": reduction,
    "aten.norm": reduction,
    "aten.linalg_vector_norm": reduction,
    "aten.any": reduction,
    "aten.all": reduction,
    "aten.max": extreme_with_index,
    "aten.min": extreme_with_index,
    "aten.argmax": index_of_extreme,
    "aten.argmin": index_of_extreme,
}
