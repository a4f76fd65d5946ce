"""Singular directions against the double loops of the definition, and the laws of permutations that change nothing."""

import copy
import json
import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import block_diag, polar
from scipy.stats import spearmanr
from torch import nn

import isthmus
from helpers.pairs import CNN, MLP, VGG_BN, data_of, fresh, lively, planted, symmetry, trained
from helpers.refusals import refuses
from helpers.zoo import built, traced
from isthmus.errors import DataError, InputError, ModelError, TransformError
from isthmus.explain.directions import EqualDistance, Intervention, MatchedPart, intervene, match_directions
from isthmus.explain.spectrum import Spectra, _pairing, _summed, measure_spectra
from isthmus.explain.taylor import taylor_barrier
from isthmus.explain.weights import factorise, weights_of
from isthmus.match.base import identity_transforms
from isthmus.match.weight_matching import WeightMatching
from isthmus.symmetry import Alignment, Permutation, Site, Space
from isthmus.symmetry.transform import invert, move_state

# Sums of some 10³ products of float64 numbers up to one.
CLOSE = 1e-10


def matrix(tensor: torch.Tensor, groups: int = 1) -> np.ndarray:
    """The dense block-diagonal matrix of a weight with its outputs in front."""
    return block_diag(*(part.flatten(1).numpy() for part in tensor.detach().double().chunk(groups)))


def double_loop(a: np.ndarray, b: np.ndarray, threshold: float) -> tuple[float, int, int]:
    """Σ_ij (u_i^a·u_j^b)(v_i^a·v_j^b) as it is written, and how many directions of each were kept."""
    (ua, sa, va), (ub, sb, vb) = (np.linalg.svd(x, full_matrices=False) for x in (a, b))
    kept = [
        [i for i, value in enumerate(s) if value >= threshold * s[0] and value > max(x.shape) * 2.3e-16 * s[0]]
        for s, x in ((sa, a), (sb, b))
    ]
    total = 0.0
    for i in kept[0]:
        for j in kept[1]:
            total += (ua[:, i] @ ub[:, j]) * (va[i] @ vb[j])
    return total, len(kept[0]), len(kept[1])


def both(spec: str) -> list[nn.Module]:
    return [trained(spec, 0), trained(spec, 1)]


@cache
def matched(spec: str) -> Alignment:
    return isthmus.align(both(spec), symmetry(spec))


@cache
def measured(spec: str) -> Spectra:
    models = both(spec)
    return measure_spectra(models, matched(spec), isthmus.merge(models, matched(spec)), data_of(spec))


# Against the definitions


@pytest.mark.parametrize("spec", [MLP, CNN, VGG_BN])
def test_overlaps_are_the_double_loop(spec):
    a, b = (model.state_dict() for model in both(spec))
    moved = isthmus.apply(matched(spec), trained(spec, 1), 1).state_dict()
    found = measured(spec)
    for layer in found.layers:
        for overlap in layer.overlaps[:: 3 if spec == MLP else 9]:
            for state, total in ((b, overlap.sum_before), (moved, overlap.sum_after)):
                expected = double_loop(matrix(a[layer.name]), matrix(state[layer.name]), overlap.threshold)
                assert total == pytest.approx(expected[0], abs=CLOSE)
                assert (overlap.kept_a, overlap.kept_b) == expected[1:]
    for whole, parts in zip(found.overlaps, zip(*(layer.overlaps for layer in found.layers), strict=True), strict=True):
        count = sum(part.kept_a + part.kept_b for part in parts) / 2
        assert whole.after == pytest.approx(sum(part.sum_after for part in parts) / count)
        assert found.at(whole.threshold) == whole


def test_without_a_threshold_it_is_the_trace_of_polar_factors():
    a, b = (model.state_dict() for model in both(MLP))
    for layer in measured(MLP).layers:
        p, q = (polar(matrix(state[layer.name]))[0] for state in (a, b))
        assert layer.overlaps[0].before == pytest.approx(np.trace(p.T @ q) / len(layer.values_a), abs=CLOSE)


