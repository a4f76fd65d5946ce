"""A small vision transformer: patches are tokens, and the head reads their mean."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from isthmus.errors import ModelError
from isthmus.models.transformer import INITIAL_DEVIATION, initialise, make_blocks, make_norm


class ViT(nn.Module):
    """A vision transformer that classifies images cut into patches.

    Args:
        width: units of the residual stream.
        depth: number of blocks.
        heads: attention heads of every block; they divide the width.
        patch: height and width of a patch in pixels; it divides the image's.
        classes: number of logits.
        in_channels: channels of the image.
        image_size: height and width of the image in pixels.
        norm: "layer" or "rms".
        mlp: "gelu" (4 · width hidden units) or "gated" (SiLU gates, 8/3 · width hidden units).

    Raises:
        ModelError: a size out of range or an unknown option.

    Source: Dosovitskiy et al. 2021 (arXiv 2010.11929); mean pooling instead of a class token as in Beyer et al. 2022
        (arXiv 2205.01580), with learned positions.
    """

    def __init__(
        self,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
        patch: int = 4,
        classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        norm: str = "layer",
        mlp: str = "gelu",
    ) -> None:
        if min(classes, in_channels, patch, image_size) < 1 or image_size % patch:
            raise ModelError(
                f"ViT: classes={classes} and in_channels={in_channels} must be 1 or more, and image_size={image_size} "
                f"a multiple of patch={patch}"
            )
        super().__init__()
        self.patches = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.positions = nn.Parameter(torch.empty((image_size // patch) ** 2, width))
        self.blocks = make_blocks(depth, width, heads, norm=norm, mlp=mlp, bias=True)
        self.norm = make_norm(norm, width, bias=True)
        self.head = nn.Linear(width, classes)
        initialise(self, self.blocks)
        nn.init.normal_(self.positions, std=INITIAL_DEVIATION)
        # A patch's pixels are many and of deviation 1: with 0.02 the tokens would start much smaller than positions.
        nn.init.xavier_uniform_(self.patches.weight.view(width, -1))
        self.sample_shape = (in_channels, image_size, image_size)

    def forward(self, x: Float[Tensor, "batch in_channels image_size image_size"]) -> Float[Tensor, "batch classes"]:
        """The logits."""
        x_BTD = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(self.norm(x_BTD).mean(dim=1))
