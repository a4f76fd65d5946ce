"""Subset selection: the greedy choice against a naive one, and what the chosen units explain."""

import numpy as np
import pytest
import torch

import isthmus
from helpers.pairs import MLP, VGG_BN, data_of, learnt, symmetry, trained
from isthmus.errors import InputError, TransformError
from isthmus.match.subset_selection import SubsetSelection, _greedy_subset, _select_units
from isthmus.symmetry import LinearMap


def naive_greedy(covariance: np.ndarray, wanted: np.ndarray, count: int) -> list[int]:
    """The candidate, one at a time, with which the regression on all chosen so far explains most."""
    picks: list[int] = []
    for _ in range(count):
        explained = []
        for candidate in range(len(covariance)):
            if candidate in picks:
                explained.append(-1.0)
                continue
            chosen = [*picks, candidate]
            gram = covariance[np.ix_(chosen, chosen)]
            cross = wanted[:, chosen]
            explained.append(float(np.trace(cross @ np.linalg.solve(gram, cross.T))))
        picks.append(int(np.argmax(explained)))
    return picks


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_the_naive_greedy_one(seed):
    rng = np.random.default_rng(seed)
    data = rng.normal(size=(60, 9)) @ rng.normal(size=(9, 9))
    covariance = np.cov(data, rowvar=False)
    wanted = rng.normal(size=(4, 9)) @ covariance
    found = _greedy_subset(torch.from_numpy(covariance), torch.from_numpy(wanted), 5)
    assert found == naive_greedy(covariance, wanted, 5)


def test_it_never_explains_less_than_nothing_and_stops_when_all_is_explained():
    base = torch.randn(3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data = torch.cat([base, base])
    covariance = data @ data.T / 50
    assert len(_greedy_subset(covariance, covariance, 6)) == 3


def test_identical_models_keep_every_pair_once():
    units = torch.randn(200, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    both = torch.cat([units, units], dim=1)
    covariance = (both.T @ both / 200).reshape(2, 6, 2, 6)
    found = _select_units(
        covariance, torch.randn(2, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    )
    assert sum(found.kinds) == 6
    torch.testing.assert_close(found.into.sum(dim=0), torch.eye(6, dtype=torch.float64))
    assert found.unexplained[0] == pytest.approx(0, abs=1e-8)  # the ridge is 1e-9


def test_the_choice_explains_more_than_the_means():
    models = [learnt(VGG_BN, seed) for seed in range(3)]
    for count in (2, 3):
        found = isthmus.align(models[:count], symmetry(VGG_BN), "subset_selection", data=data_of(VGG_BN))
        spaces = found.details["spaces"].values()
        assert spaces
        # greedy is not optimal: single spaces may lose a little, all together must not (0.2 to 0.8 of it is left)
        assert sum(s["unexplained"] for s in spaces) < sum(s["unexplained_by_means"] for s in spaces)
        assert all(sum(s["kinds"]) == symmetry(VGG_BN)[name].size for name, s in found.details["spaces"].items())


def test_it_merges_better_than_its_pairing():
    models = [learnt(MLP, seed) for seed in range(2)]

    def loss(method: str) -> float:
        found = isthmus.align(models, symmetry(MLP), method, data=data_of(MLP))
        return isthmus.evaluate(isthmus.merge(models, found), data_of(MLP)).loss

    assert loss("subset_selection") < loss("activation_matching") - 0.2  # measured: 0.2 and 0.8


def test_repair_refuses_linear_maps():
    models = [trained(MLP, seed) for seed in range(2)]
    found = isthmus.align(models, symmetry(MLP), "subset_selection", data=data_of(MLP))
    assert any(isinstance(t, LinearMap) for t in found.transforms[0].values())
    merged = isthmus.merge(models, found)
    with pytest.raises(TransformError, match="reset"):
        isthmus.repair(merged, data_of(MLP), "repair", parents=models, alignment=found)


def test_bad_options_are_refused():
    for options in ({"pairing": "cca"}, {"at": "middle"}, {"reference": "last"}):
        with pytest.raises(InputError):
            SubsetSelection(**options)
