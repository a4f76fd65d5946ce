"""Normalisations: statistics over some axes, and a product with gains that belong to units."""

from dataclasses import replace
from types import SimpleNamespace

from torch import fx

from isthmus.symmetry.traced_graph import BatchNorm
from isthmus.tracing.blocks import reduce
from isthmus.tracing.execute import GainUse, Rule, Tracing
from isthmus.tracing.labels import Value, combine, reshape, support
from isthmus.tracing.rules.contraction import argument
from isthmus.tracing.rules.pointwise import PERMUTATION_LEVEL, limit_value
from isthmus.tracing.units import FIXING_ONES_LEVEL, ORTHOGONAL_LEVEL, UnitTable


def _along(value: Value | None, dim: int, ndim: int) -> list[Value]:
    """A vector laid along dimension `dim` of a value with `ndim` dimensions; nothing where it is absent."""
    if value is None:
        return []
    shape = [1] * ndim
    shape[dim] = value.shape[0]
    return [reshape(value, shape)]


def _batch_norm(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Value:
    """Normalisation by a channel's statistics, stored or of the batch: elementwise along the channel axis."""
    x: Value = a.input
    tensors = [a.weight, a.bias, a.running_mean, a.running_var]
    weight, bias, mean, variance = (tracing.source_of(argument(node, index)) for index in range(1, 5))
    source = node.args[0]
    if isinstance(source, fx.Node):
        tracing.batch_norms.append(BatchNorm(node.name, source.name, weight, bias, mean, variance, a.eps))
    parts = [part for tensor in tensors for part in _along(tensor, 1, len(x.shape))]
    use_batch = a.training if hasattr(a, "training") else getattr(a, "use_input_stats", False)
    if use_batch or a.running_mean is None:
        spatial = [d for d in range(len(x.shape)) if d != 1]
        parts.append(reduce(tracing.units, x, spatial, keepdim=True))
    return normalised(tracing.units, x, parts)


def normalised(units: UnitTable, x: Value, parts: list[Value]) -> Value:
    """`x` combined with statistics and gains, which ties units to their own gain: permutations only."""
    out = combine(units, [x, *parts])
    limit_value(units, out, PERMUTATION_LEVEL)
    return out


def _layer_norm(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Value:
    """Normalisation over the last dimensions of each sample: by a norm (`rms_norm`), or by the norm of centred values.

    Rotations keep a norm; rotations that keep the ones vector keep the norm of centred values. Neither
    keep gains, but what reads the result may be able to take these in.
    """
    x: Value = a.input
    count = len(a.normalized_shape)
    statistics = reduce(tracing.units, x, range(-count, 0), keepdim=True)
    gains = [value for value in (a.weight, getattr(a, "bias", None)) if value is not None]
    if count > 1:
        return normalised(tracing.units, x, [statistics, *gains])
    out = combine(tracing.units, [x, statistics, *gains])
    axis = len(x.shape) - 1
    centres = str(getattr(node.target, "overloadpacket", node.target)) != "aten.rms_norm"
    level = FIXING_ONES_LEVEL if centres else ORTHOGONAL_LEVEL
    for layer in out.layers:
        if axis in support(layer):
            tracing.units.limit(layer.ravel(), level if support(layer) == (axis,) else PERMUTATION_LEVEL)
    if a.weight is None:
        return out
    weight = tracing.source_of(_named_argument(node, 2, "weight"))
    bias = tracing.source_of(_named_argument(node, 3, "bias")) if getattr(a, "bias", None) is not None else None
    if weight is None or (bias is None and getattr(a, "bias", None) is not None):
        limit_value(tracing.units, out, PERMUTATION_LEVEL)
    else:
        tracing.gain_uses.append(GainUse(node, axis, weight, 0.0, bias, (out,)))
    return out


def _named_argument(node: fx.Node, index: int, name: str) -> object:
    """A graph argument that is given by place or by name; None where it was left out."""
    return node.kwargs.get(name, argument(node, index))


def _group_norm(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Value:
    """Normalisation over each block of channels."""
    x: Value = a.input
    batch, channels, *spatial = x.shape
    blocks = reshape(x, (batch, a.num_groups, channels // a.num_groups, *spatial))
    statistics = reduce(tracing.units, blocks, range(2, len(blocks.shape)), keepdim=True)
    out = reshape(combine(tracing.units, [blocks, statistics]), x.shape)
    gains = _along(a.weight, 1, len(x.shape)) + _along(a.bias, 1, len(x.shape))
    return normalised(tracing.units, out, gains)


def _softmax(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Value:
    """Normalised exponentials along one dimension."""
    x: Value = vars(a)["self"]
    return normalised(tracing.units, x, [reduce(tracing.units, x, [a.dim], keepdim=True)])


def _instance_norm(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Value:
    """Normalisation over the spatial positions of each sample and channel."""
    x: Value = a.input
    statistics = reduce(tracing.units, x, range(2, len(x.shape)), keepdim=True)
    tensors = [a.weight, a.bias] + ([] if a.use_input_stats else [a.running_mean, a.running_var])
    parts = [part for tensor in tensors for part in _along(tensor, 1, len(x.shape))]
    return normalised(tracing.units, x, [statistics, *parts])


def _weight_norm(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Value:
    """A weight's direction `v / ‖v‖` times its size `g`, the norm being taken over all dimensions but `dim`."""
    v: Value = a.v
    dims = [d for d in range(len(v.shape)) if d != a.dim]
    out = normalised(tracing.units, v, [reduce(tracing.units, v, dims, keepdim=True), a.g])
    return replace(out, source=v.source)


NORMALISATIONS: dict[str, Rule] = {
    "aten.batch_norm": _batch_norm,
    "aten.layer_norm": _layer_norm,
    "aten.rms_norm": _layer_norm,
    "aten.group_norm": _group_norm,
    "aten.instance_norm": _instance_norm,
    "aten._weight_norm": _weight_norm,
    "aten.softmax": _softmax,
    "aten._softmax": _softmax,
    "aten.log_softmax": _softmax,
    "aten._log_softmax": _softmax,
}
