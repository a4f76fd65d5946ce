"""Orthogonal weight matching: rotations that were planted are found, and what allows permutations only is permuted."""

import numpy as np
import pytest
import torch
from torch import nn

import isthmus
from helpers.pairs import CNN, MLP, inputs_of, lively, symmetry
from helpers.prenorm import CONFIGS, symmetry_of, tokens, transformer
from helpers.refusals import refuses
from isthmus.errors import DataError, InputError
from isthmus.match.coordinate_ascent import _random_start, coordinate_ascent
from isthmus.match.nested import family_of
from isthmus.match.nested import solve_family as solve_by_permutations
from isthmus.match.orthogonal_matching import (
    OrthogonalMatching,
    _balancing,
    _family_value,
    _gains_of,
    _improve_family,
    _solve_family,
)
from isthmus.match.weight_objective import WeightObjective
from isthmus.symmetry import Group, LinearMap, Permutation, keeps_function
from isthmus.symmetry.gains import fold_state
from isthmus.symmetry.groups import random_element
from isthmus.symmetry.transform import Transform, move_state
from test_gains import compute

NAMES = ["layer, no biases", "rms, grouped, gated", "tied"]
EVERY = pytest.mark.parametrize("name", NAMES)
# Networks whose every tensor fits, so that 60 operations and maps of up to 10 units are all that rounds.
ROUNDING = 1e-10


