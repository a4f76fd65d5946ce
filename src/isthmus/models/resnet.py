"""ResNet20 for small images."""

import math
from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from isthmus.errors import ModelError

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(math.gcd(8, channels), channels),
    "layer": lambda channels: nn.GroupNorm(1, channels),
    "none": lambda channels: nn.Identity(),
}
SHORTCUTS = {"projection": 1, "conv3x3": 3}


class ResidualBlock(nn.Module):
    """relu(branch(x) + shortcut(x)): the shortcut is a convolution where the shape changes, else x itself."""

    def __init__(self, channels: int, after: int, stride: int, norm: str, shortcut: str) -> None:
        super().__init__()
        bias = norm == "none"
        self.conv1 = nn.Conv2d(channels, after, 3, stride, padding=1, bias=bias)
        self.norm1 = NORMS[norm](after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=bias)
        self.norm2 = NORMS[norm](after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != after:
            kernel = SHORTCUTS[shortcut]
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, after, kernel, stride, padding=kernel // 2, bias=bias), NORMS[norm](after)
            )

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch after height_after width_after"]:
        """The feature map."""
        branch = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(branch)) + self.shortcut(x))


class ResNet20(nn.Module):
    """A classifier of images: three stages of three residual blocks and global average pooling.

    Args:
        width: multiplies the channels 16, 32 and 64 (rounded, at least 1); may be fractional.
        classes: number of logits.
        in_channels: channels of the image, which may have any size from 4×4 pixels up.
        norm: "batch", "group" (8 groups, fewer where 8 does not divide the channels), "layer" (one group over
            channels and image) or "none".
        shortcut: "projection" (1×1 convolution and norm) or "conv3x3" (3×3 convolution and norm), used where the
            shape changes.

    Raises:
        ModelError: an unknown norm or shortcut, or a size out of range.

    Source: He et al. 2016 (arXiv 1512.03385), section 4.2; the 3×3 shortcuts are those of Horoi et al. 2024
        (arXiv 2407.05385).
    """

    def __init__(
        self,
        width: int | float = 1.0,
        classes: int = 10,
        in_channels: int = 3,
        norm: str = "batch",
        shortcut: str = "projection",
    ) -> None:
        for name, value, known in (("norm", norm, NORMS), ("shortcut", shortcut, SHORTCUTS)):
            if value not in known:
                raise ModelError(f"ResNet20: {name}={value!r} is unknown; take one of {', '.join(known)}")
        if width <= 0 or min(classes, in_channels) < 1:
            raise ModelError(
                f"ResNet20: width={width} must be positive, classes={classes} and in_channels={in_channels} 1 or more"
            )
        super().__init__()
        stages = [max(1, round(channels * width)) for channels in (16, 32, 64)]
        self.conv = nn.Conv2d(in_channels, stages[0], 3, padding=1, bias=norm == "none")
        self.norm = NORMS[norm](stages[0])
        blocks: list[nn.Module] = []
        channels = stages[0]
        for stage, after in enumerate(stages):
            for index in range(3):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(ResidualBlock(channels, after, stride, norm, shortcut))
                channels = after
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, classes)
        self.sample_shape = (in_channels, 32, 32)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Float[Tensor, "batch in_channels height width"]) -> Float[Tensor, "batch classes"]:
        """The logits."""
        x = F.relu(self.norm(self.conv(x)))
        return self.head(self.blocks(x).mean(dim=(2, 3)))
