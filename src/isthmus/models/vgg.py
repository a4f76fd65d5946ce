"""VGG for small images: 3×3 convolutions, max pooling and one linear head."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from isthmus.errors import ModelError

# Output channels at width 1; "pool" halves the image.
LAYERS: dict[int, tuple[int | str, ...]] = {
    11: (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"),
    16: (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512, "pool"),
}


class VGG(nn.Module):
    """A VGG that classifies images; the last feature map is flattened into the linear head, whatever its size.

    Args:
        depth: 11 or 16.
        width: multiplies the channels 64, 128, 256 and 512 (rounded, at least 1).
        bn: batch normalisation after every convolution, which then has no bias.
        classes: number of logits.
        in_channels: channels of the image.
        image_size: height and width of the image in pixels, at least 32 (five poolings).

    Raises:
        ModelError: an unknown depth, or a size out of range.

    Source: Simonyan and Zisserman 2015 (arXiv 1409.1556); one linear head and Xavier initialisation as in
        Horoi et al. 2024 (arXiv 2407.05385).
    """

    def __init__(
        self,
        depth: int = 11,
        width: int | float = 1.0,
        bn: bool = False,
        classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
    ) -> None:
        if depth not in LAYERS:
            raise ModelError(f"VGG: depth={depth} is unknown; take one of {', '.join(map(str, LAYERS))}")
        if width <= 0 or min(classes, in_channels) < 1 or image_size < 32:
            raise ModelError(
                f"VGG: width={width} must be positive, classes={classes} and in_channels={in_channels} 1 or more, "
                f"image_size={image_size} 32 or more"
            )
        super().__init__()
        layers: list[nn.Module] = []
        channels, size = in_channels, image_size
        for item in LAYERS[depth]:
            if isinstance(item, str):
                layers.append(nn.MaxPool2d(2))
                size //= 2
                continue
            after = max(1, round(item * width))
            layers.append(nn.Conv2d(channels, after, 3, padding=1, bias=not bn))
            if bn:
                layers.append(nn.BatchNorm2d(after))
            layers.append(nn.ReLU())
            channels = after
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels * size * size, classes)
        self.sample_shape = (in_channels, image_size, image_size)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Float[Tensor, "batch in_channels image_size image_size"]) -> Float[Tensor, "batch classes"]:
        """The logits."""
        return self.head(torch.flatten(self.features(x), 1))
