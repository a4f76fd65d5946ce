"""Tiny networks, one structure each, by name: a new one in any file here is found by itself."""

import copy
import importlib
import pkgutil
from functools import cache

import torch
from torch import nn

import isthmus
from helpers.zoo.net import Apply, Chain, Net
from isthmus.symmetry import Symmetry

__all__ = ["ZOO", "Apply", "Chain", "Net", "built", "double", "traced"]


def _networks(module: str) -> list[type[Net]]:
    """The networks that a file defines."""
    found = vars(importlib.import_module(module)).values()
    return [net for net in found if isinstance(net, type) and issubclass(net, Net) and net.__module__ == module]


ZOO: dict[str, type[Net]] = {
    net.__name__: net
    for file in pkgutil.iter_modules(__path__, "helpers.zoo.")
    if file.name != "helpers.zoo.net"
    for net in _networks(file.name)
}


@cache
def built(name: str) -> Net:
    """A network of the zoo with seeded weights, in training mode as it comes; to be left as it is."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return ZOO[name]()


@cache
def traced(name: str) -> Symmetry:
    """The symmetry of `built(name)`."""
    args, kwargs = built(name).inputs()
    return isthmus.trace(built(name), *args, kwargs=kwargs)


def double(model: nn.Module) -> nn.Module:
    """A float64 copy of the model in `eval()`."""
    return copy.deepcopy(model).double().eval()
