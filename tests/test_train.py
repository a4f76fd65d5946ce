import dataclasses
import resource
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from isthmus.data import DataSet, load_data
from isthmus.errors import CheckpointError, DataError, InputError
from isthmus.models import load_model
from isthmus.models.mlp import MLP
from isthmus.models.small_cnn import SmallCNN
from isthmus.training.presets import PRESETS, TrainOptions
from isthmus.training.trainer import Epoch, _flip_and_crop, _learning_rate, _Run, train

QUICK = TrainOptions("adam", learning_rate=3e-3, epochs=3, batch_size=32, schedule="linear", warmup=1.0)
MODEL = "mlp?in_features=64&width=16&depth=2"
CNN = "cnn?width=0.25"


@pytest.fixture(scope="module")
def digits() -> DataSet:
    return load_data("digits")


@pytest.fixture(scope="module")
def few(digits) -> DataSet:
    return dataclasses.replace(digits, x_train=digits.x_train[:200], y_train=digits.y_train[:200])


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def accuracy(model: nn.Module, data: DataSet) -> float:
    with torch.no_grad():
        return sum(int((model(x).argmax(1) == y).sum()) for x, y in data.test()) / len(data.y_test)


class KilledError(Exception):
    """Stands for a process that is killed."""


@contextmanager
def killed_in_epoch(number: int):
    """Raises at the end of an epoch, before its checkpoint is written."""
    original = _Run.epoch

    def epoch(self, index, advance):
        result = original(self, index, advance)
        if index == number:
            raise KilledError
        return result

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_Run, "epoch", epoch)
        yield


def test_it_learns_the_digits(digits):
    model, history = train(
        "cnn?width=0.5", digits, dataclasses.replace(PRESETS["cpu_digits"], epochs=6), seed=0, holdout=200
    )
    assert [epoch.loss for epoch in history] == sorted((epoch.loss for epoch in history), reverse=True)
    assert history[-1].accuracy > 0.95
    assert history[-1].validation_accuracy is not None
    assert history[-1].validation_accuracy > 0.93
    assert accuracy(model, digits) > 0.93
    assert not model.training


def test_the_seed_decides_every_bit(few):
    dropout = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Dropout(0.3), nn.Linear(8, 10))
    for model in (MODEL, dropout):
        runs = [train(model, few, QUICK, seed=seed) for seed in (5, 5, 6)]
        assert same(runs[0].model, runs[1].model)
        assert runs[0].history == runs[1].history
        assert not same(runs[0].model, runs[2].model)


def test_arguments_and_the_global_random_state_stay_as_they_were(few):
    torch.manual_seed(1)
    model = SmallCNN(width=0.25).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    trained = train(model, few, QUICK, seed=0).model
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not same(trained, model)


def test_text_and_module_give_the_same_start(few):
    torch.manual_seed(4)
    model = load_model(MODEL)
    untrained = dataclasses.replace(QUICK, epochs=0, warmup=0.0)
    assert same(train(MODEL, few, untrained, seed=4).model, model)
    assert train(MODEL, few, untrained, seed=4).history == ()


