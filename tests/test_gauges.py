"""Gauges: factors of single units keep the function where they are claimed, and one choice of them is canonical."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import isthmus
from helpers.pairs import MLP, VGG_BN, fresh, inputs_of, stir, symmetry
from helpers.refusals import refuses
from helpers.zoo import ZOO, built, double, traced
from isthmus.errors import SymmetryError
from isthmus.symmetry import Gauge, Symmetry
from isthmus.symmetry.gauges import _balancing_factors, random_factors, rescaled
from isthmus.tracing.random_network import _fresh_inputs, _outputs

# float64 through at most ten layers of sums of 65 terms, factors of up to two either way.
ROUNDING = 1e-10


def gauges_of(name: str) -> list[tuple[int, str]]:
    """Sizes and kinds."""
    return sorted((traced(name)[gauge.space].size, gauge.kind) for gauge in traced(name).gauges)


# Every kind of evidence: what hands on a sign, a scale or neither.
KNOWN = {
    "PlainMLP": [(4, "sign"), (5, "scale")],
    "EqualWidths": [(2, "scale"), (2, "scale")],
    "Dropout": [(5, "scale")],
    "BatchNorm": [],
    "GroupNorm": [],
    "LayerNormBefore": [],
    "WeightNorm": [],
    "DeepLinear": [],
    "Softmax": [],
    "GatedLinear": [],
    "MeanOverChannels": [],
    "TiedAutoencoder": [],
    "StoredMask": [],
    "LSTMCell": [],
}


@pytest.mark.parametrize("name", KNOWN)
def test_gauges_are_found_by_evidence(name):
    assert gauges_of(name) == KNOWN[name]


@pytest.mark.parametrize("name", [name for name in ZOO if traced(name).gauges])
def test_factors_keep_the_function(name):
    model, sym = double(built(name)), traced(name)
    args, kwargs = _fresh_inputs(model.inputs(), np.random.default_rng(1))
    state = model.state_dict()
    moved = rescaled(state, sym, random_factors(sym, np.random.default_rng(0)))
    assert any(not torch.equal(tensor, moved[key]) for key, tensor in state.items())
    expected = _outputs(model, state, args, kwargs)
    for other in (moved, isthmus.canonicalise(model, sym).state_dict()):
        for found, wanted in zip(_outputs(model, other, args, kwargs), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=ROUNDING, atol=ROUNDING)


def wavy() -> nn.Module:
    """ReLU, tanh and max-pooled convolutions: signs and scales."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 2), nn.LeakyReLU(0.1), nn.Flatten(),
        nn.Linear(20, 7), nn.Tanh(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3),
    )  # fmt: skip
    stir(net, 0)
    return net.double().eval()


X = torch.randn(4, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_networks_that_differ_in_factors_have_one_canonical_form():
    net = wavy()
    sym = isthmus.trace(net, X)
    assert sorted(gauge.kind for gauge in sym.gauges) == ["scale", "scale", "scale", "sign"]
    before = copy.deepcopy(net.state_dict())
    canonical = isthmus.canonicalise(net, sym)
    assert all(torch.equal(tensor, net.state_dict()[key]) for key, tensor in before.items())
    again = isthmus.canonicalise(canonical, sym)
    for seed in range(3):
        other = copy.deepcopy(net)
        other.load_state_dict(rescaled(net.state_dict(), sym, random_factors(sym, np.random.default_rng(seed))))
        for key, tensor in isthmus.canonicalise(other, sym).state_dict().items():
            torch.testing.assert_close(tensor, canonical.state_dict()[key], rtol=1e-9, atol=1e-12)
    for key, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, canonical.state_dict()[key], rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(canonical(X), net(X), rtol=ROUNDING, atol=ROUNDING)


def test_canonical_scales_are_balanced_and_make_the_weights_smallest():
    net = wavy()
    sym = isthmus.trace(net, X)
    state = isthmus.canonicalise(net, sym).state_dict()

    def size(each) -> float:
        return sum(float(tensor.square().sum()) for tensor in each.values())

    for gauge in sym.gauges:
        if gauge.kind == "scale":
            factors = _balancing_factors(state, sym[gauge.space])
            torch.testing.assert_close(factors, torch.ones_like(factors), rtol=1e-9, atol=0)
    assert size(state) < size(net.state_dict())
    for seed in range(20):
        assert size(state) < size(rescaled(state, sym, random_factors(sym, np.random.default_rng(seed))))


def test_canonicalised_copies_are_matched_though_their_scales_differ():
    model, sym = fresh(MLP, 0).double(), symmetry(MLP)
    stir(model, 0)
    rng = np.random.default_rng(0)
    moves = {space.name: isthmus.Permutation.random(space, rng) for space in sym}
    other = isthmus.apply(isthmus.Alignment(sym, (moves,)), model, 0)
    other.load_state_dict(rescaled(other.state_dict(), sym, random_factors(sym, rng)))
    pair = [isthmus.canonicalise(each, sym) for each in (model, other)]
    merged = isthmus.merge(pair, isthmus.align(pair, sym))
    x = inputs_of(model, 5).double()
    with torch.no_grad():
        torch.testing.assert_close(merged(x), model(x), rtol=1e-9, atol=1e-9)


def test_dead_units_keep_their_scale():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        net[0].weight[1], net[0].bias[1], net[2].weight[:, 2] = 0, 0, 0
    x = torch.randn(4, 3, dtype=torch.float64)
    canonical = isthmus.canonicalise(net, isthmus.trace(net, x))
    assert torch.equal(canonical[0].weight[2], net[0].weight[2])
    assert torch.equal(canonical[2].weight[:, 1], net[2].weight[:, 1])
    assert all(bool(tensor.isfinite().all()) for tensor in canonical.state_dict().values())


def test_a_network_without_gauges_stays_as_it_is():
    model = fresh(VGG_BN, 0)
    canonical = isthmus.canonicalise(model, symmetry(VGG_BN))
    assert all(torch.equal(tensor, canonical.state_dict()[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(("activation", "kind"), [(F.gelu, "scale"), (F.relu, "sign"), (F.tanh, "scale")])
def test_a_gauge_that_does_not_hold_is_refused(activation, kind):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.head(activation(self.body(x)))

    net, x = Net(), torch.randn(2, 3)
    sym = isthmus.trace(net, x)
    with refuses(SymmetryError, "factors or turns of units of body change the outputs"):
        isthmus.verify(net, replace(sym, gauges=(Gauge("body", kind),)), x)


def test_gauges_are_saved_with_the_symmetry():
    sym = traced("PlainMLP")
    again = Symmetry.from_json(sym.to_json()).gauges
    assert [(gauge.space, gauge.kind) for gauge in again] == [(gauge.space, gauge.kind) for gauge in sym.gauges] != []
