import copy
import math
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

import isthmus
from helpers.pairs import CNN, MLP, VGG_BN, data_of, lively, planted, structures, symmetry, trained
from helpers.refusals import refuses
from isthmus.errors import DataError, InputError
from isthmus.match.base import MatchingProblem, identity_transforms
from isthmus.match.coordinate_ascent import _random_start
from isthmus.match.gradient_search import TaskLoss
from isthmus.match.ste import STE, Walk
from isthmus.match.weight_matching import WeightMatching
from isthmus.symmetry import Permutation
from isthmus.symmetry.transform import invert
from oracles import ste as oracle

SMALL = "mlp?in_features=64&width=12&depth=2"
TINY = "mlp?in_features=64&width=4&depth=2"
WIDE = STE(steps=5, learning_rate=0.05, batch=50)  # steps wide enough to try other permutations
NESTED = ("Attention", "GroupNorm", "GroupedConv", "GroupedQueries", "TiedEmbedding", "RecurrentCell")


@cache
def doubles(spec: str, count: int) -> tuple[nn.Module, ...]:
    return tuple(copy.deepcopy(trained(spec, seed)).double() for seed in range(count))


def rows_of(transforms) -> list[np.ndarray]:
    return [transforms[name].indices[0] for name in transforms]


def samples_in(task: TaskLoss, seed: int, count: int) -> list[oracle.Sample]:
    batches = task.batches(torch.Generator().manual_seed(seed))
    return [oracle.as_sample(batch.args[0], batch.targets) for batch in (batches.next() for _ in range(count))]


# Against the paper, transcribed


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("start", ["identity", "random"])
def test_free_weights_and_projections_go_where_the_transcription_goes(count, start):
    models, sym = doubles(SMALL, count), symmetry(SMALL)
    problem = MatchingProblem(models, sym, data_of(SMALL), seed=3)
    task, rng = TaskLoss(problem, 50), np.random.default_rng(0)
    starts = [identity_transforms(sym), *(identity_transforms(sym) for _ in models[1:])]
    if start == "random":
        starts[1:] = [_random_start(sym, rng) for _ in models[1:]]
    walk = Walk(problem, task, starts, 0.05)
    networks = [oracle.layers_of(model) for model in models]
    expected = oracle.Walk(
        networks, [rows_of(t) for t in starts[1:]], 0.05, np.random.default_rng([3, count]), oracle.project_in_turn
    )
    changes, before = 0, None
    for sample in [None, *samples_in(task, 3, 8)]:
        if sample is not None:
            assert walk.step()
            expected.step(sample)
        for index in range(1, count):
            found = rows_of(walk.transforms[index])
            for layer in range(2):
                assert np.array_equal(found[layer], expected.permutations[index - 1][layer])
        changes += before is not None and any((a != b).any() for a, b in zip(found, before, strict=True))
        before = found
    assert changes  # or the steps were too short to tell anything
    for free, theirs in zip(walk.free, expected.free, strict=True):
        names = [("hidden.0", 0), ("hidden.1", 1), ("head", 2)]
        for name, layer in names:
            W, b = theirs[layer]
            # float64: a relative error of 1e-15 a sum, over 8 steps of Adam, whose ε of 1e-8 damps gradients near zero
            np.testing.assert_allclose(free[f"{name}.weight"].numpy(), W, rtol=1e-9, atol=1e-9)
            if f"{name}.bias" in free:
                np.testing.assert_allclose(free[f"{name}.bias"].numpy(), b, rtol=1e-9, atol=1e-9)
    assert set(walk.free[0]) == {
        "hidden.0.weight", "hidden.0.bias", "hidden.1.weight", "hidden.1.bias", "head.weight",
    }  # fmt: skip


@pytest.mark.parametrize("count", [2, 3])
def test_it_keeps_the_best_by_the_transcriptions_held_out_loss(count):
    models, sym = doubles(SMALL, count), symmetry(SMALL)
    problem = MatchingProblem(models, sym, data_of(SMALL), seed=1)
    matched = isthmus.align(models, sym, WeightMatching(many="all_to_one"), seed=1)
    task = TaskLoss(problem, 50)
    held = [oracle.as_sample(*batch) for batch in data_of(SMALL)[3:]]
    best, losses = oracle.ste(
        [oracle.layers_of(model) for model in models],
        [rows_of(t) for t in matched.transforms[1:]],
        samples_in(task, 1, 5),
        held,
        0.05,
        np.random.default_rng([1, count]),
    )
    found = isthmus.align(models, sym, WIDE, data=data_of(SMALL), seed=1)
    assert len(set(losses)) > 2
    assert found.details["start"] == pytest.approx(losses[0], rel=1e-9)  # float64 sums in another order
    assert found.details["checks"] == pytest.approx(losses[1:], rel=1e-9)
    assert found.objective == pytest.approx(-min(losses), rel=1e-9)
    for transforms, rows in zip(found.transforms[1:], best, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(rows_of(transforms), rows, strict=True))


