"""State dicts: their type, and the precision and device that stand for a whole one."""

from collections.abc import Mapping

import torch
from torch import Tensor

State = Mapping[str, Tensor]


def first_float(state: Mapping[str, Tensor]) -> Tensor:
    """A tensor whose precision and device stand for a whole state's."""
    return next((tensor for tensor in state.values() if tensor.is_floating_point()), torch.zeros(()))


def upcast(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with floating-point tensors in float32 at least."""
    return {
        name: tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
