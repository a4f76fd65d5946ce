"""Folding: BatchNorm taken into the layer before it, gains of LayerNorm and RMSNorm into those behind, exactly."""

import copy

import torch
from torch import nn

from isthmus.errors import ModelError
from isthmus.observe.layers import folded, layers_of
from isthmus.symmetry.gains import fold_state, foldable
from isthmus.symmetry.symmetry import Symmetry


def fold_batch_norms(model: nn.Module, symmetry: Symmetry) -> nn.Module:
    """A new module that computes the same in `eval()`, every BatchNorm that alone reads a layer folded into that layer.

    The BatchNorm becomes `nn.Identity`, its layer gains a bias where it has none. All models that are to be merged have
    to be folded alike, and the result traced anew.

    Args:
        model: A module of the traced architecture.
        symmetry: What `trace` returned for it, with its graph.

    Raises:
        ModelError: A layer has no place for a bias, or the symmetry holds no graph.
    """
    if symmetry.graph is None:
        raise ModelError("the symmetry was loaded without its graph: trace the model again")
    result = copy.deepcopy(model).eval()
    state = model.state_dict()
    for layer in layers_of(symmetry):
        if layer.norm is None or layer.norm.weight is None:
            continue
        path, _, own = layer.contraction.weight.rpartition(".")
        module = result.get_submodule(path)
        if own != "weight" or not hasattr(module, "bias"):
            raise ModelError(
                f"{layer.contraction.weight}: its layer has no place for a bias, so nothing can be folded in"
            )
        weight, bias = folded(layer, state)
        old = state[layer.contraction.weight]
        with torch.no_grad():
            module.weight = nn.Parameter(weight.to(old.dtype))
            module.bias = nn.Parameter(bias.to(old.dtype))
        result.set_submodule(layer.norm.weight.rpartition(".")[0], nn.Identity())
    return result


def fold_norm_gains(model: nn.Module, symmetry: Symmetry) -> nn.Module:
    """A new module that computes the same, the gain of every LayerNorm and RMSNorm taken into what reads it.

    Classes and shapes stay as they are: gains become ones, and shifts move into the consumers' biases, or stay behind
    the norm, divided by the gain, where a consumer has no bias. Gains that cannot be folded stay as they are;
    `symmetry.gains` says why. A rotation of the units then keeps the function, as `Space.group` claims it.

    Args:
        model: A module of the traced architecture.
        symmetry: What `trace` returned for it.

    Raises:
        ModelError: No gain can be folded although there are some, or a shift cannot: a unit has no gain to divide by.

    Source: Ashkboos et al., SliceGPT, ICLR 2024, §3.2.
    """
    if symmetry.gains and not foldable(symmetry):
        first = symmetry.gains[0]
        raise ModelError(f"{first.parameter} cannot be folded: {first.obstacle}; align by permutations instead")
    result = copy.deepcopy(model)
    result.load_state_dict(fold_state(model.state_dict(), symmetry))
    return result
