"""Partial zip: one trunk, several heads, cut from the traced graph."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import isthmus
from helpers.pairs import CNN, MLP, VGG_BN, data_of, inputs_of, learnt, lively, planted, stir, symmetry, trained
from helpers.refusals import refuses
from helpers.zoo import ZOO as STRUCTURES
from isthmus.data import Batch
from isthmus.errors import DataError, InputError, SymmetryError, TraceError
from isthmus.match.zipit import ZipIt, _correlations
from isthmus.partial_merging.module import PartialZip
from oracles import zipit as oracle

GROUPS = "resnet20?width=0.5&norm=group"
SOME = [MLP, CNN, GROUPS]
# A space that no activations stand for, and a network that is captured in one precision only.
UNREADABLE = {"ConcatZeros", "PaddedTwice", "Repeat", "RepeatInterleave", "FactorisedWeight", "LowRankUpdate"}
# A write in place across the border, which is refused (below).
UNREADABLE |= {"WrittenIntoZeros"}
WHOLE = sorted(set(STRUCTURES) - UNREADABLE - {"Functional", "CastInside"})


def roots(sym: isthmus.Symmetry) -> list[str]:
    return [space.name for space in sym if space.parent is None]


def structure(name: str) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    model = STRUCTURES[name]().eval().double()
    stir(model, 0)
    inputs = pytree.tree_map(
        lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x,
        model.inputs(samples=30),
    )
    return model, Batch(*inputs)


def answer(model: nn.Module, batch: Batch):
    with torch.no_grad():
        own = batch.clone()
        return model(*own.args, **own.kwargs)


@pytest.mark.parametrize("name", SOME)
def test_where_nothing_is_zipped_every_head_is_its_model(name):
    models = [lively(name, seed) for seed in range(3)]
    x = inputs_of(models[0], 5)
    zipped = isthmus.partial_zip(models, [inputs_of(models[0], 64)], roots(symmetry(name))[0])
    assert not zipped.trunk.tensors()
    with torch.no_grad():
        for model, output in zip(models, zipped(x), strict=True):
            assert torch.equal(output, model(x))


# Every third network by default, all of them among the slow ones: each is traced, cut and run several times.
@pytest.mark.parametrize(
    "name",
    [name if number % 3 == 0 else pytest.param(name, marks=pytest.mark.slow) for number, name in enumerate(WHOLE)],
)
def test_a_network_and_its_shuffled_copy_keep_their_answers_wherever_it_stops(name):
    model, batch = structure(name)
    sym = isthmus.trace(model, *batch.clone().args, kwargs=batch.clone().kwargs)
    moved, _ = planted(model, sym, 1)
    expected = pytree.tree_leaves(answer(model, batch))
    for stop in dict.fromkeys([*roots(sym)[:1], *roots(sym)[-1:], None]):
        zipped = isthmus.partial_zip([model, moved], [batch], stop, method="activation_matching")
        for output in answer(zipped, batch):
            for found, right in zip(pytree.tree_leaves(output), expected, strict=True):
                torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9)  # float64, reordered sums


@pytest.mark.parametrize("name", SOME)
def test_zipit_merges_a_network_with_its_shuffled_copies_and_loses_nothing(name):
    model, sym = lively(name, 0), symmetry(name)
    models = [model, planted(model, sym, 1)[0], planted(model, sym, 2)[0]]
    x = inputs_of(model, 5)
    with torch.no_grad():
        expected = model(x)
        for stop in (roots(sym)[1], None):
            zipped = isthmus.partial_zip(models, [inputs_of(model, 64)], stop)
            assert zipped.trunk.tensors()
            assert zipped.alignment.is_exact
            for output in zipped(x):
                # float32: heads sum reordered terms, up to 64 · 9 of them in 20 layers
                torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def zipped_by_hand(models: list[nn.Module], layers: int, x: torch.Tensor, options: ZipIt) -> list[np.ndarray]:
    """Every head's answer: the first layers zipped with explicit matrices, the others each model's own."""
    moments = isthmus.collect(models, symmetry(MLP), data_of(MLP), at=options.at)
    spaces = [_correlations(moments[space.name]) for space in symmetry(MLP)][:layers]
    groups = [oracle.zip_groups(each, len(models), options.budget_within, options.decay) for each in spaces]
    linear = [
        [
            (m.weight.detach().double().numpy(), m.bias.detach().double().numpy())
            for m in model.modules()
            if isinstance(m, nn.Linear)
        ]
        for model in models
    ]
    weights, biases = oracle.zip_mlp(
        [[w for w, _ in own[: layers + 1]] for own in linear],
        [[b for _, b in own[: layers + 1]] for own in linear],
        groups,
    )
    trunk = x.double().numpy()
    for weight, bias in list(zip(weights, biases, strict=True))[:layers]:
        trunk = np.maximum(trunk @ weight.T + bias, 0)
    answers = []
    for index, own in enumerate(linear):
        value = trunk
        if layers:
            value = value @ oracle.merge_matrices(groups[-1], len(models), len(own[layers - 1][1]))[1][index].T
        for number, (weight, bias) in enumerate(own[layers:], start=layers):
            value = value @ weight.T + bias
            value = np.maximum(value, 0) if number < len(own) - 1 else value
        answers.append(value)
    return answers


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("count", [2, 3])
def test_the_heads_answer_what_the_papers_matrices_give(layers, count):
    models = [trained(MLP, seed) for seed in range(count)]
    options = ZipIt(at="post", budget_within=1.0, decay=0.8)
    stop = [*roots(symmetry(MLP)), None][layers]
    zipped = isthmus.partial_zip(models, data_of(MLP), stop, method=options)
    assert not zipped.alignment.is_exact
    x = data_of(MLP)[0][0]
    with torch.no_grad():
        for output, expected in zip(zipped(x), zipped_by_hand(models, layers, x, options), strict=True):
            # float32 against float64, sums of 64 terms in four layers, values up to 10
            np.testing.assert_allclose(output.numpy(), expected, rtol=1e-4, atol=1e-4)


class Tasks(nn.Module):
    """A small residual network with a number of classes of its own."""

    def __init__(self, classes: int):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.inner, self.outer = nn.Conv2d(12, 10, 3, padding=1), nn.Conv2d(10, 12, 3, padding=1)
        self.head = nn.Linear(12, classes)

    def forward(self, x):
        x = F.relu_(self.norm(self.stem(x)))
        x = F.relu_(x + self.outer(F.relu(self.inner(x))))
        return self.head(x.mean((2, 3)))


def tasks() -> tuple[list[nn.Module], torch.Tensor]:
    models = []
    for seed, classes in enumerate((3, 7)):
        torch.manual_seed(seed)
        models.append(Tasks(classes).eval())
        stir(models[-1], seed)
    return models, torch.randn(40, 1, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("stop", ["stem", "inner", None])
def test_models_of_other_class_counts_share_a_trunk(stop):
    models, x = tasks()
    zipped = isthmus.partial_zip(models, [x], stop)
    with torch.no_grad():
        first, second = zipped(x)
    assert (first.shape, second.shape) == ((40, 3), (40, 7))
    labels = [torch.arange(40) % 3, torch.arange(40) % 7]
    scores = zipped.evaluate([[(x, y)] for y in labels])
    for index, (output, y) in enumerate(zip((first, second), labels, strict=True)):
        assert torch.equal(zipped.head(index)(x), output)
        assert scores[index].loss == pytest.approx(F.cross_entropy(output, y).item(), rel=1e-5)
        assert scores[index].count == 40
    heads = [set(own.tensors()) for own in zipped.owns]
    assert heads[0] == heads[1]
    shared = set(zipped.trunk.tensors())
    if stop == "stem":
        assert not shared
        assert torch.equal(first, models[0](x))
    elif stop == "inner":  # the stream is merged where it comes from the stem, and every model's own behind the block
        assert shared == {
            "stem.weight",
            "stem.bias",
            *(f"norm.{k}" for k in ("weight", "bias", "running_mean", "running_var")),
        }
        assert heads[0] == {f"{k}.{t}" for k in ("inner", "outer", "head") for t in ("weight", "bias")}
    else:
        assert heads[0] == {"head.weight", "head.bias"}


def test_the_trunks_statistics_are_those_of_the_merged_network():
    models = [trained(VGG_BN, seed) for seed in range(2)]
    merged = isthmus.merge(models, isthmus.align(models, symmetry(VGG_BN), "zipit", data=data_of(VGG_BN)))
    expected = isthmus.repair(merged, data_of(VGG_BN)).state_dict()
    zipped = isthmus.partial_zip(models, data_of(VGG_BN))
    for name, tensor in zipped.trunk.tensors().items():
        # running statistics are averaged here in float64, there in float32
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


def test_the_heads_statistics_are_measured_if_asked_for():
    models = [learnt(VGG_BN, seed) for seed in range(2)]
    zipped = isthmus.partial_zip(models, data_of(VGG_BN), roots(symmetry(VGG_BN))[2])
    before = copy.deepcopy(zipped.state_dict())
    again = zipped.reset(data_of(VGG_BN), heads=True)
    assert all(torch.equal(tensor, before[key]) for key, tensor in zipped.state_dict().items())
    for key, tensor in again.state_dict().items():
        if key.startswith("trunk") or "running" not in key:
            assert torch.equal(tensor, before[key]), key
        else:
            assert not torch.equal(tensor, before[key]), key
    zipped_loss, again_loss = (sum(s.loss for s in z.evaluate([data_of(VGG_BN)] * 2)) for z in (zipped, again))
    assert again_loss < zipped_loss - 0.3  # measured: 0.7 and 1.6


def test_a_later_stop_shares_more_and_costs_more():
    models = [learnt(VGG_BN, seed) for seed in range(2)]
    shared, losses = [], []
    for stop in (roots(symmetry(VGG_BN))[0], roots(symmetry(VGG_BN))[3], None):
        zipped = isthmus.partial_zip(models, data_of(VGG_BN), stop).reset(data_of(VGG_BN), heads=True)
        shared.append(sum(t.numel() for t in zipped.trunk.tensors().values()))
        losses.append(sum(score.loss for score in zipped.evaluate([data_of(VGG_BN)] * 2)))
    assert shared[0] < shared[1] < shared[2]
    assert losses[0] < losses[1] - 0.5  # measured: 0.02, 1.6 and 3.4
    assert losses[1] < losses[2] - 0.5


def test_any_batch_size_a_loaded_state_copies_and_gradients():
    models, x = tasks()
    zipped = isthmus.partial_zip(models, [x], None)
    with torch.no_grad():
        whole = zipped(x)
        for size in (1, 7):
            for part, output in zip(zipped(x[:size]), whole, strict=True):
                torch.testing.assert_close(part, output[:size])  # other kernels for other batch sizes
    other = isthmus.partial_zip(models, [x + 1], None)
    other.load_state_dict(zipped.state_dict())
    copied = copy.deepcopy(zipped)
    for each in (other, copied):
        assert each(x)[1].shape == whole[1].shape
    assert torch.equal(copied(x)[1], whole[1])
    sum(output.sum() for output in zipped(x)).backward()
    assert all(p.grad is not None for p in zipped.parameters())
    assert all(p.grad is None for model in models for p in model.parameters())


def test_nothing_it_was_given_changes():
    models, x = tasks()
    models[0].train()
    before = [copy.deepcopy(model.state_dict()) for model in models]
    seen = x.clone()
    zipped = isthmus.partial_zip(models, [x])
    zipped(x)
    with torch.no_grad():
        for tensor in zipped.state_dict().values():
            tensor.zero_()
    assert torch.equal(x, seen)
    assert models[0].training
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_first_models_precision_is_the_trunks(dtype):
    models = [copy.deepcopy(lively(MLP, seed)).to(dtype) for seed in range(2)]
    zipped = isthmus.partial_zip(models, [inputs_of(lively(MLP, 0), 64)])
    assert {tensor.dtype for tensor in zipped.state_dict().values()} == {dtype}
    assert all(output.isfinite().all() for output in zipped(inputs_of(lively(MLP, 0), 4).to(dtype)))


@pytest.mark.parametrize("method", ["identity", "weight_matching", "activation_matching", "ot_fusion", "zipit"])
def test_any_method_that_looks_at_spaces_alone_will_do(method):
    models, x = tasks()
    zipped = isthmus.partial_zip(models, [x], "inner", method=method)
    assert zipped.alignment.method == method
    assert [output.shape for output in zipped(x)] == [(40, 3), (40, 7)]


def test_one_model_is_itself():
    models, x = tasks()
    zipped = isthmus.partial_zip(models[:1], [x])
    assert isinstance(zipped, PartialZip)
    assert len(zipped) == 1
    assert torch.equal(zipped(x)[0], models[0](x))


class InPlace(nn.Module):
    """What the trunk computes is written over by what is not in it, and read again."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x):
        h = F.relu(self.stem(x))
        h.view(h.shape).add_(self.head(h).sum(1, keepdim=True))
        return self.head(h)


