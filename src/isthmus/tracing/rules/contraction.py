"""Contractions: a product of two values, element by element, and a sum over the units they share."""

from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import fx

from isthmus.symmetry.traced_graph import Contraction
from isthmus.tracing.blocks import pin, reduce
from isthmus.tracing.execute import Rule, Tracing, freeze_value
from isthmus.tracing.labels import Value, combine, compress, reshape, support, unsqueeze, with_rigid
from isthmus.tracing.rules.pointwise import PERMUTATION_LEVEL, limit_sum, varying
from isthmus.tracing.units import ORTHOGONAL_LEVEL, Labels, UnitTable


def contract(units: UnitTable, left: Value, right: Value, dims: list[int]) -> Value:
    """The product of two aligned values, summed over `dims`; notes on which side of the sum parameters' units lie."""
    ndim = max(len(left.shape), len(right.shape))
    gone = {d % ndim for d in dims}
    # Only in a product with a parameter is it known which factor moves by T and which by T⁻¹.
    one_parameter = (left.source is None) != (right.source is None)
    for value, other in ((left, right), (right, left)):
        offset = ndim - len(value.shape)
        one_to_one = _is_told_apart(units, other, ndim, gone)
        for layer in value.layers:
            along = {d + offset for d in support(layer)}
            summed = along & gone
            if summed and not one_parameter:
                units.limit(layer.ravel(), ORTHOGONAL_LEVEL)
            # Units that are multiplied one by one cannot be mixed, nor can those that read the same number.
            if along <= varying(other, ndim) - gone or (summed and not one_to_one):
                units.limit(layer.ravel(), PERMUTATION_LEVEL)
            if value.source is None:
                continue
            (units.contracted if summed else units.kept)[layer.ravel()] = True
    product = combine(units, [left, right])
    return reduce(units, product, sorted(gone))


def _is_told_apart(units: UnitTable, value: Value, ndim: int, gone: set[int]) -> bool:
    """Whether no two of the positions that are summed over hold the same number: only such can be mixed at will."""
    offset = ndim - len(value.shape)
    shape = tuple(size if d + offset in gone else 1 for d, size in enumerate(value.shape))
    if any(_differs_in_every_row(units, layer, gone, offset) for layer in value.layers):
        return True
    telling = [layer for layer in value.layers if {d + offset for d in support(layer)} <= gone]
    labels = [np.zeros(int(np.prod(shape)), dtype=np.int64)]
    labels += [np.broadcast_to(units.find(layer), shape).ravel() for layer in telling]
    return np.unique(np.stack(labels), axis=1).shape[1] == len(labels[0])


def _differs_in_every_row(units: UnitTable, layer: Labels, gone: set[int], offset: int) -> bool:
    """Whether a layer that varies along one summed dimension, and others, gives each place of a sum another label."""
    summed = [d for d in support(layer) if d + offset in gone]
    if len(gone) != 1 or len(summed) != 1:
        return False
    rows = np.sort(np.moveaxis(units.find(layer), summed[0], -1), axis=-1)
    return bool((rows[..., 1:] != rows[..., :-1]).all())


def _record(tracing: Tracing, node: fx.Node, weight: object, bias: object, channel: int, output: int = 0) -> None:
    """Remembers a contraction of an activation with a parameter."""
    name = tracing.source_of(weight)
    source = node.args[0]
    if name is not None and isinstance(source, fx.Node):
        tracing.contractions.append(Contraction(node.name, source.name, name, tracing.source_of(bias), channel, output))


