import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import isthmus
from helpers.pairs import (
    CNN,
    MLP,
    RESNET20,
    VGG_BN,
    data_of,
    fresh,
    inputs_of,
    learnt,
    lively,
    planted,
    symmetry,
    trained,
)
from helpers.refusals import refuses
from isthmus import Alignment, LinearMap
from isthmus.errors import DataError, InputError, ModelError, TransformError
from isthmus.observe.running_statistics import reset_statistics
from oracles import git_rebasin as oracle

VGG = "vgg11?width=0.0625&in_channels=1"
GROUP = "resnet20?width=0.5&norm=group&in_channels=1"


def norms_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]


def images(name: str, batches: int = 4) -> list[torch.Tensor]:
    return [x for x, _ in data_of(name)][:batches]


def assert_same_state(a: nn.Module, b: nn.Module, **tolerance) -> None:
    for key, tensor in a.state_dict().items():
        torch.testing.assert_close(tensor, b.state_dict()[key], **({"rtol": 0, "atol": 0} | tolerance))


# Reset


@pytest.mark.parametrize("name", [CNN, VGG_BN, RESNET20])
def test_reset_is_what_torch_does_after_weight_averaging(name):
    merged = isthmus.merge([trained(name, 0), trained(name, 1)])
    mended = isthmus.repair(merged, data_of(name))
    expected = copy.deepcopy(merged)
    torch.optim.swa_utils.update_bn(data_of(name), expected)
    assert_same_state(mended, expected)
    assert not torch.equal(norms_of(mended)[0].running_mean, norms_of(merged)[0].running_mean)


@pytest.mark.parametrize("name", [CNN, RESNET20])
def test_reset_is_the_mean_of_the_batches_own_statistics(name):
    merged = isthmus.merge([trained(name, 0), trained(name, 1)])
    expected = copy.deepcopy(merged)
    oracle.reset_batch_norm(expected, images(name))
    mended = isthmus.repair(merged, data_of(name))
    for found, by_hand in zip(norms_of(mended), norms_of(expected), strict=True):
        # float32 through up to 19 layers of batch statistics
        torch.testing.assert_close(found.running_mean, by_hand.running_mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.running_var, by_hand.running_var, rtol=1e-4, atol=1e-5)
        assert int(found.num_batches_tracked) == 4


class Dropped(nn.Module):
    """A batch-normalised network with dropout before the normalisation."""

    def __init__(self, p: float):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)
        self.drop = nn.Dropout(p)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.drop(self.body(x)))))


def test_reset_leaves_dropout_off():
    x = torch.randn(50, 5, generator=torch.Generator().manual_seed(0))
    with_dropout, without = Dropped(0.9).eval(), Dropped(0.0).eval()
    without.load_state_dict(with_dropout.state_dict())
    assert_same_state(isthmus.repair(with_dropout, [x]), isthmus.repair(without, [x]))


@pytest.mark.parametrize("method", ["reset", "repair"])
def test_the_merged_model_and_the_data_are_left_as_they_were(method):
    parents = [trained(CNN, 0), trained(CNN, 1)]
    merged = isthmus.merge(parents).train()
    for norm in norms_of(merged):
        norm.momentum = 0.3
    before, batches = copy.deepcopy(merged.state_dict()), [x.clone() for x in images(CNN)]
    mended = isthmus.repair(merged, data_of(CNN), method, parents=parents)
    assert merged.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in merged.state_dict().items())
    assert not any(module.training for module in mended.modules())
    assert {norm.momentum for norm in norms_of(mended)} == {0.3}
    assert all(torch.equal(x, y) for x, y in zip(images(CNN), batches, strict=True))
    assert mended.needs_repair is False


def test_statistics_are_put_back_into_place_after_a_failure():
    model = trained(CNN, 0)
    broken = copy.deepcopy(model)
    with pytest.raises(RuntimeError):
        reset_statistics(broken, [torch.zeros(2, 7, 8, 8)])
    assert not any(module.training for module in broken.modules())
    assert [norm.momentum for norm in norms_of(broken)] == [norm.momentum for norm in norms_of(model)]