RECIPES = {
    "adam": QUICK,
    "sgd, colour": TrainOptions("sgd", 0.05, weight_decay=5e-4, epochs=3, batch_size=32, augment=True),
    "bf16, channels last": TrainOptions("sgd", 0.05, epochs=3, batch_size=32, precision="bf16", channels_last=True),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("killed_in", [0, 1, 2])
def test_an_interrupted_training_resumes_to_the_same_bits(recipe, killed_in, few, tmp_path):
    options, path = RECIPES[recipe], tmp_path / "run.ckpt"
    torch.manual_seed(0)
    model = nn.Sequential(SmallCNN(width=0.25), nn.Dropout(0.2))
    whole = train(model, few, options, seed=3, holdout=20)
    with killed_in_epoch(killed_in), pytest.raises(KilledError):
        train(model, few, options, seed=3, holdout=20, resume=path)
    assert path.exists() == (killed_in > 0)
    torch.rand(7)  # another process has another random state
    resumed = train(model, few, options, seed=3, holdout=20, resume=path)
    assert same(whole.model, resumed.model)
    assert whole.history == resumed.history
    assert list(tmp_path.iterdir()) == [path]


def test_a_finished_checkpoint_gives_the_model_back_without_training(few, tmp_path, monkeypatch):
    path = tmp_path / "run.ckpt"
    first = train(MODEL, few, QUICK, seed=0, resume=path)
    monkeypatch.setattr(_Run, "epoch", None)
    again = train(MODEL, few, QUICK, seed=0, resume=path)
    assert same(first.model, again.model)
    assert first.history == again.history


def test_a_checkpoint_of_another_training_is_refused(few, tmp_path):
    torch.manual_seed(1)  # the initial weights below are not those that seed 0 draws
    path = tmp_path / "run.ckpt"
    train(MODEL, few, QUICK, seed=0, resume=path)
    written = path.read_bytes()
    other = dataclasses.replace(few, x_train=few.x_train + 1)
    for change in (
        {"seed": 1},
        {"options": dataclasses.replace(QUICK, learning_rate=1e-3)},
        {"model": "mlp?in_features=64&width=17&depth=2"},
        {"model": MLP(64, 16, 2)},  # the same shapes, other initial weights
        {"data": other},
        {"holdout": 5},
        {"indices": torch.arange(100)},
    ):
        arguments = {"model": MODEL, "data": few, "options": QUICK, "seed": 0, "resume": path} | change
        with pytest.raises(CheckpointError, match="another training"):
            train(**arguments)
        assert path.read_bytes() == written


def test_damaged_and_hostile_checkpoints_are_refused(few, tmp_path):
    path, mark = tmp_path / "run.ckpt", tmp_path / "ran"
    train(MODEL, few, QUICK, seed=0, resume=path)
    whole = path.read_bytes()

    class Hostile:
        def __reduce__(self):
            return (mark.touch, ())

    torch.save(Hostile(), tmp_path / "hostile")
    hostile = (tmp_path / "hostile").read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], hostile, b"\x80\x02."):
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            train(MODEL, few, QUICK, seed=0, resume=path)
        assert "\n" not in str(caught.value)
        assert "delete it to start again" in str(caught.value)
    assert not mark.exists()
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="another training"):
        train(MODEL, few, QUICK, seed=0, resume=path)


