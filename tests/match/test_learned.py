import copy
import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import isthmus
from helpers.pairs import CNN, MLP, VGG_BN, data_of, lively, planted, structures, symmetry, trained
from helpers.refusals import refuses
from helpers.zoo import ZOO as STRUCTURES
from isthmus.errors import DataError, InputError
from isthmus.match.base import MatchingProblem
from isthmus.match.coordinate_ascent import _random_start
from isthmus.match.gradient_search import TaskLoss
from isthmus.match.learned import LAMBDAS, Latents, Learned, _similarity_around
from isthmus.match.weight_objective import WeightObjective
from isthmus.symmetry import LinearMap, Permutation
from isthmus.symmetry.transform import as_matrix, invert
from oracles import learned as oracle
from oracles.ste import as_sample, layers_of, loss_by_batch

SMALL = "mlp?in_features=64&width=12&depth=2"
NESTED = ("Attention", "GroupNorm", "GroupedConv", "GroupedQueries", "TiedEmbedding", "RecurrentCell")
GROUPS = pytest.mark.parametrize("group", ["permutation", "orthogonal", "invertible"])
LINEAR = pytest.mark.parametrize("group", ["orthogonal", "invertible"])


@cache
def doubles(spec: str, count: int = 2) -> tuple[nn.Module, ...]:
    return tuple(copy.deepcopy(trained(spec, seed)).double() for seed in range(count))


