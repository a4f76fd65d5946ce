"""Networks of timm, by their names there."""

import importlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from isthmus.errors import ModelError
from isthmus.models.factory import build_from_factory as build_from
from isthmus.models.factory import not_installed, one_line
from isthmus.models.from_torchvision import import_torchvision
from isthmus.models.source import Source
from isthmus.registry import did_you_mean


def _build_from_timm(spec: str, name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """`timm.create_model(name, pretrained=False, **arguments)`, which also states its images' shape.

    Raises:
        ModelError: timm is not installed or has no such network, or the arguments do not fit.
    """
    try:
        import_torchvision()  # timm imports it
        timm: Any = importlib.import_module("timm")
    except ImportError as error:
        package = "torchvision" if error.name == "torchvision" else "timm"
        raise not_installed(spec, package, error, "vision") from error
    except RuntimeError as error:
        raise ModelError(f"model {spec!r}: importing timm failed: {one_line(error)}") from error
    # A name such as hf-hub:owner/model would be downloaded; only names that timm itself knows pass.
    known = timm.list_models()
    if name.partition(".")[0] not in known:
        raise ModelError(f"model {spec!r}: timm has no network {name!r}{did_you_mean(name, known)}")
    if wanted := [key for key in ("pretrained", "checkpoint_path") if arguments.get(key)]:
        raise ModelError(f"model {spec!r}: {wanted[0]}= would load weights; leave it out and give checkpoints")

    def create(**given: Any) -> nn.Module:
        return timm.create_model(name, **{**given, "pretrained": False})

    model: Any = build_from(spec, create, arguments)
    published = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    if published is not None and len(published) == 3:
        channels, height, width = published
        side = arguments.get("img_size", (height, width))
        height, width = (side, side) if isinstance(side, int) else side
        model.sample_shape = (arguments.get("in_chans", channels), height, width)
    return model


SOURCE = Source(
    prefix="timm",
    example="timm:NAME",
    build=_build_from_timm,
    takes_arguments=True,
)