def test_projections_reach_the_best_of_all_permutations_more_often_than_not():
    sym, exact = symmetry(TINY), []
    for first, second in [(0, 1), (1, 2), (2, 0)]:
        models = [copy.deepcopy(trained(TINY, seed)).double() for seed in (first, second)]
        problem = MatchingProblem(models, sym, data_of(TINY))
        task = TaskLoss(problem, 50)
        start = [dict(t) for t in isthmus.align(models, sym, WeightMatching(restarts=5)).transforms]
        walk = Walk(problem, task, start, 0.05)
        moved = oracle.layers_of(models[1])
        for _ in range(3):
            walk.step()
            tensors = [(walk.free[0][f"{name}.weight"].numpy(), walk.free[0].get(f"{name}.bias")) for name in NAMES]
            free = [(W, np.zeros(len(W)) if b is None else b.numpy()) for W, b in tensors]
            rows = rows_of(walk.transforms[1])
            best = oracle.project_by_trying_all(free, moved, rows, np.random.default_rng(0))
            values = [oracle.agreement(free, oracle.permuted(moved, each)) for each in (rows, best)]
            assert values[0] <= values[1] + 1e-9
            # It stops where a step gains less than 1e-6 of the value.
            exact.append(values[0] >= values[1] * (1 - 1e-5))
    assert sum(exact) > len(exact) / 2


NAMES = ("hidden.0", "hidden.1", "head")


# The method


@pytest.mark.parametrize(
    ("spec", "start"), [(MLP, "weight_matching"), (MLP, "identity"), (CNN, "identity"), (VGG_BN, "weight_matching")]
)
def test_on_held_out_batches_it_is_never_worse_than_its_start(spec, start):
    models, data = [trained(spec, seed) for seed in range(2)], data_of(spec)
    method = STE(steps=5, learning_rate=0.02, start=start)
    found = isthmus.align(models, symmetry(spec), method, data=data)
    begun = isthmus.align(models, symmetry(spec), start)
    # float32 twice: the moved weights are averaged, and the same operations run on them
    told, first = (oracle.loss_by_batch(isthmus.merge(models, each), data[3:]) for each in (found, begun))
    assert -found.objective == pytest.approx(told, rel=1e-5)
    assert found.details["start"] == pytest.approx(first, rel=1e-5)
    assert told <= first * (1 + 1e-5)
    assert found.details["best"] == min(found.details["start"], *found.details["checks"])


def test_from_where_the_models_are_the_first_projection_matches_weights():
    models, sym = doubles(MLP, 2), symmetry(MLP)
    problem = MatchingProblem(models, sym, data_of(MLP))
    walk = Walk(problem, TaskLoss(problem, 100), [identity_transforms(sym)] * 2, 1e-3)
    a, b = (oracle.layers_of(model) for model in models)
    still, found = rows_of(identity_transforms(sym)), rows_of(walk.transforms[1])
    assert oracle.agreement(a, oracle.permuted(b, found)) > oracle.agreement(a, oracle.permuted(b, still))
    again = oracle.project_in_turn(a, b, found, np.random.default_rng(0))  # no space alone can do better
    assert all(np.array_equal(p, q) for p, q in zip(found, again, strict=True))


@pytest.mark.parametrize("spec", [MLP, CNN])
def test_a_planted_permutation_stays_recovered(spec):
    model = trained(spec, 0)
    moved, transforms = planted(model, symmetry(spec), 1)
    found = isthmus.align([model, moved], symmetry(spec), WIDE, data=data_of(spec))
    assert found.details == {"equal": True}
    assert found.seconds > 0
    back = isthmus.apply(found, moved, 1).state_dict()
    assert all(torch.equal(tensor, back[key]) for key, tensor in model.state_dict().items())
    noisy = copy.deepcopy(moved)
    generator = torch.Generator().manual_seed(0)
    for parameter in noisy.parameters():
        parameter.data += 1e-3 * torch.randn(parameter.shape, generator=generator)
    found = isthmus.align([model, noisy], symmetry(spec), STE(steps=5), data=data_of(spec))
    undone = invert(transforms, symmetry(spec))
    live = [space.name for space in symmetry(spec)]
    assert all(np.array_equal(found.transforms[1][name].indices, undone[name].indices) for name in live)


