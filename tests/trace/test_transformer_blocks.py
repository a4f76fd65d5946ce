"""What transformers are made of, a few lines each: the spaces that a hand count gives, and a proof with several seeds.

A space is written (copies, size), with copies 1 where it is nested in nothing.
"""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import isthmus

T, D, HEADS, INNER = 5, 6, 3, 4
WIDTH = HEADS * INNER


def checked(net, *inputs, spaces=(), frozen_by=(), seeds=(0, 1, 2)):
    """The symmetry, after its spaces were counted and three proofs were made."""
    symmetry = isthmus.trace(net, *inputs)
    for seed in seeds:
        isthmus.verify(net, symmetry, *inputs, trials=4, seed=seed)
    assert Counter((space.copies, space.size) for space in symmetry) == Counter(spaces)
    assert {item.operation for item in symmetry.frozen if not item.expected} == set(frozen_by)
    return symmetry


def reason_for(symmetry, parameter, dim="0"):
    return {item.reason for item in symmetry.frozen if item.parameter == parameter and item.dim == dim}


def tokens(samples=2):
    return torch.randn(samples, T, D)


def heads_of(x, heads=HEADS):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """A residual stream of six units around what `attend` does with queries, keys and values."""

    key_heads = HEADS

    def __init__(self, bias=True):
        super().__init__()
        self.stem, self.head = nn.Linear(D, D), nn.Linear(D, 2)
        self.query, self.out = nn.Linear(D, WIDTH, bias=bias), nn.Linear(WIDTH, D, bias=bias)
        self.key, self.value = (nn.Linear(D, WIDTH, bias=bias) for _ in range(2))

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        q, k, v = (heads_of(layer(x)) for layer in (self.query, self.key, self.value))
        mixed = self.attend(q, k, v).transpose(1, 2).flatten(2)
        return self.head(torch.tanh(x + self.out(mixed)))

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


STREAM, OF_HEADS, IN_EACH = (1, D), (1, HEADS), (HEADS, INNER)


class Causal(Block):
    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Masked(Block):
    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(T, T, dtype=torch.bool).tril())


class Alibi(Block):
    def attend(self, q, k, v):
        slopes = torch.tensor([0.5, 0.25, 0.125]).view(HEADS, 1, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=slopes * torch.arange(T))


@pytest.mark.parametrize("kind", [Block, Causal, Masked])
def test_fused_attention_has_heads_and_units_in_each(kind):
    checked(kind(), tokens(), spaces=[STREAM, OF_HEADS, IN_EACH, IN_EACH])


def test_slopes_that_differ_tell_heads_apart_but_not_their_units():
    symmetry = checked(Alibi(), tokens(), spaces=[STREAM, *[(1, INNER)] * (2 * HEADS)])
    assert all(item.expected for item in symmetry.frozen)