def test_a_full_disk_leaves_the_old_checkpoint(few, tmp_path):
    path = tmp_path / "run.ckpt"
    with killed_in_epoch(1), pytest.raises(KilledError):
        train(MODEL, few, QUICK, seed=0, resume=path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(CheckpointError) as caught:
            train(MODEL, few, QUICK, seed=0, resume=path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot be written" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(CheckpointError, match="does not exist; create it"):
        train(MODEL, few, QUICK, seed=0, resume=tmp_path / "absent" / "run.ckpt")


def test_only_the_chosen_samples_that_are_not_held_out_are_seen(digits):
    chosen = (digits.y_train < 5).nonzero()[:, 0]
    seen: list[torch.Tensor] = []

    class Spy(nn.Linear):
        def forward(self, x):
            if self.training:
                seen.append(x.detach().flatten(1))
            return super().forward(x.flatten(1))

    epochs = 2
    train(Spy(64, 10), digits, dataclasses.replace(QUICK, epochs=epochs), seed=0, indices=chosen, holdout=300)
    (expected, _), *_ = digits.train(2000, holdout=300, indices=chosen)
    rows = sorted(map(bytes, torch.cat(seen).numpy()))
    assert rows == sorted(map(bytes, expected.flatten(1).repeat(epochs, 1).numpy()))
    assert not torch.equal(torch.cat(seen)[: len(expected)], torch.cat(seen)[len(expected) :])  # another order


def test_steps_of_an_epoch_are_of_nearly_equal_size(few):
    sizes: list[int] = []

    class Spy(nn.Linear):
        def forward(self, x):
            if self.training:
                sizes.append(len(x))
            return super().forward(x.flatten(1))

    train(Spy(64, 10), few, dataclasses.replace(QUICK, epochs=1, batch_size=199), seed=0)
    assert sizes == [100, 100]  # not 199 and 1, which BatchNorm could not take


def test_text_is_trained_on(tmp_path):
    (tmp_path / "tinyshakespeare.txt").write_text("abcd" * 400)
    data = load_data("tinyshakespeare", tmp_path, block=8)
    model = nn.Sequential(nn.Embedding(data.classes, 8), nn.Linear(8, data.classes))
    options = TrainOptions("adam", learning_rate=0.05, epochs=5, batch_size=16)
    _, history = train(model, data, options, seed=0, holdout=10)
    assert history[-1].accuracy == 1.0
    assert history[-1].validation_accuracy == 1.0


@pytest.mark.parametrize("schedule", ["one_cycle", "linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 2.0])
def test_schedules_rise_to_the_peak_and_fall_as_stated(schedule, warmup):
    if schedule == "one_cycle" and warmup:
        with pytest.raises(InputError, match="its own warm-up"):
            TrainOptions(schedule=schedule, warmup=warmup)
        return
    options = TrainOptions(learning_rate=0.4, epochs=10, schedule=schedule, warmup=warmup)
    steps = 20
    rates = [_learning_rate(options, step, steps) for step in range(10 * steps)]
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(0.4)
    assert min(rates) > 0
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    if schedule == "constant":
        assert rates[-1] == 0.4
    else:
        assert rates[-1] < 0.01
    if schedule == "one_cycle":
        assert rates[0] == pytest.approx(0.4 / 25)
        assert peak == 60
    elif warmup:
        assert rates[:3] == pytest.approx([0.01, 0.02, 0.03])
    middle = rates[round((peak + 200) / 2)]
    if schedule in ("linear", "cosine"):
        assert middle == pytest.approx(0.2, rel=0.02)  # half way down, give or take half a step of 160


def test_sgd_steps_are_those_of_the_formula(few):
    # Full batches, so that the order of the samples does not matter: g = ∇L + λθ, v ← μv + g, θ ← θ - ηv.
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    options = TrainOptions("sgd", 0.1, 0.8, weight_decay=0.3, epochs=3, batch_size=200, schedule="linear")
    trained = train(model, few, options, seed=0).model
    ((x, y),) = few.train(200)
    velocity = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for rate in (0.1, 0.1 * 2 / 3, 0.1 / 3):
        gradients = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient, v in zip(model.parameters(), gradients, velocity, strict=True):
                v.mul_(0.8).add_(gradient + 0.3 * parameter)
                parameter.sub_(rate * v)
    for got, wanted in zip(trained.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got, wanted)


def test_each_crop_is_the_image_shifted_over_black_and_perhaps_flipped():
    torch.manual_seed(0)
    x = torch.randint(1, 256, (300, 3, 9, 7), dtype=torch.uint8)
    kept = x.clone()
    made = _flip_and_crop(x)
    assert torch.equal(x, kept)
    assert made.shape == x.shape
    assert made.dtype == torch.uint8
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    found: dict[tuple[int, int, bool], int] = {}
    for image, canvas in zip(made, padded, strict=True):
        shifts = [
            (top, left, flip)
            for top in range(9)
            for left in range(9)
            for flip in (False, True)
            if torch.equal(image.flip(2) if flip else image, canvas[:, top : top + 9, left : left + 7])
        ]
        assert len(shifts) == 1
        found[shifts[0]] = found.get(shifts[0], 0) + 1
    tops, lefts, flips = zip(*found, strict=True)
    assert set(tops) == set(lefts) == set(range(9))
    # 300 fair coins: mean 150, deviation 8.7; five of those.
    assert abs(sum(count for (_, _, flip), count in found.items() if flip) - 150) < 44
    assert set(flips) == {False, True}


def test_augmentation_and_smoothing_reach_the_training_only(few):
    base = TrainOptions(learning_rate=0.05, epochs=1, batch_size=50)
    plain, augmented, smooth = (
        train(CNN, few, dataclasses.replace(base, **change), seed=0, holdout=50)
        for change in ({}, {"augment": True}, {"label_smoothing": 0.5})
    )
    assert not same(plain.model, augmented.model)
    assert not same(plain.model, smooth.model)
    x, y = next(iter(few.validation(holdout=50)))
    with torch.no_grad():
        expected = nn.functional.cross_entropy(smooth.model(x), y).item()
    assert smooth.history[0].validation_loss == pytest.approx(expected, rel=1e-5)


def test_bf16_keeps_float32_weights_and_the_plain_layout(few):
    options = TrainOptions(epochs=1, batch_size=50, precision="bf16", channels_last=True)
    half, full = (
        train(CNN, few, dataclasses.replace(options, precision=precision), seed=0).model
        for precision in ("bf16", "float32")
    )
    assert not same(half, full)
    for tensor in half.state_dict().values():
        assert tensor.is_contiguous()
        assert tensor.dtype in (torch.float32, torch.int64)


def test_wrong_options_get_one_line():
    for wrong in (
        {"optimizer": "lion"},
        {"schedule": "step"},
        {"precision": "fp16"},
        {"learning_rate": -1.0},
        {"learning_rate": float("nan")},
        {"momentum": 1.5},
        {"weight_decay": -1e-4},
        {"epochs": -1},
        {"batch_size": 0},
        {"schedule": "linear", "warmup": 11.0},
        {"label_smoothing": 2.0},
    ):
        with pytest.raises(InputError) as caught:
            TrainOptions(**wrong)
        assert list(wrong)[-1] in str(caught.value)
        assert "\n" not in str(caught.value)


def test_what_cannot_be_trained_gets_one_line(few, digits):
    colourless = dataclasses.replace(few, x_train=few.x_train.float())
    frozen = MLP(64, 8).requires_grad_(False)
    for error, says, arguments in (
        (InputError, "cannot take samples [1, 8, 8] of digits", {"model": "mlp"}),
        (DataError, "needs logits [2, 10]", {"model": "mlp?in_features=64&classes=9"}),
        (InputError, "nothing to train", {"model": frozen}),
        (InputError, "nothing to train", {"model": nn.Flatten()}),
        (InputError, "augment flips and crops", {"data": colourless, "options": TrainOptions(augment=True)}),
        (DataError, "no training sample is left", {"indices": torch.empty(0, dtype=torch.int64)}),
        (DataError, "no training sample is left", {"holdout": 200}),
        (InputError, "lower learning_rate", {"options": TrainOptions(learning_rate=1e30, epochs=2)}),
    ):
        with pytest.raises(error) as caught:
            train(**({"model": MODEL, "data": few, "options": QUICK, "seed": 0} | arguments))
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)


def test_nothing_is_printed_where_there_is_no_terminal(few, capfd):
    train(MODEL, few, QUICK, seed=0, progress=True)
    assert capfd.readouterr() == ("", "")


def test_a_terminal_sees_the_progress(few, capfd, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    train(MODEL, few, QUICK, seed=0, progress=True)
    assert "epoch 3: loss" in capfd.readouterr().err
    train(MODEL, few, QUICK, seed=0)
    assert capfd.readouterr() == ("", "")


def test_history_scores_are_means_over_samples(few):
    frozen_rate = TrainOptions(learning_rate=0.0, momentum=0.0, epochs=1, batch_size=64)
    result = train(MODEL, few, frozen_rate, seed=0, holdout=50)
    with torch.no_grad():
        scores = []
        for batches in (few.train(1000, holdout=50), few.validation(1000, holdout=50)):
            ((x, y),) = batches
            logits = result.model(x)
            scores += [nn.functional.cross_entropy(logits, y).item(), (logits.argmax(1) == y).float().mean().item()]
    assert dataclasses.astuple(result.history[0]) == pytest.approx(scores, rel=1e-5)
    assert isinstance(result.history[0], Epoch)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_usable_recipes(name):
    options = PRESETS[name]
    assert options.epochs > 0
    assert _learning_rate(options, 0, 100) > 0
