import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import isthmus
from helpers.pairs import CNN, MLP, VGG_BN, data_of, fresh, inputs_of, lively, planted, symmetry
from helpers.refusals import refuses
from isthmus import Alignment, LinearMap, Permutation
from isthmus.average.base import Average, Averaged
from isthmus.average.mean import Mean
from isthmus.errors import DataError, InputError, ModelError, SymmetryError, TransformError


def test_the_mean_is_that_computed_by_hand():
    models = [lively(MLP, seed) for seed in range(3)]
    merged = isthmus.merge(models).state_dict()
    for key, tensor in merged.items():
        expected = sum(model.state_dict()[key].double() for model in models) / 3
        torch.testing.assert_close(tensor, expected.float(), rtol=1.2e-7, atol=0)  # float32's eps


@pytest.mark.parametrize("coefficients", [[1.0, 3.0], [0.25, 0.75], (10.0, 30.0)])
def test_coefficients_are_scaled_to_one(coefficients):
    a, b = lively(MLP, 0), lively(MLP, 1)
    merged = isthmus.merge([a, b], coefficients=coefficients).state_dict()
    for key, tensor in merged.items():
        expected = (a.state_dict()[key].double() + 3 * b.state_dict()[key].double()) / 4
        torch.testing.assert_close(tensor, expected.float(), rtol=1e-6, atol=1e-7)


def test_coefficients_may_be_negative():
    a, b = lively(MLP, 0), lively(MLP, 1)
    merged = isthmus.merge([a, b], coefficients=[2.0, -1.0]).state_dict()
    for key, tensor in merged.items():
        expected = 2 * a.state_dict()[key].double() - b.state_dict()[key].double()
        torch.testing.assert_close(tensor, expected.float(), rtol=1e-6, atol=1e-6)


def test_models_are_averaged_where_the_alignment_puts_them():
    models = [lively(CNN, seed) for seed in range(3)]
    alignment = isthmus.align(models, symmetry(CNN))
    moved = [isthmus.apply(alignment, model, index) for index, model in enumerate(models)]
    aligned, by_hand = isthmus.merge(models, alignment).state_dict(), isthmus.merge(moved).state_dict()
    naive = isthmus.merge(models).state_dict()
    assert all(torch.equal(tensor, by_hand[key]) for key, tensor in aligned.items())
    assert not all(torch.equal(tensor, naive[key]) for key, tensor in aligned.items())


@pytest.mark.parametrize("name", [MLP, CNN, VGG_BN, "resnet20?width=0.25"])
def test_a_model_and_its_shuffled_self_merge_into_the_same_function(name):
    model, sym = lively(name, 0), symmetry(name)
    shuffled, _ = planted(model, sym, 1)
    merged = isthmus.merge([model, shuffled], isthmus.align([model, shuffled], sym))
    x = inputs_of(model, 8)
    with torch.no_grad():
        assert torch.equal(merged(x), model(x))  # each weight is the mean of two equal numbers
        assert not torch.allclose(isthmus.merge([model, shuffled])(x), model(x), atol=1e-2)


def test_integer_buffers_are_the_first_models():
    models = [lively(CNN, seed) for seed in range(2)]
    for model, count in zip(models, (7, 100), strict=True):
        model.features[1].num_batches_tracked.fill_(count)
    for order, expected in ((models, 7), (models[::-1], 100)):
        merged = isthmus.merge(order, isthmus.align(order, symmetry(CNN)))
        assert int(merged.features[1].num_batches_tracked) == expected
        assert merged.features[1].num_batches_tracked.dtype == torch.int64