class Rotated(Block):
    """Rotary positions on the first `part` units of each head, its halves paired."""

    part = INNER

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(self.rotated(q), self.rotated(k), v)

    def rotated(self, x):
        angles = torch.outer(torch.arange(T), torch.arange(1, self.part // 2 + 1)).repeat(1, 2)
        turned, kept = x[..., : self.part], x[..., self.part :]
        first, second = turned.chunk(2, -1)
        half = torch.cat([-second, first], -1)
        return torch.cat([turned * angles.cos() + half * angles.sin(), kept], -1)


class PartlyRotated(Rotated):
    part = 2


class RotatedAsComplex(Rotated):
    """The same rotation of neighbours, by complex numbers."""

    def rotated(self, x):
        angles = torch.outer(torch.arange(T), torch.arange(1, self.part // 2 + 1)).to(x.dtype)
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
            torch.ones_like(angles), angles
        )
        return torch.view_as_real(turned).flatten(-2)


@pytest.mark.parametrize("kind", [Rotated, RotatedAsComplex])
def test_rotations_fix_the_units_of_queries_and_keys(kind):
    checked(kind(), tokens(), spaces=[STREAM, OF_HEADS, IN_EACH])


def test_units_that_are_not_rotated_stay_free():
    checked(PartlyRotated(), tokens(), spaces=[STREAM, OF_HEADS, IN_EACH, (HEADS, 2)])


class Grouped(Block):
    """Three heads of keys, six of queries: each key head serves two in a row."""

    def __init__(self):
        super().__init__(bias=False)
        self.query, self.out = nn.Linear(D, 2 * WIDTH), nn.Linear(2 * WIDTH, D)

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        q, k, v = heads_of(self.query(x), 2 * HEADS), heads_of(self.key(x)), heads_of(self.value(x))
        return self.head(torch.tanh(x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))))

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


class GroupedByExpand(Grouped):
    def attend(self, q, k, v):
        k, v = (x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(len(x), 2 * HEADS, T, INNER) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v)


class GroupedByBroadcast(Grouped):
    def attend(self, q, k, v):
        k, v = (torch.broadcast_to(x[:, :, None], (len(x), HEADS, 2, T, INNER)).flatten(1, 2) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("kind", [Grouped, GroupedByExpand, GroupedByBroadcast])
def test_query_heads_move_inside_their_key_head(kind):
    checked(kind(), tokens(), spaces=[STREAM, OF_HEADS, (HEADS, 2), IN_EACH, IN_EACH])


class Interleaved(Block):
    """Queries, keys and values of each head beside one another in one layer."""

    def __init__(self):
        super().__init__()
        self.fused = nn.Linear(D, 3 * WIDTH)

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        q, k, v = self.fused(x).view(len(x), T, HEADS, 3 * INNER).transpose(1, 2).chunk(3, -1)
        return self.head(torch.tanh(x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))))


def test_one_layer_for_all_three_interleaved_by_head():
    symmetry = checked(Interleaved(), tokens(), spaces=[STREAM, OF_HEADS, IN_EACH, IN_EACH])
    assert {"query.weight", "key.weight", "value.weight"} <= set(symmetry.untouched)


class BySums(nn.Module):
    """Weights of shape [width, heads, units] and [heads, units, width]."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(D, D), nn.Linear(D, 2)
        self.into = nn.ParameterList(nn.Parameter(torch.randn(D, HEADS, INNER)) for _ in range(3))
        self.out = nn.Parameter(torch.randn(HEADS, INNER, D))

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        q, k, v = (torch.einsum("btd,dhi->bhti", x, w) for w in self.into)
        mixed = F.softmax(torch.einsum("bhti,bhsi->bhts", q, k), -1) @ v
        return self.head(torch.tanh(x + torch.einsum("bhti,hid->btd", mixed, self.out)))


def test_units_of_three_dimensional_weights_are_told_apart_by_head():
    checked(BySums(), tokens(), spaces=[STREAM, OF_HEADS, IN_EACH, IN_EACH])


class SharedBias(nn.Module):
    """Two layers of attention whose scores receive one table's biases, a column a head."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.table = nn.Embedding(4, HEADS)

    def forward(self, x):
        apart = (torch.arange(T)[:, None] - torch.arange(T)).abs().clamp(max=3)
        bias = self.table(apart).permute(2, 0, 1)
        total = 0
        for layer in self.layers:
            layer.attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            total = total + layer(x)
        return total


def test_a_shared_bias_ties_the_heads_of_all_layers():
    checked(SharedBias(), tokens(), spaces=[STREAM, STREAM, OF_HEADS, *[IN_EACH] * 4])


class FromTorch(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.stem, self.head = nn.Linear(D, WIDTH), nn.Linear(WIDTH, 2)
        self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 7, batch_first=True, **options)

    def forward(self, x):
        return self.head(self.layer(self.stem(x)))


@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_layer_of_torch_is_not_hidden_by_its_fast_path(norm_first):
    checked(FromTorch(norm_first=norm_first), tokens(), spaces=[(1, WIDTH), OF_HEADS, IN_EACH, IN_EACH, (1, 7)])
    assert torch.backends.mha.get_fastpath_enabled()


