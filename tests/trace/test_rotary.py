"""Turns of pairs of queries and keys: found where positions turn both, and nothing else reads either."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import isthmus
from helpers.refusals import refuses
from helpers.zoo import double
from isthmus.errors import SymmetryError
from isthmus.symmetry import Gauge
from isthmus.symmetry.gauges import random_turns, turned

T, D, HEADS, INNER = 5, 6, 4, 6
# float64 through a few sums of 24 terms, scales of up to two either way.
ROUNDING = 1e-12


def angles(units):
    return torch.outer(torch.arange(T), 1 / torch.arange(1, units // 2 + 1))


def halves(x):
    """Unit k and unit k + half are a pair."""
    angle = angles(x.shape[-1]).repeat(1, 2)
    first, second = x.chunk(2, -1)
    return x * angle.cos() + torch.cat([-second, first], -1) * angle.sin()


def neighbours(x):
    """Units 2k and 2k + 1 are a pair."""
    angle = angles(x.shape[-1]).repeat_interleave(2, -1)
    crossed = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * angle.cos() + crossed * angle.sin()


def written_out(x):
    """Halves, each product by itself."""
    cosine, sine = angles(x.shape[-1]).cos(), angles(x.shape[-1]).sin()
    first, second = x.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)


def backwards(x):
    """Turned the other way."""
    angle = -angles(x.shape[-1]).repeat(1, 2)
    first, second = x.split(x.shape[-1] // 2, -1)
    return (x * angle.cos() + torch.cat([-second, first], -1) * angle.sin()) / 1.5


def partly(x):
    """The first four units of each head are turned."""
    return torch.cat([halves(x[..., :4]), x[..., 4:]], -1)


class Rotary(nn.Module):
    """Attention over turned queries and keys.

    Args:
        turn: Turns queries and keys.
        key_heads: Heads of keys and values, each read by several of queries.
        bias: Whether layers have biases.
        fused: Whether one layer makes queries, keys and values.
    """

    def __init__(self, turn=halves, key_heads=HEADS, bias=True, fused=False):
        super().__init__()
        torch.manual_seed(0)
        self.turn, self.fused, self.key_heads = turn, fused, key_heads
        self.sizes = [HEADS * INNER, key_heads * INNER, key_heads * INNER]
        self.stem, self.head = nn.Linear(D, D), nn.Linear(D, 2)
        parts = [sum(self.sizes)] if fused else self.sizes
        self.project = nn.ModuleList(nn.Linear(D, size, bias=bias) for size in parts)
        self.out = nn.Linear(HEADS * INNER, D)

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        parts = self.project[0](x).split(self.sizes, -1) if self.fused else [layer(x) for layer in self.project]
        q, k, v = (part.unflatten(-1, (-1, INNER)).transpose(1, 2) for part in parts)
        q, k = self.turned(q, k)
        return self.head(torch.tanh(x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))))

    def turned(self, q, k):
        return self.turn(q), self.turn(k)

    def attend(self, q, k, v):
        k, v = (y.repeat_interleave(HEADS // self.key_heads, 1) for y in (k, v))
        return (q / INNER**0.5 @ k.transpose(2, 3)).softmax(-1) @ v


class Fused(Rotary):
    """Attention as one operation."""

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.key_heads != HEADS)


NETWORKS = {
    "halves": (Rotary(), HEADS, 3, 2),
    "neighbours": (Rotary(neighbours), HEADS, 3, 2),
    "written out": (Rotary(written_out, bias=False), HEADS, 3, 2),
    "backwards": (Rotary(backwards), HEADS, 3, 2),
    "partly": (Rotary(partly), HEADS, 2, 2),
    "grouped": (Rotary(key_heads=2), 2, 3, 4),
    "one head of keys": (Rotary(key_heads=1), 1, 3, 8),
    "grouped, one operation": (Fused(key_heads=2), 2, 3, 4),
    "one operation": (Fused(neighbours), HEADS, 3, 2),
    "one layer": (Rotary(fused=True), HEADS, 3, 2),
    "one layer, grouped": (Fused(partly, key_heads=2, fused=True), 2, 2, 4),
}


def tokens():
    return torch.randn(2, T, D, generator=torch.Generator().manual_seed(0))


def traced(network):
    return isthmus.trace(network, tokens())


def rotations(symmetry):
    return [gauge for gauge in symmetry.gauges if gauge.kind == "rotation"]


@pytest.mark.parametrize("name", NETWORKS)
def test_pairs_are_found_and_proved(name):
    network, heads, pairs, members = NETWORKS[name]
    symmetry = traced(network)
    (gauge,) = rotations(symmetry)
    assert {site.role: site.positions.shape for site in gauge.sites} == {
        "vector": (heads, pairs, members),
        "covector": (heads, pairs, 2),
    }
    assert len(gauge.sites) == (2 if network.project[0].bias is None else 4)
    for seed in range(3):
        isthmus.verify(network, symmetry, tokens(), trials=2, seed=seed)


@pytest.mark.parametrize("name", NETWORKS)
def test_turns_keep_the_function_and_move_the_weights(name):
    network = double(NETWORKS[name][0])
    symmetry = traced(network)
    x = tokens().double()
    moved = turned(network.state_dict(), symmetry, random_turns(symmetry, np.random.default_rng(1)))
    assert all(
        not torch.equal(moved[site.parameter], network.state_dict()[site.parameter])
        for gauge in rotations(symmetry)
        for site in gauge.sites
    )
    found = torch.func.functional_call(network, moved, (x,))
    torch.testing.assert_close(found, network(x), rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("name", ["halves", "neighbours", "grouped", "one layer, grouped"])
def test_turned_models_have_one_canonical_form(name):
    network = double(NETWORKS[name][0])
    symmetry = traced(network)
    other = copy.deepcopy(network)
    other.load_state_dict(turned(network.state_dict(), symmetry, random_turns(symmetry, np.random.default_rng(2))))
    one, two = (isthmus.canonicalise(model, symmetry) for model in (network, other))
    x = tokens().double()
    torch.testing.assert_close(one(x), network(x), rtol=ROUNDING, atol=ROUNDING)
    for key, tensor in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[key], tensor, rtol=ROUNDING, atol=ROUNDING)


def test_wrong_pairs_are_refused():
    symmetry = traced(NETWORKS["halves"][0])
    (gauge,) = rotations(symmetry)
    wrong = tuple(replace(site, positions=site.positions[:, ::-1] if k < 2 else site.positions) for k, site in
                  enumerate(gauge.sites))  # fmt: skip
    claimed = replace(symmetry, gauges=(Gauge(gauge.space, gauge.kind, wrong),))
    with refuses(SymmetryError, "factors or turns of units of project.0/turns change the outputs"):
        isthmus.verify(NETWORKS["halves"][0], claimed, tokens())


class Normed(Rotary):
    """A norm of each head before it is turned."""

    def turned(self, q, k):
        return super().turned(F.rms_norm(q, (INNER,)), F.rms_norm(k, (INNER,)))


class ReadElsewhere(Rotary):
    """Something else reads the keys."""

    def attend(self, q, k, v):
        return super().attend(q, k, v) + torch.tanh(k)


class ReadBefore(Rotary):
    """Something else reads the queries before they are turned."""

    def turned(self, q, k):
        self.seen = q.square().sum(-1, keepdim=True)
        return super().turned(q, k)

    def attend(self, q, k, v):
        return super().attend(q, k, v) * self.seen


class OnlyQueries(Rotary):
    """Keys are not turned."""

    def turned(self, q, k):
        return self.turn(q), k


class Shared(Rotary):
    """One layer makes queries and keys."""

    def turned(self, q, k):
        return self.turn(q), self.turn(q)


class OtherPairs(Rotary):
    """Queries and keys are turned in other pairs."""

    def turned(self, q, k):
        return halves(q), neighbours(k)


def stretched(x):
    """No turn: the two units of a pair grow apart."""
    angle = angles(x.shape[-1]).repeat(1, 2)
    first, second = x.chunk(2, -1)
    return x * angle.cos() + torch.cat([second, first], -1) * 0.5 * angle.sin()


def learned(x):
    return x + angles(2 * x.shape[-1]).sin()


@pytest.mark.parametrize(
    "network",
    [
        Normed(),
        ReadElsewhere(),
        ReadBefore(),
        OnlyQueries(),
        Shared(),
        OtherPairs(),
        Rotary(stretched),
        Rotary(learned),
    ],
    ids=["normed", "read elsewhere", "read before", "only queries", "shared", "other pairs", "stretched", "learned"],
)
def test_no_pairs_are_claimed_without_evidence(network):
    symmetry = traced(network)
    assert not rotations(symmetry)
    isthmus.verify(network, symmetry, tokens(), trials=2)


def test_turns_are_saved_with_the_symmetry():
    symmetry = traced(NETWORKS["grouped"][0])
    again = isthmus.symmetry.Symmetry.from_json(symmetry.to_json())
    assert again.to_json() == symmetry.to_json()
    assert np.array_equal(rotations(again)[0].sites[0].positions, rotations(symmetry)[0].sites[0].positions)