class Tied(nn.Module):
    """An autoencoder-like net that reads one matrix in both directions, under two names."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 4), nn.Linear(4, 2)
        self.body.weight = self.stem.weight

    def forward(self, x):
        return self.head(F.relu(self.body(F.relu(self.stem(x)))))


def test_tied_weights_stay_tied_and_are_averaged_once():
    torch.manual_seed(0)
    models = [Tied().eval() for _ in range(2)]
    merged = isthmus.merge(models, isthmus.align(models, inputs=(torch.randn(2, 4),)))
    assert merged.body.weight is merged.stem.weight
    naive = isthmus.merge(models)
    expected = (models[0].stem.weight.double() + models[1].stem.weight.double()) / 2
    assert torch.equal(naive.stem.weight, expected.float())
    assert naive.body.weight is naive.stem.weight


def test_bfloat16_is_averaged_in_float32():
    models = [copy.deepcopy(lively(MLP, seed)).bfloat16() for seed in range(3)]
    merged = isthmus.merge(models).state_dict()
    lossy = 0
    for key, tensor in merged.items():
        states = [model.state_dict()[key] for model in models]
        expected = (sum(state.double() for state in states) / 3).float().bfloat16()
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected)
        lossy += int((((states[0] + states[1]) + states[2]) / 3 != expected).sum())
    assert lossy > 0  # arithmetic in bfloat16 itself would have shown


def test_state_dicts_are_as_good_as_modules():
    models = [lively(MLP, seed) for seed in range(2)]
    expected = isthmus.merge(models).state_dict()
    states = [model.state_dict() for model in models]
    for given, module in (([models[0], states[1]], None), (states, fresh(MLP, 5))):
        merged = isthmus.merge(given, module=module).state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in merged.items())


def test_a_configured_average_is_as_good_as_its_name():
    models = [lively(MLP, seed) for seed in range(2)]
    named, configured = (isthmus.merge(models, average=each).state_dict() for each in ("mean", Mean()))
    assert all(torch.equal(tensor, configured[key]) for key, tensor in named.items())


# Linear maps


def rotated(name: str) -> Alignment:
    """An alignment that turns the second model by a random rotation in every space."""
    sym = symmetry(name)
    generator = torch.Generator().manual_seed(0)
    turns = {}
    for space in sym:
        q = torch.linalg.qr(torch.randn(space.size, space.size, generator=generator, dtype=torch.float64)).Q
        turns[space.name] = LinearMap(q[None], q.T[None])
    return Alignment(sym, ({space.name: Permutation.identity(space) for space in sym}, turns), method="by hand")


def test_a_linear_map_over_batch_norm_leaves_a_model_to_repair():
    models = [lively(CNN, seed) for seed in range(2)]
    alignment = rotated(CNN)
    with refuses(TransformError, "running variance is undefined under a linear map; .* call repair"):
        isthmus.apply(alignment, models[1], 1)
    merged = isthmus.merge(models, alignment)
    assert merged.needs_repair
    norms = [module for module in merged.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(torch.equal(norm.running_var, torch.ones_like(norm.running_var)) for norm in norms)
    mended = isthmus.repair(merged, data_of(CNN))
    assert not mended.needs_repair
    assert not torch.equal(mended.features[1].running_var, norms[0].running_var)


def test_permutations_over_batch_norm_and_maps_without_it_need_no_repair():
    models = [lively(CNN, seed) for seed in range(2)]
    assert isthmus.merge(models).needs_repair is False
    assert isthmus.merge(models, isthmus.align(models, symmetry(CNN))).needs_repair is False
    models = [lively(MLP, seed) for seed in range(2)]
    assert isthmus.merge(models, rotated(MLP)).needs_repair is False


def test_a_linear_map_acts_on_both_sides_of_its_space():
    models = [lively(MLP, seed) for seed in range(2)]
    alignment = rotated(MLP)
    merged = isthmus.merge(models, alignment, coefficients=[0.0, 1.0])
    into = {name: transform.into[0] for name, transform in alignment.transforms[1].items()}
    old = {key: tensor.double() for key, tensor in models[1].state_dict().items()}
    expected = {
        "hidden.0.weight": into["hidden.0"] @ old["hidden.0.weight"],
        "hidden.1.weight": into["hidden.1"] @ old["hidden.1.weight"] @ into["hidden.0"].T,
        "hidden.1.bias": into["hidden.1"] @ old["hidden.1.bias"],
        "head.weight": old["head.weight"] @ into["hidden.2"].T,
        "head.bias": old["head.bias"],
    }
    for key, tensor in expected.items():
        torch.testing.assert_close(merged.state_dict()[key], tensor.float(), rtol=1e-5, atol=1e-6)


# Refusals


class NeedsBase(Average):
    """An average that asks for what is not there."""

    name, needs = "needs_base", "base"

    def __call__(self, aligned):
        return Averaged(dict(aligned.states[0]))


class NeedsData(NeedsBase):
    name, needs = "needs_data", "data"


MODELS = [lively(MLP, seed) for seed in range(2)]
THREE = isthmus.align([*MODELS, lively(MLP, 2)], symmetry(MLP), "identity")
OTHER = isthmus.align([lively(CNN, 0)] * 2, symmetry(CNN), "identity")
REFUSED = {
    "no models": ({"models": []}, InputError, "no models"),
    "a misspelt average": ({"average": "meen"}, InputError, "no average 'meen' (did you mean 'mean'?)"),
    "too few coefficients": ({"coefficients": [1.0]}, InputError, "1 coefficients for 2 models"),
    "too many coefficients": ({"coefficients": [1.0, 2.0, 3.0]}, InputError, "3 coefficients for 2 models"),
    "coefficients that cancel": ({"coefficients": [1.0, -1.0]}, InputError, "not sum to zero"),
    "a NaN coefficient": ({"coefficients": [1.0, math.nan]}, InputError, "must be finite"),
    "infinite coefficients": ({"coefficients": [math.inf, -math.inf]}, InputError, "must be finite"),
    "an alignment of three": ({"alignment": THREE}, InputError, "2 models, but the alignment holds 3"),
    "an alignment of other networks": ({"alignment": OTHER}, SymmetryError, "not this model's: features.0.weight"),
    "no base": ({"average": NeedsBase()}, InputError, "needs base="),
    "no data": ({"average": NeedsData()}, DataError, "needs data"),
    "another architecture": ({"models": [MODELS[0], lively(CNN, 0)]}, ModelError, "model 1"),
    "a base of another architecture": ({"base": lively(CNN, 0)}, ModelError, "base"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_refuses(what):
    changed, kind, told = REFUSED[what]
    with refuses(kind, re.escape(told)):
        isthmus.merge(**{"models": MODELS, **changed})


@pytest.mark.parametrize("index", [-1, 2])
def test_a_model_that_is_not_in_the_alignment_is_refused(index):
    with refuses(InputError, f"index {index}: the alignment holds models 0 … 1"):
        isthmus.apply(isthmus.align(MODELS, symmetry(MLP), "identity"), MODELS[0], index)
