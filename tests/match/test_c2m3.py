import copy
import itertools
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import isthmus
from helpers.pairs import (
    CNN,
    MLP,
    RESNET20,
    TRAINED,
    VGG_BN,
    data_of,
    learnt,
    lively,
    planted,
    spec_of,
    structure,
    symmetry,
    trained,
)
from helpers.refusals import refuses
from helpers.zoo import ZOO as STRUCTURES
from isthmus.errors import InputError
from isthmus.match.base import MatchingProblem, identity_transforms
from isthmus.match.c2m3 import C2M3, GAP, _frank_wolfe, _highest, _starting_points
from isthmus.match.coordinate_ascent import _random_start
from isthmus.match.nested import family_of
from isthmus.match.relaxed_objective import RelaxedObjective, mix
from isthmus.match.weight_matching import WeightMatching
from isthmus.symmetry import Permutation
from isthmus.symmetry.transform import compose, invert
from oracles import c2m3 as oracle
from oracles import git_rebasin

FRANK_WOLFE_ALONE = C2M3(restarts=1, polish=False)
# Plain chains, shared and repeated places, nested families; and two whose families interlock.
SEVERAL = (
    "BatchNorm",
    "Projection",
    "DenseBlock",
    "RecurrentCell",
    "OuterProduct",
    "GroupNorm",
    "Attention",
    "Experts",
)
INTERLOCKED = ("GroupedConv", "GroupedQueries")


@cache
def case(name: str, count: int = 3) -> tuple[tuple[nn.Module, ...], isthmus.Symmetry]:
    """Networks in float64 and their symmetry."""
    if name not in STRUCTURES:
        return tuple(copy.deepcopy(lively(name, seed)).double() for seed in range(count)), symmetry(name)
    models = [structure(name, seed) for seed in range(count)]
    args, kwargs = models[0].inputs()
    return tuple(model.double() for model in models), isthmus.trace(structure(name), *args, kwargs=kwargs)


def relaxed_of(models, sym, moving=None) -> RelaxedObjective:
    problem = MatchingProblem(models, sym)
    stay = [identity_transforms(sym) for _ in models]
    return RelaxedObjective(sym, problem.states, problem.parameters, stay, moving or range(len(models)))


def value_of(models, sym, transforms) -> float:
    """The summed inner products of the parameters of moved models, from nothing but their state dicts."""
    found = isthmus.Alignment(sym, tuple(transforms))
    states = [isthmus.apply(found, model, index).state_dict() for index, model in enumerate(models)]
    touched = {site.parameter for space in sym for site in space.sites}
    names = [name for name, _ in models[0].named_parameters() if name in touched]
    return sum(
        float((a[n].double() * b[n].double()).sum()) for a, b in itertools.combinations(states, 2) for n in names
    )


def draw(sym, rng, held=()) -> dict[str, Permutation]:
    """Random permutations, but of held families."""
    still = {space.name for root in held for space in family_of(sym, root)}
    return _random_start(sym, rng) | {name: t for name, t in identity_transforms(sym).items() if name in still}


# Against the paper, transcribed


@pytest.mark.parametrize("name", TRAINED)
def test_two_models_are_matched_as_pairwise_frank_wolfe_does(name):
    models, sym = case(name, 2)
    spec, states = spec_of(name), [git_rebasin.as_arrays(model) for model in models]
    expected = {key: oracle.nearest(m).argmax(axis=1) for key, m in oracle.pairwise(spec, *states, GAP).items()}
    found = isthmus.align(models, sym, FRANK_WOLFE_ALONE)
    for space in sym:
        assert np.array_equal(found.transforms[1][space.name].indices[0], expected[space.name]), space.name
    assert found.details["starts"][0]["steps"] > 1


@pytest.mark.parametrize(("name", "count"), [(MLP, 3), (MLP, 4)])
@pytest.mark.parametrize("pinned", [True, False])
def test_several_models_end_where_dense_frank_wolfe_does(name, count, pinned):
    models, sym = case(name, count)
    spec, states = spec_of(name), [git_rebasin.as_arrays(model) for model in models]
    starts = [oracle.identities(spec, state) for state in states]
    if pinned:
        starts[1:] = [oracle.pairwise(spec, states[0], state, GAP, steps=20) for state in states[1:]]
    moving = range(1 if pinned else 0, count)
    expected, values, evaluations = oracle.frank_wolfe(spec, states, starts, moving, GAP, steps=20)
    found = isthmus.align(models, sym, C2M3(restarts=1, polish=False, pinned=pinned, frame="universe", budget=0.4))
    for index in range(count):
        for space in sym:
            assert np.array_equal(found.transforms[index][space.name].indices[0], expected[index][space.name])
    # The relaxed objective leaves nothing out here; both sum float64 products in another order, over up to 20 steps
    # whose lengths come from roots of polynomials (√eps each, at a maximum where the value is flat).
    assert evaluations <= 5
    assert found.details["evaluations_per_step"] <= 5
    reached = found.details["starts"][0]["relaxed"]
    if found.details["starts"][0]["steps"] < 20:
        assert reached == pytest.approx(values[-1], rel=1e-9)
    assert sorted(values) == values


