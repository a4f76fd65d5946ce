import copy
import re

import numpy as np
import pytest
import torch
from torch import nn

import isthmus
from helpers.pairs import MLP, VGG_BN, data_of, fresh, lively, symmetry
from helpers.refusals import refuses
from isthmus.errors import DataError, InputError, ModelError, SymmetryError
from isthmus.match import METHODS
from isthmus.match.base import Match
from isthmus.match.weight_matching import WeightMatching
from isthmus.registry import configure

MODELS = [lively(MLP, 0), lively(MLP, 1)]


def same(a: isthmus.Alignment, b: isthmus.Alignment) -> bool:
    return all(
        np.array_equal(s[space.name].indices, t[space.name].indices)
        for space in a.symmetry
        for s, t in zip(a.transforms, b.transforms, strict=True)
    )


def test_every_method_of_the_table_is_a_match_of_that_name():
    for name, method in METHODS.items():
        assert method.name == name
        assert isinstance(method(), Match)
        assert method().needs in ("", "data", "labels")


def test_the_default_is_weight_matching():
    assert isthmus.align(MODELS, symmetry(MLP)).method == "weight_matching"


def test_a_name_stands_for_its_method_without_options():
    named, configured = (isthmus.align(MODELS, symmetry(MLP), each) for each in ("weight_matching", WeightMatching()))
    assert same(named, configured)


def test_the_symmetry_is_found_where_it_is_left_out():
    expected = isthmus.align(MODELS, symmetry(MLP))
    x, _ = data_of(MLP)[0]
    for found in (
        isthmus.align(MODELS, inputs=(x[:2],)),
        isthmus.align(MODELS, data=data_of(MLP)),
        isthmus.align(MODELS, isthmus.Symmetry.from_json(symmetry(MLP).to_json())),
    ):
        assert found.symmetry.hash == symmetry(MLP).hash
        assert same(found, expected)


@pytest.mark.parametrize("method", ["weight_matching", "activation_matching"])
def test_state_dicts_are_as_good_as_modules(method):
    expected = isthmus.align(MODELS, symmetry(MLP), method, data=data_of(MLP))
    states = [model.state_dict() for model in MODELS]
    for models, module in (([MODELS[0], states[1]], None), ([states[0], MODELS[1]], None), (states, fresh(MLP, 7))):
        assert same(isthmus.align(models, symmetry(MLP), method, data=data_of(MLP), module=module), expected)


def test_a_wrapped_model_is_aligned_with_a_bare_one():
    wrapped = nn.DataParallel(copy.deepcopy(MODELS[1])).eval()
    assert all(name.startswith("module.") for name in wrapped.state_dict())
    expected = isthmus.align(MODELS, symmetry(MLP))
    assert same(isthmus.align([MODELS[0], wrapped], symmetry(MLP)), expected)
    assert same(isthmus.align([MODELS[0], wrapped.train()], symmetry(MLP)), expected)
    assert wrapped.training


def test_another_seed_may_end_elsewhere():
    models = [lively(VGG_BN, 0), lively(VGG_BN, 1)]
    one_start = WeightMatching(restarts=1)
    ends = {isthmus.align(models, symmetry(VGG_BN), one_start, seed=seed).objective for seed in range(4)}
    assert len(ends) > 1


def broken(value: float) -> nn.Module:
    model = fresh(MLP, 0)
    with torch.no_grad():
        model.head.weight[0, 0] = value
    return model


GOOD = {"models": MODELS, "symmetry": symmetry(MLP)}
REFUSED = {
    "a misspelt name": ({"method": "weight_matchin"}, InputError, "did you mean 'weight_matching'"),
    "a name like no other": ({"method": "zzz"}, InputError, "choose from auto, identity, weight_matching"),
    "no models": ({"models": []}, InputError, "no models"),
    "only state dicts": ({"models": [m.state_dict() for m in MODELS]}, InputError, "give module="),
    "no symmetry": ({"symmetry": None}, InputError, "no symmetry"),
    "a negative seed": ({"seed": -1}, InputError, "seed=-1"),
    "no data": ({"method": "activation_matching"}, DataError, "activation_matching needs data"),
    "a generator": ({"method": "activation_matching", "data": (x for x in data_of(MLP))}, DataError, "only once"),
    "a generator that is not needed": ({"data": (x for x in data_of(MLP))}, DataError, "only once"),
    "empty data": ({"method": "activation_matching", "data": []}, DataError, "data is empty"),
    "an empty batch": ({"method": "activation_matching", "data": [torch.zeros(0, 64)]}, DataError, "empty batch"),
    "a tensor": ({"method": "activation_matching", "data": torch.zeros(2, 64)}, DataError, "is a Tensor"),
    "a NaN weight": (
        {"models": [MODELS[0], broken(torch.nan)]},
        ModelError,
        "model 1: 1 of 240 values of 'head.weight'",
    ),
    "an infinite weight": ({"models": [broken(torch.inf), MODELS[0]]}, ModelError, "model 0: 1 of 240 values"),
    "another architecture": ({"models": [MODELS[0], fresh(VGG_BN, 0)]}, ModelError, "model 1"),
    "another width": ({"models": [MODELS[0], fresh(MLP.replace("24", "25"), 0)]}, ModelError, "model 1: wrong shapes"),
    "another depth": ({"models": [MODELS[0], fresh(MLP.replace("depth=3", "depth=2"), 0)]}, ModelError, "model 1"),
    "another symmetry": ({"symmetry": symmetry(VGG_BN)}, SymmetryError, "is not this model's"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_refuses(what):
    changed, kind, told = REFUSED[what]
    with refuses(kind, re.escape(told)):
        isthmus.align(**{**GOOD, **changed})


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("weight_matching", {"restart": 3}, "has no option 'restart' (did you mean 'restarts'?)"),
        ("activation_matching", {"zzz": 3}, "it has reference, at, similarity"),
        ("identity", {"at": "pre"}, "it has none"),
        ("weight_matching", {"restarts": 0}, "restarts=0"),
    ],
)
def test_options_that_a_method_does_not_have_are_refused(name, options, told):
    with refuses(InputError, re.escape(told)):
        configure("matching method", name, METHODS, options)


def test_options_reach_the_method():
    assert configure("matching method", "weight_matching", METHODS, {"restarts": 7}) == WeightMatching(restarts=7)
