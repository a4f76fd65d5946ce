"""What the caller gave is checked once a call: weights are searched for NaN one time, however often they are used."""

from collections import Counter

import pytest

import isthmus
from helpers.pairs import CNN, MLP, data_of, symmetry, trained
from isthmus.observe import given


@pytest.fixture
def scans(monkeypatch):
    """Counts the calls of `check_state`, by what names the model in its messages."""
    counted = Counter()
    real = given.check_state

    def counting(state, model, where):
        counted[where] += 1
        return real(state, model, where)

    monkeypatch.setattr(given, "check_state", counting)
    return counted


def checked_once(scans, models):
    """Whether each of so many models was searched once, and nothing else was."""
    return sum(scans.values()) == models == len(scans)


@pytest.fixture
def trio():
    return [trained(MLP, seed) for seed in range(3)]


@pytest.fixture
def pair():
    return [trained(CNN, seed) for seed in range(2)]


def test_a_line_of_eleven_points(scans, pair):
    isthmus.connect(*pair, data_of(CNN, "test"), calibration=data_of(CNN))
    assert checked_once(scans, 2)


def test_a_simplex_and_a_plane(scans, trio):
    isthmus.walk_simplex(trio, data_of(MLP, "test"), repair=None)
    assert checked_once(scans, 3)
    scans.clear()
    isthmus.walk_plane(trio, data_of(MLP, "test"), points=3)
    assert checked_once(scans, 3)


@pytest.mark.parametrize(
    "method",
    [
        "auto?candidates=identity,weight_matching",
        "cca",
        "weight_matching",
        "ot_fusion",
        "zipit",
        "activation_matching?reference=best",
        "procrustes",
    ],
)
def test_an_alignment(scans, trio, method):
    configured = isthmus.registry.configure_text("matching method", method, isthmus.match.METHODS)
    isthmus.align(trio, symmetry(MLP), configured, data_of(MLP))
    assert checked_once(scans, 3)


def test_a_merge_and_its_repairs(scans, pair):
    alignment = isthmus.align(pair, symmetry(CNN))
    for average in ("mean", "pleas", "regmean", "greedy_soup"):
        scans.clear()
        merged = isthmus.merge(pair, alignment, average, data=data_of(CNN))
        assert checked_once(scans, 2), average
    scans.clear()
    isthmus.repair(merged, data_of(CNN))
    assert checked_once(scans, 0)
    isthmus.repair(merged, data_of(CNN), "repair", parents=pair, alignment=alignment)
    assert checked_once(scans, 2)


def test_moments_and_scores(scans, trio):
    isthmus.collect(trio, symmetry(MLP), data_of(MLP))
    assert checked_once(scans, 3)
    scans.clear()
    isthmus.evaluate(trio[0], data_of(MLP))
    assert checked_once(scans, 1)


def test_a_comparison(scans, pair):
    isthmus.compare(
        pair, data_of(CNN, "test"), data_of(CNN), symmetry(CNN),
        methods=["identity", "weight_matching"], averages=["mean", "regmean"],
    )  # fmt: skip
    assert checked_once(scans, 2)


def test_cycles_and_all_lines(scans, trio):
    isthmus.cycle_error(trio, symmetry(MLP), "activation_matching", data_of(MLP))
    assert checked_once(scans, 3)
    alignment = isthmus.align(trio, symmetry(MLP))
    scans.clear()
    isthmus.pairwise_barriers(trio, alignment, data_of(MLP), points=3)
    assert checked_once(scans, 3)


def test_a_zipped_trunk(scans, trio):
    isthmus.partial_zip(trio, data_of(MLP))
    assert checked_once(scans, 3)
