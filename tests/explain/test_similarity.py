"""Measures of similarity against written-out formulas, and what they must not notice."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from torch import nn

import isthmus
from helpers.pairs import CNN, MLP, VGG_BN, data_of, planted, symmetry, trained
from helpers.refusals import refuses
from helpers.zoo import built, traced
from isthmus.errors import DataError, InputError, ModelError, SymmetryError
from isthmus.explain.layer_similarity import _u_centred, cka_matrix
from isthmus.explain.similarity import (
    Covariances,
    _canonical_correlations,
    _mean_cca,
    cka,
    debiased_cka,
    matched_correlations,
    procrustes_distance,
    pwcca,
    svcca,
    unit_correlations,
)
from isthmus.symmetry import Alignment
from isthmus.symmetry.transform import invert

# Some 10² numbers of float64, and inverses of covariances whose condition is some 10³.
CLOSE = 1e-9


def tables(p: int = 6, q: int = 8, samples: int = 60, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations of two networks that share half of what they do, with means of their own."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(samples, 4))
    return tuple(
        torch.from_numpy(shared @ rng.normal(size=(4, n)) + rng.normal(size=(samples, n)) + 3 * rng.normal(size=n))
        for n in (p, q)
    )


def rotation(n: int, seed: int = 5) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))[0]


def invertible(n: int) -> torch.Tensor:
    """A map of condition 10."""
    return rotation(n) @ torch.diag(torch.logspace(0, 1, n, dtype=torch.float64)) @ rotation(n, 6)


def off(x: torch.Tensor) -> np.ndarray:
    return (x - x.mean(dim=0)).double().numpy()


# Written-out formulas


def gram_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """From centred samples × samples kernels."""
    n = len(x)
    h = np.eye(n) - 1 / n
    k, m = (h @ (z.double().numpy() @ z.double().numpy().T) @ h for z in (x, y))
    return float((k * m).sum() / math.sqrt((k * k).sum() * (m * m).sum()))


def hsic(k: np.ndarray, m: np.ndarray) -> float:
    """HSIC₁ as Song et al. write it, from kernels that are not centred."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    one = np.ones(n)
    middle = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return float((np.trace(k @ m) + middle - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3)))


def kernels(*parts: torch.Tensor) -> list[np.ndarray]:
    return [part.flatten(1).double().numpy() @ part.flatten(1).double().numpy().T for part in parts]


def qr_correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.linalg.svd(np.linalg.qr(x)[0].T @ np.linalg.qr(y)[0], compute_uv=False)


def principal(x: np.ndarray, variance: float) -> np.ndarray:
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    held = np.cumsum(s**2) / np.sum(s**2)
    count = next(k for k in range(1, len(s) + 1) if held[k - 1] >= variance - 1e-12)
    return u[:, :count] * s[:count]


def projection_weighted(x: np.ndarray, y: np.ndarray) -> float:
    qx, qy = np.linalg.qr(x)[0], np.linalg.qr(y)[0]
    left, values, _ = np.linalg.svd(qx.T @ qy, full_matrices=False)
    variates = qx @ left
    weights = [sum(abs(h @ x[:, j]) for j in range(x.shape[1])) for h in variates.T]
    return float(np.dot(weights, values) / sum(weights))


@pytest.mark.parametrize(("p", "q", "seed"), [(6, 8, 0), (8, 6, 1), (1, 3, 2), (5, 5, 3)])
def test_they_are_their_formulas(p, q, seed):
    x, y = tables(p, q, seed=seed)
    a, b = off(x), off(y)
    found = Covariances.of_rows(x, y)
    assert cka(found) == pytest.approx(gram_cka(x, y), rel=CLOSE)
    expected = hsic(*kernels(x, y)) / math.sqrt(hsic(*kernels(x, x)) * hsic(*kernels(y, y)))
    assert debiased_cka(x, y) == pytest.approx(expected, rel=1e-7)  # kernels that are not centred lose digits
    np.testing.assert_allclose(_canonical_correlations(found), qr_correlations(a, b), rtol=CLOSE)
    assert _mean_cca(found) == pytest.approx(qr_correlations(a, b).mean(), rel=CLOSE)
    for variance in (0.5, 0.9, 1.0):
        expected = qr_correlations(principal(a, variance), principal(b, variance)).mean()
        assert svcca(found, variance) == pytest.approx(expected, rel=CLOSE)
    if p <= q:
        assert pwcca(found) == pytest.approx(projection_weighted(a, b), rel=CLOSE)
    m, n = (z / np.linalg.norm(z) for z in (a, b))
    width = max(p, q)
    m, n = (np.pad(z, ((0, 0), (0, width - z.shape[1]))) for z in (m, n))
    turn, _ = orthogonal_procrustes(n, m)
    assert procrustes_distance(found) == pytest.approx(np.square(m - n @ turn).sum(), rel=CLOSE)
    expected = np.corrcoef(a, b, rowvar=False)[:p, p:]
    np.testing.assert_allclose(unit_correlations(found), expected, atol=CLOSE)