def test_writing_across_the_border_is_refused():
    models = [InPlace().eval() for _ in range(2)]
    with refuses(TraceError, "writes in place over"):
        isthmus.partial_zip(models, [torch.randn(20, 3)], method="activation_matching")


def test_what_it_cannot_do_is_refused():
    models, x = tasks()
    with refuses(SymmetryError, "no space 'nowhere'"):
        isthmus.partial_zip(models, [x], "nowhere")
    with refuses(InputError, "no models"):
        isthmus.partial_zip([], [x])
    with refuses(DataError, "zipit needs data"):
        isthmus.partial_zip(models, inputs=(x,))
    with refuses(InputError, "no symmetry"):
        isthmus.partial_zip(models, method="weight_matching")
    with refuses(InputError, "model 1 is a state dict"):
        isthmus.partial_zip([models[0], models[1].state_dict()], [x])
    zipped = isthmus.partial_zip(models, [x])
    with refuses(InputError, "head 2: there are heads 0 … 1"):
        zipped.head(2)
    with refuses(InputError, "1 data sets for 2 heads"):
        zipped.evaluate([[(x, torch.zeros(40).long())]])
    other = Tasks(3).eval()
    other.inner, other.outer = nn.Conv2d(12, 11, 3, padding=1), nn.Conv2d(11, 12, 3, padding=1)
    isthmus.partial_zip([models[0], other], [x], "inner")
    with refuses(SymmetryError, "model 1 has no space inner of 1 × 10 units"):
        isthmus.partial_zip([models[0], other], [x])
    nested = lively(GROUPS, 0)
    child = next(space.name for space in symmetry(GROUPS) if space.parent is not None)
    with refuses(InputError, "is nested in"):
        isthmus.partial_zip([nested, nested], [inputs_of(nested, 4)], child)
