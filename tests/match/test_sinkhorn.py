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
from isthmus.data import Batch
from isthmus.errors import DataError, InputError
from isthmus.match.assignment import assignment_value, solve_lap
from isthmus.match.base import MatchingProblem
from isthmus.match.gradient_search import TaskLoss, mix_states, move_softly
from isthmus.match.sinkhorn import LAMBDAS, Sinkhorn, _doubly_stochastic, _rounded, _squared_distance
from isthmus.symmetry.transform import invert
from oracles import sinkhorn as oracle
from oracles.ste import as_sample, layers_of, loss_by_batch

SMALL = "mlp?in_features=64&width=12&depth=2"
NESTED = ("Attention", "GroupNorm", "GroupedConv", "GroupedQueries", "TiedEmbedding", "RecurrentCell")
LOSSES = pytest.mark.parametrize("loss", ["l2", "midpoint", "random"])


@cache
def doubles(spec: str, count: int = 2) -> tuple[nn.Module, ...]:
    return tuple(copy.deepcopy(trained(spec, seed)).double() for seed in range(count))


def rows_of(transforms) -> list[np.ndarray]:
    return [transforms[name].indices[0] for name in transforms]


def latent(seed: int, size: int, copies: int = 1) -> torch.Tensor:
    return torch.randn(copies, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The matrices


@settings(max_examples=30)
@given(st.integers(0, 99), st.integers(1, 9), st.sampled_from([0.05, 0.3, 1.0, 10.0]), st.integers(1, 15))
def test_the_turns_are_the_transcriptions(seed, size, temperature, turns):
    x = latent(seed, size)
    found = _doubly_stochastic(x, temperature, turns)
    expected = oracle.turns_of(x[0].numpy(), temperature, turns)[-1]
    # exp(X / τ) is a product of up to e^80 that cancels in the transcription: 80 roundings' worth of relative error
    np.testing.assert_allclose(found.into[0].numpy(), expected, rtol=1e-11, atol=1e-300)
    assert torch.equal(found.back, found.into.transpose(1, 2))


@settings(max_examples=20)
@given(st.integers(0, 99), st.integers(1, 9), st.sampled_from([0.3, 1.0, 10.0]))
def test_columns_sum_to_one_after_any_turn_and_rows_after_many(seed, size, temperature):
    """Of n rows, Σ |row − 1| never grows, and after k turns it is below n √(2 (2 log n + spread / τ) / k).

    Each turn lowers the divergence from the limit by that of the rows from one; all turns together by no more than
    there was, log(n² exp(spread / τ)); and Pinsker's inequality turns divergence into distance.
    """
    x = latent(seed, size, copies=2)
    spread = float(x.max() - x.min())
    before = math.inf
    for turns in (1, 3, 100):
        matrix = _doubly_stochastic(x, temperature, turns).into
        assert (matrix >= 0).all()
        torch.testing.assert_close(matrix.sum(1), torch.ones(2, size).double(), rtol=0, atol=1e-12)  # 9 roundings
        slack = float((matrix.sum(2) - 1).abs().sum(1).max())
        assert slack <= before + 1e-12
        assert slack <= size * math.sqrt(2 * (2 * math.log(size) + spread / temperature) / turns) + 1e-12
        before = slack
    if temperature == 10:  # entries differ by a factor of e^0.6 at most: a turn takes four fifths off
        assert before < 1e-9


@settings(max_examples=10)
@given(st.integers(0, 99))
def test_what_is_added_to_a_row_or_column_cancels(seed):
    x = latent(seed, 6)
    shifted = x + latent(seed + 100, 6)[:, :, :1]
    # A row's constant falls out of the first normalisation.
    torch.testing.assert_close(
        _doubly_stochastic(x, 0.5, 4).into, _doubly_stochastic(shifted, 0.5, 4).into, rtol=1e-9, atol=1e-12
    )
    limits = [_doubly_stochastic(each, 2.0, 200).into for each in (x, shifted + latent(seed + 200, 6)[:, :1, :])]
    torch.testing.assert_close(*limits, rtol=0, atol=1e-8)  # a column's in the limit of many turns


@settings(max_examples=10)
@given(st.integers(0, 99), st.integers(2, 7), st.sampled_from([1.0, 0.1, 0.02]))
def test_cooling_tends_to_the_value_of_the_assignment(seed, size, temperature):
    """P maximises ⟨X, P⟩ + τ H(P) with 0 ≤ H ≤ n log n, so that ⟨X, P⟩ is within τ n log n of the best assignment's."""
    x = latent(seed, size)
    value = assignment_value(x[0].numpy(), solve_lap(x[0].numpy()))
    matrix = _doubly_stochastic(x, temperature, 300).into
    slack = float((matrix.sum(2) - 1).abs().sum()) * float(x.max() - x.min())  # as far as turns were too few
    reached = float((x * matrix).sum())
    assert value - temperature * size * math.log(size) - slack - 1e-9 <= reached <= value + slack + 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_cooling_tends_to_the_assignment(seed):
    """P mixes permutations; those that are not the best hold a share of τ n log n over what they fall short by."""
    x, size = latent(seed, 4), 4
    best = solve_lap(x[0].numpy())
    gap = second_best(x[0].numpy())
    matrix = _doubly_stochastic(x, gap / (20 * size * math.log(size)), 2000).into[0].numpy()
    slack = np.abs(matrix.sum(1) - 1).sum()
    assert slack * float(x.max() - x.min()) / gap < 0.05  # turns enough
    assert matrix[np.arange(size), best].sum() > size * (1 - 0.05 - 0.05)


def second_best(x: np.ndarray) -> float:
    """How much worse than the best assignment is the best that differs from it."""
    best, gaps = solve_lap(x), []
    value = assignment_value(x, best)
    for row, column in enumerate(best):
        barred = x.copy()
        barred[row, column] = -1e3
        gaps.append(value - assignment_value(barred, solve_lap(barred)))
    return min(gaps)


@pytest.mark.parametrize("turns", [1, 5])
def test_the_gradient_goes_through_all_turns(turns):
    x, weight = latent(0, 4, copies=2).requires_grad_(), latent(1, 4, copies=2)
    assert torch.autograd.gradcheck(lambda x: (_doubly_stochastic(x, 0.7, turns).into * weight).sum(), [x])
    (slope,) = torch.autograd.grad((_doubly_stochastic(x, 0.7, turns).into * weight).sum(), [x])
    for c in range(2):
        turned = oracle.turns_of(x[c].detach().numpy(), 0.7, turns)
        np.testing.assert_allclose(
            slope[c].numpy(), oracle.back_through_turns(turned, weight[c].numpy(), 0.7), rtol=1e-9, atol=1e-12
        )


def test_latents_are_rounded_to_the_assignment_they_gather_most_of():
    x = latent(3, 6, copies=3)
    found = _rounded({"s": x})["s"].indices
    for c in range(3):
        assert np.array_equal(found[c], oracle.nearest(x[c].numpy()))


# Against the paper, transcribed


@LOSSES
def test_the_gradient_of_a_loss_is_the_one_by_hand(loss):
    models, sym = doubles(SMALL), symmetry(SMALL)
    task = TaskLoss(MatchingProblem(models, sym, data_of(SMALL)), 100)
    fixed, moved = task.states
    x, y = data_of(SMALL)[0]
    t = {"l2": 0.0, "midpoint": 0.5, "random": 0.3}[loss]
    points = {space.name: latent(seed, 12).mul(0.1).requires_grad_() for seed, space in enumerate(sym)}
    state = move_softly(moved, {name: _doubly_stochastic(p, 0.2, 6) for name, p in points.items()}, sym)
    if loss == "l2":
        value = _squared_distance(fixed, state, frozenset(name for name, _ in models[0].named_parameters()))
    else:
        value = task.at(mix_states([fixed, state], [1 - t, t]), Batch((x,), {}, y))
    found = torch.autograd.grad(value, list(points.values()))
    a, b = (layers_of(model) for model in models)

    def slopes(there):
        if loss == "l2":
            return oracle.slopes_of_distance(a, there)
        return oracle.slopes_of_task(a, there, t, as_sample(x, y))

    expected = oracle.slopes_of_latents(b, [p[0].detach().numpy() for p in points.values()], 0.2, 6, slopes)
    for one, other in zip(found, expected, strict=True):
        assert np.abs(other).max() > 0
        np.testing.assert_allclose(one[0].numpy(), other, rtol=1e-8, atol=1e-10 * np.abs(other).max())


@LOSSES
def test_a_search_goes_where_the_transcription_goes(loss):
    models, sym, seed = doubles(SMALL), symmetry(SMALL), 2
    generator = torch.Generator().manual_seed(seed)
    batches = TaskLoss(MatchingProblem(models, sym, data_of(SMALL)), 50).batches(generator)

    def draw():
        if loss == "l2":
            return None
        t = float(torch.rand((), generator=generator)) if loss == "random" else 0.5
        batch = batches.next()
        return t, as_sample(batch.args[0], batch.targets)

    start = rows_of(isthmus.align(models, sym, seed=seed).transforms[1])
    held = [as_sample(*batch) for batch in data_of(SMALL)[3:]]
    places = {"l2": (), "midpoint": (0.5,), "random": LAMBDAS}[loss]
    a, b = (layers_of(model) for model in models)
    best, losses = oracle.sinkhorn(a, b, start, [draw() for _ in range(5)], held, places, 0.3, 7, 0.5)
    method = Sinkhorn(loss=loss, temperature=0.3, iterations=7, learning_rate=0.5, steps=5, batch=50)
    found = isthmus.align(models, sym, method, data=data_of(SMALL), seed=seed)
    (told,) = found.details["pairs"]
    assert len(set(losses)) > 2
    assert told["start"] == pytest.approx(losses[0], rel=1e-9)  # float64 sums in another order
    assert told["checks"] == pytest.approx(losses[1:], rel=1e-9)
    assert found.objective == pytest.approx(-min(losses), rel=1e-9)
    assert all(np.array_equal(p, q) for p, q in zip(rows_of(found.transforms[1]), best, strict=True))


# The method


@LOSSES
@pytest.mark.parametrize(("spec", "start"), [(MLP, "weight_matching"), (MLP, "identity"), (VGG_BN, "weight_matching")])
def test_by_its_own_measure_it_is_never_worse_than_its_start(spec, start, loss):
    models, data = [trained(spec, seed) for seed in range(2)], data_of(spec)
    method = Sinkhorn(loss=loss, steps=5, learning_rate=0.3, start=start)
    found = isthmus.align(models, symmetry(spec), method, data=data)
    begun = isthmus.align(models, symmetry(spec), start)

    def measured(alignment) -> float:
        if loss == "l2":
            a, b = models[0], isthmus.apply(alignment, models[1], 1)
            return sum(
                float((p.double() - q.double()).detach().square().sum())
                for p, q in zip(a.parameters(), b.parameters(), strict=True)
            )
        places = (0.25, 0.5, 0.75) if loss == "random" else (0.5,)
        merged = [isthmus.merge(models, alignment, coefficients=[1 - t, t]) for t in places]
        return sum(loss_by_batch(model, data[3:]) for model in merged) / len(places)

    # float32: the same operations on averages formed in another way
    assert -found.objective == pytest.approx(measured(found), rel=1e-5)
    assert found.details["pairs"][0]["start"] == pytest.approx(measured(begun), rel=1e-5)
    assert measured(found) <= measured(begun) * (1 + 1e-5)


def test_by_distance_it_finds_its_way_from_where_the_models_are():
    models, sym = [trained(MLP, seed) for seed in range(2)], symmetry(MLP)
    method = Sinkhorn(loss="l2", start="identity", steps=100, learning_rate=0.1, temperature=0.5)
    found = isthmus.align(models, sym, method)
    ends = [
        -isthmus.align(models, sym, Sinkhorn(loss="l2", start=start, steps=1)).objective
        for start in ("identity", "weight_matching")
    ]
    # Weight matching's 39.5 from 56.8 where they are: measured 42.9, four fifths of the way.
    assert -found.objective < ends[0] - (ends[0] - ends[1]) / 2


@LOSSES
@pytest.mark.parametrize("spec", [MLP, CNN])
def test_a_planted_permutation_stays_recovered(spec, loss):
    model, sym = trained(spec, 0), symmetry(spec)
    moved, transforms = planted(model, sym, 1)
    found = isthmus.align([model, moved], sym, Sinkhorn(loss=loss, steps=5), data=data_of(spec))
    assert found.details["pairs"] == [{"equal": True}]
    back = isthmus.apply(found, moved, 1).state_dict()
    assert all(torch.equal(tensor, back[key]) for key, tensor in model.state_dict().items())
    noisy = copy.deepcopy(moved)
    generator = torch.Generator().manual_seed(0)
    for parameter in noisy.parameters():
        parameter.data += 1e-3 * torch.randn(parameter.shape, generator=generator)
    found = isthmus.align([model, noisy], sym, Sinkhorn(loss=loss, steps=5), data=data_of(spec))
    undone = invert(transforms, sym)
    assert all(np.array_equal(found.transforms[1][s.name].indices, undone[s.name].indices) for s in sym)


@pytest.mark.parametrize("loss", ["l2", "random"])
@pytest.mark.parametrize("name", NESTED)
def test_nested_tied_and_repeated_places_are_moved_exactly(name, loss):
    models, sym, data = structures(name)
    models = [copy.deepcopy(model).double() for model in models]
    method = Sinkhorn(loss=loss, steps=4, learning_rate=0.5, start="identity")
    found = isthmus.align(models, sym, method, data=data)
    x = data[0][0] if name == "TiedEmbedding" else data[0][0].double()  # numbers of tokens stay whole
    for index, model in enumerate(models):
        with torch.no_grad():  # float64 sums of a few terms in another order
            torch.testing.assert_close(isthmus.apply(found, model, index)(x), model(x), rtol=1e-9, atol=1e-9)
    for told in found.details["pairs"]:
        assert told["best"] <= told["start"]
        assert told["skipped"] == 0


class TwoHeads(nn.Module):
    """Class scores, and beside them what the task loss never sees."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(3, 5), nn.Linear(5, 2)
        self.side, self.end = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(torch.relu(self.stem(x))), self.end(torch.relu(self.side(x)))


def test_spaces_that_the_loss_does_not_see_stay_at_the_start():
    models = [TwoHeads().eval() for _ in range(2)]
    x, y = torch.randn(40, 3), torch.randint(2, (40,))
    sym = isthmus.trace(models[0], x[:2])
    matched = isthmus.align(models, sym)
    for method in (Sinkhorn(steps=5, learning_rate=0.5), isthmus.match.Learned(steps=5, learning_rate=0.5)):
        found = isthmus.align(models, sym, method, data=[(x[:20], y[:20]), (x[20:], y[20:])])
        assert found.details["pairs"][0]["skipped"] == 0
        assert np.array_equal(found.transforms[1]["side"].indices, matched.transforms[1]["side"].indices)


@pytest.mark.parametrize("loss", ["l2", "midpoint"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_and_double_precision(dtype, loss):
    models = [copy.deepcopy(trained(CNN, seed)).to(dtype) for seed in range(2)]
    found = isthmus.align(models, symmetry(CNN), Sinkhorn(loss=loss, steps=2), data=data_of(CNN))
    assert math.isfinite(found.objective)
    assert found.is_exact
    assert found.details["pairs"][0]["skipped"] == 0


@pytest.mark.parametrize("reference", ["first", "best", "medoid"])
def test_three_models_go_to_their_reference(reference):
    models = [trained(MLP, seed) for seed in range(3)]
    method = Sinkhorn(steps=3, learning_rate=0.3, reference=reference)
    found = isthmus.align(models, symmetry(MLP), method, data=data_of(MLP))
    centre = found.details["reference"]
    assert all(transform.is_identity for transform in found.transforms[centre].values())
    assert not any(t.is_identity for i, each in enumerate(found.transforms) for t in each.values() if i != centre)
    assert len(found.details["pairs"]) == 2
    assert found.objective == pytest.approx(-sum(pair["best"] for pair in found.details["pairs"]))


def test_a_temperature_that_overflows_leaves_the_start_and_says_so():
    models, sym = [trained(MLP, seed) for seed in range(2)], symmetry(MLP)
    found = isthmus.align(models, sym, Sinkhorn(temperature=1e-42, steps=3), data=data_of(MLP))
    assert found.details["pairs"][0]["skipped"] == 3
    assert all(
        (p == q).all()
        for p, q in zip(rows_of(found.transforms[1]), rows_of(isthmus.align(models, sym).transforms[1]), strict=True)
    )


# Refusals


def test_labels_are_asked_for_by_name_where_the_loss_needs_them():
    models, unlabelled = [lively(MLP, seed) for seed in range(2)], [x for x, _ in data_of(MLP)]
    for loss in ("midpoint", "random"):
        with refuses(DataError, "sinkhorn needs labels: give batches"):
            isthmus.align(models, symmetry(MLP), Sinkhorn(loss=loss), data=unlabelled)
    with refuses(DataError, "sinkhorn needs labels"):
        isthmus.align(models, symmetry(MLP), Sinkhorn(loss="l2", reference="best"), data=unlabelled)
    with refuses(DataError, "needs labels"):
        Sinkhorn()(MatchingProblem(models, symmetry(MLP), unlabelled))
    assert isthmus.align(models, symmetry(MLP), Sinkhorn(loss="l2", steps=1)).is_exact


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"loss": "L2"}, "loss='L2': use one of l2, midpoint, random"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"iterations": 0}, "iterations=0"),
        ({"start": "random"}, "start='random'"),
        ({"reference": "last"}, "reference='last'"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"steps": 0}, "steps=0"),
    ],
)
def test_options_out_of_range_are_refused(options, told):
    with refuses(InputError, told):
        Sinkhorn(**options)


@LOSSES
def test_one_model_or_nothing_to_move_takes_no_data(loss):
    lone = isthmus.align([lively(MLP, 0)], symmetry(MLP), Sinkhorn(loss=loss), data=data_of(MLP)[:1])
    assert len(lone) == 1
    models = [nn.Linear(3, 2).eval(), nn.Linear(3, 2).eval()]
    x = torch.randn(4, 3)
    data = [(x, torch.zeros(4).long())]
    assert isthmus.align(models, isthmus.trace(models[0], x), Sinkhorn(loss=loss), data=data).transforms == ({}, {})