class CrossAttention(nn.Module):
    """Keys and values from a second stream of another width; weights averaged over heads are returned too."""

    def __init__(self):
        super().__init__()
        self.stem, self.other = nn.Linear(D, WIDTH), nn.Linear(D, 5)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, kdim=5, vdim=5, batch_first=True)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x, y):
        x, y = torch.tanh(self.stem(x)), torch.tanh(self.other(y))
        mixed, weights = self.attention(x, y, y)
        return self.head(torch.tanh(x + mixed)), weights


def test_attention_to_another_stream():
    checked(CrossAttention(), tokens(), tokens(), spaces=[(1, WIDTH), (1, 5), OF_HEADS, IN_EACH, IN_EACH])


# Experts

E, I = 3, 4  # noqa: E741


class DenseExperts(nn.Module):
    """All experts run, as one batched product, and a gate weighs them."""

    def __init__(self):
        super().__init__()
        self.stem, self.router, self.head = nn.Linear(D, D), nn.Linear(D, E, bias=False), nn.Linear(D, 2)
        self.up, self.down = nn.Parameter(torch.randn(E, 2 * I, D)), nn.Parameter(torch.randn(E, D, I))

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        return self.head(torch.tanh(x + self.mixture(x)))

    def mixture(self, x):
        gate, up = torch.bmm(x.expand(E, -1, -1), self.up.transpose(1, 2)).chunk(2, -1)
        out = torch.bmm(F.silu(gate) * up, self.down.transpose(1, 2))
        return torch.einsum("end,ne->nd", out, self.router(x).softmax(-1))


class ExpertsBySums(DenseExperts):
    def mixture(self, x):
        hidden = F.gelu(torch.einsum("nd,eid->nei", x, self.up[:, :I]))
        return torch.einsum("nei,edi->nd", hidden * self.router(x).softmax(-1)[..., None], self.down)


class RoutedExperts(DenseExperts):
    """Each sample is sent to its two best experts, whose weights are looked up."""

    def mixture(self, x):
        weights, chosen = self.router(x).softmax(-1).topk(2)
        weights /= weights.sum(-1, keepdim=True)
        chosen = self.sent(chosen)
        gate, up = torch.bmm(self.up[chosen], x.repeat_interleave(2, 0)[..., None]).squeeze(-1).chunk(2, -1)
        out = torch.bmm(self.down[chosen], (F.silu(gate) * up)[..., None]).squeeze(-1)
        return (out * weights.reshape(-1, 1)).view(len(x), 2, D).sum(1)

    def sent(self, chosen):
        return chosen.reshape(-1)


class ShiftedExperts(RoutedExperts):
    """The next expert after the one that was chosen: experts stand in an order."""

    def sent(self, chosen):
        return (chosen.reshape(-1) + 1) % E


class TwoChoices(RoutedExperts):
    """The best expert's first half gates the second best's second half: their hidden units belong together."""

    def mixture(self, x):
        chosen = self.router(x).softmax(-1).topk(2).indices
        first = torch.bmm(self.up[chosen[:, 0]], x[..., None]).squeeze(-1)[:, :I]
        second = torch.bmm(self.up[chosen[:, 1]], x[..., None]).squeeze(-1)[:, I:]
        return torch.bmm(self.down[chosen[:, 0]], (F.silu(first) * second)[..., None]).squeeze(-1)


class LoopedExperts(DenseExperts):
    """Experts one after another, each a part of the stack that is taken by its number."""

    def mixture(self, x):
        shares = self.router(x).softmax(-1)
        total = torch.zeros_like(x)
        for k in range(E):
            gate, up = F.linear(x, self.up[k]).chunk(2, -1)
            total = total + shares[:, k : k + 1] * F.linear(F.silu(gate) * up, self.down[k])
        return total


def samples():
    return torch.randn(7, D)


@pytest.mark.parametrize("kind", [DenseExperts, RoutedExperts])
def test_experts_move_and_their_hidden_units_inside_them(kind):
    symmetry = checked(kind(), samples(), spaces=[STREAM, (1, E), (E, I)])
    assert {site.parameter for site in symmetry["up"].sites} == {"router.weight", "up", "down"}
    assert [site.dims for site in symmetry["up/units"].sites] == [(0, 1), (0, 2)]


