"""What the gradient methods stand on: the task loss, soft moves, steps, and the best seen."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import isthmus
from helpers.pairs import CNN, MLP, VGG_BN, data_of, lively, structure, symmetry
from helpers.refusals import refuses
from isthmus.data import Batch
from isthmus.errors import DataError, InputError, ModelError
from isthmus.match.base import MatchingProblem, identity_transforms
from isthmus.match.coordinate_ascent import _random_start
from isthmus.match.gradient_search import (
    TaskLoss,
    _alike,
    _parts_of,
    check_search,
    follow,
    gradients_of,
    matrices,
    mix_states,
    move_softly,
    search,
    working_states,
)
from isthmus.match.ste import STE
from isthmus.symmetry import Permutation
from isthmus.symmetry.transform import as_matrix, move_state
from oracles import ste as oracle

# Chains, shared and repeated places, tied tensors, nested families, and two that interlock.
SEVERAL = (
    "BatchNorm",
    "WeightNorm",
    "Projection",
    "DenseBlock",
    "TiedAutoencoder",
    "TiedEmbedding",
    "RecurrentCell",
    "OuterProduct",
    "GroupNorm",
    "Attention",
    "Experts",
    "GroupedConv",
    "GroupedQueries",
)


def task_of(spec: str, batch: int = 100, data=None) -> TaskLoss:
    models = [copy.deepcopy(lively(spec, seed)) for seed in range(2)]
    return TaskLoss(MatchingProblem(models, symmetry(spec), data_of(spec) if data is None else data), batch)


# The loss


@pytest.mark.parametrize("spec", [MLP, CNN, VGG_BN])
def test_the_loss_is_that_of_the_network_normalised_by_its_batch(spec):
    task = task_of(spec)
    for seed in range(2):
        model = copy.deepcopy(lively(spec, seed))
        x, y = data_of(spec)[0]
        # float32 twice, the same operations: only the reduction to the mean may be ordered otherwise
        assert float(task.at(task.states[seed], Batch((x,), {}, y))) == pytest.approx(
            oracle.loss_by_batch(model, [(x, y)]), rel=1e-5
        )
        assert task.held_out(task.states[seed]) == pytest.approx(
            oracle.loss_by_batch(model, data_of(spec)[3:]), rel=1e-5
        )


def test_the_held_out_loss_weighs_targets_and_leaves_ignored_ones_out():
    (x, y), (u, v), *_ = data_of(MLP)
    fewer, padded = v[:30].clone(), y.clone()
    padded[:60] = -100
    task = task_of(MLP, data=[(x, y)] * 18 + [(x, padded), (u[:30], fewer)])
    assert len(task.held) == 2
    with torch.no_grad():
        model = lively(MLP, 0)
        whole = F.cross_entropy(model(torch.cat([x[60:], u[:30]])), torch.cat([y[60:], fewer]))
    assert task.held_out(task.states[0]) == pytest.approx(float(whole), rel=1e-6)


def test_a_part_in_which_nothing_counts_is_never_fitted_to():
    (x, y), (u, v), *_ = data_of(MLP)
    task = task_of(MLP, batch=50, data=[(x, torch.cat([torch.full((50,), -100), y[50:]])), (u, v), (x, y)])
    assert [int((batch.targets != -100).sum()) for batch in task.fitting] == [50, 50, 50]
    for place, data in (
        ("fitting", [(x, torch.full_like(y, -100)), (u, v)]),
        ("held-out", [(x, y), (u, torch.full_like(v, -100))]),
    ):
        with refuses(DataError, f"the {place} batches have no targets that count"):
            task_of(MLP, data=data)


@pytest.mark.parametrize("targets", [list(range(100)), None])
def test_targets_that_are_no_tensor_are_refused(targets):
    (x, y), (u, _), *_ = data_of(MLP)
    with refuses(DataError, f"{type(targets).__name__} as targets: give every batch a tensor of classes"):
        task_of(MLP, data=[(x, y), (u, targets)])


def test_targets_that_are_no_classes_are_refused():
    x, y = data_of(MLP)[0]
    with refuses(ModelError, "for classifiers; use a method that needs no labels"):
        task = task_of(MLP, data=[(x, torch.randn(100, 10))] * 2)
        task.held_out(task.states[0])
    with refuses(DataError, "target 10 for a model of 10 classes"):
        task = task_of(MLP, data=[(x, y + 1)] * 2)
        task.held_out(task.states[0])


def test_one_sample_has_no_variance():
    models = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).eval() for _ in range(2)]
    x, y = torch.randn(3, 3), torch.tensor([0, 1, 1])
    sym = isthmus.trace(models[0], x)
    with refuses(DataError, "a batch of one sample has no variance"):
        isthmus.align(models, sym, STE(steps=1), data=[(x, y), (x[:1], y[:1])])
    with refuses(DataError, "a batch of one sample has no variance"):
        isthmus.align(models, sym, STE(steps=1, batch=1), data=[(x, y), (x, y)])


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.float16, torch.float16], torch.float32),
        ([torch.bfloat16, torch.float32], torch.float32),
        ([torch.float16, torch.float64], torch.float64),
    ],
)
def test_all_is_computed_in_one_precision_of_float32_at_least(dtypes, expected):
    models = [copy.deepcopy(lively(VGG_BN, seed)).to(dtype) for seed, dtype in enumerate(dtypes)]
    task = TaskLoss(MatchingProblem(models, symmetry(VGG_BN), data_of(VGG_BN)), 100)
    assert task.dtype == expected
    assert {t.dtype for state in task.states for t in state.values() if t.is_floating_point()} == {expected}
    assert task.at(task.states[1], task.fitting[0]).dtype == expected
    assert [next(model.parameters()).dtype for model in models] == dtypes


# Batches


@given(size=st.integers(1, 40), most=st.integers(1, 45))
def test_parts_are_even_and_leave_nothing_out(size, most):
    x, y = torch.arange(size * 2.0).reshape(size, 2), torch.arange(size)
    parts = _parts_of(Batch((x,), {}, y), most)
    assert torch.equal(torch.cat([part.args[0] for part in parts]), x)
    assert torch.equal(torch.cat([part.targets for part in parts]), y)
    sizes = [part.size for part in parts]
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1
    assert len(parts) == math.ceil(size / most)


@pytest.mark.parametrize(
    "batch",
    [
        Batch((torch.zeros(8, 2),), {"mask": torch.zeros(4, 4)}, torch.zeros(8)),
        Batch((torch.zeros(8, 2),), {"scale": torch.tensor(2.0)}, torch.zeros(8)),
        Batch((torch.zeros(8, 2),), {}, torch.tensor(3)),
        Batch((torch.zeros(8, 2),), {}, torch.zeros(16)),
    ],
)
def test_a_batch_that_is_not_rows_throughout_stays_whole(batch):
    assert _parts_of(batch, 3) == [batch]


def test_every_round_of_batches_holds_each_once_in_another_order():
    stream = task_of(MLP, batch=20).batches(torch.Generator().manual_seed(0))
    rounds = [[stream.next() for _ in range(15)] for _ in range(3)]
    places = [[next(i for i, each in enumerate(stream.all) if each is batch) for batch in seen] for seen in rounds]
    assert [sorted(each) for each in places] == [list(range(15))] * 3
    assert places[0] != places[1] != places[2]


# Moves


@pytest.mark.parametrize("name", SEVERAL)
def test_a_soft_move_by_permutation_matrices_is_the_hard_move(name):
    model = structure(name)
    args, kwargs = model.inputs()
    sym = isthmus.trace(structure(name), *args, kwargs=kwargs)
    (state,) = working_states(MatchingProblem([model], sym))
    transforms = _random_start(sym, np.random.default_rng(0))
    hard = move_state(state, transforms, sym)
    soft = move_softly(state, {key: as_matrix(t) for key, t in transforms.items()}, sym)
    assert soft.keys() == hard.keys()
    assert any(not torch.equal(tensor, state[key]) for key, tensor in hard.items())
    assert all(torch.equal(tensor, soft[key]) for key, tensor in hard.items())  # sums of one number and zeros


@pytest.mark.parametrize("name", ["Attention", "GroupedConv", "RecurrentCell", "TiedAutoencoder"])
def test_a_soft_move_has_the_gradient_of_finite_differences(name):
    model = structure(name).double()
    args, kwargs = model.inputs()
    sym = isthmus.trace(structure(name), *args, kwargs=kwargs)
    (state,) = working_states(MatchingProblem([model], sym))
    rng = np.random.default_rng(1)
    weights = {key: torch.from_numpy(rng.standard_normal(tensor.shape)) for key, tensor in state.items()}

    def value(*points: torch.Tensor) -> torch.Tensor:
        maps = {space.name: isthmus.LinearMap(x, x.transpose(1, 2)) for space, x in zip(sym, points, strict=True)}
        moved = move_softly(state, maps, sym)
        return torch.stack([(weights[key] * tensor).sum() for key, tensor in moved.items()]).sum()

    points = [torch.from_numpy(rng.random((s.copies, s.size, s.size))).requires_grad_() for s in sym]
    assert torch.autograd.gradcheck(value, points)


def test_permutation_matrices_have_their_ones_where_units_come_from():
    found = matrices(np.array([[2, 0, 1], [0, 2, 1]]), torch.zeros((), dtype=torch.float64))
    assert torch.equal(found[0] @ torch.tensor([10.0, 20, 30]).double(), torch.tensor([30.0, 10, 20]).double())
    assert torch.equal(found[1] @ torch.tensor([10.0, 20, 30]).double(), torch.tensor([10.0, 30, 20]).double())


def test_combining_takes_integers_from_the_first():
    states = [{"w": torch.tensor([float(i)]), "n": torch.tensor(i)} for i in (1, 2, 4)]
    merged = mix_states(states, [0.5, 0.25, 0.25])
    assert merged == {"w": torch.tensor([2.0]), "n": torch.tensor(1)}


# Steps


def test_a_step_along_what_is_no_number_is_not_taken():
    leaves = [torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True)]
    optimizer = torch.optim.Adam(leaves, lr=0.1)
    assert not follow(optimizer, leaves, [torch.tensor([1.0, math.nan]), torch.ones(1)])
    assert not follow(optimizer, leaves, [torch.tensor([1.0, math.inf]), None])
    assert not optimizer.state
    assert follow(optimizer, leaves, [torch.ones(2), None])
    # Adam's first step is the rate, whatever the gradient, but for its ε of 1e-8
    torch.testing.assert_close(leaves[0].detach(), torch.full((2,), 0.9))
    assert torch.equal(leaves[1].detach(), torch.ones(1))


def test_what_a_loss_does_not_depend_on_has_no_gradient():
    a, b = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    found = gradients_of((3 * a).sum(), [a, b])
    assert found[1] is None
    assert torch.equal(found[0], torch.tensor([3.0]))
    assert gradients_of(torch.ones(()), [a, b]) == [None, None]


@settings(max_examples=30)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=12), st.integers(0, 3))
def test_a_search_keeps_the_best_of_its_checks(losses, missed):
    """Position `i` is a permutation of its own, whose loss is `losses[i]`."""
    steps, place = len(losses) - 1, [0]
    where = [{"s": Permutation(np.roll(np.arange(12), index))} for index in range(12)]

    def step() -> bool:
        place[0] += 1
        return place[0] > missed

    def judge(transforms) -> float:
        return losses[next(i for i, each in enumerate(where) if _alike(each, transforms[0]))]

    found = search([where[0]], judge, step, lambda: [where[place[0]]], steps, "searching")
    checked = [0, *sorted({max(1, round(steps * k / 5)) for k in range(1, 6)})]
    assert found.value == min(losses[i] for i in checked)
    first = next(i for i in checked if losses[i] == found.value)
    assert _alike(found.transforms[0], where[first])
    assert found.details["best_step"] == first
    assert found.converged == (first < steps)
    assert found.details["checks"] == [losses[i] for i in checked[1:]]
    assert found.details["skipped"] == min(missed, steps)


def test_losses_that_are_no_number_are_told_as_none():
    found = search(
        [{"s": Permutation(np.array([1, 0]))}],
        lambda _: math.inf,
        lambda: False,
        lambda: [{"s": Permutation(np.arange(2))}],
        2,
        "searching",
    )
    assert found.details == {
        "start": None, "best": None, "best_step": 0, "checks": [None, None], "steps": 2, "skipped": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
        ({"steps": 0}, "steps=0"),
        ({"batch": 0}, "batch=0"),
        ({"budget": 0.0}, "budget=0.0"),
        ({"budget": math.inf}, "budget=inf"),
    ],
)
def test_options_with_which_nothing_can_be_searched_are_refused(options, told):
    with refuses(InputError, told):
        check_search(**({"learning_rate": 1.0, "steps": 1, "budget": 1.0, "batch": 1} | options))


def test_identity_is_alike_to_itself_only():
    sym = symmetry(MLP)
    still = identity_transforms(sym)
    assert _alike(still, identity_transforms(sym))
    assert not _alike(still, _random_start(sym, np.random.default_rng(0)))
    assert not _alike({"s": as_matrix(Permutation(np.arange(2)))}, {"s": as_matrix(Permutation(np.arange(2)))})
