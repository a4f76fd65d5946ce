"""A small convolutional network with batch normalisation, sized for the 8×8 digits."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from isthmus.errors import ModelError


def _stage(channels: int, after: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]


class SmallCNN(nn.Module):
    """A classifier of images: three convolutions with batch normalisation and two poolings, then a linear head.

    Args:
        width: multiplies the channels 16, 32 and 32 (rounded, at least 1).
        classes: number of logits.
        in_channels: channels of the image.
        image_size: height and width of the image in pixels, at least 4.

    Raises:
        ModelError: a size out of range.
    """

    def __init__(self, width: int | float = 1.0, classes: int = 10, in_channels: int = 1, image_size: int = 8) -> None:
        if width <= 0 or min(classes, in_channels) < 1 or image_size < 4:
            raise ModelError(
                f"SmallCNN: width={width} must be positive, classes={classes} and in_channels={in_channels} 1 or more, "
                f"image_size={image_size} 4 or more"
            )
        super().__init__()
        first, second = (max(1, round(channels * width)) for channels in (16, 32))
        self.features = nn.Sequential(
            *_stage(in_channels, first),
            nn.MaxPool2d(2),
            *_stage(first, second),
            nn.MaxPool2d(2),
            *_stage(second, second),
        )
        self.head = nn.Linear(second * (image_size // 4) ** 2, classes)
        self.sample_shape = (in_channels, image_size, image_size)

    def forward(self, x: Float[Tensor, "batch in_channels image_size image_size"]) -> Float[Tensor, "batch classes"]:
        """The logits."""
        return self.head(torch.flatten(self.features(x), 1))
