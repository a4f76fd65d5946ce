"""The papers' small networks, and `load_model`, which builds a network from one line of text."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn

from isthmus.errors import ModelError
from isthmus.models import exported, from_timm, from_torchvision, hugging_face
from isthmus.models.factory import build_from_factory, current_folder_importable, find_factory, parse_arguments
from isthmus.models.gpt import GPT
from isthmus.models.mlp import MLP
from isthmus.models.resnet import ResNet20
from isthmus.models.small_cnn import SmallCNN
from isthmus.models.vgg import VGG
from isthmus.models.vit import ViT
from isthmus.registry import did_you_mean

__all__ = [
    "GPT",
    "MLP",
    "SOURCES",
    "VGG",
    "ZOO",
    "ResNet20",
    "SmallCNN",
    "ViT",
    "absolute_spec",
    "load_model",
    "parse_spec",
    "sample_shape",
    "sample_tokens",
    "spoken_specs",
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

# Libraries and files that networks come from, by the prefix of their names.
SOURCES = {
    source.prefix: source
    for source in (hugging_face.SOURCE, from_timm.SOURCE, from_torchvision.SOURCE, exported.SOURCE)
}


def load_model(spec: str) -> nn.Module:
    """The network that `spec` describes, with initial weights drawn from torch's global random generator.

    `spec` is one of

    - `zoo:NAME?key=value&key=value`, one of the papers' networks; `zoo:` may be left out;
    - `package.module:factory?key=value`, looked for on the Python path, then in the current folder;
    - one of `SOURCES`, such as `hf:DIRECTORY`, what the `config.json` of a Hugging Face model describes, with random
      weights; `timm:NAME?key=value` and `torchvision:NAME?key=value`, without pretrained weights; `pt2:FILE`, or a name
      that ends in `.pt2`, a program that `torch.export.save` wrote, with its weights.

    Each value is JSON, or else a string. A factory and an exported program are code: loading them may run it. Nothing
    is ever downloaded.

    Raises:
        ModelError: an unknown name, module, factory or argument, a factory that fails or returns no `nn.Module`, a
            library that is not installed, or a file that cannot be read.

    >>> load_model("zoo:mlp?width=8&depth=1").head
    Linear(in_features=8, out_features=10, bias=True)
    """
    prefix, name, query = parse_spec(spec)
    arguments = parse_arguments(spec, query)
    if prefix in SOURCES:
        return SOURCES[prefix].build(spec, name, arguments)
    if prefix == "zoo":
        if name not in ZOO:
            raise ModelError(
                f"model {spec!r}: no network {name!r} in the zoo{did_you_mean(name, ZOO)}; it has {', '.join(ZOO)}, "
                f"and others are named {spoken_specs(zoo=False)}"
            )
        return build_from_factory(spec, ZOO[name], arguments)
    with current_folder_importable():
        return build_from_factory(spec, find_factory(spec, prefix, name), arguments)


def parse_spec(spec: str) -> tuple[str, str, str]:
    """The source that a network is from, its name there, and the text of its arguments."""
    target, _, query = spec.partition("?")
    prefix, colon, name = target.partition(":")
    if colon and prefix in SOURCES:
        return prefix, name, query
    for source in SOURCES.values():
        if source.suffix and target.endswith(source.suffix):
            return source.prefix, target, query
    prefix, colon, name = target.rpartition(":")
    return (prefix if colon else "zoo"), name, query


def spoken_specs(*, zoo: bool = True, arguments: bool = False) -> str:
    """How networks are named, for texts: `zoo:NAME, package.module:factory, hf:DIRECTORY, … or FILE.pt2`.

    Args:
        zoo: Whether the zoo is among them.
        arguments: Whether `?key=value` stands where it may.
    """
    ways = [("zoo:NAME", True)] * zoo + [("package.module:factory", True)]
    ways += [(source.example, source.takes_arguments) for source in SOURCES.values()]
    *most, last = [example + "?key=value" * (arguments and takes) for example, takes in ways]
    return f"{', '.join(most)} or {last}"


def absolute_spec(spec: str) -> str:
    """The same specification with an absolute path, where it holds a path."""
    prefix, name, query = parse_spec(spec)
    if prefix not in SOURCES or not SOURCES[prefix].is_path:
        return spec
    return f"{prefix}:{Path(name).resolve()}" + (f"?{query}" if query else "")


def sample_shape(model: nn.Module) -> tuple[int, ...] | None:
    """The shape of one input sample, without the batch, from `model.sample_shape`; None if it has none.

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
    """How many tokens the model knows, from `model.sample_tokens`; None where its inputs are no tokens.

    Raises:
        ModelError: the attribute is not a positive integer.
    """
    tokens = getattr(model, "sample_tokens", None)
    if tokens is not None and (type(tokens) is not int or tokens < 1):
        raise ModelError(f"{type(model).__name__}.sample_tokens is {tokens!r}; it must be a positive integer, as 65")
    return tokens


def window(model: nn.Module) -> int | None:
    """How many tokens one sample has; None where the model takes no tokens, or does not say."""
    shape = sample_shape(model) if sample_tokens(model) is not None else None
    return shape[0] if shape is not None and len(shape) == 1 else None