@pytest.mark.parametrize("samples", [5, 12])
def test_centred_kernels_multiply_to_the_unbiased_estimate(samples):
    k, m = kernels(*tables(samples=samples))
    found = (_u_centred(torch.from_numpy(k)) * _u_centred(torch.from_numpy(m))).sum() / (samples * (samples - 3))
    assert float(found) == pytest.approx(hsic(k, m), rel=1e-8)


def test_without_samples_to_spare_cka_is_biased_and_the_estimator_is_not():
    draws = [torch.randn(2, 12, 40, generator=torch.Generator().manual_seed(seed)) for seed in range(200)]
    plain = np.mean([cka(Covariances.of_rows(x, y)) for x, y in draws])
    unbiased = [debiased_cka(x, y) for x, y in draws]
    assert plain > 0.7
    assert abs(np.mean(unbiased)) < 4 * np.std(unbiased) / math.sqrt(len(draws))  # four standard errors


# What they must not notice

TURNED = [cka, svcca, _mean_cca, procrustes_distance]
MEASURES = [*TURNED, pwcca]


@pytest.mark.parametrize("measure", MEASURES, ids=lambda each: each.__name__)
def test_a_network_is_like_itself(measure):
    x, _ = tables()
    expected = 0 if measure is procrustes_distance else 1
    assert measure(Covariances.of_rows(x, x)) == pytest.approx(expected, abs=1e-9)
    assert measure(Covariances.of_rows(x, 3 * x + 1)) == pytest.approx(expected, abs=1e-9)


def test_the_estimator_finds_a_network_like_itself():
    x, y = tables()
    assert debiased_cka(x, x) == pytest.approx(1)
    assert debiased_cka(x @ rotation(6) * 2 + 1, y @ rotation(8)) == pytest.approx(debiased_cka(x, y), rel=CLOSE)


@pytest.mark.parametrize("measure", TURNED, ids=lambda each: each.__name__)
def test_rotations_and_scales_go_unnoticed(measure):
    x, y = tables()
    plain = measure(Covariances.of_rows(x, y))
    assert 0.05 < plain < 1.95
    turned = measure(Covariances.of_rows(2 * x @ rotation(6), 0.1 * y @ rotation(8) + 4))
    assert turned == pytest.approx(plain, rel=CLOSE)


def test_invertible_maps_go_unnoticed_by_canonical_correlations_alone():
    x, y = tables()
    plain, mapped = Covariances.of_rows(x, y), Covariances.of_rows(x @ invertible(6), y @ invertible(8))
    np.testing.assert_allclose(_canonical_correlations(mapped), _canonical_correlations(plain), rtol=1e-8)
    second = Covariances.of_rows(x, y @ invertible(8))
    assert pwcca(second) == pytest.approx(pwcca(plain), rel=1e-8)
    # Its weights are those of the first network's units, so that a map of these is noticed, as it is by all others.
    for measure in (pwcca, cka, procrustes_distance):
        assert abs(measure(mapped) - measure(plain)) > 1e-3


@pytest.mark.parametrize("measure", TURNED, ids=lambda each: each.__name__)
def test_most_are_symmetric(measure):
    x, y = tables()
    assert measure(Covariances.of_rows(x, y)) == pytest.approx(measure(Covariances.of_rows(y, x)), rel=CLOSE)


def test_units_that_never_vary_are_left_out():
    x, y = tables()
    dead = torch.cat([x, torch.full((len(x), 2), 0.7, dtype=torch.float64)], dim=1)
    plain, padded = Covariances.of_rows(x, y), Covariances.of_rows(dead, y)
    for measure in MEASURES:
        assert measure(padded) == pytest.approx(measure(plain), rel=CLOSE)
    assert unit_correlations(padded)[-2:].abs().max() == 0


# From moments