def test_a_network_without_batch_norm_comes_back_as_it_is():
    merged = isthmus.merge([lively(MLP, 0), lively(MLP, 1)])
    mended = isthmus.repair(merged, data_of(MLP))
    assert mended is not merged
    assert_same_state(mended, merged)


class Overwrites(nn.Module):
    """Works in place on its input."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)

    def forward(self, x):
        x -= 1
        return self.head(F.relu(self.norm(self.body(x))))


@pytest.mark.parametrize("method", ["reset", "repair"])
def test_a_model_that_works_in_place_does_not_spoil_the_data(method):
    torch.manual_seed(0)
    parents = [Overwrites().eval(), Overwrites().eval()]
    x = torch.randn(20, 3)
    before = x.clone()
    isthmus.repair(isthmus.merge(parents), [x], method, parents=parents)
    assert torch.equal(x, before)


# REPAIR

# The layers whose outputs are rescaled.
LAYERS = {
    MLP: lambda model: [f"hidden.{index}" for index in range(3)],
    VGG: lambda model: [f"features.{index}" for index in oracle.VGG11],
    VGG_BN: lambda model: [f"features.{index + 1}" for index in oracle.VGG11_BN],
    RESNET20: lambda model: [path for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)],
    GROUP: lambda model: [path for path, module in model.named_modules() if isinstance(module, nn.Conv2d)],
}
WITH_LAYERS = pytest.mark.parametrize("name", LAYERS)


def aligned(name: str, models=None):
    """Two models in the frame of the first, their merge, and the alignment."""
    models = models or [lively(name, 0), lively(name, 1)]
    alignment = isthmus.align(models, symmetry(name))
    moved = [isthmus.apply(alignment, model, index) for index, model in enumerate(models)]
    return models, moved, isthmus.merge(models, alignment), alignment


@WITH_LAYERS
def test_every_hidden_unit_gets_its_parents_mean_and_deviation(name):
    models, moved, merged, alignment = aligned(name)
    x = images(name, 1)
    mended = isthmus.repair(merged, x, "repair", parents=models, alignment=alignment)
    for layer in LAYERS[name](merged):
        parents = [oracle.statistics(parent, x, layer) for parent in moved]
        mean, deviation = (torch.stack(each).mean(0) for each in zip(*parents, strict=True))
        found_mean, found_deviation = oracle.statistics(mended, x, layer)
        # Exact on one batch but for float32, whose errors are passed on through 20 layers: 20 eps and some slack.
        torch.testing.assert_close(found_deviation, deviation, rtol=1e-5, atol=0)
        torch.testing.assert_close(found_mean, mean, rtol=0, atol=1e-5 * float(deviation.max()))
    before = [oracle.statistics(merged, x, layer)[1] for layer in LAYERS[name](merged)[1:]]
    targets = [oracle.statistics(moved[0], x, layer)[1] for layer in LAYERS[name](merged)[1:]]
    assert not all(torch.allclose(a, b, rtol=0.1) for a, b in zip(before, targets, strict=True))


@WITH_LAYERS
def test_the_folded_network_is_the_rescaled_one(name):
    models, moved, merged, alignment = aligned(name)
    x = images(name, 1)
    mended = isthmus.repair(merged, x, "repair", parents=models, alignment=alignment)
    rescaled = copy.deepcopy(merged)
    oracle.repaired(rescaled, moved, x, LAYERS[name](merged))
    with torch.no_grad():
        expected = rescaled(x[0])
        torch.testing.assert_close(mended(x[0]), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))  # as above
        assert not torch.allclose(merged(x[0]), expected, atol=1e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("name", [MLP, VGG_BN])
def test_several_batches_come_near_the_exact_statistics(name):
    """While measuring, each batch is rescaled by its own statistics, as BatchNorm does: per mille on 100 samples."""
    models, moved, merged, alignment = aligned(name, [trained(name, 0), trained(name, 1)])
    x = images(name)
    mended = isthmus.repair(merged, x, "repair", parents=models, alignment=alignment)
    for layer in LAYERS[name](merged):
        deviation = torch.stack([oracle.statistics(parent, x, layer)[1] for parent in moved]).mean(0)
        found = oracle.statistics(mended, x, layer)[1]
        assert float((found / deviation).log().abs().mean()) < 0.01


@pytest.mark.parametrize("name", [MLP, VGG_BN, RESNET20])
def test_the_last_layer_is_left_alone(name):
    models, _, merged, alignment = aligned(name)
    mended = isthmus.repair(merged, images(name), "repair", parents=models, alignment=alignment)
    assert torch.equal(mended.head.weight, merged.head.weight)
    assert torch.equal(mended.head.bias, merged.head.bias)
    assert mended.gained_biases == []


@WITH_LAYERS
def test_copies_of_a_model_need_hardly_any_repair(name):
    model = lively(name, 0)
    shuffled, _ = planted(model, symmetry(name), 1)
    models, _, merged, alignment = aligned(name, [model, shuffled])
    mended = isthmus.repair(merged, images(name, 1), "repair", parents=models, alignment=alignment)
    with torch.no_grad():
        x = inputs_of(model, 20)
        expected = model(x)
        # scale 1 and shift 0 to the rounding of float32, layer by layer, as above
        torch.testing.assert_close(mended(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_parents_count_by_their_coefficients():
    models = [lively(MLP, 0), lively(MLP, 1)]
    coefficients = [0.2, 0.8]
    merged = isthmus.merge(models, coefficients=coefficients)
    x = images(MLP, 1)
    mended = isthmus.repair(merged, x, "repair", parents=models, coefficients=coefficients)
    (mean_a, deviation_a), (mean_b, deviation_b) = (oracle.statistics(model, x, "hidden.2") for model in models)
    mean, deviation = oracle.statistics(mended, x, "hidden.2")
    torch.testing.assert_close(mean, 0.2 * mean_a + 0.8 * mean_b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(deviation, 0.2 * deviation_a + 0.8 * deviation_b, rtol=1e-4, atol=1e-5)


class NoBias(nn.Module):
    """Layers without biases: nothing can take a shift."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.conv, self.up = nn.Conv2d(1, width, 3, bias=False), nn.ConvTranspose2d(width, 5, 2, bias=False)
        self.body, self.head = nn.Linear(5, width, bias=False), nn.Linear(width, 3, bias=False)

    def forward(self, x):
        x = F.relu(self.up(F.relu(self.conv(x)))).mean((2, 3))
        return self.head(F.relu(self.body(x)))


