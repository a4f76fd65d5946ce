"""Pointwise operations, which torch declares by a tag: labels that meet are related, nothing else happens."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from torch import fx

from isthmus.graph.operations import (
    ADDITIONS,
    COPIES,
    DEGREE_ONE,
    LINEAR_POINTWISE,
    MULTIPLICATIONS,
    ODD_FUNCTIONS,
    PRODUCTS,
    RARE_DROPOUTS,
    SUMS,
    operation_name,
)
from isthmus.tracing.execute import GainUse, Rule, Tracing, values_in
from isthmus.tracing.labels import Value, combine, lift, narrow, one_to_one, support
from isthmus.tracing.units import FIXING_ONES_LEVEL, SCALE, SIGN, UnitTable

# Evidence levels: 0 says that only linear maps were seen, 3 that a unit is used as a single number.
PERMUTATION_LEVEL = 3

# Odd functions hand on a sign; functions of degree one a positive factor.
FACTORS = {**dict.fromkeys(ODD_FUNCTIONS, SIGN), **dict.fromkeys(DEGREE_ONE, SCALE)}


def limit_value(units: UnitTable, value: Value, level: int, factors: int = 0) -> None:
    """Records evidence against richer groups, and all factors but `factors`, for all units of a value."""
    for layer in value.layers:
        units.limit(layer.ravel(), level, factors)


def pointwise(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Value:
    """Any operation that computes each element from the elements at its place."""
    operands = values_in(vars(a))
    out = combine(tracing.units, operands)
    name = operation_name(node)
    if _is_square(node, name):
        tracing.squares[node.name] = out
    elif name in SUMS:
        plain = [x for x in vars(a).values() if isinstance(x, int | float) and not isinstance(x, bool)]
        parameter = tracing.source_of(node.args[0]) if name in ADDITIONS and len(operands) == 1 else None
        if parameter is not None and getattr(a, "alpha", 1) == 1:
            tracing.offsets[node.name] = (parameter, float(plain[0]), out)
        elif len(operands) < 2 and any(plain):
            limit_value(tracing.units, out, FIXING_ONES_LEVEL)
        limit_sum(tracing.units, out, operands)
    elif name in PRODUCTS:
        use = _gain_use(tracing, node, operands, out) if name in MULTIPLICATIONS and len(operands) == 2 else None
        if use is not None:
            tracing.gain_uses.append(use)
            limit_value(tracing.units, out, 0)  # what holds the factors is no vector
        else:
            _limit_product(tracing.units, operands, len(out.shape))
        if name.startswith("aten.div") and len(operands) > 1:
            limit_value(tracing.units, operands[1], PERMUTATION_LEVEL)
    elif name not in LINEAR_POINTWISE:
        limit_value(tracing.units, out, PERMUTATION_LEVEL, FACTORS.get(name.removesuffix("_"), 0))
        tracing.nonlinear += [x.name for x in node.args if isinstance(x, fx.Node)]
    return out


def _is_square(node: fx.Node, name: str) -> bool:
    """Whether a pointwise operation squares."""
    if name == "aten.mul":
        return len(node.args) == 2 and node.args[0] is node.args[1]
    return name == "aten.square" or (name == "aten.pow" and len(node.args) == 2 and node.args[1] in (2, 2.0))


def _gain_use(tracing: Tracing, node: fx.Node, operands: Sequence[Value], out: Value) -> GainUse | None:
    """The product as one of an activation with a parameter that holds one factor a unit; None where it is none."""
    for index in (1, 0):
        factor, other = operands[index], operands[1 - index]
        source = node.args[index]
        offset = tracing.offsets.get(source.name) if isinstance(source, fx.Node) else None
        parameter = offset[0] if offset else tracing.source_of(source)
        # Another parameter is no activation; and a factor is one number a unit if it has one dimension.
        if parameter is None or tracing.source_of(node.args[1 - index]) is not None or len(factor.shape) != 1:
            continue
        axis = len(out.shape) - 1
        if factor.shape[0] != out.shape[axis] or len(other.shape) != len(out.shape) or factor.shape[0] < 2:
            return None
        joint = [layer for layer in out.layers if axis in support(layer) and support(layer) != (axis,)]
        if joint:
            return None
        return GainUse(node, axis, parameter, offset[1] if offset else 0.0, None, (out,))
    return None


def _limit_product(units: UnitTable, operands: Sequence[Value], ndim: int) -> None:
    """Records that units are used one by one where both factors vary along their axis."""
    for index, value in enumerate(operands):
        others = {d for other in (*operands[:index], *operands[index + 1 :]) for d in varying(other, ndim)}
        for layer in value.layers:
            if others & {d + ndim - len(value.shape) for d in support(layer)}:
                units.limit(layer.ravel(), PERMUTATION_LEVEL)


def varying(value: Value, ndim: int) -> set[int]:
    """The dimensions of a result of `ndim` dimensions along which an operand's labels vary."""
    offset = ndim - len(value.shape)
    return {d + offset for layer in value.layers for d in support(layer)}