def _linear(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Value:
    """`x Wᵀ + b`."""
    _record(tracing, node, argument(node, 1), argument(node, 2), len(a.input.shape) - 1)
    out = contract(tracing.units, unsqueeze(a.input, -2), a.weight, [-1])
    return with_bias(tracing.units, out, a.bias)


def with_bias(units: UnitTable, out: Value, bias: Value | None) -> Value:
    """The sum of a product and a bias; units along dimensions in which the bias does not vary all receive it alike."""
    if bias is None:
        return out
    total = combine(units, [out, bias])
    limit_sum(units, total, [out, bias])
    return total


def argument(node: fx.Node, index: int) -> object:
    """A positional graph argument, or None where it was left out."""
    return node.args[index] if index < len(node.args) else None


def _convolution(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Value:
    """Convolutions of any dimension, grouped or not, plain or transposed."""
    units = tracing.units
    transposed = bool(getattr(a, "transposed", False)) or "transpose" in str(node.target)
    x, weight = a.input, a.weight
    spatial = len(weight.shape) - 2
    batched = len(x.shape) == spatial + 2
    out_shape = tuple(int(s) for s in node.meta["val"].shape)
    x = pin(units, x, range(-spatial, 0), "lies along positions that a convolution slides over")
    x = reshape(x, x.shape[: len(x.shape) - spatial])
    weight = _split_by_group(tracing, weight, a.groups, transposed)
    weight = pin(units, weight, range(2, len(weight.shape)), "kernel positions")
    weight = reshape(weight, weight.shape[:2])
    groups, channels = a.groups, x.shape[-1]
    x = reshape(x, (*x.shape[:-1], groups, 1, channels // groups))
    if transposed:  # weight [in, out / groups]
        weight = reshape(weight, (groups, channels // groups, weight.shape[1]))
        weight = Value(
            (groups, weight.shape[2], channels // groups),
            tuple(layer.transpose(0, 2, 1) for layer in weight.layers),
            source=weight.source,
        )
    else:
        weight = reshape(weight, (groups, weight.shape[0] // groups, weight.shape[1]))
    out = contract(units, x, weight, [-1])
    out = reshape(out, (*out.shape[:-2], out.shape[-2] * out.shape[-1]))
    out = with_bias(units, out, a.bias)
    if not transposed or groups == 1:  # a transposed grouped weight has no dimension of all produced units
        _record(tracing, node, argument(node, 1), argument(node, 2), 1 if batched else 0, int(transposed))
    out = reshape(out, (*out.shape, *[1] * spatial))
    return with_rigid(units, out, out_shape, range(len(out_shape) - spatial, len(out_shape)))


def _split_by_group(tracing: Tracing, weight: Value, groups: int, transposed: bool) -> Value:
    """A grouped convolution's weight with its shared dimension labelled anew for every group.

    A parameter's second dimension starts with one unit per index, the same for all groups; yet each group reads units
    of its own. As long as no operation has used these labels, they can be replaced by labels that vary with the group.
    """
    if groups == 1 or weight.source is None or weight is not tracing.parameters.get(weight.source):
        return weight
    units = tracing.units
    shared = [layer for layer in weight.layers if support(layer) == (1,)]
    if not shared or units.kept[shared[0].ravel()].any() or units.contracted[shared[0].ravel()].any():
        return weight
    rows, per_group = weight.shape[0], weight.shape[1]
    ids = units.fresh(groups * per_group).reshape(groups, per_group)
    layer = np.repeat(ids, rows // groups, axis=0).reshape(rows, per_group, *[1] * (len(weight.shape) - 2))
    layers = tuple(compress(layer) if old is shared[0] else old for old in weight.layers)
    split = Value(weight.shape, layers, source=weight.source)
    # Rows of one group and the group's own labels belong together from the start.
    first = next((old for old in weight.layers if support(old) == (0,)), None)
    if first is not None:
        units.relate(first, layer)
    tracing.parameters[weight.source] = split
    for name, value in tracing.values.items():
        if value is weight:
            tracing.values[name] = split
    return split


def _matmul(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Value:
    """Matrix products of any rank, batched or not."""
    left, right = _values(a)
    rows, columns = len(left.shape) > 1, len(right.shape) > 1
    product = matmul_aligned(tracing, left if rows else unsqueeze(left, 0), right if columns else unsqueeze(right, 1))
    product = product if columns else _reshape_away(product, -1)
    return product if rows else _reshape_away(product, -2 if columns else -1)


def _values(a: SimpleNamespace) -> tuple[Value, Value]:
    """The two factors, whatever the schema calls them."""
    named = vars(a)
    right = next(named[name] for name in ("mat2", "other", "vec", "tensor") if name in named)
    return named["self" if "self" in named else "input"], right


def _reshape_away(value: Value, dim: int) -> Value:
    """The value without a dimension of size 1."""
    dim %= len(value.shape)
    return reshape(value, value.shape[:dim] + value.shape[dim + 1 :])


def matmul_aligned(tracing: Tracing, left: Value, right: Value) -> Value:
    """`left @ right` for values of rank two and more."""
    right = _swap_last(right)  # [..., out, in]
    return contract(tracing.units, unsqueeze(left, -2), unsqueeze(right, -3), [-1])


def _swap_last(value: Value) -> Value:
    """The value with its last two dimensions swapped."""
    order = [*range(len(value.shape) - 2), len(value.shape) - 1, len(value.shape) - 2]
    shape = tuple(value.shape[d] for d in order)
    return Value(shape, tuple(layer.transpose(order) for layer in value.layers), source=value.source)


def _addmm(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Value:
    """`bias + left @ right`."""
    named = vars(a)
    right = named["mat2"] if "mat2" in named else named["batch2"]
    left = named["mat1"] if "mat1" in named else named["batch1"]
    return with_bias(tracing.units, matmul_aligned(tracing, left, right), named["self"])


def _einsum(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Any:
    """Einstein sums of two operands without repeated or elided indices; others have no rule."""
    equation = a.equation.replace(" ", "")
    operands, arrow, result = equation.partition("->")
    terms = operands.split(",")
    if not arrow or "." in equation or any(len(set(term)) < len(term) for term in terms) or len(terms) > 2:
        return NotImplemented
    letters = result + "".join(sorted(set("".join(terms)) - set(result)))
    aligned = [_spread_letters(value, term, letters) for value, term in zip(a.tensors, terms, strict=True)]
    summed = [letters.index(x) for x in letters if x not in result]
    if len(aligned) == 1:
        return reduce(tracing.units, aligned[0], summed)
    return contract(tracing.units, aligned[0], aligned[1], summed)


def _spread_letters(value: Value, term: str, letters: str) -> Value:
    """The value with one dimension for each of `letters`, of size 1 where `term` lacks it."""
    order = [term.index(x) for x in letters if x in term]
    shape = tuple(value.shape[term.index(x)] if x in term else 1 for x in letters)
    layers = []
    for layer in value.layers:
        moved = layer.transpose(order)
        layers.append(
            moved.reshape(
                [moved.shape[[x for x in letters if x in term].index(x)] if x in term else 1 for x in letters]
            )
        )
    return Value(shape, tuple(layers), source=value.source)


def _embedding(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Value:
    """Rows of a table, looked up by index: the rows are fixed, what lies along them is not."""
    units = tracing.units
    table = pin(units, a.weight, [0], "rows of a table that inputs look up")
    for layer in table.layers:
        units.kept[layer.ravel()] = True
    freeze_value(units, a.indices, "indices into a table")
    rows = [1] * len(a.indices.shape)
    out = reshape(table, (*rows, *table.shape[1:]))
    shape = (*a.indices.shape, *table.shape[1:])
    return with_rigid(units, out, shape, range(len(a.indices.shape)))


CONTRACTIONS: dict[str, Rule] = {
    "aten.linear": _linear,
    "aten.conv1d": _convolution,
    "aten.conv2d": _convolution,
    "aten.conv3d": _convolution,
    "aten.convolution": _convolution,
    "aten.conv_transpose1d": _convolution,
    "aten.conv_transpose2d": _convolution,
    "aten.conv_transpose3d": _convolution,
    "aten.matmul": _matmul,
    "aten.mm": _matmul,
    "aten.bmm": _matmul,
    "aten.mv": _matmul,
    "aten.dot": _matmul,
    "aten.vdot": _matmul,
    "aten.addmm": _addmm,
    "aten.baddbmm": _addmm,
    "aten.einsum": _einsum,
    "aten.embedding": _embedding,
}
