"""Pointwise operations, which torch declares by a tag: labels that meet are related, nothing else happens."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from torch import fx

from isthmus.trace.execute import Rule, Tracing, values_in
from isthmus.trace.labels import Units, Value, lift, merge, narrow, one_to_one, support

# Evidence levels: 0 says that only linear maps were seen, 3 that a unit is used as a single number.
PERMUTATION_LEVEL = 3

# Linear in each operand, as long as only one operand carries a space.
SUMS = {"aten.add", "aten.add_", "aten.sub", "aten.sub_", "aten.rsub"}
PRODUCTS = {"aten.mul", "aten.mul_", "aten.div", "aten.div_"}
LINEAR = {"aten.neg", "aten.neg_", "aten.positive", "aten.clone", "aten.alias", "aten._to_copy", "aten.to"}


def limit_value(units: Units, value: Value, level: int) -> None:
    """Records evidence against richer groups for all units of a value."""
    for layer in value.layers:
        units.limit(layer.ravel(), level)


def pointwise(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Value:
    """Any operation that computes each element from the elements at its place."""
    operands = values_in(vars(a))
    out = merge(tracing.units, operands)
    name = str(getattr(node.target, "overloadpacket", node.target))
    if name in SUMS:
        plain = [x for x in vars(a).values() if isinstance(x, int | float) and not isinstance(x, bool)]
        if len(operands) < 2 and any(plain):
            limit_value(tracing.units, out, PERMUTATION_LEVEL)
        limit_sum(tracing.units, out, operands)
    elif name in PRODUCTS:
        for index, value in enumerate(operands):
            others = {d for other in operands[:index] + operands[index + 1 :] for d in varying(other, len(out.shape))}
            if others & varying(value, len(out.shape)):
                limit_value(tracing.units, value, PERMUTATION_LEVEL)
        if name.startswith("aten.div") and len(operands) > 1:
            limit_value(tracing.units, operands[1], PERMUTATION_LEVEL)
    elif name not in LINEAR:
        limit_value(tracing.units, out, PERMUTATION_LEVEL)
        tracing.nonlinear += [x.name for x in node.args if isinstance(x, fx.Node)]
    return out


def varying(value: Value, ndim: int) -> set[int]:
    """The dimensions of a result of `ndim` dimensions along which an operand's labels vary."""
    offset = ndim - len(value.shape)
    return {d + offset for layer in value.layers for d in support(layer)}


def limit_sum(units: Units, out: Value, operands: Sequence[Value]) -> None:
    """Records that units are used one by one where an operand of a sum gives several of them the same number."""
    for layer in out.layers:
        for value in operands:
            if not any(one_to_one(units, layer, lift(other, len(out.shape))) for other in value.layers):
                units.limit(layer.ravel(), PERMUTATION_LEVEL)


def unchanged(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Any:
    """Operations that copy, cast or, in `eval()`, do nothing."""
    if getattr(a, "train", False) or getattr(a, "training", False):
        return NotImplemented  # a random mask breaks every symmetry
    return next(iter(vars(a).values()))


def copied(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Value:
    """`copy`, `fill` and `zero`: the second operand in the shape of the first, of which nothing else remains."""
    shape = vars(a)["self"].shape
    sources = values_in([getattr(a, "src", None), getattr(a, "value", None)])
    return Value(tuple(shape), tuple(lift(layer, len(shape)) for x in sources for layer in x.layers))


def prelu(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Value:
    """Leaky ReLU with a learned slope, one for all channels or one a channel."""
    x: Value = vars(a)["self"]
    shape = [1] * len(x.shape)
    if a.weight.shape and a.weight.shape[0] > 1:
        shape[1] = a.weight.shape[0]
    layers = tuple(layer.reshape(shape) for layer in a.weight.layers)
    out = merge(tracing.units, [x, Value(tuple(shape), layers)])
    limit_value(tracing.units, out, PERMUTATION_LEVEL)
    tracing.nonlinear += [x.name for x in node.args[:1] if isinstance(x, fx.Node)]
    return out


def gated(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Value:
    """`glu`: the first half along a dimension, times the sigmoid of the second."""
    x: Value = vars(a)["self"]
    dim = a.dim % len(x.shape)
    halves = [narrow(tracing.units, x, dim, start, x.shape[dim] // 2) for start in (0, x.shape[dim] // 2)]
    out = merge(tracing.units, halves)
    limit_value(tracing.units, out, PERMUTATION_LEVEL)
    tracing.nonlinear += [x.name for x in node.args[:1] if isinstance(x, fx.Node)]
    return out


# Operations that work element by element although torch does not say so.
UNDECLARED = ("hardswish", "log_sigmoid", "masked_fill", "float_power", "softplus", "threshold", "where")

POINTWISE: dict[str, Rule] = {
    "pointwise": pointwise,
    **{f"aten.{name}": pointwise for name in UNDECLARED},
    "aten.copy": copied,
    "aten.fill": copied,
    "aten.zero": copied,
    "aten.glu": gated,
    "aten.clone": unchanged,
    "aten.alias": unchanged,
    "aten.contiguous": unchanged,
    "aten.detach": unchanged,
    "aten.detach_": unchanged,
    "aten.lift_fresh_copy": unchanged,
    "aten.to": unchanged,
    "aten._to_copy": unchanged,
    "aten.type_as": unchanged,
    "aten.dropout": unchanged,
    "aten.feature_dropout": unchanged,
    "aten.alpha_dropout": unchanged,
    "aten.prelu": prelu,
    "aten._prelu_kernel": prelu,
}
