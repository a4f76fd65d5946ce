"""Fisher averaging and RegMean against formulas written out."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import isthmus
from helpers.pairs import CNN, MLP, VGG_BN, data_of, learnt, symmetry, trained
from isthmus.average.coefficients import Coefficients
from isthmus.average.fisher import Fisher
from isthmus.average.regmean import RegMean
from isthmus.errors import InputError
from isthmus.match.cca import CCA

# Products are summed in float32 over 4,096 rows at most; their rounding adds up like a random walk.
ROUNDING = float(torch.finfo(torch.float32).eps) * 4096**0.5


def test_fisher_is_the_expected_squared_gradient():
    """With many draws of the same inputs, the drawn information tends to the exact expectation over classes."""
    model = trained(MLP, 0)
    x = data_of(MLP)[0][0][:2]
    exact = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    for row in x:
        chances = model(row[None]).softmax(dim=-1)[0].detach()
        for label, chance in enumerate(chances):
            copied = copy.deepcopy(model).requires_grad_(True)
            F.cross_entropy(copied(row[None]), torch.tensor([label])).backward()
            for name, p in copied.named_parameters():
                exact[name] += float(chance) * p.grad.double().square() / len(x)
    draws = 400
    data = [(x.repeat(draws // 2, *[1] * (x.ndim - 1)), torch.zeros(draws).long())]
    states = [model.state_dict()]
    aligned = isthmus.average.AveragingProblem(states, Coefficients((1.0,)), model, data, None, 0, [model])
    found = Fisher(samples=draws, floor=1e-12)._information(aligned, 0)
    for name, values in exact.items():
        # A Monte Carlo mean of 400 draws: the sums over a tensor are within some per cent of the expectation.
        assert float(found[name].sum() / draws) == pytest.approx(float(values.sum()), rel=0.25)


def test_fisher_lets_the_informed_model_decide():
    models = [trained(MLP, 0), copy.deepcopy(trained(MLP, 1))]
    with torch.no_grad():
        models[1].head.weight.zero_()  # its predictions depend on no weight below the head
        models[1].head.bias.zero_()
    merged = isthmus.merge(models, None, Fisher(samples=50), data=data_of(MLP))
    below = next(name for name, _ in models[0].named_parameters())
    first, last = models[0].state_dict()[below], merged.state_dict()[below]
    informed = (last - first).abs() < 1e-3 * (models[1].state_dict()[below] - first).abs().clamp_min(1e-9)
    assert informed.float().mean() > 0.5  # all but weights from pixels that are always blank


def test_regmean_is_the_least_squares_answer():
    """Without shrinking, W minimises the summed squared distance of the answers on every parent's own inputs."""
    models = [trained(MLP, seed) for seed in range(2)]
    data = data_of(MLP)
    x = torch.cat([x for x, _ in data])
    merged = isthmus.merge(models, None, RegMean(shrink=0.999999), data=data)
    name = next(name for name, module in models[0].named_modules() if isinstance(module, torch.nn.Linear))
    flat = x.flatten(1).double()
    weights = [model.get_submodule(name).weight.double() for model in models]
    found = merged.get_submodule(name).weight.double()
    expected = (weights[0] + weights[1]) / 2  # the first layer reads the same from both
    torch.testing.assert_close(flat @ found.T, flat @ expected.T, rtol=1e-3, atol=1e-3)


def test_a_layer_in_which_one_parent_counts_is_that_parents_exactly():
    models = [trained(CNN, seed) for seed in range(2)]
    merged = isthmus.merge(
        models, None, "regmean", coefficients={"head": [0.0, 1.0], "": [0.5, 0.5]}, data=data_of(CNN)
    )
    assert torch.equal(merged.head.weight, models[1].head.weight)
    assert torch.equal(merged.head.bias, models[1].head.bias)
    assert not any(
        torch.equal(merged.get_parameter(name), p) for name, p in models[1].named_parameters() if "head" not in name
    )


