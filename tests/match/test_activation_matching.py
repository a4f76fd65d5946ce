import numpy as np
import pytest
import torch

import isthmus
from helpers.pairs import (
    MLP,
    NETWORKS,
    TRAINED,
    data_of,
    inputs_of,
    lively,
    planted,
    seen_by_hooks,
    stir,
    symmetry,
    trained,
)
from helpers.refusals import refuses
from helpers.zoo import ZOO as STRUCTURES
from isthmus.errors import InputError, SymmetryError
from isthmus.match.activation_matching import ActivationMatching
from oracles import git_rebasin as oracle


@pytest.mark.parametrize("at", ["post", "pre"])
@pytest.mark.parametrize("name", TRAINED)
def test_it_finds_the_oracles_permutations(name, at):
    a, b = trained(name, 0), trained(name, 1)
    seen_a, seen_b = seen_by_hooks(name, at, 0), seen_by_hooks(name, at, 1)
    expected = oracle.activation_matching(seen_a, seen_b)
    found = isthmus.align([a, b], symmetry(name), ActivationMatching(at=at), data=data_of(name))
    total = 0.0
    for space in symmetry(name):
        similarity = oracle.correlation(seen_a[space.name], seen_b[space.name])
        best = similarity[np.arange(len(similarity)), expected[space.name]].sum()
        mine = similarity[np.arange(len(similarity)), found.transforms[1][space.name].indices[0]].sum()
        # Dead units tie, so the permutations may differ where the sums do not; correlations agree to 1e-6.
        assert mine == pytest.approx(best, abs=1e-5), space.name
        total += best
    assert found.objective == pytest.approx(total, abs=1e-4)
    assert found.upper_bound == found.objective


@pytest.mark.parametrize("name", NETWORKS)
def test_a_planted_permutation_is_recovered(name):
    model, sym = lively(name, 0), symmetry(name)
    moved, _ = planted(model, sym, 1)
    x = inputs_of(model, 64)
    # before the nonlinearity no unit is dead
    found = isthmus.align([model, moved], sym, ActivationMatching(at="pre"), data=[x])
    back = isthmus.apply(found, moved, 1).state_dict()
    assert all(torch.equal(tensor, back[key]) for key, tensor in model.state_dict().items())
    units = sum(space.copies * space.size for space in sym if not sym.children(space))
    assert found.objective == pytest.approx(units)  # every unit correlates fully with its copy


@pytest.mark.parametrize(
    "name",
    ["GroupNorm", "GroupedConv", "DepthwiseMultiplier", "Attention", "GroupedQueries", "OuterProduct", "Experts"],
)
def test_a_planted_permutation_of_nested_and_crossed_spaces_is_recovered(name):
    torch.manual_seed(0)
    model = STRUCTURES[name]().eval()
    stir(model, 0)
    (x,), _ = model.inputs(samples=100)
    sym = isthmus.trace(model, x)
    moved, _ = planted(model, sym, 1)
    found = isthmus.align([model, moved], sym, ActivationMatching(at="pre"), data=[x])
    back = isthmus.apply(found, moved, 1).state_dict()
    assert all(torch.equal(tensor, back[key]) for key, tensor in model.state_dict().items())


def test_units_of_an_outer_product_are_told_apart_before_the_other_factor_is_matched():
    torch.manual_seed(0)
    model = STRUCTURES["OuterProduct"]().eval()
    stir(model, 0)
    (x,), _ = model.inputs(samples=200)
    sym = isthmus.trace(model, x)
    moved, _ = planted(model, sym, 2)
    read = isthmus.collect([model, moved], sym, [x], at="post")
    found = isthmus.align([model, moved], sym, "activation_matching", data=[x])
    for space in sym:
        correlation = read[space.name].correlation(0, 1).numpy()
        facing = correlation[np.arange(space.size), found.transforms[1][space.name].indices[0]]
        alive = read[space.name].deviation[0].numpy() > 0
        np.testing.assert_allclose(facing[alive], 1, atol=1e-6)


@pytest.mark.parametrize("name", TRAINED)
def test_it_does_not_matter_how_the_moved_models_units_were_numbered(name):
    a, b = lively(name, 0), lively(name, 1)
    shuffled, _ = planted(b, symmetry(name), 3)
    moved = []
    for other in (b, shuffled):
        found = isthmus.align([a, other], symmetry(name), ActivationMatching(at="pre"), data=data_of(name)[:1])
        moved.append(isthmus.apply(found, other, 1).state_dict())
    assert all(torch.equal(tensor, moved[1][key]) for key, tensor in moved[0].items())


def test_covariance_prefers_strong_units_where_correlation_does_not():
    """Two strong units that agree in part outweigh two pairs that agree well, one of a weak unit, in covariance."""
    x = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    a, b = (torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1)).eval() for _ in "ab")
    with torch.no_grad():
        a[0].weight.copy_(torch.tensor([[10.0, 0.0], [0.0, 1.0]]))
        b[0].weight.copy_(torch.tensor([[0.1, 0.0], [6.0, 8.0]]))
    sym = isthmus.trace(a, x[:2])
    chosen = {
        similarity: isthmus.align(
            [a, b], sym, ActivationMatching(at="pre", similarity=similarity), data=[x]
        ).transforms[1]
        for similarity in ("correlation", "covariance")
    }
    # expected correlations [[1, 0.6], [0, 0.8]], covariances [[1, 60], [0, 8]]
    assert chosen["correlation"]["0"].indices.tolist() == [[0, 1]]
    assert chosen["covariance"]["0"].indices.tolist() == [[1, 0]]


def test_what_was_read_is_reported():
    models = [lively(MLP, seed) for seed in range(2)]
    found = isthmus.align(models, symmetry(MLP), ActivationMatching(at="pre"), data=data_of(MLP))
    assert found.details == {"reference": 0, "pairs": [{"samples": 400}]}


def test_every_model_is_matched_to_the_first():
    models = [trained(MLP, seed) for seed in range(3)]
    together = isthmus.align(models, symmetry(MLP), "activation_matching", data=data_of(MLP))
    objective = 0.0
    for index in (1, 2):
        alone = isthmus.align([models[0], models[index]], symmetry(MLP), "activation_matching", data=data_of(MLP))
        objective += alone.objective
        for space in symmetry(MLP):
            assert np.array_equal(
                together.transforms[index][space.name].indices, alone.transforms[1][space.name].indices
            )
    assert together.objective == pytest.approx(objective)


def test_a_space_that_cannot_be_read_is_named():
    torch.manual_seed(0)
    a, b = (STRUCTURES["LowRankUpdate"]().eval() for _ in "ab")
    (x,), _ = a.inputs(samples=10)
    with refuses(SymmetryError, "no activations stand for space"):
        isthmus.align([a, b], isthmus.trace(a, x), "activation_matching", data=[x])


@pytest.mark.parametrize(
    ("options", "told"), [({"at": "mid"}, "'post' or 'pre'"), ({"similarity": "cosine"}, "'cosine'")]
)
def test_options_out_of_range_are_refused(options, told):
    with refuses(InputError, told):
        ActivationMatching(**options)
