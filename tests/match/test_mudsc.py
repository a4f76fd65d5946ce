"""MuDSC between its two ends: activation matching and the sweeps of weight matching."""

import numpy as np
import pytest

import isthmus
from helpers.pairs import MLP, RESNET20, VGG_BN, data_of, fresh, symmetry, trained
from isthmus.errors import InputError
from isthmus.match.mudsc import MuDSC, _standardised
from isthmus.symmetry import Permutation
from isthmus.symmetry.transform import move_state


def indices(found: isthmus.Alignment) -> dict[str, np.ndarray]:
    return {name: t.indices for name, t in found.transforms[1].items()}


@pytest.mark.parametrize("name", [MLP, VGG_BN])
def test_activations_alone_are_activation_matching(name):
    models = [trained(name, seed) for seed in range(2)]
    mixed = isthmus.align(models, symmetry(name), MuDSC(alpha=1.0), data_of(name))
    plain = isthmus.align(models, symmetry(name), "activation_matching", data_of(name))
    for space, found in indices(mixed).items():
        assert np.array_equal(found, indices(plain)[space])


@pytest.mark.parametrize("name", [MLP, VGG_BN, RESNET20])
def test_weights_alone_end_where_no_space_can_improve(name):
    models = [trained(name, seed) for seed in range(2)]
    mixed = isthmus.align(models, symmetry(name), MuDSC(alpha=0.0), data_of(name))
    naive = isthmus.align(models, symmetry(name), "identity")
    assert mixed.converged
    assert mixed.objective > 0
    assert not all(np.array_equal(a, indices(naive)[space]) for space, a in indices(mixed).items())


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", [MLP, VGG_BN, RESNET20])
def test_a_planted_permutation_is_recovered(name, alpha):
    model = fresh(name, 0)
    rng = np.random.default_rng(0)
    planted = {space.name: Permutation.random(space, rng) for space in symmetry(name)}
    other = fresh(name, 0)
    other.load_state_dict(move_state(model.state_dict(), planted, symmetry(name)))
    found = isthmus.align([model, other], symmetry(name), MuDSC(alpha=alpha, at="pre"), data_of(name))
    for space in symmetry(name):
        assert np.array_equal(
            planted[space.name].indices[0][found.transforms[1][space.name].indices[0]], np.arange(space.size)
        )


def test_matrices_are_standardised():
    matrix = np.random.default_rng(0).normal(3, 2, size=(5, 5))
    assert _standardised(matrix).mean() == pytest.approx(0)
    assert _standardised(matrix).std() == pytest.approx(1)
    assert not _standardised(np.ones((3, 3))).any()


def test_bad_options_are_refused():
    for options in ({"alpha": 1.5}, {"alpha": float("nan")}, {"at": "x"}, {"max_sweeps": 0}, {"reference": "x"}):
        with pytest.raises(InputError):
            MuDSC(**options)
