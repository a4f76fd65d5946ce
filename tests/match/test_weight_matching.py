import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import isthmus
from helpers.pairs import (
    MLP,
    NETWORKS,
    RESNET20,
    TRAINED,
    VGG_BN,
    data_of,
    lively,
    planted,
    spec_of,
    stir,
    symmetry,
    trained,
)
from helpers.refusals import refuses
from helpers.zoo import ZOO as STRUCTURES
from isthmus import Permutation
from isthmus.errors import DataError, InputError
from isthmus.match.coordinate_ascent import _forward_start, _random_start
from isthmus.match.nested import family_of, paired_value
from isthmus.match.weight_matching import WeightMatching
from isthmus.match.weight_objective import WeightObjective
from isthmus.models import ZOO
from isthmus.symmetry.transform import compose, move_state
from oracles import git_rebasin as oracle

ONE_START = WeightMatching(restarts=1)
KINDS = pytest.mark.parametrize("kind", ["random", "trained"])
SMALL = pytest.mark.parametrize("name", TRAINED)


def group_of(name: str, kind: str, count: int = 2) -> list[torch.nn.Module]:
    make = {"random": lively, "trained": trained}[kind]
    return [make(name, seed) for seed in range(count)]


def order(seed: int) -> np.random.Generator:
    """What the first start of the first moved model draws its order of spaces from."""
    return np.random.default_rng([seed, 0])


def value_of(models, alignment) -> float:
    """The inner product of the parameters of aligned models, from nothing but their state dicts."""
    states = [isthmus.apply(alignment, model, i).state_dict() for i, model in enumerate(models)]
    touched = {site.parameter for space in alignment.symmetry for site in space.sites}
    names = [name for name, _ in models[0].named_parameters() if name in touched]
    return sum(
        float((a[name].double() * b[name].double()).sum())
        for a, b in itertools.combinations(states, 2)
        for name in names
    )


@KINDS
@SMALL
def test_same_start_and_order_give_the_oracles_permutations(name, kind):
    spec, models = spec_of(name), group_of(name, kind)
    states = [oracle.as_arrays(model) for model in models]
    for seed in (0, 1):
        expected = oracle.weight_matching(spec, *states, order(seed))
        found = isthmus.align(models, symmetry(name), ONE_START, seed=seed)
        for space in symmetry(name):
            assert np.array_equal(found.transforms[1][space.name].indices[0], expected[space.name]), space.name
        # Both add up the same float64 products in another order: eps · √(10⁵ terms) is below 1e-13.
        assert found.objective == pytest.approx(oracle.objective(spec, *states, expected), rel=1e-12)
        assert found.converged


@KINDS
@SMALL
def test_restarts_never_end_below_the_oracle(name, kind):
    spec, models = spec_of(name), group_of(name, kind)
    states = [oracle.as_arrays(model) for model in models]
    expected = oracle.objective(spec, *states, oracle.weight_matching(spec, *states, order(3)))
    found = isthmus.align(models, symmetry(name), seed=3)
    assert found.objective >= expected * (1 - 1e-12)
    assert len(found.details["restarts"][0]) == 3
    assert found.objective == pytest.approx(max(found.details["restarts"][0]), rel=1e-12)


@KINDS
@SMALL
def test_objective_is_that_of_the_applied_models_and_below_its_bound(name, kind):
    models = group_of(name, kind)
    found = isthmus.align(models, symmetry(name))
    assert found.objective == pytest.approx(value_of(models, found), rel=1e-12)
    assert found.objective <= found.upper_bound


@KINDS
@SMALL
def test_where_it_converged_no_space_alone_can_be_improved(name, kind):
    spec, models = spec_of(name), group_of(name, kind)
    found = isthmus.align(models, symmetry(name), seed=5)
    assert found.converged
    reached = {space.name: found.transforms[1][space.name].indices[0] for space in symmetry(name)}
    states = [oracle.as_arrays(model) for model in models]
    for space in spec:
        similarity = oracle.gram(spec, *states, reached, space)
        now = similarity[np.arange(len(similarity)), reached[space]].sum()
        # A step is taken from a relative gain of 1e-6 on, on float32 Gram matrices.
        assert similarity[oracle.linear_sum_assignment(similarity, maximize=True)].sum() <= now + 2e-6 * abs(now)