# The relaxed objective


@pytest.mark.parametrize("name", [*SEVERAL, *INTERLOCKED])
def test_at_permutations_it_is_the_objective_of_weight_matching(name):
    models, sym = case(name)
    relaxed, rng = relaxed_of(models, sym), np.random.default_rng(0)
    values = []
    for _ in range(2):
        transforms = [draw(sym, rng, relaxed.held) for _ in models]
        points = [relaxed.point(relaxed.vertex(t)) for t in transforms]
        values.append((relaxed.value(relaxed.at(points)), value_of(models, sym, transforms)))
    # Tensors that only held families touch are left out, and do not change.
    assert values[0][0] - values[1][0] == pytest.approx(values[0][1] - values[1][1], rel=1e-9, abs=1e-9)
    assert bool(relaxed.held) == (name in INTERLOCKED)


@pytest.mark.parametrize("moving", [range(3), range(1, 3), [1]])
@pytest.mark.parametrize("name", SEVERAL)
def test_along_a_step_it_is_the_polynomial_and_its_slope_is_the_gradients(name, moving):
    models, sym = case(name)
    relaxed, rng = relaxed_of(models, sym, moving), np.random.default_rng(0)
    points = [relaxed.point(relaxed.vertex(draw(sym, rng))) for _ in models]
    points = [{key: mix(m, relaxed.vertex(draw(sym, rng))[key], 0.3) for key, m in point.items()} for point in points]
    corners = [relaxed.vertex(draw(sym, rng)) for _ in models]
    moved = relaxed.at(points)
    coefficients = relaxed.along(moved, points, corners)
    size = np.abs(coefficients).sum()
    for t in (0.0, 0.3, 0.8, 1.0):
        there = [
            {key: mix(m, corner[key], t) for key, m in p.items()} for p, corner in zip(points, corners, strict=True)
        ]
        told = np.polynomial.Polynomial(coefficients)(t)
        assert told == pytest.approx(relaxed.value(relaxed.at(there)), abs=1e-12 * size)
    slopes = relaxed.gradient(moved)
    rise = sum(
        float((slopes[p][key] * (relaxed.point(corners[p])[key] - points[p][key]).numpy()).sum())
        for p in moving
        for key in points[p]
    )
    assert coefficients[1] == pytest.approx(rise, abs=1e-12 * size)
    assert all((slopes[p] == {}) == (p not in moving) for p in range(3))
    assert relaxed.evaluations <= 5


@pytest.mark.filterwarnings("ignore:The tensor attributes")  # torch.export on recurrent layers
def test_no_line_search_takes_more_than_five_evaluations():
    for name in ("PlainMLP", "Conv3d", "Inception", "Bilinear", "Experts", "FusedAttention", "UNet", "LSTMCell"):
        models, sym = case(name, 1)
        assert relaxed_of(models, sym, [0]).evaluations <= 5


@pytest.mark.parametrize("name", [MLP, CNN, "Attention"])
@pytest.mark.parametrize("restart", [0, 1, 2])
def test_it_never_falls_and_stays_doubly_stochastic(name, restart):
    models, sym = case(name)
    relaxed = relaxed_of(models, sym, [1, 2])
    points, _ = _starting_points(relaxed, 0, restart)
    values = []
    for steps in range(6):
        reached, _, value, gap = _frank_wolfe(relaxed, points, steps)
        values.append(value)
        assert gap >= 0
        for matrix in [matrix for point in reached for matrix in point.values()]:
            assert (matrix >= -1e-12).all()  # sums of at most 8 products of numbers in [0, 1]
            for axis in (0, 1):
                torch.testing.assert_close(matrix.sum(axis), torch.ones(len(matrix)).double(), rtol=0, atol=1e-12)
    assert sorted(values) == values
    assert values[0] < values[-1]


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=7))
def test_the_highest_point_of_a_polynomial_beats_a_grid(coefficients):
    polynomial = np.polynomial.Polynomial(coefficients)
    t = _highest(np.array(coefficients))
    assert 0 <= t <= 1
    # A double root of the slope is known to √eps, where the polynomial is flat.
    assert polynomial(t) >= polynomial(np.linspace(0, 1, 1001)).max() - 1e-7


def test_the_mean_start_does_not_see_how_units_are_numbered():
    models, sym = case(MLP, 3)
    shuffled = [models[0], *(planted(model, sym, seed)[0] for seed, model in enumerate(models[1:]))]
    values = [C2M3().search(relaxed_of(each, sym, [1, 2]), 0, 1)[1]["relaxed"] for each in (models, shuffled)]
    assert values[0] == pytest.approx(values[1], rel=1e-9)  # the same sums in another order


# The method


