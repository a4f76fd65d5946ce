"""Networks of torchvision, by their names there."""

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from isthmus.errors import ModelError
from isthmus.models.factory import build_from_factory as build_from
from isthmus.models.factory import not_installed, one_line
from isthmus.models.source import Source
from isthmus.registry import did_you_mean

# Beside a torch that it was not compiled for, such as the CPU build of torch beside the wheel that PyPI has, the Python
# part of torchvision stops at its own import: it registers shapes for two operators of its binary part, which are then
# missing. The networks use neither. Their schemas alone make the import pass; calling them still fails, as it should.
MISSING = "operator torchvision::nms does not exist"
OPERATORS = ("torchvision::nms", "torchvision::qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def import_torchvision() -> Any:
    """The package, also where its binary part does not fit the installed torch.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if MISSING not in str(error):
            raise
    for name in OPERATORS:
        torch.library.define(name, SCHEMA)
    return importlib.import_module("torchvision")


def _build_from_torchvision(spec: str, name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """`torchvision.models.get_model(name, weights=None, **arguments)`, which also states its images' shape.

    Raises:
        ModelError: torchvision is not installed or has no such network, or the arguments do not fit.
    """
    try:
        models = import_torchvision().models
    except ImportError as error:
        raise not_installed(spec, "torchvision", error, "vision") from error
    except RuntimeError as error:
        raise ModelError(f"model {spec!r}: importing torchvision failed: {one_line(error)}") from error
    if name not in (known := models.list_models()):
        raise ModelError(f"model {spec!r}: torchvision has no network {name!r}{did_you_mean(name, known)}")
    if wanted := [key for key in arguments if key.startswith("weights")]:
        raise ModelError(f"model {spec!r}: {wanted[0]}= would download weights; leave it out and give checkpoints")
    builder = models.get_model_builder(name)
    given = dict(arguments)
    if "weights_backbone" in inspect.signature(builder).parameters:
        given["weights_backbone"] = None  # pretrained by default, even where weights= is None
    model: Any = build_from(spec, builder, given)
    # The published weights say which images they were trained on; networks for other tasks state no such size.
    crop = getattr(models.get_model_weights(name).DEFAULT.transforms(), "crop_size", None) or []
    if len(crop) == 1 and "image_size" not in given:
        model.sample_shape = (3, crop[0], crop[0])
    elif type(given.get("image_size")) is int:
        model.sample_shape = (3, given["image_size"], given["image_size"])
    return model


SOURCE = Source(
    prefix="torchvision",
    example="torchvision:NAME",
    build=_build_from_torchvision,
    takes_arguments=True,
)