def gram_of(model: nn.Module, layer: str, inputs: list[torch.Tensor]) -> torch.Tensor:
    """The uncentred Gram matrix of what a layer reads, every patch of a convolution a row."""
    rows = []

    def keep(module, args):
        x = args[0].double()
        if isinstance(module, nn.Conv2d):
            x = F.unfold(x, module.kernel_size, padding=module.padding, stride=module.stride).transpose(1, 2)
        rows.append(x.reshape(-1, x.shape[-1]))

    handle = model.get_submodule(layer).register_forward_pre_hook(keep)
    with torch.no_grad():
        for x in inputs:
            model(x)
    handle.remove()
    read = torch.cat(rows)
    return read.T @ read / len(read)


@pytest.mark.parametrize("name", [MLP, CNN, VGG_BN])
def test_no_weights_answer_every_parents_inputs_better_than_regmeans(name):
    """It minimises Σ c_m tr (W − W_m) G_m (W − W_m)ᵀ, layer by layer."""
    models, coefficients, shrink = [trained(name, seed) for seed in range(2)], (0.3, 0.7), 0.9
    found = isthmus.align(models, symmetry(name), "activation_matching", data=data_of(name))
    moved = [isthmus.apply(found, model, index) for index, model in enumerate(models)]
    everywhere = RegMean(rows=10**7, shrink=shrink)  # so many that every position is read
    merged = isthmus.merge(models, found, everywhere, coefficients=coefficients, data=data_of(name))
    inputs = [x for x, _ in data_of(name)]
    layers = [n for n, module in merged.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for layer in layers:
        weights = [model.get_submodule(layer).weight.detach().double().flatten(1) for model in (*moved, merged)]
        grams = [gram_of(model, layer, inputs) for model in moved]
        grams = [shrink * gram + (1 - shrink) * torch.diag(gram.diagonal()) for gram in grams]

        def distance(weight, weights=weights, grams=grams):
            steps = [weight - own for own in weights[:2]]
            return sum(c * float(((s @ G) * s).sum()) for c, s, G in zip(coefficients, steps, grams, strict=True))

        mean = sum(c * own for c, own in zip(coefficients, weights[:2], strict=True))
        least, *others = (distance(w) for w in (weights[2], mean, weights[0], weights[1], weights[2] + 0.01))
        # Weights that differ from the best by the rounding of float32 sums, ROUNDING, miss it by the square of that.
        assert least <= min(others) * (1 + ROUNDING)
        # The first layer reads the same of both, so that the mean is best there; behind it, 0.1 to 0.7 of it is left.
        assert layer == layers[0] or least < 0.9 * others[0]


@pytest.mark.parametrize("name", [MLP, CNN])
def test_regmean_lowers_the_loss_of_the_mean(name):
    models = [learnt(name, seed) for seed in range(2)]
    found = isthmus.align(models, symmetry(name), "activation_matching", data=data_of(name))
    losses = {}
    for average in ("mean", "regmean"):
        merged = isthmus.repair(isthmus.merge(models, found, average, data=data_of(name)), data_of(name))
        losses[average] = isthmus.evaluate(merged, data_of(name)).loss
    assert losses["regmean"] < losses["mean"] - 0.1  # measured: 0.5 each, and 0.8 and 0.7


def test_linear_maps_and_bad_options_are_refused():
    models = [trained(MLP, seed) for seed in range(2)]
    found = isthmus.align(models, symmetry(MLP), CCA(gamma=0.1), data=data_of(MLP))
    for average in ("fisher", "regmean"):
        with pytest.raises(InputError, match="linear maps"):
            isthmus.merge(models, found, average, data=data_of(MLP))
    for build, options in ((Fisher, {"samples": 0}), (Fisher, {"floor": 0.0}), (RegMean, {"shrink": 1.0})):
        with pytest.raises(InputError):
            build(**options)
