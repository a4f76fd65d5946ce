"""Every classification model of torchvision, for `coverage.py --source torchvision`."""

from collections.abc import Iterator

import torch
from coverage import Case

# Builds without compiled operators lack these names, which `import torchvision` looks up.
OPERATORS = ("nms", "qnms")


def define_missing_operators() -> None:
    """Declares the operators that torchvision's Python code refers to, where its compiled part is absent."""
    for name in OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def cases() -> Iterator[Case]:
    """All of `torchvision.models.list_models(module=torchvision.models)`, on images as small as each one allows."""
    define_missing_operators()
    from torchvision import models

    for name in models.list_models(module=models):
        pixels, options = 64, {}
        if name.startswith("vit"):
            pixels = 56 if name.endswith("14") else 64
            options = {"image_size": pixels}
        elif name.startswith("maxvit"):
            pixels = 224
        elif name.startswith("inception"):
            pixels, options = 96, {"aux_logits": True, "init_weights": False}
        elif name.startswith("googlenet"):
            options = {"init_weights": False}
        elif name.startswith("alexnet"):
            pixels = 96

        def factory(name: str = name, options: dict[str, object] = options) -> torch.nn.Module:
            return models.get_model(name, weights=None, **options)

        yield Case(
            name,
            factory,
            (torch.randn(2, 3, pixels, pixels),),
            family=models.get_model_builder(name).__module__.rpartition(".")[2],
            note=f"{pixels} px",
        )