def test_a_grouped_convolution_is_a_block_diagonal_matrix():
    model, sym = built("GroupedConv"), traced("GroupedConv")
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    found = {layer.name: layer for layer in measure_spectra([model, other], symmetry=sym).layers}["layers.2.weight"]
    assert found.shape == (2, 2, 27)
    a, b = (matrix(each.layers[2].weight, 2) for each in (model, other))
    np.testing.assert_allclose(found.values_a, np.linalg.svd(a, compute_uv=False), rtol=CLOSE)
    for overlap in found.overlaps:
        total, kept_a, kept_b = double_loop(a, b, overlap.threshold)
        assert overlap.sum_before == pytest.approx(total, abs=CLOSE)
        assert (overlap.kept_a, overlap.kept_b) == (kept_a, kept_b)


def test_a_transposed_convolution_has_its_outputs_as_rows():
    model = built("ConvTranspose")
    name = next(n for n, m in model.named_modules() if isinstance(m, nn.ConvTranspose2d))
    found = {layer.name: layer for layer in measure_spectra([model] * 2, symmetry=traced("ConvTranspose")).layers}
    expected = np.linalg.svd(matrix(model.get_submodule(name).weight.transpose(0, 1)), compute_uv=False)
    np.testing.assert_allclose(found[f"{name}.weight"].values_a, expected, rtol=CLOSE)


def test_singular_values_times_pairs_are_the_matching_objective():
    weights, _ = weights_of(symmetry(MLP), trained(MLP, 0))
    moved = isthmus.apply(matched(MLP), trained(MLP, 1), 1)
    for weight in weights:
        a, b = (factorise(weight.blocks(model.state_dict())) for model in (trained(MLP, 0), moved))
        x, y = (model.get_parameter(weight.name).detach().double() for model in (trained(MLP, 0), moved))
        inner = (x * y).sum()
        assert _summed(_pairing(a, b), a.values, b.values) == pytest.approx(float(inner), abs=1e-8)


@pytest.mark.parametrize("spec", [MLP, VGG_BN])
def test_directions_gains_and_distances_are_their_formulas(spec):
    a, b = (isthmus.apply(matched(spec), model, index).state_dict() for index, model in enumerate(both(spec)))
    merged = isthmus.merge(both(spec), matched(spec)).state_dict()
    for layer in measured(spec).layers:
        x, y, m = (matrix(state[layer.name]) for state in (a, b, merged))
        u, s, v = np.linalg.svd(x, full_matrices=False)
        w, _, z = np.linalg.svd(y, full_matrices=False)
        directions = [u[:, i] @ (w @ z) @ v[i] for i in range(len(s))]
        np.testing.assert_allclose(layer.directions, directions, atol=CLOSE)
        assert np.mean(directions) == pytest.approx(layer.overlaps[0].after, abs=CLOSE)
        assert layer.rank_correlation == pytest.approx(spearmanr(s, directions).statistic)
        # The merged model is stored in float32, whose rounding the smallest singular value blows up.
        slack = 1e-6 * s[0] / s[-1]
        np.testing.assert_allclose(layer.gains, [u[:, i] @ m @ v[i] / s[i] for i in range(len(s))], atol=slack)
        np.testing.assert_allclose(layer.values_merged, np.linalg.svd(m, compute_uv=False), rtol=CLOSE)
        assert layer.distance_after == pytest.approx(np.linalg.norm(x - y))
    trained_names = [name for name, _ in trained(spec, 0).named_parameters()]
    total = math.sqrt(sum(float((a[name].double() - b[name].double()).square().sum()) for name in trained_names))
    assert measured(spec).distance_after == pytest.approx(total)
    assert measured(spec).distance_after < measured(spec).distance_before


