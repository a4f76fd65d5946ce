"""Hand-written transformers of a few units: every kind of norm, bias, head and tie that folding has to tell apart."""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isthmus
from helpers.pairs import stir

VOCABULARY = 11
LENGTH = 5


class WrittenRMSNorm(nn.Module):
    """The norm of Llama: in steps, with casts."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class OffsetRMSNorm(nn.Module):
    """The norm of Gemma: a gain of one is stored as zero."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-6)
        return (wide * (1.0 + self.weight.float())).type_as(x)


class WrittenLayerNorm(nn.Module):
    """The norm of early GPTs: in steps, a gain and a shift."""

    def __init__(self, size: int, bias: bool = True):
        super().__init__()
        self.g, self.b = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * self.g + self.b


@dataclass(frozen=True)
class Config:
    """What a transformer is made of.

    Attributes:
        norm: Which norm; `"plain"` is a LayerNorm without gains.
        bias: Whether linear layers have biases, those behind the last norm among them.
        kv_heads: Heads of keys and values, for four of queries.
        gated: Whether the MLP is gated.
        post: Whether norms stand behind the sums.
        tied: Whether the head is the embedding.
        conv: Whether linear layers are `addmm` with transposed weights.
    """

    norm: str = "layer"
    bias: bool = True
    kv_heads: int = 4
    gated: bool = False
    post: bool = False
    tied: bool = False
    conv: bool = False
    blocks: int = 1


NORMS = {
    "layer": nn.LayerNorm,
    "layer without shift": lambda size: nn.LayerNorm(size, bias=False),
    "plain": lambda size: nn.LayerNorm(size, elementwise_affine=False),
    "rms": lambda size: nn.RMSNorm(size, eps=1e-6),
    "written rms": WrittenRMSNorm,
    "offset rms": OffsetRMSNorm,
    "written layer": WrittenLayerNorm,
}
CENTRED = ("layer", "layer without shift", "plain", "written layer")

CONFIGS = {
    "layer": Config(),
    "layer, no biases": Config(bias=False),
    "layer without shift": Config("layer without shift", bias=False),
    "plain": Config("plain"),
    "rms": Config("rms", bias=False),
    "rms, biases": Config("rms"),
    "rms, grouped, gated": Config("rms", bias=False, kv_heads=2, gated=True),
    "written rms": Config("written rms", bias=False, kv_heads=2, gated=True),
    "offset rms": Config("offset rms", bias=False, gated=True),
    "written layer": Config("written layer"),
    "written layer, no biases": Config("written layer", bias=False),
    "addmm": Config(conv=True),
}
REFUSED = {
    "post-norm": Config(post=True),
    "post-norm rms": Config("rms", post=True),
}


class Conv1D(nn.Module):
    """The linear layer of GPT-2, with its weight the other way round."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs) / 3), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(*x.shape[:-1], -1)


def linear(config: Config, inputs: int, outputs: int) -> nn.Module:
    return Conv1D(inputs, outputs) if config.conv else nn.Linear(inputs, outputs, bias=config.bias)


class Attention(nn.Module):
    def __init__(self, config: Config, size: int):
        super().__init__()
        self.kv_heads, self.head = config.kv_heads, size // 4
        self.query, self.out = linear(config, size, size), linear(config, size, size)
        self.key, self.value = (linear(config, size, config.kv_heads * self.head) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q = self.query(x).view(n, t, 4, self.head).transpose(1, 2)
        k, v = (f(x).view(n, t, self.kv_heads, self.head).transpose(1, 2) for f in (self.key, self.value))
        k, v = (y.repeat_interleave(4 // self.kv_heads, 1) for y in (k, v))
        scores = (q @ k.transpose(2, 3) / self.head**0.5).softmax(-1)
        return self.out((scores @ v).transpose(1, 2).reshape(n, t, -1))


class MLP(nn.Module):
    def __init__(self, config: Config, size: int):
        super().__init__()
        self.up, self.down = linear(config, size, 14), linear(config, 14, size)
        self.gate = linear(config, size, 14) if config.gated else None

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        return self.down(F.gelu(up) if self.gate is None else F.silu(self.gate(x)) * up)


class Transformer(nn.Module):
    def __init__(self, config: Config = CONFIGS["layer"], size: int = 8):
        super().__init__()
        self.config = config
        norm = NORMS[config.norm]
        self.tokens = nn.Embedding(VOCABULARY, size)
        self.positions = nn.Parameter(torch.randn(LENGTH, size))
        self.attentions = nn.ModuleList(Attention(config, size) for _ in range(config.blocks))
        self.mlps = nn.ModuleList(MLP(config, size) for _ in range(config.blocks))
        self.norms = nn.ModuleList(norm(size) for _ in range(2 * config.blocks))
        self.last = norm(size)
        self.head = nn.Linear(size, VOCABULARY, bias=config.bias)
        if config.tied:
            self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x) + self.positions
        layers = [layer for pair in zip(self.attentions, self.mlps, strict=True) for layer in pair]
        for norm, layer in zip(self.norms, layers, strict=True):
            x = norm(x + layer(x)) if self.config.post else x + layer(norm(x))
        return self.head(torch.tanh(x) if self.config.post else self.last(x))


def tokens(samples: int = 3, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (samples, LENGTH), generator=torch.Generator().manual_seed(seed))


def transformer(name: str, seed: int = 0) -> Transformer:
    """A transformer whose every vector is in general position."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = Transformer({**CONFIGS, **REFUSED, "tied": Config("rms", bias=False, tied=True)}[name]).eval()
    stir(model, seed)
    return model


@cache
def symmetry_of(name: str) -> isthmus.Symmetry:
    return isthmus.trace(transformer(name), tokens(2))