@pytest.mark.parametrize("spec", [MLP, VGG_BN])
def test_moments_tell_what_rows_tell(spec):
    models = [trained(spec, 0), trained(spec, 1)]
    moments = isthmus.collect(models, symmetry(spec), data_of(spec))
    for space in symmetry(spec):
        found = Covariances.of_moments(moments[space.name])
        assert found.count == moments[space.name].count
        back = Covariances.of_moments(moments[space.name], 1, 0)
        assert cka(found) == pytest.approx(cka(back))
        assert torch.equal(unit_correlations(found), moments[space.name].correlation(0, 1))
        assert 0 < cka(found) < 1
        assert 0 < svcca(found) < 1
        assert cka(Covariances.of_moments(moments[space.name], 0, 0)) == pytest.approx(1)


def test_an_mlps_space_is_read_as_by_hand():
    models = [trained(MLP, 0), trained(MLP, 1)]
    moments = isthmus.collect(models, symmetry(MLP), data_of(MLP))
    with torch.no_grad():
        rows = [torch.cat([torch.relu(model.hidden[0](x)) for x, _ in data_of(MLP)]) for model in models]
    found, expected = Covariances.of_moments(moments["hidden.0"]), Covariances.of_rows(*rows)
    for measure in (cka, procrustes_distance, svcca, pwcca):
        # Moments are sums of float32 products; canonical correlations divide by variances down to some 10⁻³ of the
        # largest.
        assert measure(found) == pytest.approx(measure(expected), rel=1e-3 if measure in (svcca, pwcca) else 1e-5)


def test_matched_units_of_a_shuffled_copy_correlate_fully():
    for name, model, sym, x in (
        (MLP, trained(MLP, 0), symmetry(MLP), data_of(MLP)),
        ("nested", built("GroupedConv").eval(), traced("GroupedConv"), [torch.randn(50, 2, 3, 3)]),
    ):
        moved, transforms = planted(model, sym, 1)
        rng = np.random.default_rng(0)
        frame = {space.name: isthmus.Permutation.random(space, rng) for space in sym}
        alignment = Alignment(sym, (frame, isthmus.symmetry.transform.compose(frame, invert(transforms, sym), sym)))
        moments = isthmus.collect([model, moved], sym, x)
        found = matched_correlations(moments, alignment)
        for space in sym:
            if space.name in moments.spaces:
                alive = moments[space.name].deviation[0] > 1e-3
                (
                    torch.testing.assert_close(
                        found[space.name][alive], torch.ones(int(alive.sum()), dtype=torch.float64), atol=1e-4, rtol=0
                    ),
                    name,
                )


# Layer by layer