def pair_of(make, shape, samples: int = 64):
    torch.manual_seed(0)
    models = [make().eval(), make().eval()]
    x = torch.randn(samples, *shape)
    alignment = isthmus.align(models, inputs=(x[:2],))
    return models, isthmus.merge(models, alignment), alignment, x


def test_layers_without_a_bias_gain_one_and_use_it():
    models, merged, alignment, x = pair_of(NoBias, (1, 8, 8))
    mended = isthmus.repair(merged, [x], "repair", parents=models, alignment=alignment)
    assert set(mended.gained_biases) == {"conv.bias", "up.bias", "body.bias"}
    assert set(mended.state_dict()) == set(merged.state_dict()) | set(mended.gained_biases)
    moved = [isthmus.apply(alignment, model, index) for index, model in enumerate(models)]
    for layer in ("conv", "up", "body"):
        mean = torch.stack([oracle.statistics(parent, [x], layer)[0] for parent in moved]).mean(0)
        torch.testing.assert_close(oracle.statistics(mended, [x], layer)[0], mean, rtol=1e-4, atol=1e-5)
        assert mended.get_parameter(f"{layer}.bias").abs().max() > 1e-3
    assert mended.head.bias is None
    assert merged.conv.bias is None


class PreActivation(nn.Module):
    """A residual stream that is normalised where it is read, not where it is written."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv1, self.conv2 = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.norm1, self.norm2, self.norm3 = nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return self.head(F.relu(self.norm3(x)).mean((2, 3)))


def test_streams_that_are_normalised_where_they_are_read_are_repaired_there():
    models, merged, alignment, x = pair_of(PreActivation, (1, 8, 8))
    mended = isthmus.repair(merged, [x], "repair", parents=models, alignment=alignment)
    moved = [isthmus.apply(alignment, model, index) for index, model in enumerate(models)]
    for layer in ("norm1", "norm2", "norm3"):
        parents = [oracle.statistics(parent, [x], layer) for parent in moved]
        mean, deviation = (torch.stack(each).mean(0) for each in zip(*parents, strict=True))
        found_mean, found_deviation = oracle.statistics(mended, [x], layer)
        torch.testing.assert_close(found_deviation, deviation, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found_mean, mean, rtol=1e-4, atol=1e-4)


class Branching(nn.Module):
    """A convolution that is read as it is and normalised."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.conv(x)
        return self.head((F.relu(self.norm(x)) + torch.tanh(x)).mean((2, 3)))


