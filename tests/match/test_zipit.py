"""ZipIt!: the fast greedy merging against a naive one, and what its groups make of networks."""

import copy

import numpy as np
import pytest
import torch

import isthmus
from helpers.pairs import MLP, NETWORKS, RESNET20, VGG_BN, data_of, inputs_of, lively, planted, stir, symmetry, trained
from helpers.refusals import refuses
from helpers.zoo import ZOO as STRUCTURES
from isthmus.errors import InputError
from isthmus.match.zipit import ZipIt, _correlations, _slots_of, _zip_units, _zippable
from isthmus.observe.moments import SpaceMoments
from isthmus.symmetry import LinearMap, Permutation
from oracles import zipit as oracle

SETTINGS = [(0.0, 1.0), (0.2, 0.5), (0.5, 0.5), (1.0, 0.3), (1.0, 1.0), (1.0, 0.0)]


def random_correlations(models: int, units: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    found = np.corrcoef(rng.normal(size=(3 * units, models * units)) @ rng.normal(size=(models * units,) * 2), rowvar=0)
    return (found + found.T) / 2


def as_groups(slots: np.ndarray) -> set[frozenset[tuple[int, int]]]:
    models, units = slots.shape
    return {
        frozenset((m, u) for m in range(models) for u in range(units) if slots[m, u] == slot) for slot in range(units)
    }


@pytest.mark.parametrize("models", [2, 3, 4])
@pytest.mark.parametrize(("beta", "alpha"), SETTINGS)
def test_the_groups_are_the_naive_ones(models, beta, alpha):
    for seed in range(4):
        similarity = random_correlations(models, 9, seed)
        expected = oracle.zip_groups(similarity, models, beta, alpha)
        found = _zip_units(similarity, models, beta, alpha)
        assert as_groups(found.slots) == {frozenset(group) for group in expected}


@pytest.mark.parametrize("models", [2, 3])
def test_every_unit_goes_into_one_group_and_no_slot_stays_empty(models):
    for beta, alpha in SETTINGS:
        slots = _zip_units(random_correlations(models, 20, 1), models, beta, alpha).slots
        assert slots.shape == (models, 20)
        assert set(slots.ravel().tolist()) == set(range(20))


def test_without_a_budget_two_models_are_permuted():
    found = _zip_units(random_correlations(2, 30, 0), 2, 0.0, 1.0)
    assert found.within == [0, 0]
    assert all(sorted(row) == list(range(30)) for row in found.slots.tolist())


def test_the_budget_bounds_the_merges_within_each_model():
    similarity = random_correlations(3, 20, 0)
    free = _zip_units(similarity, 3, 1.0, 1.0)
    assert min(free.within) > 2
    # 40 merges, a tenth of them over three models: one each, and more only where nothing else was left
    assert max(_zip_units(similarity, 3, 0.1, 1.0).within) < max(free.within)
    assert _zip_units(random_correlations(2, 20, 0), 2, 0.4, 1.0).within <= [4, 4]


def test_a_smaller_factor_makes_groups_more_even():
    # One factor with loadings that fall off: the highest loadings are always the most alike.
    loadings = np.concatenate([np.linspace(0.99, 0.1, 40), np.linspace(0.98, 0.09, 40)])
    unevenness = []
    for alpha in (1.0, 0.9, 0.0):
        slots = _zip_units(np.outer(loadings, loadings), 2, 1.0, alpha).slots
        unevenness.append(np.square(np.bincount(slots.ravel())).sum())
    assert unevenness[0] > unevenness[1] > unevenness[2]


def test_slots_are_those_of_the_first_model():
    slots = _zip_units(random_correlations(2, 25, 0), 2, 1.0, 1.0).slots
    for slot in range(25):
        mine = np.flatnonzero(slots[0] == slot)
        if len(mine):  # its lowest unit, which stood here
            assert mine.min() == slot
    assert np.array_equal(_slots_of(np.array([[0, 0, 2], [3, 2, 2]])), [[0, 0, 2], [1, 2, 2]])


def test_units_that_never_vary_are_alike():
    covariance = torch.eye(6, dtype=torch.float64)
    covariance[1], covariance[:, 1], covariance[4], covariance[:, 4] = 0, 0, 0, 0
    found = _correlations(SpaceMoments(10, torch.zeros(2, 3), covariance.reshape(2, 3, 2, 3)))
    assert found[1, 4] == found[4, 1] == found[1, 1] == 1
    assert found[0, 1] == found[1, 2] == 0


@pytest.mark.parametrize("name", NETWORKS)
def test_a_planted_permutation_is_recovered(name):
    model, sym = lively(name, 0), symmetry(name)
    moved, _ = planted(model, sym, 1)
    again, _ = planted(model, sym, 2)
    found = isthmus.align([model, moved, again], sym, ZipIt(at="pre"), data=[inputs_of(model, 64)])
    assert found.is_exact
    for index, other in enumerate((model, moved, again)):
        back = isthmus.apply(found, other, index).state_dict()
        assert all(torch.equal(tensor, back[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["GroupNorm", "Attention", "OuterProduct", "Experts", "TiedAutoencoder", "DenseBlock"])
def test_a_planted_permutation_of_nested_and_crossed_spaces_is_recovered(name):
    torch.manual_seed(0)
    model = STRUCTURES[name]().eval()
    stir(model, 0)
    (x,), _ = model.inputs(samples=100)
    sym = isthmus.trace(model, x)
    moved, _ = planted(model, sym, 1)
    found = isthmus.align([model, moved], sym, ZipIt(at="pre"), data=[x])
    back = isthmus.apply(found, moved, 1).state_dict()
    assert all(torch.equal(tensor, back[key]) for key, tensor in model.state_dict().items())


def test_spaces_that_would_take_the_factor_twice_are_left_out():
    for name, left in (("TiedAutoencoder", False), ("DenseBlock", True), ("Attention", True)):
        model = STRUCTURES[name]().eval()
        sym = isthmus.trace(model, *model.inputs()[0])
        for space in _zippable(sym):
            assert space.parent is None
            assert not sym.children(space)
        assert bool(_zippable(sym)) == left, name


@pytest.mark.parametrize("models", [2, 3])
def test_the_merged_network_is_the_papers(models):
    parents = [trained(MLP, seed) for seed in range(models)]
    options = ZipIt(at="post", budget_within=1.0, decay=0.8)
    found = isthmus.align(parents, symmetry(MLP), options, data=data_of(MLP))
    assert any(isinstance(t, LinearMap) for t in found.transforms[0].values())
    moments = isthmus.collect(parents, symmetry(MLP), data_of(MLP))
    groups = [oracle.zip_groups(_correlations(moments[s.name]), models, 1.0, 0.8) for s in symmetry(MLP)]
    states = [{k: v.double().numpy() for k, v in parent.state_dict().items()} for parent in parents]
    layers = [name.removesuffix(".weight") for name in states[0] if name.endswith(".weight")]
    weights, biases = oracle.zip_mlp(
        [[s[f"{layer}.weight"] for layer in layers] for s in states],
        [[s[f"{layer}.bias"] for layer in layers] for s in states],
        groups,
    )
    x = data_of(MLP)[0][0].flatten(1).double()
    expected = x.numpy()
    for number, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        expected = expected @ weight.T + bias
        expected = np.maximum(expected, 0) if number < len(weights) - 1 else expected
    merged = isthmus.merge([copy.deepcopy(parent).double() for parent in parents], found)
    with torch.no_grad():  # float64 throughout; groups stand in another order, which reorders sums of 64 terms
        np.testing.assert_allclose(merged(x).numpy(), expected, rtol=1e-9, atol=1e-9)


def test_maps_are_means_and_members():
    models = [trained(VGG_BN, seed) for seed in range(3)]
    found = isthmus.align(models, symmetry(VGG_BN), ZipIt(budget_within=1.0, decay=1.0), data=data_of(VGG_BN))
    for space in symmetry(VGG_BN):
        maps = [t[space.name] for t in found.transforms]
        if isinstance(maps[0], Permutation):
            continue
        M, U = torch.cat([m.into[0] for m in maps], dim=1) / 3, torch.cat([m.back[0] for m in maps])
        torch.testing.assert_close(M @ U, torch.eye(space.size, dtype=torch.float64))
        assert torch.equal(U.sum(dim=1), torch.ones(3 * space.size, dtype=torch.float64))


def test_batch_norms_are_measured_again():
    models = [trained(RESNET20, seed) for seed in range(2)]
    merged = isthmus.merge(models, isthmus.align(models, symmetry(RESNET20), "zipit", data=data_of(RESNET20)))
    assert merged.needs_repair
    assert not isthmus.repair(merged, data_of(RESNET20)).needs_repair


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"at": "middle"}, "'post' or 'pre'"),
        ({"budget_within": 1.5}, "budget_within=1.5"),
        ({"decay": -0.1}, "decay=-0.1"),
        ({"decay": float("nan")}, "decay=nan"),
    ],
)
def test_bad_options_are_refused(options, told):
    with refuses(InputError, told):
        ZipIt(**options)
