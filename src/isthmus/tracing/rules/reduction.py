"""Symmetric reductions: sums, means, extremes and norms over whole axes."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from torch import fx

from isthmus.graph.operations import LINEAR_REDUCTIONS, operation_name
from isthmus.tracing.blocks import reduce
from isthmus.tracing.execute import Rule, Tracing, freeze_value, output_shapes
from isthmus.tracing.labels import Value, rigid_value, support
from isthmus.tracing.rules.pointwise import PERMUTATION_LEVEL, limit_value, pointwise
from isthmus.tracing.units import FIXING_ONES_LEVEL, ORTHOGONAL_LEVEL


def _reduction(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Value:
    """Reductions in which the order of elements does not matter."""
    x: Value = vars(a)["self"]
    dims = _dimensions(a, len(x.shape))
    name = operation_name(node)
    reduced = {d % len(x.shape) for d in dims} if x.shape else set()
    level = _whole_axis_level(name, a)
    is_square = name in LINEAR_REDUCTIONS and any(x is square for square in tracing.squares.values())
    for layer in x.layers:
        along = set(support(layer))
        if is_square and along <= reduced:
            continue  # a squared norm; `absorption.settle` looks at all that is done with the square
        if name in LINEAR_REDUCTIONS and not along & reduced:
            continue  # a mean over positions is linear in the units
        tracing.units.limit(layer.ravel(), level if along <= reduced else PERMUTATION_LEVEL)
    return reduce(tracing.units, x, dims, keepdim=bool(getattr(a, "keepdim", False)))


def _whole_axis_level(name: str, a: SimpleNamespace) -> int:
    """Evidence level of units that are reduced all together: what the result says of a vector of units.

    A sum is kept by maps that keep the ones vector, a Euclidean norm by rotations, a variance by maps that do both.
    """
    if name in LINEAR_REDUCTIONS or name in ("aten.var", "aten.std"):
        return FIXING_ONES_LEVEL
    order = getattr(a, "ord", None) if name == "aten.linalg_vector_norm" else getattr(a, "p", None)
    if name in ("aten.linalg_vector_norm", "aten.norm") and order == 2:
        return ORTHOGONAL_LEVEL
    return PERMUTATION_LEVEL


def _dimensions(a: SimpleNamespace, ndim: int) -> Sequence[int]:
    """The dimensions that a reduction names; all where it names none."""
    return dimensions_of(getattr(a, "dim", None), ndim)


def dimensions_of(dim: Any, ndim: int) -> Sequence[int]:
    """The dimensions that an argument stands for; all where it is left out."""
    if dim is None or dim == []:
        return range(ndim)
    return [dim] if isinstance(dim, int) else list(dim)


def _extreme_with_index(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Any:
    """`max(dim)` and the like: the values are a reduction; the indices name positions, which fixes the axis."""
    if getattr(a, "other", None) is not None:
        return pointwise(tracing, node, a)  # the larger of two tensors, element by element
    if getattr(a, "dim", None) is None:
        return _reduction(tracing, node, a)
    x: Value = vars(a)["self"]
    if any(user.args[1] != 0 and user.users for user in node.users):
        freeze_value(tracing.units, x, "its index is taken by an extreme")
    limit_value(tracing.units, x, PERMUTATION_LEVEL)
    values = reduce(tracing.units, x, [a.dim], keepdim=bool(getattr(a, "keepdim", False)))
    return [values, rigid_value(tracing.units, values.shape)]


def _index_of_extreme(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Any:
    """`argmax` and `argmin`: an index names a position, which fixes the axis."""
    freeze_value(tracing.units, vars(a)["self"], "its index is taken by an extreme")
    shape = output_shapes(node)
    assert isinstance(shape, tuple)
    return rigid_value(tracing.units, shape)


REDUCTIONS: dict[str, Rule] = {
    "aten.mean": _reduction,
    "aten.sum": _reduction,
    "aten.amax": _reduction,
    "aten.amin": _reduction,
    "aten.prod": _reduction,
    "aten.var": _reduction,
    "aten.std": _reduction,
    "aten.logsumexp": _reduction,
    "aten.norm": _reduction,
    "aten.linalg_vector_norm": _reduction,
    "aten.any": _reduction,
    "aten.all": _reduction,
    "aten.max": _extreme_with_index,
    "aten.min": _extreme_with_index,
    "aten.argmax": _index_of_extreme,
    "aten.argmin": _index_of_extreme,
}