@pytest.mark.parametrize("kind", [lively, trained])
@pytest.mark.parametrize(("name", "count"), [(MLP, 3), (CNN, 3), (VGG_BN, 2), (RESNET20, 2)])
def test_from_the_same_start_it_never_ends_below_weight_matching(name, count, kind):
    models = [kind(name, seed) for seed in range(count)]
    expected = isthmus.align(models, symmetry(name), WeightMatching(restarts=1)).objective
    found = isthmus.align(models, symmetry(name), C2M3(restarts=1))
    assert found.objective >= expected
    assert found.objective == pytest.approx(value_of(models, symmetry(name), found.transforms), rel=1e-12)
    assert found.objective <= found.upper_bound
    assert found.details["gap"] == pytest.approx(found.upper_bound - found.objective)


def test_on_trained_networks_frank_wolfe_itself_ends_above_weight_matching_more_often_than_not():
    wins = []
    for name in (MLP, CNN):
        for pair in itertools.combinations([learnt(name, seed) for seed in range(3)], 2):
            started, rival = isthmus.align(pair, symmetry(name), C2M3(restarts=1)).details["starts"]
            wins.append(started["polished"] >= rival["polished"])
    assert sum(wins) > len(wins) / 2


@pytest.mark.parametrize("name", [MLP, CNN])
def test_restarts_and_polish_never_lower_the_objective(name):
    models, sym = case(name, 3)
    one, two = (isthmus.align(models, sym, C2M3(restarts=restarts)) for restarts in (1, 2))
    assert two.objective >= one.objective
    for start in two.details["starts"][:2]:
        assert start["polished"] >= start["projected"] * (1 - 1e-12)
    assert two.objective == pytest.approx(max(start["polished"] for start in two.details["starts"]), rel=1e-12)
    assert [start["start"] for start in two.details["starts"]] == ["identity", "mean", "weight matching"]


@pytest.mark.parametrize("name", [MLP, CNN, "GroupNorm", "DenseBlock", "Attention"])
def test_planted_permutations_of_several_models_are_recovered(name):
    (model,), sym = case(name, 1)
    models = [model, planted(model, sym, 1)[0], planted(model, sym, 2)[0]]
    found = isthmus.align(models, sym, C2M3())
    for index in (1, 2):
        back = isthmus.apply(found, models[index], index).state_dict()
        assert all(torch.equal(tensor, back[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("name", [MLP, "Attention", "GroupedConv"])
def test_both_frames_hold_the_same_alignment(name, pinned):
    models, sym = case(name)
    first, universe = (
        isthmus.align(models, sym, C2M3(restarts=1, polish=False, pinned=pinned, frame=frame))
        for frame in ("first", "universe")
    )
    assert first.objective == universe.objective
    assert all(transform.is_identity for transform in first.transforms[0].values())
    # Model 0 moves where it may, but where all its families interlock.
    moved = not all(transform.is_identity for transform in universe.transforms[0].values())
    assert moved == (not pinned and name not in INTERLOCKED)
    around = [compose(invert(first.between(0, i), sym), universe.between(0, i), sym) for i in range(3)]
    assert all(transform.is_identity for each in around for transform in each.values())
    x = models[0].inputs(seed=3)[0][0].double() if name in STRUCTURES else data_of(name)[0][0].double()
    with torch.no_grad():  # the merged network in another numbering of its units: float64 sums in another order
        torch.testing.assert_close(
            isthmus.merge(models, first)(x), isthmus.merge(models, universe)(x), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("name", INTERLOCKED)
def test_interlocked_families_are_named_held_and_polished(name):
    models, sym = case(name)
    found = isthmus.align(models, sym, C2M3(restarts=2))
    assert found.details["held"]
    assert found.objective >= isthmus.align(models, sym, WeightMatching(restarts=1)).objective
    alone = isthmus.align(models, sym, FRANK_WOLFE_ALONE)
    assert alone.objective > value_of(models, sym, [identity_transforms(sym)] * 3)


def test_a_larger_budget_takes_more_steps_and_a_small_one_says_that_it_was_too_small():
    models, sym = case(MLP, 3)
    short, long = (isthmus.align(models, sym, C2M3(1, budget, polish=False)) for budget in (0.06, 1.0))
    assert short.details["starts"][0]["steps"] == 3
    assert not short.converged
    assert long.converged
    assert 3 < long.details["starts"][0]["steps"] <= 50
    assert short.details["starts"][0]["pair_steps"] == [3, 3]
    assert long.details["starts"][0]["relaxed_gap"] <= GAP * long.details["starts"][0]["relaxed"]


def test_another_seed_draws_other_starts():
    models, sym = case(MLP, 2)
    told = [isthmus.align(models, sym, C2M3(3, 0.1), seed=seed).details["starts"] for seed in (0, 1)]
    assert told[0][2]["start"] == "random"
    assert told[0][2]["relaxed"] != told[1][2]["relaxed"]
    assert [start["relaxed"] for start in told[0][:2]] == [start["relaxed"] for start in told[1][:2]]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"restarts": 0}, "restarts=0"),
        ({"budget": 0.0}, "budget=0.0"),
        ({"budget": float("nan")}, "budget=nan"),
        ({"frame": "last"}, "use one of first, universe"),
    ],
)
def test_options_out_of_range_are_refused(options, told):
    with refuses(InputError, told):
        C2M3(**options)
