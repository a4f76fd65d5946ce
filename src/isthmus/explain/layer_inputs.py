"""What the layers of a network read: second moments of their inputs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from isthmus.data.batches import check_data
from isthmus.graph.reader import node_shapes, observe_batch, program_for
from isthmus.observe.layers import Layer, chunked_product, input_rows, layers_of, sample_positions, seen_by, take
from isthmus.state import State
from isthmus.symmetry.symmetry import Symmetry


def input_grams(
    state: State, symmetry: Symmetry, data: Any, samples: int, rows: int, seed: int
) -> dict[str, Float[Tensor, "blocks columns columns"]]:
    """The uncentred second moment of what each layer's product reads, a matrix a group of channels, by weight."""
    check_data(data)
    batches = take(data, samples, state)
    layers = layers_of(symmetry)
    count = max(1, -(-rows // sum(batch.size for batch in batches)))
    generator = torch.Generator().manual_seed(seed)
    totals: dict[str, Tensor] = {}
    seen_rows: dict[str, int] = {}
    for batch in batches:
        program = program_for(symmetry.traced.program, batch)
        shapes = node_shapes(program)
        seen: dict[str, Tensor] = {}
        observers = {layer.contraction.source: seen_by(seen, layer.contraction.source) for layer in layers}
        observe_batch(program, state, batch, observers)
        for layer in layers:
            name, found = layer.contraction.weight, _layer_rows(layer, seen, shapes, state, count, generator)
            products = torch.stack([chunked_product(part, part) for part in found]).cpu()
            totals[name] = totals[name] + products if name in totals else products
            seen_rows[name] = seen_rows.get(name, 0) + len(found[0])
    return {name: total / seen_rows[name] for name, total in totals.items()}


def _layer_rows(
    layer: Layer,
    seen: Mapping[str, Tensor],
    shapes: Mapping[str, Sequence[int]],
    state: State,
    count: int,
    generator: torch.Generator,
) -> list[Float[Tensor, "rows inputs"]]:
    """What a layer reads at up to `count` positions of every sample, in float32 at least, a matrix a group."""
    shape = shapes[layer.contraction.node]
    positions = sample_positions(layer, shape, count, generator)
    value = seen[layer.contraction.source]
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    return input_rows(layer, value, positions, state[layer.contraction.weight].shape[2:], shape)
