"""Fused attention: scores, softmax and the weighted sum in one operation."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import fx

from isthmus.tracing.blocks import reduce
from isthmus.tracing.execute import Rule, Tracing
from isthmus.tracing.labels import Value, combine, rigid_layers, unsqueeze
from isthmus.tracing.rules.contraction import contract, matmul_aligned
from isthmus.tracing.rules.normalisation import normalised


def _scaled_dot_product_attention(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Any:
    """`softmax(q kᵀ · scale + mask) v`, head by head; a key head may serve several query heads that follow it.

    Source: Vaswani et al., Attention Is All You Need (2017).
    """
    if a.dropout_p:
        return NotImplemented  # a random mask breaks every symmetry
    units, query, key, value = tracing.units, a.query, a.key, a.value
    if a.enable_gqa:
        key, value = (_repeated(x, -3, query.shape[-3] // x.shape[-3]) for x in (key, value))
    scores = contract(units, unsqueeze(query, -2), unsqueeze(key, -3), [-1])
    masks = [] if a.attn_mask is None else [a.attn_mask]
    if a.is_causal:
        shape = (query.shape[-2], key.shape[-2])
        masks.append(Value(shape, rigid_layers(units, shape, (0, 1))))
    scores = combine(units, [scores, *masks])
    weights = normalised(units, scores, [reduce(units, scores, [-1], keepdim=True)])
    return matmul_aligned(tracing, weights, value)


def _repeated(value: Value, dim: int, times: int) -> Value:
    """The value with each slice along `dim` repeated `times` in a row."""
    dim %= len(value.shape)
    shape: Sequence[int] = (*value.shape[:dim], value.shape[dim] * times, *value.shape[dim + 1 :])
    return Value(tuple(shape), tuple(np.repeat(x, times, dim) if x.shape[dim] > 1 else x for x in value.layers))


ATTENTION: dict[str, Rule] = {
    "aten.scaled_dot_product_attention": _scaled_dot_product_attention,
}
