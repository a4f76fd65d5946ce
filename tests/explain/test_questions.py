"""Questions on merged networks: every verdict turns where its figure crosses the threshold that is stated."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from isthmus.explain.claims import FAILS, HOLDS, PARTLY
from isthmus.explain.questions import (
    COLLAPSED,
    LEAST_DIFFERENCE,
    REPAIRED,
    SURVIVES,
    _by_depth,
    _by_matching,
    _variance,
    _whether_pairs_survive,
    _whose_features,
    answer_questions,
)
from isthmus.explain.units import THRESHOLD, SpaceFates

A_BIT = 1e-6  # to either side of a threshold: far above what float64 rounds off, far below every threshold


def units(merged, *, matched=None, naive=None, overlap=None, naive_overlap=None, threshold=THRESHOLD) -> SpaceFates:
    """A space with these correlations of merged units, one row a model."""
    merged = torch.tensor(merged, dtype=torch.float64)
    count = merged.shape[1]
    plain = torch.zeros(count, dtype=torch.float64)

    def rows(value):
        return None if value is None else torch.full_like(merged, value)

    return SpaceFates(
        space="space",
        names=tuple("ABC"[: len(merged)]),
        threshold=threshold,
        sources=np.tile(np.arange(count), (len(merged), 1)),
        before=plain,
        matched=plain if matched is None else torch.tensor(matched, dtype=torch.float64),
        merged=merged,
        naive=rows(naive),
        shuffled=torch.zeros_like(merged),
        norm_ratio=plain,
        overlap=rows(overlap),
        naive_overlap=rows(naive_overlap),
    )


def labelled(shared: int, some: int, lost: int, level: float = THRESHOLD + A_BIT) -> SpaceFates:
    """So many units of both models, of A alone, and of neither."""
    return units([[level] * (shared + some) + [0.0] * lost, [level] * shared + [0.0] * (some + lost)])


# ---- whose features


@pytest.mark.parametrize(
    ("shared", "some", "lost", "verdict"),
    [(5, 0, 5, HOLDS), (10, 0, 0, HOLDS), (4, 1, 5, PARTLY), (0, 5, 5, PARTLY), (4, 0, 6, FAILS), (0, 0, 10, FAILS)],
)
def test_most_units_are_all_models_features(shared, some, lost, verdict):
    claim = _whose_features([labelled(shared, some, lost)])
    assert claim.verdict == verdict
    assert claim.figure == f"{shared / 10:.0%} shared, {some / 10:.0%} of some models only, {lost / 10:.0%} lost"
    # Units count, not spaces: the same ones in two spaces give the same.
    assert _whose_features([labelled(shared, 0, 0), labelled(0, some, lost)]).verdict == verdict


def test_a_unit_counts_from_the_threshold_on():
    assert _whose_features([labelled(3, 0, 0, THRESHOLD)]).verdict == HOLDS
    assert _whose_features([labelled(3, 0, 0, THRESHOLD - A_BIT)]).verdict == FAILS
    assert f"{THRESHOLD:.2f}" in _whose_features([labelled(3, 0, 0)]).threshold


def test_the_average_without_matching_stands_beside():
    own = units([[0.9] * 4] * 2, naive=0.9)
    assert "averaged without matching 100%, 0%, 0%" in _whose_features([own]).figure


# ---- pairs


def ladder(order, low: float, high: float) -> SpaceFates:
    """Units whose matched correlation rises evenly and whose merged one follows `order` from low to high."""
    count = len(order)
    kept = [low + (high - low) * place / (count - 1) for place in order]
    return units([kept, [0.99] * count], matched=[index / count for index in range(count)])


# The quarters of eight units are the outer two each: their means are 6 of 7 steps apart.
RISE = LEAST_DIFFERENCE * 7 / 6


@pytest.mark.parametrize(
    ("order", "rise", "verdict"),
    [
        (range(8), RISE + A_BIT, HOLDS),
        (range(8), RISE - A_BIT, PARTLY),
        (range(7, -1, -1), RISE + A_BIT, FAILS),
    ],
    ids=["wide", "narrow", "falling"],
)
def test_well_matched_pairs_survive(order, rise, verdict):
    assert _whether_pairs_survive([ladder(list(order), 0.1, 0.1 + rise)]).verdict == verdict


def test_the_relation_turns_at_its_threshold():
    # Orders whose quarters are far apart, and whose correlation of ranks lies just on either side.
    orders = np.array(list(itertools.permutations(range(8))))
    orders = orders[orders[:, -2:].sum(axis=1) - orders[:, :2].sum(axis=1) >= 2]
    relations = np.round(1 - 6 * ((orders - np.arange(8)) ** 2).sum(axis=1) / (8 * 63), 9)
    below = orders[relations == relations[relations < SURVIVES].max()][0].tolist()
    above = orders[relations == relations[relations >= SURVIVES].min()][0].tolist()
    assert spearmanr(range(8), below).statistic < SURVIVES <= spearmanr(range(8), above).statistic
    assert _whether_pairs_survive([ladder(above, 0.0, 0.9)]).verdict == HOLDS
    assert _whether_pairs_survive([ladder(below, 0.0, 0.9)]).verdict == PARTLY


def test_it_is_the_median_space_and_the_worse_model():
    good, bad = ladder(list(range(8)), 0.1, 0.9), ladder(list(range(7, -1, -1)), 0.1, 0.9)
    assert _whether_pairs_survive([good, good, bad]).verdict == HOLDS
    assert _whether_pairs_survive([good, bad, bad]).verdict == FAILS
    few = ladder(list(range(6, -1, -1)), 0.1, 0.9)
    assert _whether_pairs_survive([good, few]).verdict == HOLDS  # seven units have no quarters


@pytest.mark.parametrize("own", [[], [ladder([0, 1, 2], 0, 1)], [units([[0.5] * 9] * 2)]], ids=["none", "few", "flat"])
def test_pairs_that_tell_nothing(own):
    assert _whether_pairs_survive(own).verdict is None
    assert _whether_pairs_survive(own).figure.startswith("not measured")


# ---- depth


@pytest.mark.parametrize(
    ("kept", "verdict"),
    [
        ([0.9, 0.8 - A_BIT], HOLDS),
        ([0.9, 0.8 + A_BIT], PARTLY),  # the last keeps less, but not by so much
        ([0.9, 0.9], FAILS),
        ([0.8, 0.9, 0.6, 0.8], PARTLY),  # later less, but the last no less than the first
        ([0.9, 0.0, 0.8 - A_BIT], HOLDS),  # the middle one of an odd number is in neither half
        ([0.9, 0.95, 0.8 + A_BIT], PARTLY),
    ],
)
def test_less_is_left_with_depth(kept, verdict):
    assert _by_depth([units([[value, value], [value, value]]) for value in kept]).verdict == verdict


def test_one_space_has_no_depth():
    assert _by_depth([units([[0.5]])]).verdict is None


# ---- matching


@pytest.mark.parametrize(
    ("correlation", "overlap", "verdict"),
    [
        (0.4 + LEAST_DIFFERENCE + A_BIT, 0.2 + LEAST_DIFFERENCE + A_BIT, HOLDS),
        (0.4 + LEAST_DIFFERENCE - A_BIT, 0.2 + LEAST_DIFFERENCE + A_BIT, PARTLY),
        (0.4 + LEAST_DIFFERENCE + A_BIT, 0.2 + LEAST_DIFFERENCE - A_BIT, PARTLY),
        (0.4 + LEAST_DIFFERENCE - A_BIT, 0.2 + LEAST_DIFFERENCE - A_BIT, FAILS),
    ],
)
def test_matching_keeps_the_features(correlation, overlap, verdict):
    own = units([[correlation] * 4] * 2, naive=0.4, overlap=overlap, naive_overlap=0.2)
    assert _by_matching([own]).verdict == verdict


@pytest.mark.parametrize(
    ("correlation", "verdict"), [(0.4 + LEAST_DIFFERENCE + A_BIT, HOLDS), (0.4 + LEAST_DIFFERENCE - A_BIT, FAILS)]
)
def test_without_top_images_correlation_decides(correlation, verdict):
    assert _by_matching([units([[correlation] * 4] * 2, naive=0.4)]).verdict == verdict
    assert _by_matching([units([[correlation] * 4] * 2)]).verdict is None


# ---- variance


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (COLLAPSED - A_BIT, 1.0, HOLDS),
        (COLLAPSED + A_BIT, 1.0, PARTLY),
        (COLLAPSED - A_BIT, REPAIRED[0] + A_BIT, HOLDS),
        (COLLAPSED - A_BIT, REPAIRED[0] - A_BIT, PARTLY),
        (COLLAPSED - A_BIT, REPAIRED[1] - A_BIT, HOLDS),
        (COLLAPSED - A_BIT, REPAIRED[1] + A_BIT, PARTLY),
        (COLLAPSED + A_BIT, REPAIRED[1] + A_BIT, FAILS),
    ],
)
def test_repair_gives_variance_back(before, after, verdict):
    ratios = {"space": {"naive": 0.1, "aligned": before, "mended": after}}
    assert _variance(ratios, True).verdict == verdict
    others = {"first": {"aligned": 0.0, "mended": 0.0}, "last": {"aligned": 9.0, "mended": 9.0}}
    assert _variance({**others, **ratios}, True).verdict == verdict  # the median space decides
    assert _variance(ratios, False).verdict is None
    assert "a merge that was repaired" in _variance(ratios, False).figure


@pytest.mark.parametrize("missing", ["aligned", "mended"])
def test_a_variance_that_was_not_measured_decides_nothing(missing):
    ratios = {"space": {"aligned": 0.5, "mended": 1.0, missing: None}}
    assert _variance(ratios, True).verdict is None
    assert _variance({}, True).verdict is None


# ---- all


def test_all_five_are_answered_in_order():
    own = {"one": labelled(8, 0, 0), "empty": units([[], []])}
    ratios = {"one": {"aligned": 0.5, "mended": 1.0}}
    claims = answer_questions(own, ratios)
    assert [claim.verdict for claim in claims] == [HOLDS, None, None, None, HOLDS]
    assert len({claim.text for claim in claims}) == 5
    assert all(claim.threshold and claim.figure for claim in claims)
    assert answer_questions(own, ratios, repaired=False)[-1].verdict is None
    assert {claim.verdict for claim in answer_questions({}, {})} == {None}
