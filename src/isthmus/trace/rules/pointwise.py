"""Pointwise operations, which torch declares by a tag: labels that meet are related, nothing else happens."""

from types import SimpleNamespace
from typing import Any

from torch import fx

from isthmus.trace.execute import Rule, Tracing, values_in
from isthmus.trace.labels import Units, Value, compress, merge, support

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
        # A number, or a value that is the same for all units, moves under a change of basis.
        plain = [x for x in vars(a).values() if isinstance(x, int | float) and not isinstance(x, bool)]
        constant = any(not value.layers for value in operands) or (len(operands) < 2 and any(plain))
        if constant or not all(same_layout(out, value) for value in operands):
            limit_value(tracing.units, out, PERMUTATION_LEVEL)
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


def same_layout(out: Value, value: Value) -> bool:
    """Whether an operand carries labels along every dimension that the result does."""
    return varying(out, len(out.shape)) == varying(value, len(out.shape))


def unchanged(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Any:
    """Operations that copy, cast or, in `eval()`, do nothing."""
    if getattr(a, "train", False) or getattr(a, "training", False):
        return NotImplemented  # a random mask breaks every symmetry
    return next(iter(vars(a).values()))


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


def narrow(units: Units, value: Value, dim: int, start: int, length: int) -> Value:
    """A slice of a value."""
    shape = (*value.shape[:dim], length, *value.shape[dim + 1 :])
    cut = [x.take(range(start, start + length), axis=dim) if x.shape[dim] > 1 else x for x in value.layers]
    layers = [compress(layer) for layer in cut]
    for layer in layers:
        units.occur(layer)
    return Value(shape, tuple(layer for layer in layers if support(layer)), source=value.source)


# Operations that work element by element although torch does not say so.
UNDECLARED = ("hardswish", "log_sigmoid", "masked_fill", "float_power", "softplus", "threshold", "copy")

POINTWISE: dict[str, Rule] = {
    "pointwise": pointwise,
    **{f"aten.{name}": pointwise for name in UNDECLARED},
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