def test_what_is_read_both_bare_and_normalised_is_repaired_twice():
    models, merged, alignment, x = pair_of(Branching, (1, 8, 8))
    mended = isthmus.repair(merged, [x], "repair", parents=models, alignment=alignment)
    moved = [isthmus.apply(alignment, model, index) for index, model in enumerate(models)]
    for layer in ("conv", "norm"):
        parents = [oracle.statistics(parent, [x], layer) for parent in moved]
        mean, deviation = (torch.stack(each).mean(0) for each in zip(*parents, strict=True))
        found_mean, found_deviation = oracle.statistics(mended, [x], layer)
        torch.testing.assert_close(found_deviation, deviation, rtol=1e-5, atol=0)
        torch.testing.assert_close(found_mean, mean, rtol=1e-5, atol=1e-5)


class Twice(nn.Module):
    """A layer that is applied twice cannot take the scale of either place."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.head(F.relu(self.body(F.relu(self.body(x)))))


def test_a_layer_that_is_applied_twice_is_left_alone():
    models, merged, alignment, x = pair_of(Twice, (4,))
    mended = isthmus.repair(merged, [x], "repair", parents=models, alignment=alignment)
    assert torch.equal(mended.body.weight, merged.body.weight)
    assert not torch.equal(mended.stem.weight, merged.stem.weight)


class PlainNorm(nn.Module):
    """Normalisation without gains, which cannot be rescaled."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.norm = nn.Linear(4, 7), nn.Linear(7, 6), nn.BatchNorm1d(6, affine=False)
        self.more, self.head = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(F.relu(self.more(F.relu(self.norm(self.body(F.relu(self.stem(x))))))))


def test_normalisation_without_gains_is_measured_anew_behind_rescaled_layers():
    models, merged, alignment, x = pair_of(PlainNorm, (4,))
    mended = isthmus.repair(merged, [x], "repair", parents=models, alignment=alignment)
    mean, deviation = oracle.statistics(mended, [x], "body")
    torch.testing.assert_close(mended.norm.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mended.norm.running_var.double(), deviation**2 * 64 / 63, rtol=1e-5, atol=0)
    assert not torch.equal(mended.stem.weight, merged.stem.weight)
    assert torch.equal(mended.body.weight, merged.body.weight)
    assert not torch.equal(mended.more.weight, merged.more.weight)


def test_units_that_never_vary_do_no_harm():
    models = [lively(MLP, 0), lively(MLP, 1)]
    with torch.no_grad():
        for model in models:
            model.hidden[0].weight[3] = 0
    merged = isthmus.merge(models)
    mended = isthmus.repair(merged, images(MLP, 1), "repair", parents=models)
    assert all(tensor.isfinite().all() for tensor in mended.state_dict().values())
    expected = (models[0].hidden[0].bias[3] + models[1].hidden[0].bias[3]) / 2
    torch.testing.assert_close(mended.hidden[0].bias[3], expected)