def largest(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def orthogonal_element(space, rng) -> Transform:
    group = Group.ORTHOGONAL if space.group is Group.INVERTIBLE else space.group
    return random_element(isthmus.Space(space.name, space.size, group, (), copies=space.copies), rng)


def rotated(name: str, seed: int, *, invertible: bool = False) -> nn.Module:
    """A model moved by random elements of all its groups; of orthogonal maps only, unless `invertible`."""
    sym, rng = symmetry_of(name), np.random.default_rng(seed)
    element = random_element if invertible else orthogonal_element
    planted = {space.name: element(space, rng) for space in sym}
    return isthmus.apply(isthmus.Alignment(sym, (planted,), folded=bool(_gains_of(sym))), transformer(name).double(), 0)


def objective_of(name: str, seed: int = 1) -> WeightObjective:
    sym = symmetry_of(name)
    a, b = (fold_state(transformer(name, s).state_dict(), sym) for s in (0, seed))
    names = frozenset(key for key, _ in transformer(name).named_parameters()) - _gains_of(sym)
    return WeightObjective(sym, a, b, names, torch.float64)


@EVERY
def test_each_moved_model_computes_what_it_did(name):
    models = [transformer(name, seed).double() for seed in range(3)]
    found = isthmus.align(models, symmetry_of(name), "orthogonal_matching")
    assert keeps_function(found)
    assert not found.is_exact
    assert found.folded == bool(_gains_of(symmetry_of(name)))
    for index, model in enumerate(models):
        assert largest(compute(isthmus.apply(found, model, index), tokens(6)), compute(model, tokens(6))) <= ROUNDING
    assert all(transform.is_identity for transform in found.transforms[0].values())


@EVERY
def test_a_model_and_its_rotated_copy_merge_to_the_model(name):
    model, other = transformer(name).double(), rotated(name, 3)
    sym = symmetry_of(name)
    found = isthmus.align([model, other], sym, "orthogonal_matching")
    folded = fold_state(model.state_dict(), sym) if found.folded else model.state_dict()
    state = isthmus.apply(found, other, 1).state_dict()
    for key, tensor in folded.items():
        torch.testing.assert_close(state[key], tensor, rtol=1e-9, atol=1e-9)
    merged = isthmus.merge([model, other], found)
    assert largest(compute(merged, tokens(6)), compute(model, tokens(6))) <= ROUNDING
    names = {key for key, _ in model.named_parameters()} - _gains_of(sym)
    touched = names & set(sym.sites)
    # The inner product of a model with itself, which no map of the group exceeds.
    assert found.objective == pytest.approx(sum(float(folded[key].square().sum()) for key in touched))


@pytest.mark.parametrize("name", ["layer, no biases", "rms, grouped, gated"])
def test_an_invertible_copy_is_found_when_bases_are_balanced(name):
    model, other = transformer(name).double(), rotated(name, 4, invertible=True)
    found = isthmus.align([model, other], symmetry_of(name), OrthogonalMatching(invertible=True))
    assert keeps_function(found)
    a, b = (isthmus.apply(found, each, index).state_dict() for index, each in enumerate((model, other)))
    for key, tensor in a.items():
        torch.testing.assert_close(b[key], tensor, rtol=1e-8, atol=1e-8)
    merged = isthmus.merge([model, other], found)
    assert largest(compute(merged, tokens(6)), compute(model, tokens(6))) <= ROUNDING
    plain = isthmus.merge([model, other], isthmus.align([model, other], symmetry_of(name), "orthogonal_matching"))
    assert largest(compute(plain, tokens(6)), compute(model, tokens(6))) > 1e-5


@pytest.mark.parametrize("name", ["layer, no biases", "rms, grouped, gated"])
def test_balanced_bases_have_the_smallest_weights(name):
    sym, state = symmetry_of(name), transformer(name).double().state_dict()
    names = frozenset(key for key, _ in transformer(name).named_parameters())
    basis = _balancing(state, sym, names)
    touched = {site.parameter for space in sym if space.group is Group.INVERTIBLE for site in space.sites}

    def size(moved) -> float:
        return sum(float(moved[key].square().sum()) for key in touched)

    balanced, rng = size(move_state(state, basis, sym)), np.random.default_rng(0)
    assert balanced < size(state)
    for _ in range(20):
        other = {
            s.name: random_element(s, rng) if s.group is Group.INVERTIBLE else Permutation.identity(s) for s in sym
        }
        assert balanced <= size(move_state(state, other, sym)) * (1 + 1e-12)


@EVERY
@pytest.mark.parametrize("seed", range(2))
def test_no_step_lowers_the_objective(name, seed):
    objective, rng = objective_of(name), np.random.default_rng(seed)
    sym = objective.symmetry
    transforms: dict[str, Transform] = {space.name: orthogonal_element(space, rng) for space in sym}
    value = objective.value(transforms)
    for _ in range(3):
        for root in objective.families():
            before = dict(transforms)
            rose = _improve_family(objective, root, transforms)
            reached = objective.value(transforms)
            if rose:
                objective.moved_by(root)
                assert reached > value
            else:
                assert transforms == before
            value = reached


@EVERY
def test_it_ends_no_lower_than_weight_matching(name):
    models = [transformer(name, seed) for seed in range(2)]
    found = isthmus.align(models, symmetry_of(name), "orthogonal_matching")
    (pair,) = found.details["pairs"]
    assert found.objective == max(pair["starts"])
    # Of permutations that are rotated further, no coordinate is worse off: on these networks each gains.
    assert found.objective > pair["permutations"]
    folded = [isthmus.fold_norm_gains(model, symmetry_of(name)).double() for model in models]
    permuted = isthmus.align(folded, symmetry_of(name), isthmus.match.WeightMatching(restarts=3))
    states = [isthmus.apply(permuted, model, index).state_dict() for index, model in enumerate(folded)]
    names = objective_of(name).tensors
    assert found.objective > sum(float((states[0][key] * states[1][key]).sum()) for key in names)


@EVERY
def test_a_familys_value_is_its_part_of_the_objective(name):
    objective, rng = objective_of(name), np.random.default_rng(0)
    sym = objective.symmetry
    first, second = ({space.name: orthogonal_element(space, rng) for space in sym} for _ in range(2))
    for root in objective.families():
        if objective.is_coupled(root):  # with grouped queries, a query head's units stand under two spaces at once
            assert CONFIGS[name].kv_heads < 4
            continue
        family = {space.name for space in family_of(sym, root)}
        mixed = {**first, **{key: second[key] for key in family}}
        similarities = {space.name: objective.similarity(space, first) for space in family_of(sym, root)}
        change = _family_value(sym, root, similarities, mixed) - _family_value(sym, root, similarities, first)
        assert change == pytest.approx(objective.value(mixed) - objective.value(first), abs=1e-9)
        best = {**first, **_solve_family(sym, root, similarities)}
        assert _family_value(sym, root, similarities, best) >= _family_value(sym, root, similarities, mixed)
        objective.moved_by(root)
        assert objective.value(best) >= objective.value(mixed) - 1e-9


def test_families_of_permutations_are_solved_as_weight_matching_solves_them():
    sym = symmetry(CNN)
    models = [lively(CNN, seed) for seed in range(2)]
    names = frozenset(key for key, _ in models[0].named_parameters())
    objective = WeightObjective(sym, models[0].state_dict(), models[1].state_dict(), names)
    start = _random_start(sym, np.random.default_rng(0))
    for root in objective.families():
        similarities = {space.name: objective.similarity(space, start) for space in family_of(sym, root)}
        found, expected = _solve_family(sym, root, similarities), solve_by_permutations(sym, root, similarities)
        for key, transform in found.items():
            assert isinstance(transform, Permutation)
            assert np.array_equal(transform.indices, expected[key])


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", [MLP, CNN])
def test_without_larger_groups_it_is_weight_matching(name, count):
    models = [lively(name, seed) for seed in range(count)]
    found, expected = (
        isthmus.align(models, symmetry(name), method, seed=1) for method in ("orthogonal_matching", "weight_matching")
    )
    assert found.objective == expected.objective
    assert not found.folded
    for a, b in zip(found.transforms, expected.transforms, strict=True):
        assert all(np.array_equal(a[space.name].indices, b[space.name].indices) for space in symmetry(name))


class DeepLinear(nn.Module):
    """A map from the stream to the stream, so that the objective is quadratic in the stream's rotation."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(3, 6), nn.RMSNorm(6, eps=1e-6), nn.Linear(6, 2)
        self.across = nn.Linear(6, 6)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.across(self.norm(x))
        return self.head(self.norm(x))


@pytest.mark.parametrize("seed", range(4))
def test_a_space_that_meets_itself_is_climbed(seed):
    torch.manual_seed(seed)
    a, b = DeepLinear().double().eval(), DeepLinear().double().eval()
    x = torch.randn(5, 3, dtype=torch.float64)
    sym = isthmus.trace(a, x)
    objective = WeightObjective(
        sym, a.state_dict(), b.state_dict(), frozenset(dict(a.named_parameters())) - _gains_of(sym), torch.float64
    )
    (root,) = objective.families()
    assert objective.is_coupled(root)
    start: dict[str, Transform] = {root.name: Permutation.identity(root)}
    transforms, converged = coordinate_ascent(objective, start, 100, np.random.default_rng(0), _improve_family)
    assert converged
    assert objective.value(transforms) > objective.value(start)
    found = isthmus.align([a, b], sym, "orthogonal_matching")
    assert largest(isthmus.apply(found, b, 1)(x).detach(), b(x).detach()) <= ROUNDING


def test_the_same_seed_gives_the_same_maps():
    models = [transformer("rms, grouped, gated", seed) for seed in range(2)]
    first, second = (
        isthmus.align(models, symmetry_of("rms, grouped, gated"), "orthogonal_matching", seed=5) for _ in range(2)
    )
    for space in first.symmetry:
        a, b = (found.transforms[1][space.name] for found in (first, second))
        if isinstance(a, LinearMap):
            assert torch.equal(a.into, b.into)
        else:
            assert np.array_equal(a.indices, b.indices)


def test_other_methods_see_folded_models_too():
    """Linear maps by activations: the gains must not stand between what is matched and what is moved."""
    models = [transformer("rms", seed).double() for seed in range(2)]
    data = [tokens(40, seed) for seed in range(3)]
    for method in ("procrustes", isthmus.match.CCA(gamma=0.1), "zipit", "ot_fusion"):
        found = isthmus.align(models, symmetry_of("rms"), method, data=data)
        # Of permutations, gains need no folding.
        assert found.folded == (not found.is_exact)
        assert found.folded or method in ("zipit", "ot_fusion")
        merged = isthmus.merge(models, found)
        assert bool((merged.last.weight == 1).all()) == found.folded
    permuted = isthmus.align(models, symmetry_of("rms"), "activation_matching", data=data)
    assert not permuted.folded


def test_an_alignment_of_folded_models_is_saved(tmp_path):
    models = [transformer("rms", seed).double() for seed in range(2)]
    found = isthmus.align(models, symmetry_of("rms"), "orthogonal_matching")
    found.save(tmp_path / "a.safetensors")
    loaded = isthmus.Alignment.load(tmp_path / "a.safetensors")
    assert loaded.folded
    first, second = (isthmus.merge(models, each).state_dict() for each in (found, loaded))
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


def test_a_model_that_merge_averages_with_a_base_is_folded_like_the_others():
    models = [transformer("rms", seed).double() for seed in range(2)]
    found = isthmus.align(models, symmetry_of("rms"), "orthogonal_matching")
    merged = isthmus.merge(models, found, isthmus.average.TaskArithmetic(scale=0.0), base=models[0])
    folded = isthmus.fold_norm_gains(models[0], symmetry_of("rms"))
    for key, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, folded.state_dict()[key])


def test_permutation_networks_compute_what_they_did():
    models = [lively(MLP, seed).double() for seed in range(2)]
    x = inputs_of(models[0], 4).double()
    found = isthmus.align(models, symmetry(MLP), "orthogonal_matching")
    assert found.is_exact
    assert largest(isthmus.apply(found, models[1], 1)(x).detach(), models[1](x).detach()) <= ROUNDING


DATA = [tokens(40, seed) for seed in range(3)]


@EVERY
@pytest.mark.parametrize("invertible", [False, True])
def test_activations_alone_find_a_rotated_copy(name, invertible):
    model, other = transformer(name).double(), rotated(name, 3, invertible=invertible)
    sym = symmetry_of(name)
    method = OrthogonalMatching(start="activations", invertible=invertible)
    found = isthmus.align([model, other], sym, method, data=DATA)
    assert keeps_function(found)
    # 600 positions, ten units or fewer: covariances are of full rank, so that the start is the end, up to the rounding
    # of float32 sums. Of grouped queries, which head of a group is which cannot be told from what rotates.
    (pair,) = found.details["pairs"]
    if name == "tied" or CONFIGS[name].kv_heads == 4:
        assert pair["activations"] == pytest.approx(found.objective, rel=1e-4)
    merged = isthmus.merge([model, other], found)
    assert largest(compute(merged, tokens(6)), compute(model, tokens(6))) <= ROUNDING


@pytest.mark.parametrize("name", [MLP, CNN])
def test_the_ascent_from_activations_lowers_nothing(name):
    models = [lively(name, seed) for seed in range(2)]
    data = [inputs_of(models[0], 50, seed) for seed in range(2)]
    found = isthmus.align(models, symmetry(name), OrthogonalMatching(start="activations"), data=data)
    assert found.is_exact
    (pair,) = found.details["pairs"]
    assert pair["starts"] == [found.objective]
    assert found.objective >= pair["activations"]
    again = isthmus.align(models, symmetry(name), OrthogonalMatching(start="activations"), data=data)
    assert again.objective == found.objective


@pytest.mark.parametrize("name", ["layer, no biases", "rms, grouped, gated"])
def test_without_sweeps_it_stays_at_the_nearest_activations(name):
    models = [transformer(name, seed).double() for seed in range(2)]
    sym = symmetry_of(name)
    found = isthmus.align(models, sym, OrthogonalMatching(start="activations", max_sweeps=0), data=DATA)
    assert keeps_function(found)
    assert found.converged
    stream = next(space for space in sym if space.parent is None and space.group is not Group.PERMUTATION)
    folded = [isthmus.fold_norm_gains(model, sym) for model in models] if found.folded else models
    moments = isthmus.collect(folded, sym, DATA)[stream.name]
    across = moments.between(0, 1)
    reached = float((found.transforms[1][stream.name].into[0] * across).sum())
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert reached >= float((orthogonal_element(stream, rng).into[0] * across).sum())


def test_a_start_at_activations_needs_data():
    models = [transformer("rms", seed) for seed in range(2)]
    method = OrthogonalMatching(start="activations")
    assert method.needs == "data"
    with refuses(DataError, "needs data"):
        isthmus.align(models, symmetry_of("rms"), method)


def test_options_are_checked():
    with refuses(InputError, "max_sweeps=0"):
        OrthogonalMatching(max_sweeps=0)
    with refuses(InputError, "start='here'"):
        OrthogonalMatching(start="here")
    with refuses(InputError, "restarts=0"):
        OrthogonalMatching(restarts=0)
    with refuses(InputError, "reference='last'"):
        OrthogonalMatching(reference="last")
    assert set(NAMES) <= {*CONFIGS, "tied"}