def latents_of(group: str, seed: int = 0, spec: str = SMALL) -> Latents:
    """Latents at a random start, moved away from where they begin."""
    models, sym = doubles(spec), symmetry(spec)
    problem = MatchingProblem(models, sym)
    objective = WeightObjective(sym, *problem.states, problem.parameters)
    latents = Latents(objective, _random_start(sym, np.random.default_rng(seed)), group, torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for free in latents.free.values():
            free += 0.2 * torch.randn(free.shape, generator=generator, dtype=free.dtype)
    return latents


def rows_of(transforms) -> list[np.ndarray]:
    return [transforms[name].indices[0] for name in transforms]


# The maps


@settings(max_examples=8)
@given(st.integers(0, 99))
def test_cayley_maps_are_rotations_of_the_start(seed):
    latents = latents_of("orthogonal", seed)
    for name, found in latents.transforms().items():
        one = torch.eye(12).double()[None]
        # float64: a solve of a well-conditioned 12 × 12 system, ‖I − K‖ ≥ 1
        torch.testing.assert_close(found.into @ found.into.transpose(1, 2), one, rtol=0, atol=1e-12)
        assert torch.equal(found.back, found.into.transpose(1, 2))
        rotation = found.into @ latents.start[name].transpose(1, 2)
        assert float(torch.linalg.det(rotation)) == pytest.approx(1, abs=1e-10)
        free, start = (x.detach()[0].numpy() for x in (latents.free[name], latents.start[name]))
        np.testing.assert_allclose(found.into[0].numpy(), oracle.cayley(free) @ start, rtol=0, atol=1e-12)


@settings(max_examples=8)
@given(st.integers(0, 99))
def test_the_way_back_undoes_the_way_into_the_frame(seed):
    for group in ("permutation", "orthogonal", "invertible"):
        for found in latents_of(group, seed).maps().values():
            back, into = found.back.detach(), found.into.detach()
            # float64: an inverse loses as many digits as the condition number has
            slack = 1e-13 * float(torch.linalg.cond(into))
            torch.testing.assert_close(back @ into, torch.eye(12).double()[None], rtol=0, atol=max(slack, 1e-12))


@GROUPS
def test_kept_maps_are_those_that_the_loss_was_taken_with(group):
    latents = latents_of(group)
    maps, kept = latents.maps(), latents.transforms()
    for name, found in maps.items():
        assert isinstance(kept[name], Permutation if group == "permutation" else LinearMap)
        matrix = as_matrix(kept[name])
        # A permutation's matrix carries its latent along: 1 + (z − z) and 0 + (z − z), each exact.
        assert torch.equal(found.into.detach(), matrix.into)
        assert torch.equal(found.back.detach(), matrix.back)
        assert not matrix.into.requires_grad


@GROUPS
def test_gradients_of_maps_are_those_by_hand(group):
    latents = latents_of(group)
    rng = np.random.default_rng(0)
    for name, found in latents.maps().items():
        by_into, by_back = (rng.standard_normal((12, 12)) for _ in range(2))
        value = (found.into[0] * torch.from_numpy(by_into)).sum() + (found.back[0] * torch.from_numpy(by_back)).sum()
        (slope,) = torch.autograd.grad(value, [latents.free[name]])
        free, start = (x.detach()[0].numpy() for x in (latents.free[name], latents.start[name]))
        expected = oracle.slope_of_latent(group, free, start, by_into, by_back)
        np.testing.assert_allclose(slope[0].numpy(), expected, rtol=1e-9, atol=1e-9)


def test_a_singular_map_is_refused():
    latents = latents_of("invertible")
    name = next(iter(latents.free))
    with torch.no_grad():
        latents.free[name].copy_(-torch.eye(12))
    with refuses(InputError, f"space {name}: its map became singular; give a smaller learning_rate"):
        latents.map(name)


# Where the latents start


@GROUPS
@pytest.mark.parametrize("name", [SMALL, "Attention", "GroupedConv", "GroupedQueries"])
def test_all_maps_start_at_the_start(name, group):
    models, sym = (doubles(name), symmetry(name)) if name not in STRUCTURES else structures(name)[:2]
    problem = MatchingProblem(models, sym)
    start = isthmus.align(models, sym).transforms[1]
    latents = Latents(WeightObjective(sym, *problem.states, problem.parameters), start, group, torch.float64)
    for space in sym:
        assert torch.equal(latents.map(space.name).into.detach(), as_matrix(start[space.name]).into)


def test_a_latent_starts_as_the_similarity_over_its_mean_on_pairs():
    models, sym = doubles(SMALL), symmetry(SMALL)
    problem = MatchingProblem(models, sym)
    start = isthmus.align(models, sym).transforms[1]
    latents = Latents(WeightObjective(sym, *problem.states, problem.parameters), start, "permutation", torch.float64)
    a, b = (layers_of(model) for model in models)
    for layer, space in enumerate(sym):
        expected = oracle.first_latent(a, b, rows_of(start), layer)
        # Gram matrices are float32: 7e-8 a product, sums of 76 of them over the mean of pairs
        np.testing.assert_allclose(latents.free[space.name][0].detach().numpy(), expected, rtol=0, atol=2e-6)


def test_a_similarity_that_does_not_tell_the_start_is_not_taken():
    permutation = Permutation(np.array([1, 0]))
    matrix = as_matrix(permutation).into
    assert torch.equal(_similarity_around(torch.eye(2).double()[None], permutation, matrix), matrix)
    assert torch.equal(_similarity_around(-3 * matrix, permutation, matrix), matrix)
    told = torch.tensor([[[1.0, 4.0], [2.0, 0.0]]]).double()
    assert torch.equal(_similarity_around(told, permutation, matrix), told / 3)


# Against a transcription


@GROUPS
def test_a_search_goes_where_the_transcription_goes(group):
    models, sym, seed, steps = doubles(SMALL), symmetry(SMALL), 2, 5
    generator = torch.Generator().manual_seed(seed)
    batches = TaskLoss(MatchingProblem(models, sym, data_of(SMALL)), 50).batches(generator)

    def draw():
        t = LAMBDAS[0] + (LAMBDAS[1] - LAMBDAS[0]) * float(torch.rand((), generator=generator))
        batch = batches.next()
        return t, as_sample(batch.args[0], batch.targets)

    start = rows_of(isthmus.align(models, sym, seed=seed).transforms[1])
    held = [as_sample(*batch) for batch in data_of(SMALL)[3:]]
    a, b = (layers_of(model) for model in models)
    best, losses = oracle.learned(group, a, b, start, [draw() for _ in range(steps)], held, rate=WIDE[group])
    method = Learned(group=group, steps=steps, batch=50, learning_rate=WIDE[group])
    found = isthmus.align(models, sym, method, data=data_of(SMALL), seed=seed)
    (told,) = found.details["pairs"]
    assert len(set(losses)) > (2 if group == "permutation" else 5)  # or the steps were too short to tell anything
    # Permutations: float64 sums in another order. Linear maps: the same over 5 steps of Adam, whose ε damps gradients
    # near zero, and inverses of matrices near the identity.
    assert told["start"] == pytest.approx(losses[0], rel=1e-9)
    assert told["checks"] == pytest.approx(losses[1:], rel=1e-8)
    assert found.objective == pytest.approx(-min(losses), rel=1e-8)
    for transform, (into, back) in zip(found.transforms[1].values(), best, strict=True):
        matrix = as_matrix(transform)
        np.testing.assert_allclose(matrix.into[0].numpy(), into, rtol=0, atol=1e-8)
        np.testing.assert_allclose(matrix.back[0].numpy(), back, rtol=0, atol=1e-8)


WIDE = {"permutation": 0.3, "orthogonal": 0.5, "invertible": 0.3}


# The method


@pytest.mark.parametrize(
    ("spec", "group"),
    [(MLP, "permutation"), (MLP, "orthogonal"), (CNN, "invertible"), (VGG_BN, "permutation"), (VGG_BN, "orthogonal")],
)
def test_on_held_out_batches_it_is_never_worse_than_its_start(spec, group):
    models, data = [trained(spec, seed) for seed in range(2)], data_of(spec)
    found = isthmus.align(models, symmetry(spec), Learned(group=group, steps=5), data=data)
    begun = isthmus.align(models, symmetry(spec))
    # float32: the same operations on averages formed in another way
    told, first = (loss_by_batch(isthmus.merge(models, each), data[3:]) for each in (found, begun))
    assert -found.objective == pytest.approx(told, rel=1e-5)
    assert found.details["pairs"][0]["start"] == pytest.approx(first, rel=1e-5)
    assert told <= first * (1 + 1e-5)


@LINEAR
def test_where_nothing_better_is_found_the_start_is_returned(group):
    models, sym = [trained(MLP, seed) for seed in range(2)], symmetry(MLP)
    wild = Learned(group=group, steps=3, learning_rate=1e3)
    found = isthmus.align(models, sym, wild, data=data_of(MLP))
    matched = isthmus.align(models, sym)
    assert found.details["pairs"][0]["best_step"] == 0
    assert found.converged
    assert found.is_exact
    assert all(
        np.array_equal(p, q) for p, q in zip(rows_of(found.transforms[1]), rows_of(matched.transforms[1]), strict=True)
    )


@pytest.mark.parametrize("name", ["DeepLinear", "LowRankUpdate", "Gram", "SingleHead"])
def test_by_default_no_space_undergoes_more_than_permutations(name):
    models, sym, data = structures(name)
    assert {space.group.value for space in sym} != {"permutation"}
    found = isthmus.align(models, sym, Learned(steps=4, learning_rate=0.5), data=data)
    assert found.is_exact


@LINEAR
@pytest.mark.parametrize("name", NESTED)
def test_nested_spaces_are_always_permuted(name, group):
    models, sym, data = structures(name)
    models = [copy.deepcopy(model).double() for model in models]
    method = Learned(group=group, steps=4, learning_rate=0.3)
    found = isthmus.align(models, sym, method, data=data)
    for told in found.details["pairs"]:
        assert told["best"] <= told["start"]
        assert told["skipped"] == 0
    for space in sym:
        alone = space.copies == 1 and space.parent is None and not sym.children(space)
        assert alone or isinstance(found.transforms[1][space.name], Permutation)
    merged = isthmus.merge(models, found)
    assert all(tensor.isfinite().all() for tensor in merged.state_dict().values() if tensor.is_floating_point())


@pytest.mark.parametrize("name", NESTED)
def test_permuted_models_compute_what_they_did(name):
    models, sym, data = structures(name)
    models = [copy.deepcopy(model).double() for model in models]
    found = isthmus.align(models, sym, Learned(steps=4, learning_rate=0.3), data=data)
    x = data[0][0] if name == "TiedEmbedding" else data[0][0].double()  # numbers of tokens stay whole
    with torch.no_grad():  # float64 sums of a few terms in another order
        torch.testing.assert_close(isthmus.apply(found, models[1], 1)(x), models[1](x), rtol=1e-9, atol=1e-9)


@GROUPS
def test_a_planted_permutation_stays_recovered(group):
    model, sym = trained(MLP, 0), symmetry(MLP)
    moved, transforms = planted(model, sym, 1)
    found = isthmus.align([model, moved], sym, Learned(group=group, steps=5), data=data_of(MLP))
    assert found.details["pairs"] == [{"equal": True}]
    back = isthmus.apply(found, moved, 1).state_dict()
    assert all(torch.equal(tensor, back[key]) for key, tensor in model.state_dict().items())
    noisy = copy.deepcopy(moved)
    generator = torch.Generator().manual_seed(0)
    for parameter in noisy.parameters():
        parameter.data += 1e-3 * torch.randn(parameter.shape, generator=generator)
    found = isthmus.align([model, noisy], sym, Learned(group=group, steps=5), data=data_of(MLP))
    undone = invert(transforms, sym)
    for space in sym:
        kept = as_matrix(found.transforms[1][space.name]).into
        expected = as_matrix(undone[space.name]).into.to(kept.dtype)
        if group == "permutation":
            assert torch.equal(kept.to(expected.dtype), expected)
        # 5 steps of at most 0.05 / 24 an entry, K of half of two of them: T is P but for twice that.
        assert float((kept - expected).abs().max()) < 4 * 5 * 0.05 / space.size


@LINEAR
def test_after_linear_maps_running_variances_are_to_be_measured_again(group):
    models, data = [trained(VGG_BN, seed) for seed in range(2)], data_of(VGG_BN)
    found = isthmus.align(models, symmetry(VGG_BN), Learned(group=group, steps=3), data=data)
    merged = isthmus.merge(models, found)
    assert merged.needs_repair == (not found.is_exact)
    assert isthmus.evaluate(isthmus.repair(merged, data), data).loss < 10


@GROUPS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_and_double_precision(dtype, group):
    models = [copy.deepcopy(trained(MLP, seed)).to(dtype) for seed in range(2)]
    found = isthmus.align(models, symmetry(MLP), Learned(group=group, steps=2), data=data_of(MLP))
    assert math.isfinite(found.objective)
    assert found.details["pairs"][0]["skipped"] == 0
    assert {t.dtype for t in isthmus.apply(found, models[1], 1).state_dict().values()} == {dtype}


@pytest.mark.parametrize("reference", ["first", "best", "medoid"])
def test_three_models_go_to_their_reference(reference):
    models = [trained(MLP, seed) for seed in range(3)]
    found = isthmus.align(models, symmetry(MLP), Learned(steps=3, reference=reference), data=data_of(MLP))
    centre = found.details["reference"]
    assert all(transform.is_identity for transform in found.transforms[centre].values())
    assert len(found.details["pairs"]) == 2
    assert found.objective == pytest.approx(-sum(pair["best"] for pair in found.details["pairs"]))


def test_a_loss_that_overflows_leaves_the_start_and_says_so():
    models, sym = [copy.deepcopy(lively(MLP, seed)) for seed in range(2)], symmetry(MLP)
    for model in models:
        for parameter in model.parameters():
            parameter.data *= 1e13  # four layers: 1e52 is no float32
    found = isthmus.align(models, sym, Learned(steps=3), data=data_of(MLP))
    assert found.objective is None
    assert found.details["pairs"][0]["skipped"] == 3
    matched = isthmus.align(models, sym)
    assert all(
        np.array_equal(p, q) for p, q in zip(rows_of(found.transforms[1]), rows_of(matched.transforms[1]), strict=True)
    )


# Refusals


def test_labels_are_asked_for_by_name():
    models, unlabelled = [lively(MLP, seed) for seed in range(2)], [x for x, _ in data_of(MLP)]
    with refuses(DataError, "learned needs labels: give batches"):
        isthmus.align(models, symmetry(MLP), "learned", data=unlabelled)
    with refuses(DataError, r"learned needs data: give data=, batches \(x, y\) with targets"):
        isthmus.align(models, symmetry(MLP), "learned")
    with refuses(DataError, "needs labels"):
        Learned()(MatchingProblem(models, symmetry(MLP), unlabelled))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"group": "rotation"}, "group='rotation': use one of permutation, orthogonal, invertible"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"reference": "last"}, "reference='last'"),
        ({"steps": 0}, "steps=0"),
        ({"budget": math.inf}, "budget=inf"),
    ],
)
def test_options_out_of_range_are_refused(options, told):
    with refuses(InputError, told):
        Learned(**options)


@GROUPS
def test_one_model_or_nothing_to_move_takes_no_data(group):
    assert len(isthmus.align([lively(MLP, 0)], symmetry(MLP), Learned(group=group), data=data_of(MLP)[:1])) == 1
    models = [nn.Linear(3, 2).eval(), nn.Linear(3, 2).eval()]
    x = torch.randn(4, 3)
    data = [(x, torch.zeros(4).long())]
    assert isthmus.align(models, isthmus.trace(models[0], x), Learned(group=group), data=data).transforms == ({}, {})