def test_copies_of_one_model_among_others_are_no_reason_to_stop():
    a, b = trained(MLP, 0), trained(MLP, 1)
    found = isthmus.align([a, copy.deepcopy(a), b], symmetry(MLP), WIDE, data=data_of(MLP))
    assert found.details["steps"] == 5
    assert found.is_exact


@pytest.mark.parametrize("name", NESTED)
def test_nested_tied_and_repeated_places_are_moved_exactly(name):
    models, sym, data = structures(name, 3)
    models = [copy.deepcopy(model).double() for model in models]
    method = STE(steps=4, learning_rate=0.1, start="identity")
    found, again = (isthmus.align(models, sym, method, data=data, seed=2) for _ in range(2))
    assert found.details["best"] <= found.details["start"]
    assert found.details["skipped"] == 0
    x = data[0][0] if name == "TiedEmbedding" else data[0][0].double()  # numbers of tokens stay whole
    for index, model in enumerate(models):
        with torch.no_grad():  # float64 sums of a few terms in another order
            torch.testing.assert_close(isthmus.apply(found, model, index)(x), model(x), rtol=1e-9, atol=1e-9)
        for space in sym:
            one, other = found.transforms[index][space.name], again.transforms[index][space.name]
            assert one.indices.tobytes() == other.indices.tobytes()
    assert all(transform.is_identity for transform in found.transforms[0].values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_and_double_precision(dtype):
    models = [copy.deepcopy(trained(CNN, seed)).to(dtype) for seed in range(2)]
    found = isthmus.align(models, symmetry(CNN), STE(steps=3), data=data_of(CNN))
    assert math.isfinite(found.objective)
    assert found.details["skipped"] == 0
    assert {t.dtype for t in isthmus.apply(found, models[1], 1).state_dict().values() if t.is_floating_point()} == {
        dtype
    }


def test_the_order_of_batches_comes_from_the_seed():
    models, sym = [trained(MLP, seed) for seed in range(2)], symmetry(MLP)
    told = [isthmus.align(models, sym, WIDE, data=data_of(MLP), seed=seed).details["checks"] for seed in (0, 0, 1)]
    assert told[0] == told[1]
    assert told[0] != told[2]


def test_a_budget_multiplies_the_steps():
    models, sym = [lively(MLP, seed) for seed in range(2)], symmetry(MLP)
    short, long = (isthmus.align(models, sym, STE(steps=4, budget=budget), data=data_of(MLP)) for budget in (0.1, 1.5))
    assert (short.details["steps"], long.details["steps"]) == (1, 6)
    assert len(long.details["checks"]) == 5


def test_a_loss_that_overflows_leaves_the_start_and_says_so():
    models = [copy.deepcopy(lively(MLP, seed)) for seed in range(2)]
    for model in models:
        for parameter in model.parameters():
            parameter.data *= 1e13  # four layers: 1e52 is no float32
    found = isthmus.align(models, symmetry(MLP), STE(steps=3), data=data_of(MLP))
    assert found.objective is None
    assert found.details["skipped"] == 3
    matched = isthmus.align(models, symmetry(MLP))
    for name, transform in matched.transforms[1].items():
        assert isinstance(transform, Permutation)
        assert np.array_equal(transform.indices, found.transforms[1][name].indices)


# Refusals


def test_labels_are_asked_for_by_name():
    models = [lively(MLP, seed) for seed in range(2)]
    with refuses(DataError, "ste needs labels: give batches"):
        isthmus.align(models, symmetry(MLP), "ste", data=[x for x, _ in data_of(MLP)])
    with refuses(DataError, r"ste needs data: give data=, batches \(x, y\) with targets"):
        isthmus.align(models, symmetry(MLP), "ste")
    with refuses(DataError, "needs labels"):
        STE()(MatchingProblem(models, symmetry(MLP), [x for x, _ in data_of(MLP)]))
    with refuses(DataError, "one batch cannot be split"):
        isthmus.align(models, symmetry(MLP), "ste", data=data_of(MLP)[:1])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"start": "random"}, "start='random': use one of weight_matching, identity"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"steps": 0}, "steps=0"),
        ({"batch": 0}, "batch=0"),
        ({"budget": -2.0}, "budget=-2.0"),
    ],
)
def test_options_out_of_range_are_refused(options, told):
    with refuses(InputError, told):
        STE(**options)


def test_one_model_or_nothing_to_move_takes_no_data():
    lone = isthmus.align([lively(MLP, 0)], symmetry(MLP), "ste", data=data_of(MLP)[:1])
    assert len(lone) == 1
    models = [nn.Linear(3, 2).eval(), nn.Linear(3, 2).eval()]
    x = torch.randn(4, 3)
    found = isthmus.align(models, isthmus.trace(models[0], x), "ste", data=[(x, torch.zeros(4).long())])
    assert found.transforms == ({}, {})
