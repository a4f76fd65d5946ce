"""Coefficients by layer: longest paths first, and the same numbers as averaging each layer on its own."""

import pytest
import torch

import isthmus
from helpers.pairs import MLP, VGG_BN, data_of, lively, symmetry, trained
from helpers.refusals import refuses
from isthmus.average.coefficients import check_coefficients
from isthmus.errors import InputError


def test_the_longest_path_counts():
    names = ["a.b.weight", "a.c.weight", "ab.weight", "d"]
    found = check_coefficients({"a": [1.0, 3.0], "a.b": [0.0, 2.0], "d": [4.0, 0.0], "": [2.0, 2.0]}, 2, names)
    assert [found.of(name) for name in names] == [(0, 1), (0.25, 0.75), (0.5, 0.5), (1, 0)]
    assert found.counting == [0, 1]
    assert check_coefficients({"a": [1.0, 0.0], "": [1.0, 0.0]}, 2, names).counting == [0]


@pytest.mark.parametrize("average", ["mean", "slerp"])
def test_every_tensor_is_averaged_with_its_own(average):
    models = [lively(MLP, seed) for seed in range(2)]
    paths = dict.fromkeys(name.rpartition(".")[0] for name in models[0].state_dict())
    shares = {path: [1 - index / 10, index / 10] for index, path in enumerate(paths)}
    merged = isthmus.merge(models, None, average, coefficients=shares).state_dict()
    for path, weights in shares.items():
        alone = isthmus.merge(models, None, average, coefficients=weights).state_dict()
        for name in alone:
            if name.startswith(f"{path}."):
                assert torch.equal(merged[name], alone[name])


def test_layers_of_one_parent_alone_are_that_parents():
    models = [trained(MLP, seed) for seed in range(2)]
    alignment = isthmus.align(models, symmetry(MLP))
    head = list(models[0].state_dict())[-1].rpartition(".")[0]
    merged = isthmus.merge(models, alignment, coefficients={head: [0.0, 1.0], "": [1.0, 0.0]}).state_dict()
    moved = isthmus.apply(alignment, models[1], 1).state_dict()
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(merged[name], moved[name] if name.startswith(head) else tensor)


@pytest.mark.parametrize("average", ["pleas", "regmean", "fisher"])
def test_the_same_weights_by_layer_and_as_a_list_are_the_same(average):
    models = [trained(MLP, seed) for seed in range(2)]
    alignment = isthmus.align(models, symmetry(MLP))
    paths = {name.rpartition(".")[0]: [3.0, 1.0] for name in models[0].state_dict()}
    found = [
        isthmus.merge(models, alignment, average, coefficients=weights, data=data_of(MLP)).state_dict()
        for weights in ([3.0, 1.0], paths)
    ]
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name])


def test_repair_takes_them_too():
    models = [trained(VGG_BN, seed) for seed in range(2)]
    alignment = isthmus.align(models, symmetry(VGG_BN))
    by_layer = {"": [1.0, 0.0]}
    merged = isthmus.merge(models, alignment, coefficients=by_layer)
    mended = isthmus.repair(
        merged, data_of(VGG_BN), "repair", parents=models, alignment=alignment, coefficients=by_layer
    )
    same = isthmus.repair(
        merged, data_of(VGG_BN), "repair", parents=models, alignment=alignment, coefficients=[1.0, 0.0]
    )
    for name, tensor in mended.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name])


def test_bad_ones_are_refused():
    models = [lively(MLP, seed) for seed in range(2)]
    with refuses(InputError, "no tensor lies there"):
        isthmus.merge(models, coefficients={"hiden": [1.0, 1.0]})
    with refuses(InputError, "1 coefficients of"):
        isthmus.merge(models, coefficients={"": [1.0]})
    with refuses(InputError, "not sum to zero"):
        isthmus.merge(models, coefficients={"": [1.0, -1.0]})
