"""Folding keeps the function and leaves no BatchNorm behind."""

import pytest
import torch
from torch import nn

import isthmus
from helpers.pairs import CNN, RESNET20, VGG_BN, inputs_of, lively, symmetry


@pytest.mark.parametrize("name", [VGG_BN, RESNET20, CNN])
def test_the_folded_network_computes_the_same(name):
    model = lively(name, 0).double()
    x = inputs_of(model, 3).double()
    plain = isthmus.fold_batch_norms(model, symmetry(name))
    with torch.no_grad():
        torch.testing.assert_close(plain(x), model(x), rtol=1e-10, atol=1e-10)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_folded_networks_are_merged_like_any_other():
    models = [isthmus.fold_batch_norms(lively(VGG_BN, seed), symmetry(VGG_BN)) for seed in range(2)]
    sym = isthmus.trace(models[0], inputs_of(models[0], 2))
    data = [(inputs_of(models[0], 20), torch.zeros(20).long()) for _ in range(2)]
    merged = isthmus.merge(models, isthmus.align(models, sym, isthmus.match.CCA(gamma=0.1), data=data))
    assert not merged.needs_repair
