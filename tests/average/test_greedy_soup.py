"""Greedy soup: it never loses to the best model on what it is judged by, and leaves out what does not fit."""

import copy

import pytest
import torch

import isthmus
from helpers.pairs import MLP, VGG_BN, data_of, planted, stir, symmetry, trained
from helpers.refusals import refuses
from isthmus.average.greedy_soup import GreedySoup
from isthmus.data.batches import split_batches
from isthmus.errors import DataError, InputError
from isthmus.observe.running_statistics import normalisation_layers, reset_statistics


def wrecked(spec):
    model = copy.deepcopy(trained(spec, 0))
    stir(model, 7)
    return model


def by_hand(models, data, held_out=0.2):
    """The chosen models: plain means of state dicts, scored with `evaluate`."""
    fitting, held = split_batches(data, held_out)

    def mean(chosen):
        model = copy.deepcopy(models[0]).eval()
        states = [models[index].state_dict() for index in chosen]
        model.load_state_dict(
            {
                name: sum(state[name].double() for state in states).div(len(states)).to(tensor.dtype)
                if tensor.is_floating_point()
                else tensor
                for name, tensor in states[0].items()
            }
        )
        if normalisation_layers(model) and len(chosen) > 1:
            reset_statistics(model, fitting)
        return isthmus.evaluate(model, held).loss

    alone = [mean([index]) for index in range(len(models))]
    order = sorted(range(len(models)), key=alone.__getitem__)
    chosen, lowest = order[:1], alone[order[0]]
    for index in order[1:]:
        loss = mean(sorted([*chosen, index]))
        if loss <= lowest:
            chosen, lowest = sorted([*chosen, index]), loss
    return chosen


@pytest.mark.parametrize("spec", [MLP, VGG_BN])
def test_it_takes_in_what_the_plain_algorithm_does(spec):
    models = [trained(spec, 0), wrecked(spec), trained(spec, 1), trained(spec, 2)]
    alignment = isthmus.align(models, symmetry(spec))
    moved = [isthmus.apply(alignment, model, index) for index, model in enumerate(models)]
    chosen = by_hand(moved, data_of(spec))
    soup = isthmus.merge(models, alignment, "greedy_soup", data=data_of(spec))
    weights = [float(index in chosen) for index in range(4)]
    expected = isthmus.merge(models, alignment, coefficients=weights)
    if len(chosen) > 1:
        expected = isthmus.repair(expected, data_of(spec))
    for name, tensor in expected.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(soup.state_dict()[name], tensor)


def test_copies_of_one_model_all_fit():
    model = trained(MLP, 0)
    copies = [model, *(planted(model, symmetry(MLP), seed)[0] for seed in (1, 2))]
    alignment = isthmus.align(copies, symmetry(MLP))
    soup = isthmus.merge(copies, alignment, "greedy_soup", data=data_of(MLP)).state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(soup[name], tensor)


def test_a_model_that_fits_to_none_leaves_the_best_alone():
    models = [wrecked(VGG_BN), trained(VGG_BN, 1)]
    soup = isthmus.merge(models, None, "greedy_soup", data=data_of(VGG_BN))
    assert soup.statistics_measured
    for name, tensor in models[1].state_dict().items():
        if tensor.is_floating_point():
            assert torch.equal(soup.state_dict()[name], tensor)


def test_coefficients_weigh_those_taken_in():
    model = trained(MLP, 0)
    near = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter.mul_(1 + 1e-4)
    soups = [
        isthmus.merge([model, near], None, average, coefficients=[3.0, 1.0], data=data_of(MLP)).state_dict()
        for average in (GreedySoup(), "mean")
    ]
    taken = all(torch.equal(soups[0][name], soups[1][name]) for name in soups[0])
    alone = all(torch.equal(soups[0][name], each[name]) for each in (near.state_dict(),) for name in soups[0])
    alone |= all(torch.equal(soups[0][name], tensor) for name, tensor in model.state_dict().items())
    assert taken or alone


def test_what_it_cannot_do_is_refused():
    models = [trained(MLP, seed) for seed in range(2)]
    data = data_of(MLP)
    with refuses(DataError, "needs data"):
        isthmus.merge(models, None, "greedy_soup")
    with refuses(DataError, "one batch"):
        isthmus.merge(models, None, "greedy_soup", data=data[:1])
    with refuses(InputError, "align by permutations"):
        mapped = isthmus.align(models, symmetry(MLP), "procrustes", data=data)
        isthmus.merge(models, mapped, "greedy_soup", data=data)
    with refuses(InputError, "held_out=1"):
        GreedySoup(held_out=1.0)
