"""Images whose pixels and colours are correlated, as those of photographs are."""

import torch
import torch.nn.functional as F


def coloured(samples: int = 60, channels: int = 3, height: int = 8, width: int = 8, seed: int = 0):
    """Batches of smooth images whose colours are correlated."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, channels, height, width, generator=generator)
    x = x + 2 * F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="circular"), 3, stride=1)
    mixed = torch.einsum("cd,ndhw->nchw", torch.eye(channels) + 0.8, x) + torch.arange(channels)[:, None, None] * 0.3
    return list(mixed.split(25))
