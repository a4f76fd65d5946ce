"""A small language model: a pre-norm transformer that sees the tokens before."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from isthmus.errors import ModelError
from isthmus.models.transformer import initialise, make_blocks, make_norm, rotations

POSITIONS = ("learned", "rope")


class GPT(nn.Module):
    """A decoder-only transformer: from tokens to the logits of every next token.

    Args:
        width: units of the residual stream.
        depth: number of blocks.
        heads: attention heads of every block; they divide the width.
        vocabulary: number of tokens.
        block: the most tokens of a sample.
        positions: "learned", a vector for every position added to its token's, or "rope", queries and keys turned by
            their position.
        norm: "layer" or "rms".
        mlp: "gelu" (4 · width hidden units) or "gated" (SiLU gates, 8/3 · width hidden units).
        bias: biases in linear layers and LayerNorm.
        tied: the head's weight is the token embedding's.

    Raises:
        ModelError: a size out of range or an unknown option.

    Source: Radford et al. 2019 (GPT-2).
    """

    def __init__(
        self,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        vocabulary: int = 65,
        block: int = 128,
        positions: str = "learned",
        norm: str = "layer",
        mlp: str = "gelu",
        bias: bool = False,
        tied: bool = False,
    ) -> None:
        if min(vocabulary, block) < 1:
            raise ModelError(f"GPT: vocabulary={vocabulary} and block={block} must be 1 or more")
        if positions not in POSITIONS:
            raise ModelError(f"GPT: positions={positions!r} is unknown; take one of {', '.join(POSITIONS)}")
        rope = positions == "rope"
        if rope and width % (2 * heads):
            raise ModelError(
                f"GPT: rope turns units in pairs, and width={width} gives heads={heads} an odd number each"
            )
        super().__init__()
        mask = torch.ones(block, block, dtype=torch.bool).triu(1)
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = None if rope else nn.Embedding(block, width)
        self.blocks = make_blocks(
            depth,
            width,
            heads,
            norm=norm,
            mlp=mlp,
            bias=bias,
            mask=mask,
            rope=rotations(block, width // heads) if rope else None,
        )
        self.norm = make_norm(norm, width, bias)
        self.head = nn.Linear(width, vocabulary, bias=False)
        initialise(self, self.blocks)
        if tied:
            self.head.weight = self.tokens.weight
        self.sample_shape = (block,)
        self.sample_tokens = vocabulary

    def forward(self, tokens_BT: Int64[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens vocabulary"]:
        """The logits of the token after each."""
        x_BTD = self.tokens(tokens_BT)
        if self.positions is not None:
            x_BTD = x_BTD + self.positions.weight[: tokens_BT.shape[1]]
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(self.norm(x_BTD))