def inputs_seen(model: nn.Module, batches) -> dict[str, torch.Tensor]:
    """What every linear layer and convolution reads, all positions, as rows in float64."""
    seen: dict[str, list[torch.Tensor]] = {}

    def hook(name, layer):
        def keep(_, args):
            x = args[0].double()
            if isinstance(layer, nn.Conv2d):
                x = F.unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride).transpose(1, 2)
            seen.setdefault(f"{name}.weight", []).append(x.reshape(-1, x.shape[-1]))

        return keep

    handles = [
        module.register_forward_pre_hook(hook(name, module))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    with torch.no_grad():
        for x, _ in batches:
            model(x)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


@pytest.mark.parametrize("spec", [MLP, CNN])
def test_input_shares_are_projections_of_the_input(spec):
    batches = data_of(spec)[:1]
    model = trained(spec, 0)
    found = measure_spectra([model, model], data=batches, rows=10**6)  # so many that every position is drawn
    for layer in found.layers:
        rows = inputs_seen(model, batches)[layer.name].numpy()
        _, s, v = np.linalg.svd(matrix(model.get_parameter(layer.name)), full_matrices=False)
        shares = [np.square(rows @ v[: k + 1].T).sum() / np.square(rows).sum() for k in range(len(s))]
        # Rows are products in float32, summed over 4,096 of them at most.
        np.testing.assert_allclose(layer.input_shares, shares, rtol=1e-4)
        assert layer.chance(2) == 2 / v.shape[1]
        if layer.shape[1] >= layer.shape[2]:
            assert layer.input_shares[-1] == pytest.approx(1, abs=1e-6)


def test_inputs_alike_in_all_directions_give_every_direction_its_chance():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.eye(8) * 3
    first = measure_spectra([model, model], data=[x]).layers[0]
    np.testing.assert_allclose(first.input_shares, [first.chance(k + 1) for k in range(6)], rtol=1e-6)


# A network against itself


@pytest.mark.parametrize("spec", [MLP, VGG_BN])
def test_a_network_agrees_with_itself_and_with_its_shuffled_copy(spec):
    model = trained(spec, 0)
    moved, transforms = planted(model, symmetry(spec), 3)
    back = Alignment(symmetry(spec), (identity_transforms(symmetry(spec)), invert(transforms, symmetry(spec))))
    for found in (measure_spectra([model, model], symmetry=symmetry(spec)), measure_spectra([model, moved], back)):
        assert found.distance_after == 0
        for overlap in found.overlaps:
            assert overlap.after == pytest.approx(1, abs=CLOSE)
        for layer in found.layers:
            np.testing.assert_allclose(layer.values_a, layer.values_b, atol=1e-10)
            assert layer.difference < 1e-10
            assert layer.unchanged <= layer.tolerance < 1e-11
            assert layer.rank_correlation is None  # every direction is aligned fully
            assert all(overlap.after == pytest.approx(1, abs=CLOSE) for overlap in layer.overlaps)


def test_moving_both_models_alike_changes_nothing():
    rng = np.random.default_rng(0)
    same = {space.name: Permutation.random(space, rng) for space in symmetry(MLP)}
    found = measure_spectra(both(MLP), Alignment(symmetry(MLP), (same, same)))
    for overlap in found.overlaps:
        assert overlap.after == pytest.approx(overlap.before, abs=CLOSE)
    assert found.distance_after == pytest.approx(found.distance_before)


STRUCTURES = (
    *("PlainMLP", "NothingToMove", "ConvChannelsFirst", "Conv1d", "Conv3d", "ConvTranspose", "BatchNorm", "WeightNorm"),
    *(
        "GroupedConv",
        "GroupedConvTranspose",
        "DepthwiseSeparable",
        "DepthwiseMultiplier",
        "GroupedShuffle",
        "DenseBlock",
    ),
    *("TiedAutoencoder", "TiedEmbedding", "SharedLayer", "Experts", "Attention", "FusedAttention", "GroupedQueries"),
)


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_structure_is_measured_or_its_tensors_are_listed(name):
    model, sym = copy.deepcopy(built(name)).eval(), traced(name)
    rng = np.random.default_rng(0)
    transforms = {space.name: Permutation.random(space, rng) for space in sym}
    moved = copy.deepcopy(model)
    moved.load_state_dict(move_state(model.state_dict(), transforms, sym))
    found = measure_spectra([model, moved], Alignment(sym, (identity_transforms(sym), invert(transforms, sym))))
    assert found.distance_after == 0
    for overlap in found.overlaps:
        assert overlap.after == pytest.approx(1, abs=CLOSE)
    matrices = {n for n, p in model.named_parameters() if p.ndim > 1}
    assert matrices <= {layer.name for layer in found.layers} | found.skipped.keys()
    assert not {layer.name for layer in found.layers} & found.skipped.keys()
    for layer in found.layers:
        assert math.prod(layer.shape) == model.state_dict()[layer.name].numel()


# Other alignments, precisions and arguments


def test_linear_maps_change_singular_values_and_are_measured():
    alignment = isthmus.align(both(MLP), symmetry(MLP), "procrustes", data_of(MLP))
    found = measure_spectra(both(MLP), alignment)
    assert not found.exact
    assert found.method == "procrustes"
    # Rotations on both sides keep them too, to the rounding of the moved float32 weights.
    assert all(layer.unchanged < 1e-5 for layer in found.layers)
    cca = measure_spectra(both(MLP), isthmus.align(both(MLP), symmetry(MLP), "cca", data_of(MLP)))
    assert max(layer.unchanged for layer in cca.layers) > 1e-3


def test_a_permutation_that_is_none_of_rows_and_columns_is_refused():
    sym = symmetry(MLP)
    site = Site("hidden.1.weight", (0, 1), np.arange(4).reshape(1, 4, 1), "vector")
    wrong = replace(sym, spaces=(*sym.spaces, Space("corner", 4, sym.spaces[0].group, (site,))))
    moves = identity_transforms(wrong)
    swapped = {**moves, "corner": Permutation(np.array([[3, 1, 2, 0]]))}
    with refuses(TransformError, "hidden.1.weight: the permutations change its singular values"):
        measure_spectra(both(MLP), Alignment(wrong, (moves, swapped)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_precision_is_measured_as_it_is(dtype):
    models = [copy.deepcopy(model).to(dtype) for model in both(MLP)]
    again = [model.to(torch.float64) for model in map(copy.deepcopy, models)]
    found, expected = (measure_spectra(each, matched(MLP)) for each in (models, again))
    assert found.layers == expected.layers
    assert measure_spectra(models, data=data_of(MLP)[:1], symmetry=symmetry(MLP)).layers[0].input_shares[-1] <= 1 + 1e-5


def test_a_matrix_of_low_rank_has_no_more_directions_than_that():
    model = copy.deepcopy(trained(MLP, 0))
    with torch.no_grad():
        model.hidden[1].weight.copy_(torch.outer(torch.arange(24.0), torch.ones(24)))
        model.hidden[2].weight.zero_()
    found = {layer.name: layer for layer in measure_spectra([model, model], symmetry=symmetry(MLP)).layers}
    one, none = found["hidden.1.weight"], found["hidden.2.weight"]
    assert len(one.directions) == 1
    assert one.overlaps[0].kept_a == 1
    assert one.overlaps[0].after == pytest.approx(1)
    assert math.isnan(none.overlaps[0].after)
    assert none.unchanged == none.difference == 0
    json.dumps(none.to_dict(), allow_nan=False)


def test_state_dicts_a_stored_symmetry_and_no_spaces_are_measured():
    stored = isthmus.Symmetry.from_json(symmetry(MLP).to_json())
    states = [model.state_dict() for model in both(MLP)]
    found = measure_spectra(states, data=data_of(MLP), symmetry=stored, module=fresh(MLP, 5))
    assert found.layers == measure_spectra(both(MLP), data=data_of(MLP), symmetry=symmetry(MLP)).layers
    alone = measure_spectra([built("NothingToMove")] * 2, symmetry=traced("NothingToMove"))
    assert alone.at(0.0).after == pytest.approx(1)


def test_nothing_is_changed_and_the_same_call_gives_the_same_numbers():
    models = [copy.deepcopy(model).train() for model in both(VGG_BN)]
    before = [copy.deepcopy(model.state_dict()) for model in models]
    state = torch.get_rng_state()
    calls = [measure_spectra(models, matched(VGG_BN), data=data_of(VGG_BN)[:1], rows=200) for _ in range(2)]
    barriers = [taylor_barrier(*models, data_of(VGG_BN)[:1]) for _ in range(2)]
    assert calls[0] == calls[1]
    assert barriers[0] == barriers[1]
    assert torch.equal(state, torch.get_rng_state())
    for model, old in zip(models, before, strict=True):
        assert model.training
        assert all(torch.equal(tensor, old[key]) for key, tensor in model.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_spectra_are_plain_json():
    told = json.loads(json.dumps(measured(MLP).to_dict(), allow_nan=False))
    assert told["overlaps"][3]["after"] == measured(MLP).overlaps[3].after
    assert told["layers"][0]["difference"] == measured(MLP).layers[0].difference


# The Taylor estimate


def test_a_network_has_no_barrier_to_itself():
    for spec in (MLP, VGG_BN):
        found = taylor_barrier(trained(spec, 0), trained(spec, 0), data_of(spec)[:1])
        assert (found.estimate, found.first_order, found.second_order, found.real) == (0, 0, 0, 0)


def test_a_quadratic_loss_is_foretold_exactly():
    models = [nn.Linear(5, 3).double() for _ in range(2)]
    batches = [(torch.randn(n, 5).double(), torch.randn(n, 3).double()) for n in (7, 4)]
    found = taylor_barrier(*models, batches, loss=F.mse_loss)
    assert found.estimate == pytest.approx(found.real, rel=1e-10)
    assert found.real < 0  # the loss is convex
    # Along a line a quadratic is -⅛ of its second derivative below the mean of its ends.
    assert found.estimate == pytest.approx(-found.second_order)


def test_it_is_the_formula_with_the_whole_hessian():
    torch.manual_seed(2)
    models = [nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double() for _ in range(2)]
    x, y = torch.randn(30, 4).double(), torch.randint(3, (30,))

    def loss(flat):
        w, b, v, c = flat.split([20, 5, 15, 3])
        hidden = torch.tanh(x @ w.view(5, 4).T + b)
        return F.cross_entropy(hidden @ v.view(3, 5).T + c, y)

    a, b = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in models)
    step = b - a
    gradients = [torch.autograd.functional.jacobian(loss, end) for end in (a, b)]
    hessians = [torch.autograd.functional.hessian(loss, end) for end in (a, b)]
    found = taylor_barrier(*models, [(x[:12], y[:12]), (x[12:], y[12:])])
    assert found.first_order == pytest.approx(float(step @ (gradients[0] - gradients[1])) / 4, rel=1e-9)
    assert found.second_order == pytest.approx(float(step @ (hessians[0] + hessians[1]) @ step) / 16, rel=1e-9)
    middle = loss((a + b) / 2)
    assert found.real == pytest.approx(float(middle - (loss(a) + loss(b)) / 2), rel=1e-9)
    assert found.count == 30


@pytest.mark.parametrize("affine", [True, False])
def test_running_statistics_belong_to_the_line(affine):
    """A smooth network, since the bends of ReLU have no second derivative."""
    torch.manual_seed(0)
    models = [
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=affine), nn.Tanh(), nn.Flatten(), nn.Linear(144, 3))
        for _ in range(2)
    ]
    for seed, model in enumerate(models):
        model.double().eval()
        norm = model[1]
        norm.running_mean.copy_(torch.randn(4, generator=torch.Generator().manual_seed(seed)))
        norm.running_var.copy_(1 + torch.rand(4, generator=torch.Generator().manual_seed(seed)))
    batches = [(torch.randn(n, 1, 8, 8).double(), torch.randint(3, (n,))) for n in (20, 9)]
    near = isthmus.merge(models, coefficients=[0.95, 0.05])
    found = taylor_barrier(models[0], near, batches)
    # What is left out is of fourth order in a step of 1/20, beside one of second order: below 1/400 of it, times the
    # ratio of derivatives.
    assert found.estimate == pytest.approx(found.real, rel=2e-2)
    for part in near.parameters():
        part.requires_grad_(False)
    only = copy.deepcopy(models[0])
    only[1].running_mean.copy_(near[1].running_mean)
    only[1].running_var.copy_(near[1].running_var)
    statistics = taylor_barrier(models[0], only, batches)
    assert statistics.real != 0
    assert statistics.estimate == pytest.approx(statistics.real, rel=2e-2)


def test_padding_and_precision_do_not_move_the_estimate():
    x, y = data_of(MLP)[0]
    padded = torch.where(torch.arange(100) < 60, y, -100)
    a, b = both(MLP)
    expected = taylor_barrier(a, b, [(x[:60], y[:60])])
    for batches in ([(x, padded)], [(x[:30], y[:30]), (x[30:], padded[30:]), (x[60:], padded[60:])]):
        found = taylor_barrier(a, b, batches)
        assert found.count == 60
        assert found.estimate == pytest.approx(expected.estimate, rel=1e-4)
        assert found.real == pytest.approx(expected.real, rel=1e-4)
    half = taylor_barrier(*(copy.deepcopy(model).to(torch.bfloat16) for model in (a, b)), [(x[:60], y[:60])])
    assert half.estimate == pytest.approx(expected.estimate, rel=0.1)  # weights of 8 bits


def test_attention_has_second_derivatives():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            mixed = F.scaled_dot_product_attention(self.q(x)[:, None], self.k(x)[:, None], x[:, None])
            return self.head(mixed[:, 0].mean(1))

    models = [Attending() for _ in range(2)]
    near = isthmus.merge(models, coefficients=[0.9, 0.1])
    batches = [(torch.randn(20, 6, 4), torch.randint(3, (20,)))]
    found = taylor_barrier(models[0].double(), near.double(), [(batches[0][0].double(), batches[0][1])])
    assert found.estimate == pytest.approx(found.real, rel=0.05)  # a step of a tenth leaves little to third order


class Detached(nn.Module):
    def __init__(self, shift: float):
        super().__init__()
        self.register_buffer("shift", torch.tensor(shift))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(x + self.shift.detach())


def test_a_buffer_without_derivative_is_refused():
    batches = [(torch.randn(5, 4), torch.randint(3, (5,)))]
    with refuses(ModelError, "shift differs between the models"):
        taylor_barrier(Detached(0.0), Detached(1.0), batches)
    assert math.isfinite(taylor_barrier(Detached(1.0), Detached(1.0), batches).estimate)


# Matching by a part of the directions


@cache
def pair() -> tuple[nn.Module, nn.Module]:
    return trained(MLP, 0), trained(MLP, 1)


def same(a: Alignment, b: Alignment) -> bool:
    return all(
        np.array_equal(x[name].indices, y[name].indices)
        for x, y in zip(a.transforms, b.transforms, strict=True)
        for name in x
    )


def test_all_directions_are_weight_matching():
    found = match_directions(pair(), symmetry(MLP), 1.0, others=True)
    assert same(found, isthmus.align(pair(), symmetry(MLP), WeightMatching()))
    assert found.method == "match_directions"
    assert found.details["energy"] == pytest.approx([1, 1])


@pytest.mark.parametrize("spec", [MLP, VGG_BN])
@pytest.mark.parametrize(("keep", "part"), [(4, "top"), (0.3, "top"), (2, "rest"), (0.3, "rest")])
def test_either_part_finds_a_shuffled_copy(spec, keep, part):
    model = lively(spec, 0)
    moved, transforms = planted(model, symmetry(spec), 1)
    found = match_directions([model, moved], symmetry(spec), keep, part)
    back = invert(transforms, symmetry(spec))
    assert all(np.array_equal(found.transforms[1][name].indices, back[name].indices) for name in back)


@pytest.mark.parametrize(("keep", "part"), [(3, "top"), (3, "rest"), (0.25, "top"), (0.25, "rest")])
def test_the_objective_is_that_of_truncated_matrices(keep, part):
    found = match_directions(pair(), symmetry(MLP), keep, part)
    states = []
    norms = []
    for model in pair():
        state = {}
        kept = whole = 0.0
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                continue
            u, s, v = np.linalg.svd(parameter.detach().double().numpy(), full_matrices=False)
            count = keep if isinstance(keep, int) else round(keep * len(s))
            s_part = np.array([x if (i < count) == (part == "top") else 0.0 for i, x in enumerate(s)])
            state[name] = u @ np.diag(s_part) @ v
            kept, whole = kept + np.square(s_part).sum(), whole + np.square(s).sum()
        states.append(state)
        norms.append(kept / whole)
    full = {
        n: torch.from_numpy(states[1][n]) if n in states[1] else p.detach() for n, p in pair()[1].named_parameters()
    }
    moved = move_state(full, found.transforms[1], symmetry(MLP))
    expected = sum((states[0][name] * moved[name].numpy()).sum() for name in states[0])
    assert found.objective == pytest.approx(expected, rel=1e-5)  # filtered weights are float32
    assert found.details["energy"] == pytest.approx(norms)


def test_three_models_and_other_precisions_are_matched():
    models = [trained(MLP, seed) for seed in range(3)]
    assert len(match_directions(models, symmetry(MLP), 4)) == 3
    halves = [copy.deepcopy(model).half() for model in pair()]
    whole = [copy.deepcopy(model).float() for model in halves]
    assert same(match_directions(halves, symmetry(MLP), 4), match_directions(whole, symmetry(MLP), 4))
    assert same(match_directions(pair(), symmetry(MLP), 4, seed=3), match_directions(pair(), symmetry(MLP), 4, seed=3))


def test_nested_spaces_are_matched_by_parts():
    model, sym = built("GroupedConv"), traced("GroupedConv")
    rng = np.random.default_rng(1)
    transforms = {space.name: Permutation.random(space, rng) for space in sym}
    moved = copy.deepcopy(model)
    moved.load_state_dict(move_state(model.state_dict(), transforms, sym))
    found = match_directions([model, moved], sym, 2)
    again = move_state(moved.state_dict(), found.transforms[1], sym)
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


# The intervention


def test_the_intervention_measures_what_its_parts_say():
    models, data = pair(), data_of(MLP, "test")
    found = intervene(models, symmetry(MLP), [3, 0.5], data)
    assert [(row.part, row.keep) for row in found.rows] == [
        ("none", None),
        ("all", None),
        ("top", 3),
        ("rest", 3),
        ("top", 0.5),
        ("rest", 0.5),
    ]
    for row in found.rows:
        alignment = {
            "none": lambda: isthmus.align(models, symmetry(MLP), "identity"),
            "all": lambda: isthmus.align(models, symmetry(MLP)),
        }.get(row.part, lambda row=row: match_directions(models, symmetry(MLP), row.keep, row.part))()
        curve = isthmus.connect(models[0], isthmus.apply(alignment, models[1], 1), data, 3)
        spectra = measure_spectra(models, alignment, thresholds=(0.0, 0.3))
        assert row.barrier == curve.midpoint_barrier
        assert row.error_barrier == curve.midpoint_error_barrier
        assert row.distance == spectra.distance_after
        assert row.overlaps == {each.threshold: each.after for each in spectra.overlaps}
    assert found.part("all")[0].distance == min(row.distance for row in found.rows)
    json.dumps(found.to_dict(), allow_nan=False)


def row(part: str, distance: float, barrier: float) -> MatchedPart:
    return MatchedPart(part, 1, 0.5, distance, distance / 10, barrier, 0.0, {})


def test_equal_distances_are_read_off_straight_lines():
    rows = (
        row("none", 10.0, 9.0),
        row("top", 4.0, 1.0),
        row("top", 8.0, 3.0),
        row("rest", 6.0, 2.0),
        row("rest", 10.0, 6.0),
    )
    found = Intervention(rows, None)
    assert found.at_equal_distance == (EqualDistance(6.0, 2.0, 2.0), EqualDistance(8.0, 3.0, 4.0))
    assert [each.distance for each in found.nearest] == [4, 6]
    apart = Intervention((row("top", 4.0, 1.0), row("rest", 6.0, 2.0)), None)
    assert apart.at_equal_distance == ()
    assert Intervention((row("top", 4.0, 1.0),), None).at_equal_distance == ()
    assert Intervention((row("top", 4.0, 1.0),), None).nearest is None


# Refusals


@pytest.mark.parametrize(
    ("changed", "kind", "told"),
    [
        ({"models": [fresh(MLP, 0)] * 3}, InputError, "3 models: singular directions are compared between two"),
        ({"models": [fresh(MLP, 0), fresh(CNN, 0)]}, ModelError, "model 1"),
        ({"thresholds": ()}, InputError, "shares of the largest singular value"),
        ({"thresholds": (0.0, 1.5)}, InputError, "from 0 to 1"),
        ({"samples": 0}, InputError, "samples=0"),
        ({"symmetry": None}, InputError, "no symmetry"),
        ({"symmetry": isthmus.Symmetry.from_json(symmetry(MLP).to_json())}, InputError, "has no graph"),
        ({"data": []}, DataError, "data is empty"),
        ({"data": (x for x in data_of(MLP))}, DataError, "only once"),
        (
            {"alignment": Alignment(symmetry(MLP), (identity_transforms(symmetry(MLP)),) * 3)},
            InputError,
            "an alignment of 3 models",
        ),
        ({"merged": fresh(CNN, 0)}, ModelError, "model 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_spectra_refuse(changed, kind, told):
    with refuses(kind, told):
        measure_spectra(**{"models": list(pair()), "symmetry": symmetry(MLP), **changed})


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"part": "middle"}, "part='middle'"),
        ({"keep": 0}, "keep=0"),
        ({"keep": 1.5}, "keep=1.5"),
        ({"keep": True}, "keep=True"),
        ({"keep": 1000, "part": "rest"}, "no singular direction is left"),
        ({"symmetry": None}, "no symmetry"),
    ],
    ids=str,
)
def test_parts_refuse(changed, told):
    with refuses(InputError, told):
        match_directions(**{"models": list(pair()), "symmetry": symmetry(MLP), "keep": 3, **changed})


def test_interventions_refuse():
    with refuses(InputError, "keeps is empty"):
        intervene(pair(), symmetry(MLP), [], data_of(MLP))
    with refuses(DataError, "give calibration="):
        intervene(both(VGG_BN), symmetry(VGG_BN), [2], data_of(VGG_BN))
    with refuses(InputError, "R was not measured at γ=0.25"):
        measured(MLP).at(0.25)
    with refuses(DataError, "no targets"):
        taylor_barrier(*pair(), [data_of(MLP)[0][0]])
