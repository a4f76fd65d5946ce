"""Operations that make a constant: nothing of what they are given matters but its shape."""

from types import SimpleNamespace

import torch
from torch import fx

from isthmus.tracing.execute import LARGEST_CONSTANT, Rule, Tracing, output_shapes
from isthmus.tracing.labels import Value, constant_value

FILLS = {"zeros": 0, "ones": 1}


def _filled(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Value:
    """A tensor whose every entry is the same number."""
    shape = output_shapes(node)
    assert isinstance(shape, tuple)
    name = str(getattr(node.target, "overloadpacket", node.target))
    number = next((fill for word, fill in FILLS.items() if word in name), getattr(a, "fill_value", None))
    if not isinstance(number, int | float) or torch.Size(shape).numel() > LARGEST_CONSTANT:
        return Value(shape)
    return constant_value(tracing.units, torch.full(shape, number, dtype=node.meta["val"].dtype))


CONSTANTS: dict[str, Rule] = {
    f"aten.{name}": _filled for name in ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
}