def limit_sum(units: UnitTable, out: Value, operands: Sequence[Value]) -> None:
    """Records that units are used one by one where an operand of a sum gives several of them the same number.

    Where it gives that number to all, maps that keep the ones vector keep the sum.
    """
    for layer in out.layers:
        for value in operands:
            if not any(one_to_one(units, layer, lift(other, len(out.shape))) for other in value.layers):
                apart = not set(support(layer)) & varying(value, len(out.shape))
                units.limit(layer.ravel(), FIXING_ONES_LEVEL if apart else PERMUTATION_LEVEL)


def unchanged(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Any:
    """Operations that copy, cast or, in `eval()`, do nothing."""
    if getattr(a, "train", False) or getattr(a, "training", False):
        return NotImplemented  # a random mask breaks every symmetry
    return next(iter(vars(a).values()))


def _copied(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Value:
    """`copy`, `fill` and `zero`: the second operand in the shape of the first; nothing else of the first remains."""
    shape = vars(a)["self"].shape
    sources = values_in([getattr(a, "src", None), getattr(a, "value", None)])
    return Value(tuple(shape), tuple(lift(layer, len(shape)) for x in sources for layer in x.layers))


def _prelu(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Value:
    """Leaky ReLU with a learned slope, one for all channels or one a channel."""
    x: Value = vars(a)["self"]
    shape = [1] * len(x.shape)
    if a.weight.shape and a.weight.shape[0] > 1:
        shape[1] = a.weight.shape[0]
    layers = tuple(layer.reshape(shape) for layer in a.weight.layers)
    out = combine(tracing.units, [x, Value(tuple(shape), layers)])
    # A slope of each unit's own would be taken for a number that moves with the unit.
    limit_value(tracing.units, out, PERMUTATION_LEVEL, 0 if layers else SCALE)
    tracing.nonlinear += [x.name for x in node.args[:1] if isinstance(x, fx.Node)]
    return out


def _gated(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Value:
    """`glu`: the first half along a dimension, times the sigmoid of the second."""
    x: Value = vars(a)["self"]
    dim = a.dim % len(x.shape)
    halves = [narrow(tracing.units, x, dim, start, x.shape[dim] // 2) for start in (0, x.shape[dim] // 2)]
    out = combine(tracing.units, halves)
    limit_value(tracing.units, out, PERMUTATION_LEVEL)
    tracing.nonlinear += [x.name for x in node.args[:1] if isinstance(x, fx.Node)]
    return out


# Operations that work element by element although torch does not say so.
UNDECLARED = ("hardswish", "log_sigmoid", "masked_fill", "float_power", "softplus", "threshold", "where")

POINTWISE: dict[str, Rule] = {
    "pointwise": pointwise,
    **{f"aten.{name}": pointwise for name in UNDECLARED},
    "aten.copy": _copied,
    "aten.fill": _copied,
    "aten.zero": _copied,
    "aten.glu": _gated,
    **dict.fromkeys(sorted(COPIES | RARE_DROPOUTS), unchanged),
    "aten.prelu": _prelu,
    "aten._prelu_kernel": _prelu,
}