@SMALL
def test_more_sweeps_never_lower_the_objective(name):
    models = group_of(name, "random")
    methods = [WeightMatching(restarts=1, max_sweeps=sweeps) for sweeps in (1, 2, 3, 100)]
    found = [isthmus.align(models, symmetry(name), method) for method in methods]
    start = isthmus.align(models, symmetry(name), "identity")
    reached = [value_of(models, start), *(alignment.objective for alignment in found)]
    assert reached == sorted(reached)
    assert reached[0] < reached[1]
    assert not found[0].converged
    assert found[-1].converged


# Optima found by trying everything


def tiny(seed: int, widths: tuple[int, ...]) -> torch.nn.Module:
    """A perceptron of few units a layer, with heavy-tailed weights."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[torch.nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layer = torch.nn.Linear(before, after)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) ** 3)
        layers += [layer, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1]).eval()


WIDTHS = ((2, 3, 2), (1, 3, 3, 2), (2, 4, 2, 3, 1))
TINY = {widths: isthmus.trace(tiny(0, widths), torch.randn(2, widths[0])) for widths in WIDTHS}


def best_value(a: torch.nn.Module, b: torch.nn.Module, sym: isthmus.Symmetry) -> float:
    """The largest inner product over all permutations, by trying them all."""
    touched = {site.parameter for space in sym for site in space.sites}
    names = [name for name, _ in a.named_parameters() if name in touched]
    fixed, moving = ({name: model.state_dict()[name].double() for name in sym.shapes} for model in (a, b))
    choices = []
    for space in sym:
        rows = list(itertools.permutations(range(space.size)))
        choices.append([(space.name, Permutation(np.array(c))) for c in itertools.product(rows, repeat=space.copies)])
    best = -np.inf
    for choice in itertools.product(*choices):
        moved = move_state(moving, dict(choice), sym)
        best = max(best, sum(float((fixed[name] * moved[name]).sum()) for name in names))
    return best


@settings(max_examples=30)
@given(widths=st.sampled_from(WIDTHS), seeds=st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)))
def test_objective_is_at_most_the_optimum_and_that_at_most_the_bound(widths, seeds):
    a, b = (tiny(seed, widths) for seed in seeds)
    found = isthmus.align([a, b], TINY[widths])
    optimum = best_value(a, b, TINY[widths])
    slack = 1e-12 * abs(optimum) + 1e-12  # float64 sums in another order, which may cancel
    assert found.objective <= optimum + slack
    assert optimum <= found.upper_bound + slack


@pytest.mark.parametrize("widths", WIDTHS)
def test_many_restarts_reach_the_optimum_of_a_tiny_network(widths):
    for seed in range(3):
        a, b = tiny(seed, widths), tiny(seed + 100, widths)
        found = isthmus.align([a, b], TINY[widths], WeightMatching(restarts=30))
        assert found.objective == pytest.approx(best_value(a, b, TINY[widths]), rel=1e-9)


@pytest.mark.parametrize("name", ["GroupedConv", "GroupNorm", "SingleHead", "DepthwiseMultiplier"])
def test_many_restarts_reach_the_optimum_over_nested_and_coupled_spaces(name):
    torch.manual_seed(0)
    a, b = STRUCTURES[name]().eval(), STRUCTURES[name]().eval()
    args, kwargs = a.inputs()
    sym = isthmus.trace(a, *args, kwargs=kwargs)
    found, optimum = isthmus.align([a, b], sym, WeightMatching(restarts=20)), best_value(a, b, sym)
    assert found.objective == pytest.approx(optimum, rel=1e-9)
    assert optimum <= found.upper_bound


@pytest.mark.parametrize("name", ["RecurrentCell", "SharedLayer"])
def test_a_tensor_touched_twice_by_one_space_stays_below_optimum_and_bound(name):
    for seed in range(2):
        torch.manual_seed(seed)
        a, b = STRUCTURES[name]().eval(), STRUCTURES[name]().eval()
        args, kwargs = a.inputs()
        sym = isthmus.trace(a, *args, kwargs=kwargs)
        found, optimum = isthmus.align([a, b], sym), best_value(a, b, sym)
        assert found.objective <= optimum + 1e-9 * abs(optimum)
        assert optimum <= found.upper_bound
        assert found.objective == pytest.approx(value_of([a, b], found), rel=1e-9)


def bound_by_hand(models, spec: oracle.Spec) -> float:
    """The exact optimum of tensors that one space moves, and the least sum of products of singular values of others."""
    a, b = (oracle.as_arrays(model) for model in models)
    total = 0.0
    places: dict[str, list[tuple[str, int]]] = {}
    for space, moved in spec.items():
        for name, axis in moved:
            places.setdefault(name, []).append((space, axis))
    for space, size in oracle.sizes_of(spec, a).items():
        alone = [(name, axis) for name, axis in spec[space] if len(places[name]) == 1]
        if alone:
            gram = oracle.gram({space: alone}, a, b, {space: np.arange(size)}, space)
            total += gram[oracle.linear_sum_assignment(gram, maximize=True)].sum()
    for name, moved in places.items():
        if len(moved) > 1:
            unfolded = [
                [np.moveaxis(state[name], axis, 0).reshape(state[name].shape[axis], -1) for state in (a, b)]
                for _, axis in moved
            ]
            spectra = [[np.linalg.svd(rows, compute_uv=False) for rows in both] for both in unfolded]
            total += min(float(left @ right) for left, right in spectra)
    return total


@SMALL
def test_the_bound_is_as_tight_as_singular_values_make_it(name):
    models = group_of(name, "random")
    found = isthmus.align(models, symmetry(name), ONE_START)
    # The bound carries a slack of 1e-6 for the rounding of its singular values.
    assert found.upper_bound == pytest.approx(bound_by_hand(models, spec_of(name)), rel=2e-6)


# What a step is worth


@pytest.mark.parametrize("name", ["GroupNorm", "GroupedShuffle", "DenseBlock", "DepthwiseMultiplier"])
def test_a_familys_similarities_tell_the_change_of_the_objective(name):
    torch.manual_seed(0)
    a, b = STRUCTURES[name]().eval(), STRUCTURES[name]().eval()
    sym = isthmus.trace(a, *a.inputs()[0])
    objective = WeightObjective(sym, a.state_dict(), b.state_dict(), frozenset(dict(a.named_parameters())))
    rng = np.random.default_rng(0)
    here = _random_start(sym, rng)
    for root in objective.families():
        assert not objective.is_coupled(root)
        family = family_of(sym, root)
        there = here | {space.name: Permutation.random(space, rng) for space in family}
        similarities = {space.name: objective.similarity(space, here) for space in family}
        told = paired_value(sym, root, similarities, there) - paired_value(sym, root, similarities, here)
        true = objective.value(there) - objective.value(here)
        assert told == pytest.approx(true, rel=1e-4, abs=1e-5)  # Gram matrices are float32
        assert objective.value(there, root) - objective.value(here, root) == pytest.approx(true, rel=1e-9)
        objective.moved_by(root)
        here = there


@pytest.mark.parametrize("name", ["Attention", "FusedAttention", "GroupedQueries", "SingleHead", "GroupedConv"])
def test_inner_similarities_tell_the_change_of_the_objective(name):
    torch.manual_seed(0)
    a, b = STRUCTURES[name]().eval(), STRUCTURES[name]().eval()
    sym = isthmus.trace(a, *a.inputs()[0])
    objective = WeightObjective(sym, a.state_dict(), b.state_dict(), frozenset(dict(a.named_parameters())))
    rng = np.random.default_rng(0)
    for space in [space for space in sym if not sym.children(space)] * 3:
        here = _random_start(sym, rng)
        move = Permutation.random(space, rng)
        inner = objective.inner_similarity(space, here)
        facing = [np.take_along_axis(inner, each.indices[:, :, None], 2).sum() for each in (move, here[space.name])]
        true = objective.value(here | {space.name: move}) - objective.value(here)
        assert facing[0] - facing[1] == pytest.approx(true, rel=1e-4, abs=1e-5)  # as above


# Planted permutations


@pytest.mark.parametrize("name", [MLP, VGG_BN, RESNET20])
def test_one_pass_from_the_input_on_recovers_a_planted_permutation(name):
    model, sym = lively(name, 0), symmetry(name)
    moved, planted_transforms = planted(model, sym, 1)
    parameters = frozenset(dict(model.named_parameters()))
    found = _forward_start(WeightObjective(sym, model.state_dict(), moved.state_dict(), parameters))
    undone = compose(found, planted_transforms, sym)
    assert all(transform.is_identity for transform in undone.values())


def test_the_planted_networks_are_all_of_the_zoo():
    assert {name.partition("?")[0] for name in NETWORKS} == set(ZOO)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_planted_permutation_is_recovered(name):
    model, sym = lively(name, 0), symmetry(name)
    moved, _ = planted(model, sym, 1)
    found = isthmus.align([model, moved], sym)
    back = isthmus.apply(found, moved, 1).state_dict()
    assert all(torch.equal(tensor, back[key]) for key, tensor in model.state_dict().items())
    assert found.objective == pytest.approx(value_of([model, model], isthmus.align([model, model], sym, "identity")))


QUICK = {  # nested spaces, and tensors that one space touches several times
    "GroupNorm",
    "GroupedConv",
    "GroupedConvTranspose",
    "GroupedShuffle",
    "DepthwiseMultiplier",
    "DenseBlock",
    "ConcatSameUnitsRolled",
    "TiedAutoencoder",
    "RecurrentCell",
    "Attention",
    "GroupedQueries",
    "OuterProduct",
}
MOVABLE = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name, net in STRUCTURES.items()
    if net.spaces
]


@pytest.mark.filterwarnings("ignore:The tensor attributes")  # torch.export on recurrent layers
@pytest.mark.parametrize("name", MOVABLE)
def test_a_planted_permutation_is_recovered_in_every_structure(name):
    torch.manual_seed(0)
    model = STRUCTURES[name]().eval()
    stir(model, 0)
    args, kwargs = model.inputs()
    sym = isthmus.trace(model, *args, kwargs=kwargs)
    moved, transforms = planted(model, sym, 1)
    assert not all(transform.is_identity for transform in transforms.values())
    found = isthmus.align([model, moved], sym)
    back = isthmus.apply(found, moved, 1).state_dict()
    assert all(torch.equal(tensor, back[key]) for key, tensor in model.state_dict().items())


# Several models


def test_two_models_have_no_use_for_merge_many():
    models = group_of(MLP, "random")
    one, many = (
        isthmus.align(models, symmetry(MLP), WeightMatching(many=many)) for many in ("all_to_one", "merge_many")
    )
    assert one.objective == many.objective
    assert all(
        np.array_equal(one.transforms[1][s.name].indices, many.transforms[1][s.name].indices) for s in symmetry(MLP)
    )


@KINDS
@SMALL
def test_merge_many_ends_at_or_above_all_to_one(name, kind):
    models = group_of(name, kind, 3)
    one, many = (
        isthmus.align(models, symmetry(name), WeightMatching(many=many)) for many in ("all_to_one", "merge_many")
    )
    assert value_of(models, one) == pytest.approx(one.objective, rel=1e-12)
    assert value_of(models, many) == pytest.approx(many.objective, rel=1e-12)
    assert many.objective >= one.objective
    assert many.objective <= many.upper_bound
    assert many.details["rounds"] >= 1
    assert all(transform.is_identity for transform in many.transforms[0].values())


def test_all_to_one_matches_each_model_as_if_it_were_alone():
    models = group_of(MLP, "random", 3)
    together = isthmus.align(models, symmetry(MLP), WeightMatching(many="all_to_one"), seed=0)
    alone = isthmus.align([models[0], models[2]], symmetry(MLP), seed=1)  # each model has its own random stream
    for space in symmetry(MLP):
        assert np.array_equal(together.transforms[2][space.name].indices, alone.transforms[1][space.name].indices)


def test_the_reference_may_be_the_best_or_the_medoid():
    models = [trained(MLP, seed) for seed in range(3)]
    options = {"many": "all_to_one", "restarts": 1}
    losses = [isthmus.evaluate(model, data_of(MLP)).loss for model in models]
    found = isthmus.align(models, symmetry(MLP), WeightMatching(**options, reference="best"), data_of(MLP))
    assert found.details["reference"] == losses.index(min(losses))
    models.append(models[1])  # model 1 and its copy match perfectly, and no other pair does
    found = isthmus.align(models, symmetry(MLP), WeightMatching(**options, reference="medoid"))
    centre = found.details["reference"]
    assert centre in (1, 3)
    assert all(transform.is_identity for transform in found.transforms[centre].values())


def test_the_best_model_needs_labels_and_merge_many_has_no_reference():
    method = WeightMatching(many="all_to_one", reference="best")
    assert (method.needs, WeightMatching().needs) == ("labels", "")
    with refuses(DataError, "weight_matching needs data"):
        isthmus.align(group_of(MLP, "random"), symmetry(MLP), method)
    with refuses(DataError, "needs labels"):
        isthmus.align(group_of(MLP, "random"), symmetry(MLP), method, [x for x, _ in data_of(MLP)])


@SMALL
def test_after_merge_many_no_model_can_be_brought_nearer_to_the_mean_of_the_others(name):
    models, spec = group_of(name, "random", 3), spec_of(name)
    found = isthmus.align(models, symmetry(name))
    assert found.converged
    moved = [oracle.as_arrays(isthmus.apply(found, model, index)) for index, model in enumerate(models)]
    stay = {space: np.arange(size) for space, size in oracle.sizes_of(spec, moved[0]).items()}
    for index, state in enumerate(moved):
        others = [other for each, other in enumerate(moved) if each != index]
        mean = {key: np.mean([other[key] for other in others], axis=0) for key in state}
        for space in spec:
            similarity = oracle.gram(spec, mean, state, stay, space)
            now = similarity.trace()
            best = similarity[oracle.linear_sum_assignment(similarity, maximize=True)].sum()
            assert best <= now + 2e-6 * abs(now)  # steps start at a relative gain of 1e-6, in float32


@SMALL
def test_merge_many_comes_near_the_oracles(name):
    """Both end in local optima, from different starts: the sums of all pairs differ by a few per cent at most."""
    models, spec = group_of(name, "random", 3), spec_of(name)
    states = [oracle.as_arrays(model) for model in models]
    expected = oracle.summed_inner_product(spec, oracle.merge_many(spec, states, np.random.default_rng(0)))
    assert isthmus.align(models, symmetry(name)).objective >= 0.95 * expected


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"restarts": 0}, "restarts=0"),
        ({"max_sweeps": 0}, "max_sweeps=0"),
        ({"many": "all"}, "'merge_many' or 'all_to_one'"),
        ({"reference": "last"}, "use one of first, best, medoid"),
        ({"reference": "medoid"}, "merge_many has none; use many='all_to_one'"),
    ],
)
def test_options_out_of_range_are_refused(options, told):
    with refuses(InputError, told):
        WeightMatching(**options)
