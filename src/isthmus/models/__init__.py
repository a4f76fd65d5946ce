"""The papers' small networks, and `load_model`, which builds a network from one line of text."""

import difflib
import importlib
import inspect
import json
import os
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.errors import ModelError
from isthmus.models.gpt import GPT
from isthmus.models.mlp import MLP
from isthmus.models.resnet import ResNet20
from isthmus.models.small_cnn import SmallCNN
from isthmus.models.vgg import VGG
from isthmus.models.vit import ViT

__all__ = [
    "GPT",
    "MLP",
    "VGG",
    "ZOO",
    "ResNet20",
    "SmallCNN",
    "ViT",
    "example_batch",
    "load_model",
    "sample_shape",
    "sample_tokens",
    "window",
]

ZOO: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "cnn": SmallCNN,
    "vgg11": partial(VGG, depth=11),
    "vgg11_bn": partial(VGG, depth=11, bn=True),
    "vgg16": partial(VGG, depth=16),
    "vgg16_bn": partial(VGG, depth=16, bn=True),
    "resnet20": ResNet20,
    "gpt": GPT,
    "vit": ViT,
}
LATER = ("hf", "timm", "torchvision")


def load_model(spec: str) -> nn.Module:
    """Returns the network that `spec` describes, with initial weights drawn from torch's global random generator.

    `spec` is `zoo:NAME?key=value&key=value` (`zoo:` may be left out) or `package.module:factory?key=value`. Each
    value is JSON, or else a string. The module is looked for on the Python path, then in the current folder; importing
    it runs its code.

    Raises:
        ModelError: an unknown name, module, factory or argument, a factory that fails or returns no `nn.Module`.

    >>> load_model("zoo:mlp?width=8&depth=1").head
    Linear(in_features=8, out_features=10, bias=True)
    """
    target, _, query = spec.partition("?")
    arguments = _arguments(spec, query)
    prefix, colon, name = target.rpartition(":")
    if prefix in LATER:
        raise ModelError(f"model {spec!r}: the prefix {prefix}: is not supported; write package.module:factory instead")
    if prefix == "zoo" or not colon:
        if name not in ZOO:
            raise ModelError(
                f"model {spec!r}: no network {name!r} in the zoo{_did_you_mean(name, ZOO)}; it has {', '.join(ZOO)}, "
                "and others are named package.module:factory"
            )
        return _build(spec, ZOO[name], arguments)
    with _current_folder_importable():
        return _build(spec, _factory(spec, prefix, name), arguments)


def sample_shape(model: nn.Module) -> tuple[int, ...] | None:
    """Returns the shape of one input sample, without the batch, from `model.sample_shape`; None if it has none.

    Raises:
        ModelError: the attribute is not a sequence of positive integers.
    """
    shape = getattr(model, "sample_shape", None)
    if shape is None:
        return None
    if not isinstance(shape, tuple | list) or not all(type(size) is int and size > 0 for size in shape):
        raise ModelError(
            f"{type(model).__name__}.sample_shape is {shape!r}; it must be positive integers, as (3, 32, 32)"
        )
    return tuple(shape)


def sample_tokens(model: nn.Module) -> int | None:
    """Returns how many tokens the model knows, from `model.sample_tokens`; None where its inputs are no tokens.

    Raises:
        ModelError: the attribute is not a positive integer.
    """
    tokens = getattr(model, "sample_tokens", None)
    if tokens is not None and (type(tokens) is not int or tokens < 1):
        raise ModelError(f"{type(model).__name__}.sample_tokens is {tokens!r}; it must be a positive integer, as 65")
    return tokens


def example_batch(model: nn.Module, shape: Sequence[int], samples: int, dtype: torch.dtype) -> Tensor:
    """Returns random samples [samples, *shape]: tokens (int64) where the model takes them, else normal in `dtype`.

    They are drawn from torch's global random generator.

    Raises:
        ModelError: `model.sample_tokens` is not a positive integer.
    """
    tokens = sample_tokens(model)
    return torch.randn(samples, *shape, dtype=dtype) if tokens is None else torch.randint(tokens, (samples, *shape))


def window(model: nn.Module) -> int | None:
    """Returns how many tokens one sample has; None where the model takes no tokens, or does not say."""
    shape = sample_shape(model) if sample_tokens(model) is not None else None
    return shape[0] if shape is not None and len(shape) == 1 else None


def _arguments(spec: str, query: str) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for item in query.split("&") if query else ():
        key, equals, value = item.partition("=")
        if not (key.isidentifier() and equals) or key in arguments:
            raise ModelError(f"model {spec!r}: {item!r} is not a new key=value; write NAME?key=value&other=value")
        try:
            arguments[key] = json.loads(value)
        except json.JSONDecodeError:  # documented: what is not JSON is a string
            arguments[key] = value
    return arguments


def _factory(spec: str, module_name: str, name: str) -> Callable[..., object]:
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        # Missing itself, or missing something that it imports: only the first is a wrong name.
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
            near = _did_you_mean(module_name, (info.name for info in pkgutil.iter_modules([os.getcwd()])))
            raise ModelError(
                f"model {spec!r}: no module {error.name!r} on the Python path or in {os.getcwd()}{near}"
            ) from error
        raise ModelError(f"model {spec!r}: importing {module_name} failed: {_one_line(error)}") from error
    if not callable(factory := getattr(module, name, None)):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ModelError(f"model {spec!r}: {module_name} has no factory {name!r}{_did_you_mean(name, known)}")
    return factory


def _build(spec: str, factory: Callable[..., object], arguments: dict[str, Any]) -> nn.Module:
    try:
        signature = inspect.signature(factory)
    except ValueError:  # some C callables have none: the call itself then checks the arguments
        signature = None
    if signature is not None:
        try:
            signature.bind(**arguments)
        except TypeError as error:
            unknown = [key for key in arguments if key not in signature.parameters]
            near = _did_you_mean(unknown[0], signature.parameters) if unknown else ""
            raise ModelError(f"model {spec!r}: {_one_line(error)}{near}; it takes {signature}") from error
    try:
        model = factory(**arguments)
    except ModelError:
        raise
    except (Exception, SystemExit) as error:
        raise ModelError(f"model {spec!r}: the factory failed: {_one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"model {spec!r}: the factory returned {type(model).__name__}, not a torch.nn.Module")
    return model


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    # At the end of the path, so that a file in the current folder never hides an installed package.
    folder = os.getcwd()
    sys.path.append(folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        # A module that prepended the same folder itself keeps its entry: ours is the last one.
        for position in reversed(range(len(sys.path))):
            if sys.path[position] == folder:
                del sys.path[position]
                break


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