def test_units_that_cancel_are_shifted_not_blown_up():
    models = [lively(MLP, 0), lively(MLP, 1)]
    with torch.no_grad():
        models[1].hidden[0].weight[3] = -models[0].hidden[0].weight[3]
    x = images(MLP, 1)
    mended = isthmus.repair(isthmus.merge(models), x, "repair", parents=models)
    assert all(tensor.isfinite().all() for tensor in mended.state_dict().values())
    means = [oracle.statistics(model, x, "hidden.0")[0][3] for model in (*models, mended)]
    torch.testing.assert_close(means[2], (means[0] + means[1]) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", ["reset", "repair"])
def test_precision_is_kept(method, dtype):
    models = [copy.deepcopy(trained(CNN, seed)).to(dtype) for seed in range(2)]
    mended = isthmus.repair(isthmus.merge(models), data_of(CNN), method, parents=models)
    assert {tensor.dtype for tensor in mended.state_dict().values() if tensor.is_floating_point()} == {dtype}
    assert all(tensor.isfinite().all() for tensor in mended.state_dict().values())


@pytest.mark.parametrize("name", [CNN, VGG_BN])
def test_repairing_a_trained_merge_lowers_its_loss(name):
    models = [learnt(name, 0), learnt(name, 1)]
    alignment = isthmus.align(models, symmetry(name), "activation_matching", data=data_of(name))
    merged = isthmus.merge(models, alignment)
    before = isthmus.evaluate(merged, data_of(name)).loss
    for method in ("reset", "repair"):
        mended = isthmus.repair(merged, data_of(name), method, parents=models, alignment=alignment)
        # Measured: from 1.5 and 2.5, a loss of chance, to 0.8 and 1.5.
        assert isthmus.evaluate(mended, data_of(name)).loss < before - 0.3


# Refusals


class OwnWeight(nn.Module):
    """A matrix that belongs to no layer that could hold a bias."""

    def __init__(self):
        super().__init__()
        self.matrix, self.head = nn.Parameter(torch.randn(5, 4)), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(F.relu(F.linear(x, self.matrix)))


class UnusedBias(nn.Module):
    """A layer of one's own with a place for a bias that its forward pass does not read."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))
        self.register_parameter("bias", None)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        return self.head(F.relu(F.linear(x, self.weight)))


@pytest.mark.parametrize("make", [OwnWeight, UnusedBias])
def test_a_layer_that_can_hold_no_bias_is_named(make):
    models, merged, alignment, x = pair_of(make, (4,))
    with refuses(ModelError, "(matrix|weight): its layer has no bias and no place for one"):
        isthmus.repair(merged, [x], "repair", parents=models, alignment=alignment)


def test_a_batch_of_one_sample_is_refused():
    model = Dropped(0.0).eval()
    with refuses(DataError, "a batch of one sample has no variance"):
        isthmus.repair(model, [torch.randn(4, 5), torch.randn(1, 5)])


def test_parents_under_a_linear_map_cannot_be_measured():
    models = [trained(CNN, 0), trained(CNN, 1)]
    maps = {s.name: LinearMap(torch.eye(s.size)[None], torch.eye(s.size)[None]) for s in symmetry(CNN)}
    alignment = Alignment(symmetry(CNN), (maps, maps))
    merged = isthmus.merge(models, alignment)
    with refuses(TransformError, "use method='reset'"):
        isthmus.repair(merged, data_of(CNN), "repair", parents=models, alignment=alignment)
    assert isthmus.repair(merged, data_of(CNN)).needs_repair is False


MODEL = fresh(CNN, 0)
REFUSED = {
    "an unknown method": ({"method": "fix"}, InputError, "choose from reset, repair"),
    "no parents": ({"method": "repair"}, InputError, "needs parents="),
    "parents that were not aligned": (
        {"method": "repair", "parents": [MODEL], "alignment": isthmus.align([MODEL, MODEL], symmetry(CNN), "identity")},
        InputError,
        "1 parents, but the alignment holds 2",
    ),
    "coefficients of others": (
        {"method": "repair", "parents": [MODEL], "coefficients": [0.5, 0.5]},
        InputError,
        "2 coefficients for 1 models",
    ),
    "parents of another architecture": ({"method": "repair", "parents": [fresh(MLP, 0)]}, ModelError, "model 0"),
    "no data": ({"data": None}, DataError, "no data"),
    "empty data": ({"data": []}, DataError, "data is empty"),
    "a generator": ({"data": (x for x in images(CNN))}, DataError, "only once"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_refuses(what):
    changed, kind, told = REFUSED[what]
    with refuses(kind, told):
        isthmus.repair(**{"merged": MODEL, "data": data_of(CNN), **changed})
