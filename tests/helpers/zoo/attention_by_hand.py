"""Attention written by hand over windows and positions."""

import torch
import torch.nn.functional as F
from torch import nn

from helpers.zoo.net import Net


class WindowedAttention(Net):
    """Swin's block: shifted windows, a bias for each relative position and head, patches merged by concatenation."""

    sample_shape = (4, 4, 3)
    spaces = (4, 2, (2, 2), (2, 2))
    larger = ("invertible", "orthogonal")
    no_ops = ()

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.qkv, self.proj = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 4)
        self.table = nn.Parameter(torch.randn(9, 2))
        place = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
        apart = place[:, :, None] - place[:, None, :] + 1
        self.register_buffer("index", 3 * apart[0] + apart[1])
        self.merge = nn.Linear(16, 2)

    def windows(self, x):
        return x.view(-1, 2, 2, 2, 2, x.shape[-1]).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, x.shape[-1])

    def mask(self, x):
        region = torch.zeros(1, 4, 4, 1, dtype=x.dtype)
        for number, (rows, columns) in enumerate([(slice(0, 3), slice(3, 4)), (slice(3, 4), slice(0, 4))]):
            region[:, rows, columns] = number + 1
        region = self.windows(region).squeeze(-1)
        return torch.where(region[:, None, :] == region[:, :, None], 0.0, -100.0).to(x.dtype)

    def forward(self, x):
        x = self.stem(x)
        y = torch.roll(self.norm(x), (-1, -1), (1, 2))
        q, k, v = self.qkv(self.windows(y)).reshape(-1, 4, 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1) + self.table[self.index.view(-1)].view(4, 4, 2).permute(2, 0, 1)
        scores = (scores.view(len(x), 4, 2, 4, 4) + self.mask(x)[:, None]).view(-1, 2, 4, 4)
        y = self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, 4, 4))
        y = y.view(-1, 2, 2, 2, 2, 4).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 4, 4)
        x = torch.tanh(x + torch.roll(y, (1, 1), (1, 2)))
        return self.merge(torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1))


class SkewedPositions(Net):
    """Heads beside the batch on one axis, and relative positions laid out by padding and cutting (BoTNet)."""

    sample_shape = (3, 3)
    spaces = (4, 2, 2, (2, 2))
    larger = ("invertible", "orthogonal")

    def __init__(self):
        super().__init__()
        self.stem, self.qkv, self.head = nn.Linear(3, 4), nn.Linear(4, 12), nn.Linear(4, 2)
        self.table = nn.Parameter(torch.randn(5, 2))

    def forward(self, x):
        q, k, v = self.qkv(torch.tanh(self.stem(x))).chunk(3, -1)
        q, k, v = (y.view(-1, 3, 2, 2).transpose(1, 2).reshape(-1, 3, 2) for y in (q, k, v))
        skewed = F.pad(q @ self.table.T, (0, 1)).flatten(1)
        skewed = F.pad(skewed, (0, 2)).view(-1, 4, 5)[:, :3, 2:]
        y = (q @ k.transpose(1, 2) + skewed).softmax(-1) @ v
        return self.head(y.view(-1, 2, 3, 2).transpose(1, 2).reshape(-1, 3, 4))


class EinsumAttention(Net):
    sample_shape = (3, 3)
    spaces = (4, 2, (2, 2), (2, 2))
    larger = ("invertible", "orthogonal")
    no_ops = ()

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.qkv = nn.ParameterList([nn.Parameter(torch.randn(4, 2, 2)) for _ in range(3)])
        self.out = nn.Parameter(torch.randn(2, 2, 4))

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        q, k, v = (torch.einsum("btc,chd->bthd", x, weight) for weight in self.qkv)
        weights = torch.einsum("bthd,bshd->bhts", q, k).softmax(-1)
        y = torch.einsum("bhts,bshd->bthd", weights, v)
        return self.head(torch.tanh(x + torch.einsum("bthd,hdc->btc", y, self.out)))
