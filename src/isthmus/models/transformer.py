"""The pre-norm transformer block that the language model and the vision transformer share.

Suffixes: B batch, T tokens, D width, H heads, K units in each head.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from isthmus.errors import ModelError

NORMS: dict[str, Callable[..., nn.Module]] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
MLPS = ("gelu", "gated")
ROPE_BASE = 10_000.0
INITIAL_DEVIATION = 0.02


def make_norm(norm: str, width: int, bias: bool) -> nn.Module:
    """LayerNorm or RMSNorm over `width` units; only LayerNorm can have a shift."""
    return NORMS[norm](width, bias=bias) if norm == "layer" else NORMS[norm](width)


class Attention(nn.Module):
    """Multi-head self-attention, written out.

    Keys have no bias: it would add the same to all scores of a query, which softmax takes away again.

    Args:
        width: units of the residual stream.
        heads: number of heads; each has width / heads units.
        bias: whether queries, values and the output have biases.
        mask: positions [tokens, tokens] that a query must not see; None shows it all.
        rope: cosines and sines [tokens, units in each head / 2] that turn queries and keys by their position.
    """

    mask: Tensor | None
    cosines: Tensor | None
    sines: Tensor | None

    def __init__(
        self,
        width: int,
        heads: int,
        bias: bool,
        mask: Bool[Tensor, "tokens tokens"] | None = None,
        rope: tuple[Float[Tensor, "tokens half"], Float[Tensor, "tokens half"]] | None = None,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=bias)
        self.output = nn.Linear(width, width, bias=bias)
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("cosines", None if rope is None else rope[0], persistent=False)
        self.register_buffer("sines", None if rope is None else rope[1], persistent=False)

    def forward(self, x_BTD: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        """The sum of what the heads read, without the residual."""
        tokens, width = x_BTD.shape[1:]
        units = width // self.heads
        q_BHTK, k_BHTK, v_BHTK = (
            layer(x_BTD).unflatten(-1, (self.heads, units)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        if self.cosines is not None and self.sines is not None:
            cosines, sines = self.cosines[:tokens], self.sines[:tokens]
            q_BHTK, k_BHTK = _turn(q_BHTK, cosines, sines), _turn(k_BHTK, cosines, sines)
        scores_BHTT = (q_BHTK / math.sqrt(units)) @ k_BHTK.transpose(2, 3)
        if self.mask is not None:
            scores_BHTT = scores_BHTT.masked_fill(self.mask[:tokens, :tokens], -math.inf)
        read_BHTK = F.softmax(scores_BHTT, dim=-1) @ v_BHTK
        return self.output(read_BHTK.transpose(1, 2).flatten(2))


def _turn(
    x_BHTK: Float[Tensor, "batch heads tokens units"],
    cosines: Float[Tensor, "tokens half"],
    sines: Float[Tensor, "tokens half"],
) -> Float[Tensor, "batch heads tokens units"]:
    """The units in pairs (k, k + K/2), each pair turned by an angle that grows with its token's position."""
    first, second = x_BHTK.chunk(2, dim=-1)
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)


def rotations(tokens: int, units: int) -> tuple[Float[Tensor, "tokens half"], Float[Tensor, "tokens half"]]:
    """Cosines and sines of every position's angles, by which `_turn` turns `units` units.

    Source: Su et al. 2021, RoFormer (arXiv 2104.09864).
    """
    speeds = ROPE_BASE ** (-torch.arange(0, units, 2, dtype=torch.float64) / units)
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] * speeds
    return angles.cos().float(), angles.sin().float()


class FeedForward(nn.Module):
    """The feed-forward part of a block.

    `gelu`: 4 · width hidden units. `gated`: 8/3 · width (rounded) hidden units, each the product of a linear unit and
    the SiLU of another, which costs about the same.

    Source: for `gated` Shazeer 2020, GLU variants improve transformer (arXiv 2002.05202).
    """

    def __init__(self, width: int, kind: str, bias: bool) -> None:
        super().__init__()
        hidden = 4 * width if kind == "gelu" else round(8 * width / 3)
        self.up = nn.Linear(width, hidden, bias=bias)
        self.gate = nn.Linear(width, hidden, bias=bias) if kind == "gated" else None
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x_BTD: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        """The same transformation of every token, without the residual."""
        hidden = self.up(x_BTD)
        return self.down(F.gelu(hidden) if self.gate is None else F.silu(self.gate(x_BTD)) * hidden)


class TransformerBlock(nn.Module):
    """Attention, then the MLP, each behind its own normalisation and added to the residual stream."""

    def __init__(self, attention: Attention, mlp: FeedForward, norm1: nn.Module, norm2: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2, self.mlp = norm1, attention, norm2, mlp

    def forward(self, x_BTD: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        """The residual stream after the block."""
        x_BTD = x_BTD + self.attention(self.norm1(x_BTD))
        return x_BTD + self.mlp(self.norm2(x_BTD))


def make_blocks(
    depth: int,
    width: int,
    heads: int,
    *,
    norm: str,
    mlp: str,
    bias: bool,
    mask: Bool[Tensor, "tokens tokens"] | None = None,
    rope: tuple[Float[Tensor, "tokens half"], Float[Tensor, "tokens half"]] | None = None,
) -> nn.ModuleList:
    """A list of `depth` blocks.

    Raises:
        ModelError: an unknown norm or MLP, or heads that do not divide the width.
    """
    for option, value, known in (("norm", norm, tuple(NORMS)), ("mlp", mlp, MLPS)):
        if value not in known:
            raise ModelError(f"transformer: {option}={value!r} is unknown; take one of {', '.join(known)}")
    if min(width, heads) < 1 or depth < 0 or width % heads:
        raise ModelError(
            f"transformer: width={width} must be a positive multiple of heads={heads}, and depth={depth} 0 or more"
        )
    return nn.ModuleList(
        TransformerBlock(
            Attention(width, heads, bias, mask, rope),
            FeedForward(width, mlp, bias),
            make_norm(norm, width, bias),
            make_norm(norm, width, bias),
        )
        for _ in range(depth)
    )


def initialise(model: nn.Module, blocks: nn.ModuleList) -> None:
    """Draws all weights anew, in place: deviation 0.02, and less by √(2 · depth) for what is added to the residual.

    Source: Radford et al. 2019 (GPT-2).
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
            nn.init.normal_(module.weight, std=INITIAL_DEVIATION)
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)
    for block in blocks:
        assert isinstance(block, TransformerBlock)
        for layer in (block.attention.output, block.mlp.down):
            nn.init.normal_(layer.weight, std=INITIAL_DEVIATION / math.sqrt(2 * len(blocks)))