def test_indices_that_something_else_reads_fix_the_experts():
    checked(ShiftedExperts(), samples(), spaces=[STREAM, (1, I)])  # the same units in all experts


def test_two_choices_from_one_router_tie_the_hidden_units_of_all_experts():
    found = isthmus.trace(TwoChoices(), samples())
    for seed in range(4):
        isthmus.verify(TwoChoices(), found, samples(), seed=seed, controls=False)
    assert not [space for space in found if space.copies == E]


def test_experts_in_a_loop_keep_their_place_and_their_own_units():
    checked(LoopedExperts(), samples(), spaces=[STREAM, *[(1, I)] * E])


def test_experts_by_einsum():
    symmetry = isthmus.trace(ExpertsBySums(), samples())
    isthmus.verify(ExpertsBySums(), symmetry, samples(), controls=False)
    assert {"router.weight", "down"} <= set(symmetry.sites)


# Positions and look-ups


class Positions(nn.Module):
    """A table of positions longer than the sequence, cut to its length after a normalisation."""

    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Parameter(torch.randn(9, D)), nn.LayerNorm(D)
        self.stem, self.head = nn.Linear(D, D), nn.Linear(D, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.stem(x) + self.norm(self.table)[:T]))


def test_rows_behind_the_sequence_are_not_free():
    """They may be exchanged on this input, and on a longer one they may not."""
    symmetry = checked(Positions(), tokens(), spaces=[STREAM])
    assert "no operation reads it on inputs of this shape" in reason_for(symmetry, "table")


class LastToken(nn.Module):
    """The stream at the position of the largest number, which only data tell."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(D, D), nn.Linear(D, 2)

    def forward(self, x):
        y = torch.tanh(self.stem(x))
        return self.head(y[torch.arange(len(x)), x[..., 0].argmax(1)])


class Gathered(LastToken):
    """Scores between positions, of which data choose some."""

    def forward(self, x):
        y = torch.tanh(self.stem(x))
        where = x[..., :1].long().clamp(0, T - 1).expand(-1, -1, D)
        return self.head(y.gather(1, where))


class Accumulated(LastToken):
    def forward(self, x):
        return self.head(torch.tanh(self.stem(x)).cumsum(1))


class Recurrent(nn.Module):
    """A state that is written down step by step."""

    def __init__(self):
        super().__init__()
        self.into, self.keep, self.head = nn.Linear(D, 4), nn.Parameter(torch.rand(4)), nn.Linear(4, 2)

    def forward(self, x):
        u = self.into(x)
        states, state = torch.zeros_like(u), 0
        for t in range(T):
            state = torch.tanh(self.keep * state + u[:, t])
            states[:, t] = state
        return self.head(states)


@pytest.mark.parametrize("kind", [LastToken, Gathered, Accumulated])
def test_operations_along_positions_leave_the_stream_free(kind):
    checked(kind(), tokens(), spaces=[STREAM])


def test_a_state_that_is_written_step_by_step():
    checked(Recurrent(), tokens(), spaces=[(1, 4)])


def test_a_part_that_is_read_after_it_was_written_over_is_not_trusted():
    """The view was taken before; it shows the new numbers, which come from other units."""

    class Stale(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.other, self.head = nn.Linear(3, 4), nn.Linear(3, 2), nn.Linear(4, 2)

        def forward(self, x):
            row = torch.tanh(self.stem(x)) * 1
            view = row[:, 1:3]
            row[:, 2:4] = torch.tanh(self.other(x))
            return self.head(torch.cat([view, row[:, :2]], 1))

    net, x = Stale(), torch.randn(2, 3)
    symmetry = isthmus.trace(net, x)
    for seed in range(4):
        isthmus.verify(net, symmetry, x, seed=seed, controls=False)


class ShapeOfAUnit(LastToken):
    """One unit's values are taken for their shape alone."""

    def forward(self, x):
        y = torch.tanh(self.stem(x))
        length = y[:, :, -1].shape[1]
        return self.head(y + torch.arange(length).unsqueeze(-1))


def test_a_unit_that_is_taken_for_its_shape_is_like_the_others():
    checked(ShapeOfAUnit(), tokens(), spaces=[STREAM])
