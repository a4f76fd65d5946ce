import copy
import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import isthmus
from helpers.pairs import CNN, MLP, RESNET20, data_of, fresh, learnt, lively, symmetry, trained
from helpers.refusals import refuses
from isthmus.errors import DataError, InputError, ModelError
from isthmus.measure.connect import Curve, _barrier_of, interpolate
from isthmus.observe.score import Ensemble
from oracles import git_rebasin as oracle


def line(losses, accuracies=()) -> Curve:
    lambdas = tuple(index / (len(losses) - 1) for index in range(len(losses)))
    return Curve(lambdas, tuple(losses), tuple(accuracies), tuple(losses), tuple(accuracies), None)


# The figures of a curve


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([1.0, 2.0], 0.0),
        ([1.0, 3.0, 2.0], 1.5),
        ([1.0, 1.0, 3.0], 0.0),
        ([0.0, 0.0, 4.0, 0.0, 4.0], 2.0),
        ([4.0, 4.0, 0.0, 0.0, 0.0], 1.0),
    ],
)
def test_the_barrier_is_the_largest_rise_above_the_straight_line(losses, expected):
    assert line(losses).barrier == pytest.approx(expected)
    assert line(losses).barrier == pytest.approx(oracle.barrier(losses))


def test_the_midpoint_barrier_is_the_rise_at_one_half():
    curve = line([1.0, 5.0, 3.0, 5.0, 3.0], [1.0, 0.5, 0.7, 0.5, 0.6])
    assert curve.midpoint_barrier == pytest.approx(1.0)
    assert curve.midpoint_error_barrier == pytest.approx(0.3 - 0.2)
    assert curve.error_barrier == pytest.approx(0.5 - 0.1)
    assert math.isnan(line([1.0, 2.0, 3.0, 4.0]).midpoint_barrier)


def test_a_loss_that_is_not_a_number_is_no_low_barrier():
    assert math.isnan(line([1.0, math.nan, 1.0]).barrier)
    assert math.isnan(_barrier_of((), ()))
    assert line([1.0, math.inf, 1.0]).barrier == math.inf


def test_a_curve_is_plain_json():
    told = line([1.0, 3.0, 2.0], [0.9, 0.1, 0.8]).to_dict()
    assert json.loads(json.dumps(told))["barrier"] == 1.5
    assert told["error_barrier"] == pytest.approx(0.9 - 0.15)


# Scores


@pytest.mark.parametrize("name", [MLP, CNN])
def test_a_score_is_the_mean_over_all_samples(name):
    model = copy.deepcopy(trained(name, 0)).double()
    batches = [(x[:size].double(), y[:size]) for (x, y), size in zip(data_of(name), (100, 37, 1), strict=False)]
    score = isthmus.evaluate(model, batches)
    # float64; the oracle takes one sample at a time, whose sums are in another order: 1e-16 · √1,000 terms a layer
    assert score.loss == pytest.approx(oracle.mean_loss(model, batches), rel=1e-12)
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    assert score.accuracy == right / 138
    assert score.count == 138


class Answers(nn.Module):
    """Gives its input back in some form."""

    def __init__(self, form=lambda scores: scores):
        super().__init__()
        self.form, self.scale = form, nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.form(x * self.scale)


@dataclasses.dataclass
class Output:
    logits: torch.Tensor


SCORES, LABELS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 0, 1])
EXPECTED = (float(F.cross_entropy(SCORES, LABELS)), float((SCORES.argmax(1) == LABELS).float().mean()))


@pytest.mark.parametrize(
    "form",
    [
        lambda scores: scores,
        lambda scores: {"hidden": None, "logits": scores},
        lambda scores: Output(scores),
        lambda scores: (scores, "more"),
        lambda scores: [scores],
    ],
    ids=["tensor", "dict", "object", "tuple", "list"],
)
def test_class_scores_are_found_in_any_output(form):
    score = isthmus.evaluate(Answers(form), [(SCORES, LABELS)])
    assert (score.loss, score.accuracy) == pytest.approx(EXPECTED)


def test_dict_batches_are_scored():
    assert isthmus.evaluate(Answers(), [{"x": SCORES, "labels": LABELS}]) == isthmus.evaluate(
        Answers(), [(SCORES, LABELS)]
    )


def test_sequences_count_every_token_but_padding():
    scores = SCORES.reshape(2, 3, 4)
    score = isthmus.evaluate(Answers(), [(scores, LABELS.reshape(2, 3))])
    assert (score.loss, score.accuracy) == pytest.approx(EXPECTED)
    assert score.count == 6
    padded = torch.tensor([[0, 1, -100], [3, -100, -100]])
    kept = padded.ravel() != -100
    loss = F.cross_entropy(SCORES[kept], padded.ravel()[kept])
    for batches in ([(scores, padded)], [(scores[:1], padded[:1]), (scores[1:], padded[1:])]):
        score = isthmus.evaluate(Answers(), batches)
        assert score.count == 3
        assert score.loss == pytest.approx(float(loss))
        assert score.accuracy == pytest.approx(float((SCORES[kept].argmax(1) == padded.ravel()[kept]).float().mean()))


