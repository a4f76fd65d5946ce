"""What every way of averaging obeys: a new one is tested by being in the table."""

import copy

import numpy as np
import pytest
import torch

import isthmus
from helpers.pairs import CNN, MLP, data_of, lively, symmetry
from isthmus.average import AVERAGES
from isthmus.average.base import Average

EVERY_AVERAGE = pytest.mark.parametrize("average", AVERAGES)
EVERY_NETWORK = pytest.mark.parametrize("name", [MLP, CNN])


def merge(average: str, name: str, models, alignment=None, **options) -> torch.nn.Module:
    """The merge with all that an average may need; what is thrown away by chance or by size is kept here."""
    chosen = AVERAGES[average].whole()
    return isthmus.merge(models, alignment, chosen, data=data_of(name, samples=200), base=lively(name, 9), **options)


def assert_close(a: torch.nn.Module, b: torch.nn.Module) -> None:
    """Equal but for the rounding of float32: averages are computed in float64 and rounded once."""
    for key, tensor in a.state_dict().items():
        torch.testing.assert_close(tensor, b.state_dict()[key], rtol=1e-6, atol=1e-7)


def assert_alike(average: str, name: str, a: torch.nn.Module, b: torch.nn.Module) -> None:
    """Equal weights; where weights are fitted, equal functions on what they were fitted to."""
    if not AVERAGES[average].fits:
        return assert_close(a, b)
    x = torch.cat([x for x, _ in data_of(name, samples=200)])
    with torch.no_grad():  # the ridge is 1e-4 of the inputs' mean variance, and may bend what the data leaves open
        torch.testing.assert_close(a(x), b(x), rtol=1e-3, atol=1e-3)
    return None


def most(average: str) -> int:
    """How many models are joined here, where it takes so many."""
    return 2 if AVERAGES[average].joins_two else 3


def test_every_entry_of_the_table_is_an_average_of_that_name():
    for name, average in AVERAGES.items():
        assert average.name == name
        assert isinstance(average(), Average)
        assert average().needs in ("", "data", "labels", "base")


@EVERY_AVERAGE
@EVERY_NETWORK
def test_the_average_of_one_model_is_that_model(name, average):
    models = [lively(name, seed) for seed in range(3)]
    alone = [[float(index == other) for other in range(3)] for index in range(3)]
    merged = [merge(average, name, models[:1]), *(merge(average, name, models, coefficients=each) for each in alone)]
    for found, model in zip(merged, [models[0], *models], strict=True):
        if average == "mean" or AVERAGES[average].fits:
            assert all(torch.equal(tensor, found.state_dict()[key]) for key, tensor in model.state_dict().items())
        else:
            assert_close(found, model)


@EVERY_AVERAGE
@EVERY_NETWORK
def test_the_average_of_copies_is_the_model(name, average):
    model = lively(name, 0)
    copies = [model, copy.deepcopy(model), model][: most(average)]
    assert_alike(average, name, merge(average, name, copies), model)


@EVERY_AVERAGE
@EVERY_NETWORK
def test_the_order_of_the_models_does_not_matter(name, average):
    count = most(average)
    models = [lively(name, seed) for seed in range(count)]
    coefficients = [1.0, 2.0, 3.0][:count]
    there = merge(average, name, models, coefficients=coefficients)
    back = merge(average, name, models[::-1], coefficients=coefficients[::-1])
    assert_alike(average, name, there, back)


@EVERY_AVERAGE
@EVERY_NETWORK
def test_only_the_ratio_of_coefficients_matters(name, average):
    models = [lively(name, seed) for seed in range(2)]
    assert_close(
        merge(average, name, models, coefficients=[1.0, 3.0]), merge(average, name, models, coefficients=[0.25, 0.75])
    )
    assert_close(merge(average, name, models), merge(average, name, models, coefficients=[5.0, 5.0]))


@EVERY_AVERAGE
@EVERY_NETWORK
def test_the_same_seed_gives_the_same_bytes(name, average):
    models = [lively(name, seed) for seed in range(2)]
    first, second = (merge(average, name, models, seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


@EVERY_AVERAGE
@EVERY_NETWORK
def test_nothing_it_was_given_changes(name, average):
    models = [lively(name, seed).train() for seed in range(2)]
    states = [copy.deepcopy(model.state_dict()) for model in models]
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    alignment = isthmus.align(models, symmetry(name))
    merged = merge(average, name, models, alignment)
    for model, state in zip(models, states, strict=True):
        assert model.training
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert not merged.training
    with torch.no_grad():  # and it shares no memory with what it was made of
        for tensor in merged.state_dict().values():
            tensor.zero_()
    for model, state in zip(models, states, strict=True):
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


@EVERY_AVERAGE
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_first_models_precision_is_kept(dtype, average):
    models = [lively(MLP, 0).to(dtype), lively(MLP, 1)]
    merged = merge(average, MLP, models)
    assert {tensor.dtype for tensor in merged.state_dict().values()} == {dtype}