def outputs_seen(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """What every linear layer and convolution gives out, in the order of the network."""
    seen: list[torch.Tensor] = []
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    handles = [layer.register_forward_hook(lambda _, __, out: seen.append(out.clone())) for layer in layers]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("spec", [MLP, VGG_BN])
def test_the_matrix_is_made_of_unbiased_estimates_averaged_over_batches(spec):
    models, batches = [trained(spec, 0), trained(spec, 1)], [x[:30] for x, _ in data_of(spec)[:2]]
    found = cka_matrix(models, symmetry(spec), batches)
    read = [[kernels(*outputs_seen(model, x)) for model in models] for x in batches]
    assert found.values.shape == (len(read[0][0]),) * 2
    assert found.layers == tuple(n for n, p in models[0].named_parameters() if p.ndim > 1)
    assert (found.samples, found.batches, found.skipped) == (60, 2, {})
    for i in range(len(found.layers)):
        for j in range(len(found.layers)):
            shared = sum(hsic(a[i], b[j]) for a, b in read)
            own, other = sum(hsic(a[i], a[i]) for a, _ in read), sum(hsic(b[j], b[j]) for _, b in read)
            # Kernels are float32 products.
            assert found.values[i, j] == pytest.approx(shared / math.sqrt(own * other), abs=1e-4)


def test_one_batch_is_the_estimator_on_its_rows():
    models, x = [trained(MLP, 0), trained(MLP, 1)], data_of(MLP)[0][0]
    found = cka_matrix(models, data=[x], samples=50)
    rows = [outputs_seen(model, x[:50]) for model in models]
    assert found.samples == 50
    assert found.values[0, 2] == pytest.approx(debiased_cka(rows[0][0], rows[1][2]), abs=1e-5)


@pytest.mark.parametrize("spec", [CNN, VGG_BN])
def test_the_matrix_knows_no_order_of_units(spec):
    a, b = trained(spec, 0), trained(spec, 1)
    moved, _ = planted(b, symmetry(spec), 2)
    x = [data_of(spec)[0][0]]
    plain, other = (cka_matrix([a, each], symmetry(spec), x).values for each in (b, moved))
    np.testing.assert_allclose(other, plain, atol=1e-4)  # sums in another order, in float32
    own = cka_matrix([a, a], symmetry(spec), x).values
    np.testing.assert_allclose(np.diag(own), 1, atol=1e-9)
    np.testing.assert_allclose(own, own.T, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_any_precision_is_compared(dtype):
    models = [copy.deepcopy(trained(MLP, seed)).to(dtype) for seed in (0, 1)]
    expected = cka_matrix([trained(MLP, 0), trained(MLP, 1)], symmetry(MLP), data_of(MLP)[:1]).values
    found = cka_matrix(models, symmetry(MLP), data_of(MLP)[:1])
    np.testing.assert_allclose(found.values, expected, atol=0.02)  # 8 bits of bfloat16
    json.dumps(found.to_dict(), allow_nan=False)


def test_shared_weights_are_told_apart_and_nothing_is_changed():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(5, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))

    model = Twice().train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    held = x.clone()
    found = [cka_matrix([model, model], data=[x]) for _ in range(2)]
    assert found[0].layers == ("layer.weight (linear)", "layer.weight (linear_1)", "head.weight")
    assert np.array_equal(found[0].values, found[1].values)
    assert torch.equal(x, held)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_layer_that_never_varies_is_listed():
    model = copy.deepcopy(trained(MLP, 0))
    with torch.no_grad():
        model.hidden[1].bias.fill_(-100.0)  # dead behind the ReLU, so that the next layer gives out its bias
    found = cka_matrix([trained(MLP, 1), model], symmetry(MLP), data_of(MLP)[:1])
    assert found.layers == ("hidden.0.weight", "hidden.1.weight")
    assert found.values.shape == (2, 2)
    assert set(found.skipped) == {"hidden.2.weight", "head.weight"}
    json.dumps(found.to_dict(), allow_nan=False)


# Refusals


def test_measures_refuse():
    x, y = tables(samples=14)
    with refuses(DataError, "14 samples for 14 directions"):
        _mean_cca(Covariances.of_rows(x, y))
    still = Covariances.of_rows(torch.full((9, 2), 0.7, dtype=torch.float64), y[:9])
    for measure in MEASURES:
        with refuses(DataError, "do not vary"):
            measure(still)
    with refuses(DataError, "do not vary"):
        debiased_cka(torch.full((9, 2), 0.7, dtype=torch.float64), y[:9])
    with refuses(DataError, "3 and 3 samples"):
        debiased_cka(x[:3], y[:3])
    with refuses(DataError, "finite numbers"):
        Covariances.of_rows(x * torch.nan, y)
    for variance in (0.0, 1.5):
        with refuses(InputError, "variance="):
            svcca(Covariances.of_rows(x, y), variance)


def test_matched_correlations_refuse():
    models = [trained(MLP, 0), trained(MLP, 1)]
    moments = isthmus.collect(models, symmetry(MLP), data_of(MLP))
    with refuses(InputError, "linear maps"):
        matched_correlations(moments, isthmus.align(models, symmetry(MLP), "procrustes", data_of(MLP)))
    with refuses(InputError, "models 0 and 2"):
        matched_correlations(moments, isthmus.align(models, symmetry(MLP)), 0, 2)


class Merged(nn.Module):
    """Its layer sees the batch and another dimension as one."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x):
        return torch.relu(self.layer(x.flatten(0, 1))).view(len(x), -1)


@pytest.mark.parametrize(
    ("changed", "kind", "told"),
    [
        ({"models": [trained(MLP, 0)]}, InputError, "1 models"),
        ({"models": [trained(MLP, 0), trained(CNN, 0)]}, ModelError, "model 1"),
        ({"data": None}, DataError, "no data"),
        ({"data": []}, DataError, "data is empty"),
        ({"data": [data_of(MLP)[0][0][:3]]}, DataError, "fewer than 4 inputs"),
        ({"symmetry": symmetry(CNN)}, SymmetryError, "is not this model's"),
        (
            {"models": [Merged(), Merged()], "symmetry": None, "data": [torch.randn(5, 2, 3)]},
            SymmetryError,
            "no layer's value has the batch in front",
        ),
    ],
    ids=["one-model", "two-kinds", "no-data", "empty-data", "few-inputs", "foreign-symmetry", "batch-merged"],
)
def test_the_matrix_refuses(changed, kind, told):
    good = {"models": [trained(MLP, 0), trained(MLP, 1)], "symmetry": symmetry(MLP), "data": data_of(MLP)[:1]}
    with refuses(kind, told):
        cka_matrix(**{**good, **changed})
