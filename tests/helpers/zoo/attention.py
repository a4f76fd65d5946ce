"""Attention."""

import torch
import torch.nn.functional as F
from torch import nn

from helpers.zoo.net import Net


class Attention(Net):
    """Written out, two heads of three: heads move, and in each the units of queries and keys, and those of values."""

    sample_shape = (4, 3)
    spaces = (5, 2, (2, 3), (2, 3))
    larger = ("invertible", "orthogonal")
    no_ops = ("key.bias",)  # it adds the same to all scores of a query

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(3, 5), nn.Linear(5, 2)
        self.query, self.key, self.value = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(5, 6)
        self.out = nn.Linear(6, 5)

    def forward(self, x):
        x = self.stem(x)
        n, t, _ = x.shape
        q, k, v = (layer(x).view(n, t, 2, 3).transpose(1, 2) for layer in (self.query, self.key, self.value))
        scores = F.softmax(q @ k.transpose(2, 3) / 3**0.5, -1)
        x = x + self.out((scores @ v).transpose(1, 2).reshape(n, t, 6))
        return self.head(torch.tanh(x))


class FusedAttention(Net):
    """Queries, keys and values from one layer; heads are put apart and joined by einsum."""

    sample_shape = (4, 3)
    spaces = (5, 2, (2, 3), (2, 3))
    larger = ("invertible", "orthogonal")

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(3, 5), nn.Linear(5, 2)
        self.qkv, self.out = nn.Linear(5, 18, bias=False), nn.Linear(6, 5)

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        n, t, _ = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, 2, 3).unbind(2)
        scores = F.softmax(torch.einsum("nqhd,nkhd->nhqk", q, k), -1)
        x = x + self.out(torch.einsum("nhqk,nkhd->nqhd", scores, v).flatten(2))
        return self.head(torch.tanh(x))


class SingleHead(Net):
    """One head: queries and keys are only multiplied with one another, values only summed."""

    sample_shape = (4, 3)
    spaces = (3, 4)
    larger = ("invertible", "orthogonal")  # invertible both, but which of queries and keys moves by T⁻¹ is not followed

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        self.value, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        scores = F.softmax(self.query(x) @ self.key(x).transpose(1, 2), -1)
        return self.head(scores @ self.value(x))


class GroupedQueries(Net):
    """Four query heads, two of keys and values: a key head carries its two query heads along."""

    sample_shape = (4, 3)
    # key heads; query heads in each; units of queries and keys; units of values
    spaces = (2, (2, 2), (2, 3), (2, 3))
    larger = ("invertible", "orthogonal")

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(3, size, bias=False) for size in (12, 6, 6))
        self.head = nn.Linear(12, 2)

    def forward(self, x):
        n, t, _ = x.shape
        q = self.query(x).view(n, t, 4, 3).transpose(1, 2)
        k, v = (f(x).view(n, t, 2, 3).transpose(1, 2).repeat_interleave(2, 1) for f in (self.key, self.value))
        scores = F.softmax(q @ k.transpose(2, 3), -1)
        return self.head((scores @ v).transpose(1, 2).reshape(n, t, 12))


class MultiheadModule(Net):
    sample_shape = (4, 3)
    spaces = (4, 2, (2, 2), (2, 2))
    larger = ("invertible", "orthogonal")

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.tanh(x + self.attention(x, x, x, need_weights=False)[0]))
