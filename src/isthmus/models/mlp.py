"""Multilayer perceptron."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from isthmus.errors import ModelError


class MLP(nn.Module):
    """A classifier: `depth` hidden ReLU layers of `width` units.

    Args:
        in_features: values in one sample; a sample of any shape is flattened.
        width: units of every hidden layer.
        depth: number of hidden layers; 0 gives a linear classifier.
        classes: number of logits.

    Raises:
        ModelError: a size is not positive, or depth is negative.

    Source: the 3×512 network of Ainsworth et al. 2023 (arXiv 2209.04836) and Ito et al. 2025 (arXiv 2402.04051).
    """

    def __init__(self, in_features: int = 784, width: int = 512, depth: int = 3, classes: int = 10) -> None:
        if min(in_features, width, classes) < 1 or depth < 0:
            raise ModelError(
                f"MLP: in_features={in_features}, width={width}, classes={classes} must be 1 or more and depth={depth} "
                "0 or more"
            )
        super().__init__()
        sizes = [in_features] + [width] * depth
        self.hidden = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(sizes))
        self.head = nn.Linear(sizes[-1], classes)
        self.sample_shape = (in_features,)

    def forward(self, x: Float[Tensor, "batch *sample"]) -> Float[Tensor, "batch classes"]:
        """The logits."""
        x = torch.flatten(x, 1)
        for layer in self.hidden:
            x = F.relu(layer(x))
        return self.head(x)
