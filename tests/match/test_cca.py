"""CCA Merge against the paper's formula, and its two limits."""

import numpy as np
import pytest
import torch

import isthmus
from helpers.pairs import MLP, RESNET20, VGG_BN, data_of, symmetry, trained
from isthmus.errors import DataError, InputError
from isthmus.match.cca import CCA, GRID, _canonical_map
from isthmus.match.procrustes import Procrustes, _rotation
from isthmus.symmetry import LinearMap
from oracles.cca import canonical_map as naive


def tables(units: int = 7, samples: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Activations of two models that share half of their directions."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(samples, units))
    own = [rng.normal(size=(samples, units)) for _ in range(2)]
    a, b = (shared @ rng.normal(size=(units, units)) + 0.5 * noise @ rng.normal(size=(units, units)) for noise in own)
    return a, b


def covariances(a: np.ndarray, b: np.ndarray) -> list[torch.Tensor]:
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    return [torch.from_numpy(x.T @ y / len(a)) for x, y in ((a, a), (b, b), (a, b))]


@pytest.mark.parametrize("gamma", [1e-3, 0.1, 10.0])
def test_it_is_the_papers_formula(gamma):
    a, b = tables()
    own, other, between = covariances(a, b)
    ridge = gamma * float(own.diagonal().mean() + other.diagonal().mean()) / 2
    into, back, correlations = naive(a, b, ridge)
    found, total = _canonical_map(own, other, between, gamma)
    # The steadying share of 1e-9 turns directions by about 1e-9 / the gap of singular values.
    np.testing.assert_allclose(found.into[0], into, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.back[0], back, rtol=1e-6, atol=1e-6)
    assert total == pytest.approx(correlations.sum(), rel=1e-6)


def test_without_a_ridge_the_mapped_units_are_as_correlated_as_can_be():
    a, b = tables()
    own, other, between = covariances(a, b)
    found, total = _canonical_map(own, other, between, 0.0)
    _, _, correlations = naive(a, b, 0.0)
    assert total == pytest.approx(correlations.sum(), rel=1e-6)
    mapped = found.into[0] @ other @ found.into[0].T
    torch.testing.assert_close(mapped, own, rtol=1e-6, atol=1e-6)  # B's units get A's covariance


def test_a_large_ridge_is_procrustes():
    own, other, between = covariances(*tables())
    found, _ = _canonical_map(own, other, between, 1e7)
    limit, _ = _rotation(own, other, between)
    torch.testing.assert_close(found.into, limit.into, rtol=1e-5, atol=1e-5)


def test_the_rotation_is_orthogonal_and_best():
    own, other, between = covariances(*tables())
    found, value = _rotation(own, other, between)
    into = found.into[0]
    torch.testing.assert_close(into @ into.T, torch.eye(len(into), dtype=into.dtype))
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        other_turn, _ = torch.linalg.qr(torch.randn(len(into), len(into), generator=generator, dtype=into.dtype))
        assert (other_turn * between).sum() <= (into * between).sum() + 1e-12
    assert float((into * between).sum()) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("name", [MLP, VGG_BN, RESNET20])
def test_back_undoes_into(name):
    models = [trained(name, seed) for seed in range(2)]
    for method in (CCA(gamma=0.1), Procrustes()):
        found = isthmus.align(models, symmetry(name), method, data_of(name))
        for space in symmetry(name):
            transform = found.transforms[1][space.name]
            assert isinstance(transform, LinearMap)
            product = transform.into.double() @ transform.back.double()
            # Condition numbers up to (1 / 0.1)·units: errors of float64 stay far below.
            torch.testing.assert_close(product[0], torch.eye(space.size, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_a_planted_permutation_is_a_canonical_map():
    model = trained(MLP, 0)
    found = isthmus.align([model, trained(MLP, 1)], symmetry(MLP))
    other = trained(MLP, 0)
    moved = isthmus.apply(found, other, 1)
    back = isthmus.align([model, moved], symmetry(MLP), CCA(gamma=1e-3), data_of(MLP))
    merged = isthmus.merge([model, moved], back)
    losses = [isthmus.evaluate(each, data_of(MLP)).loss for each in (model, merged)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_the_ridge_is_chosen_on_data_held_out():
    models = [trained(VGG_BN, seed) for seed in range(2)]
    found = isthmus.align(models, symmetry(VGG_BN), "cca", data_of(VGG_BN))
    scores = found.details["scores"]
    assert set(scores) <= {str(gamma) for gamma in GRID}
    assert found.details["gamma"] == float(min(scores, key=scores.get))
    assert "held-out" in found.details["criterion"]
    set_by_hand = isthmus.align(models, symmetry(VGG_BN), CCA(gamma=found.details["gamma"]), data_of(VGG_BN))
    for space in symmetry(VGG_BN):
        # moments of two parts joined, and of one pass: float32 products in other chunks
        torch.testing.assert_close(
            found.transforms[1][space.name].into, set_by_hand.transforms[1][space.name].into, rtol=1e-3, atol=1e-4
        )


def test_with_a_given_ridge_each_model_is_mapped_as_if_it_were_alone():
    models = [trained(MLP, seed) for seed in range(3)]
    method, sym, data = CCA(gamma=0.1), symmetry(MLP), data_of(MLP)
    together = isthmus.align(models, sym, method, data=data)
    for index in (1, 2):
        alone = isthmus.align([models[0], models[index]], sym, method, data=data)
        for name, transform in alone.transforms[1].items():
            assert torch.equal(together.transforms[index][name].into, transform.into)
            assert torch.equal(together.transforms[index][name].back, transform.back)


def test_what_is_ill_posed_is_refused():
    models = [trained(MLP, seed) for seed in range(2)]
    x, y = data_of(MLP)[0]
    with pytest.raises(DataError, match="gamma"):
        isthmus.align(models, symmetry(MLP), CCA(gamma=0.0), [(x[:10], y[:10])])
    with pytest.raises(DataError, match="held-out"):
        isthmus.align(models, symmetry(MLP), "cca", [(x, y)])
    for options in ({"gamma": -1.0}, {"gamma": float("nan")}, {"at": "middle"}, {"reference": "last"}):
        with pytest.raises(InputError):
            CCA(**options)
    with pytest.raises(InputError):
        Procrustes(at="middle")