def test_other_targets_need_a_loss_and_have_no_accuracy():
    targets = torch.randn(6, 4)
    score = isthmus.evaluate(Answers(), [(SCORES, targets)], loss=F.mse_loss)
    assert score.loss == pytest.approx(float(F.mse_loss(SCORES, targets)))
    assert score.accuracy is None
    with refuses(ModelError, r"outputs \(6, 4\) are no class scores for targets \(6, 4\): give loss="):
        isthmus.evaluate(Answers(), [(SCORES, targets)])


def test_numbers_are_no_classes_even_where_the_shapes_fit():
    score = isthmus.evaluate(Answers(), [(SCORES[:, :1], torch.zeros(6))], loss=lambda out, y: F.mse_loss(out[:, 0], y))
    assert score.accuracy is None


def test_a_score_depends_on_no_training_mode_and_changes_nothing():
    model = copy.deepcopy(trained(CNN, 0)).train()
    before = copy.deepcopy(model.state_dict())
    assert isthmus.evaluate(model, data_of(CNN)) == isthmus.evaluate(trained(CNN, 0), data_of(CNN))
    assert model.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_data_may_be_overwritten_by_the_model():
    class Overwrites(Answers):
        def forward(self, x):
            return x.mul_(2)

    x = SCORES.clone()
    isthmus.evaluate(Overwrites(), [(x, LABELS)])
    assert torch.equal(x, SCORES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_in_any_precision(dtype):
    model = copy.deepcopy(trained(MLP, 0)).to(dtype)
    expected = isthmus.evaluate(trained(MLP, 0), data_of(MLP))
    # bfloat16 has 8 bits
    assert isthmus.evaluate(model, data_of(MLP)).loss == pytest.approx(expected.loss, rel=2e-2)


def test_an_ensemble_is_the_mean_of_the_scores():
    models = [trained(MLP, 0), trained(MLP, 1)]
    x, _ = data_of(MLP)[0]
    with torch.no_grad():
        expected = (models[0](x) + models[1](x)) / 2
        torch.testing.assert_close(Ensemble(models)(x), expected)


# The line


@pytest.mark.parametrize("name", [MLP, CNN])
def test_the_ends_are_the_models_own_scores(name):
    a, b = trained(name, 0), trained(name, 1)
    for repair in ("reset", None):
        curve = isthmus.connect(a, b, data_of(name, "test"), 3, repair, data_of(name))
        for end, model in ((0, a), (-1, b)):
            own = isthmus.evaluate(model, data_of(name, "test"))
            assert curve.raw_losses[end] == own.loss
            assert curve.raw_accuracies[end] == own.accuracy
            mended = isthmus.repair(model, data_of(name)) if repair else model
            own = isthmus.evaluate(mended, data_of(name, "test"))
            assert curve.losses[end] == own.loss
            assert curve.accuracies[end] == own.accuracy


@pytest.mark.parametrize("repair", ["reset", None])
def test_every_point_is_the_merge_with_those_coefficients(repair):
    a, b = trained(CNN, 0), trained(CNN, 1)
    curve = isthmus.connect(a, b, data_of(CNN, "test"), 5, repair, data_of(CNN))
    assert curve.lambdas == (0, 0.25, 0.5, 0.75, 1)
    for x, loss, accuracy in zip(curve.lambdas, curve.losses, curve.accuracies, strict=True):
        merged = isthmus.merge([a, b], coefficients=[1 - x, x])
        merged = isthmus.repair(merged, data_of(CNN)) if repair else merged
        expected = isthmus.evaluate(merged, data_of(CNN, "test"))
        assert loss == pytest.approx(expected.loss, rel=1e-5)
        assert accuracy == pytest.approx(
            expected.accuracy, abs=0.01
        )  # a sample may lie on the edge between two classes
    assert curve.barrier == pytest.approx(oracle.barrier(curve.losses))


def test_reset_and_raw_stand_beside_each_other():
    a, b = learnt(CNN, 0), learnt(CNN, 1)
    both = isthmus.connect(a, b, data_of(CNN), 3, calibration=data_of(CNN))
    raw = isthmus.connect(a, b, data_of(CNN), 3, None)
    assert both.repair == "reset"
    assert raw.repair is None
    assert both.raw_losses == raw.raw_losses == raw.losses
    assert both.losses != both.raw_losses
    assert both.losses[1] < both.raw_losses[1] - 0.2  # measured: 1.7 and 2.2


def test_without_batch_norm_there_is_nothing_to_reset():
    curve = isthmus.connect(trained(MLP, 0), trained(MLP, 1), data_of(MLP), 3)
    assert curve.repair is None
    assert curve.losses == curve.raw_losses


@pytest.mark.parametrize("name", [MLP, CNN, RESNET20])
def test_between_a_model_and_itself_there_is_no_barrier(name):
    model = trained(name, 0)
    curve = isthmus.connect(model, copy.deepcopy(model), data_of(name)[:1], 5, calibration=data_of(name)[:1])
    assert len(set(curve.losses)) == 1
    assert curve.barrier == curve.error_barrier == curve.midpoint_barrier == 0


def test_turning_the_line_round_turns_the_curve_round():
    a, b = trained(MLP, 0), trained(MLP, 1)
    there, back = isthmus.connect(a, b, data_of(MLP), 5), isthmus.connect(b, a, data_of(MLP), 5)
    assert there.losses == pytest.approx(back.losses[::-1], rel=1e-5)
    assert there.barrier == pytest.approx(back.barrier, rel=1e-4)


def test_matching_lowers_the_barrier_of_trained_models():
    a, b = learnt(MLP, 0), learnt(MLP, 1)
    moved = isthmus.apply(isthmus.align([a, b], symmetry(MLP)), b, 1)
    naive, matched = (isthmus.connect(a, other, data_of(MLP), 5).barrier for other in (b, moved))
    assert 0 < matched < naive - 0.5  # measured: 0.9 and 2.3


def test_the_models_are_left_as_they_were_and_needs_repair_does_not_matter():
    a, b = copy.deepcopy(trained(CNN, 0)).train(), copy.deepcopy(trained(CNN, 1))
    a.needs_repair = True
    before = [copy.deepcopy(model.state_dict()) for model in (a, b)]
    curve = isthmus.connect(a, b, data_of(CNN)[:1], 3, calibration=data_of(CNN)[:1])
    assert curve == isthmus.connect(trained(CNN, 0), trained(CNN, 1), data_of(CNN)[:1], 3, calibration=data_of(CNN)[:1])
    assert a.training
    for model, state in zip((a, b), before, strict=True):
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_a_loss_of_ones_own_is_used_on_the_whole_line():
    a, b = lively(MLP, 0), lively(MLP, 1)
    data = [(x, torch.ones(len(x), 10)) for x, _ in data_of(MLP)[:1]]
    curve = isthmus.connect(a, b, data, 3, loss=F.mse_loss)
    assert curve.accuracies == ()
    assert math.isnan(curve.error_barrier)
    assert curve.losses[0] == isthmus.evaluate(a, data, loss=F.mse_loss).loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_interpolation_is_exact_at_its_ends_in_any_precision(dtype):
    a, b = (copy.deepcopy(lively(CNN, seed)).to(dtype) for seed in range(2))
    a.features[1].num_batches_tracked.fill_(5)
    if dtype == torch.float64:  # digits that float32 does not have
        with torch.no_grad():
            b.head.bias += 1e-12
    for x, end in ((0.0, a), (1.0, b)):
        state = interpolate(a, b, x).state_dict()
        for key, tensor in end.state_dict().items():
            assert torch.equal(state[key], tensor if tensor.is_floating_point() else a.state_dict()[key])
    half = interpolate(a, b, 0.5).head.bias
    torch.testing.assert_close(half, ((a.head.bias.double() + b.head.bias.double()) / 2).to(dtype))


# Refusals

MODEL = fresh(CNN, 0)
GOOD = {"model_a": MODEL, "model_b": MODEL, "data": data_of(CNN)[:1], "calibration": data_of(CNN)[:1]}
REFUSED = {
    "one point": ({"points": 1}, InputError, "points=1: a line needs its two ends"),
    "REPAIR": ({"repair": "repair"}, InputError, "'reset' or left as they are"),
    "no calibration": ({"calibration": None}, DataError, "give calibration=, or repair=None"),
    "a generator to calibrate": ({"calibration": (x for x in data_of(CNN))}, DataError, "only once"),
    "empty calibration": ({"calibration": []}, DataError, "data is empty"),
    "no data": ({"data": None}, DataError, "no data"),
    "empty data": ({"data": []}, DataError, "data is empty"),
    "a generator": ({"data": (x for x in data_of(CNN))}, DataError, "only once"),
    "no targets": ({"data": [data_of(CNN)[0][0]]}, DataError, "has no targets"),
    "another architecture": ({"model_b": fresh(MLP, 0)}, ModelError, "model 1"),
    "too few targets": ({"data": [(data_of(CNN)[0][0], torch.zeros(3).long())]}, ModelError, "no class scores"),
    "more classes": ({"data": [(data_of(CNN)[0][0], torch.full((100,), 10))]}, DataError, "target 10 .* 10 classes"),
    "a negative class": ({"data": [(data_of(CNN)[0][0], torch.full((100,), -1))]}, DataError, "target -1"),
    "only padding": ({"data": [(data_of(CNN)[0][0], torch.full((100,), -100))]}, DataError, "no targets that count"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_refuses(what):
    changed, kind, told = REFUSED[what]
    with refuses(kind, told):
        isthmus.connect(**{**GOOD, **changed})


@pytest.mark.parametrize("output", ["words", torch.zeros(6), {"scores": SCORES}, None])
def test_outputs_without_class_scores_are_refused(output):
    with refuses(ModelError, "are no class scores"):
        isthmus.evaluate(Answers(lambda _: output), [(SCORES, LABELS)])
