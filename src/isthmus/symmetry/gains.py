"""Norm gains: the factors and shifts behind a normalisation, taken exactly into what reads them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from isthmus.errors import ModelError
from isthmus.state import widened
from isthmus.symmetry.spaces import Consumer, Gain
from isthmus.symmetry.symmetry import Symmetry

# A gain this much smaller than the largest one is not divided by: a shift would grow by the inverse.
SMALLEST_GAIN = 1e-6


def foldable(symmetry: Symmetry) -> tuple[Gain, ...]:
    """The gains whose every reader can take them in."""
    return tuple(gain for gain in symmetry.gains if not gain.obstacle)


def has_diagonal_sites(symmetry: Symmetry) -> bool:
    """Whether some space allows linear maps only once gains are folded."""
    return any(site.role == "diagonal" for space in symmetry for site in space.sites)


def fold_state(state: Mapping[str, Tensor], symmetry: Symmetry) -> dict[str, Tensor]:
    """The state of a network that computes the same, every foldable gain made one and every shift zero where it can be.

    A consumer W (g ⊙ z + b) + c becomes (W g) z + (W b + c). Where a consumer has no bias c, the shift stays behind the
    norm as b / g. Computed in float32 at least; tensors that do not change are the same objects. Folding what is folded
    changes nothing.

    Args:
        state: A state dict of the traced architecture.
        symmetry: What `trace` returned for it.

    Raises:
        ModelError: A tensor is missing, or a shift can neither move on nor be divided by its gain.

    Source: Ashkboos et al., SliceGPT, ICLR 2024, §3.2.
    """
    folded = dict(state)
    for gain in foldable(symmetry):
        names = [gain.parameter, gain.bias, *(name for each in gain.consumers for name in (each.weight, each.bias))]
        missing = [name for name in names if name is not None and name not in state]
        if missing:
            raise ModelError(f"missing key {missing[0]}: the state dict is not of the traced architecture")
        factor = widened(folded[gain.parameter]) + gain.offset
        shift = None if gain.bias is None else widened(folded[gain.bias])
        if shift is not None and shift.any():
            _fold_shift(folded, gain, factor, shift)
        if bool((factor == 1).all()):
            continue
        for consumer in gain.consumers:
            weight = folded[consumer.weight]
            scaled = widened(weight) * _along(factor, consumer, weight)
            folded[consumer.weight] = scaled.to(weight.dtype)
        folded[gain.parameter] = torch.full_like(folded[gain.parameter], 1 - gain.offset)
    symmetry.tie(folded)
    return folded


def _fold_shift(folded: dict[str, Tensor], gain: Gain, factor: Tensor, shift: Tensor) -> None:
    """Moves a shift into the consumers' biases, or, where one has none, in front of the gain; changes `folded`."""
    assert gain.bias is not None
    old = folded[gain.bias]
    if all(consumer.bias is not None for consumer in gain.consumers):
        for consumer in gain.consumers:
            assert consumer.bias is not None
            bias, weight = folded[consumer.bias], widened(folded[consumer.weight])
            added = weight.movedim(consumer.dim, -1) @ shift.to(weight.dtype)
            folded[consumer.bias] = (widened(bias) + added).to(bias.dtype)
        folded[gain.bias] = torch.zeros_like(old)
        return
    small = (shift != 0) & (factor.abs() <= SMALLEST_GAIN * factor.abs().max())
    if bool(small.any()):
        name = next(consumer.weight for consumer in gain.consumers if consumer.bias is None)
        raise ModelError(
            f"{gain.bias}: unit {int(small.nonzero()[0])} has a shift and hardly a gain, and {name} has no bias to "
            "take the shift in: align by permutations (weight_matching)"
        )
    folded[gain.bias] = torch.where(shift == 0, shift, shift / torch.where(shift == 0, 1, factor)).to(old.dtype)


def _along(factor: Tensor, consumer: Consumer, weight: Tensor) -> Tensor:
    """The factors laid along the dimension that a consumer sums over."""
    return factor.reshape([-1 if d == consumer.dim else 1 for d in range(weight.ndim)])
