"""Verdicts: every one can be reached, and none is given without what it needs."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest

import isthmus
from helpers.pairs import MLP, data_of, symmetry, trained
from isthmus.errors import InputError
from isthmus.explain import claims
from isthmus.explain.claims import FAILS, HOLDS, PARTLY, _split_gains, judge_claims, top_share
from isthmus.explain.spectrum import LayerSpectrum, Overlap, Spectra, measure_spectra
from isthmus.explain.taylor import TaylorBarrier, taylor_barrier
from isthmus.match.base import identity_transforms
from isthmus.symmetry import Alignment

VALUES = (10.0, 5.0, 2.0, 1.0)


def layer(name: str, **changed) -> LayerSpectrum:
    """A layer of four directions, as the claims would have it: two are large."""
    usual = {
        "name": name,
        "shape": (1, 4, 100),
        "values_a": VALUES,
        "values_b": VALUES,
        "values_moved": VALUES,
        "values_merged": VALUES,
        "unchanged": 1e-16,
        "tolerance": 1e-12,
        "overlaps": (Overlap(0.0, 0.0, 0.4, 4, 4), Overlap(0.3, 0.0, 1.6, 2, 2)),
        "directions": (0.3, 0.2, 0.1, 0.05),
        "rank_correlation": 0.9,
        "gains": (0.9, 0.9, 0.5, 0.5),
        "input_shares": (0.5, 0.6, 0.7, 0.8),
        "note": "",
        "distance_before": 10.0,
        "distance_after": 9.0,
    }
    return LayerSpectrum(**{**usual, **changed})


def spectra(last: dict | None = None, whole: dict | None = None, **changed) -> Spectra:
    """Two layers, the last of which differs between the models more than the first."""
    other = tuple(1.05 * value for value in VALUES)
    layers = (layer("first", **changed), layer("last", **{**changed, "values_b": other, **(last or {})}))
    usual = {"distance_before": 10.0, "distance_after": 9.0, "exact": True, "method": "weight_matching"}
    return Spectra(layers, {}, **{**usual, **(whole or {})})


def overlaps(all_of_them: float, large: float) -> tuple[Overlap, ...]:
    """R at γ = 0 and 0.3 of a layer of four and two directions."""
    return Overlap(0.0, 0.0, 4 * all_of_them, 4, 4), Overlap(0.3, 0.0, 2 * large, 2, 2)


GOOD = {
    "spectra": spectra(),
    "taylor": TaylorBarrier(1.0, 1.0, 0.2, 100),
    "barriers": {"naive": 2.0, "weight_matching": 0.2, "activation_matching": 0.3, "ste": 0.1},
    "activation_matching": spectra(overlaps=overlaps(0.1, 0.7)),
    "ste": spectra(overlaps=overlaps(0.0, 0.05)),
}

TABLE = [
    # claim, what is changed, verdict
    (1, {}, HOLDS),
    (1, {"spectra": spectra(whole={"distance_after": 7.0})}, PARTLY),
    (1, {"taylor": TaylorBarrier(0.1, 0.1, 0.2, 100)}, PARTLY),
    (1, {"spectra": spectra(whole={"distance_after": 7.0}), "taylor": TaylorBarrier(0.1, 0.1, 0.2, 100)}, FAILS),
    (1, {"taylor": TaylorBarrier(0.0, 0.004, 0.001, 100)}, PARTLY),  # both are noise: no failure of the estimate
    (2, {}, HOLDS),
    (2, {"spectra": spectra(values_b=tuple(1.5 * v for v in VALUES))}, FAILS),
    (2, {"spectra": spectra(last={"values_b": VALUES}, values_b=tuple(1.01 * v for v in VALUES))}, PARTLY),
    (2, {"spectra": spectra(unchanged=1e-3)}, PARTLY),
    (3, {}, HOLDS),
    (3, {"spectra": spectra(rank_correlation=0.1)}, PARTLY),
    (3, {"spectra": spectra(overlaps=overlaps(0.5, 0.5))}, PARTLY),
    (3, {"spectra": spectra(overlaps=overlaps(0.5, 0.1), rank_correlation=-0.9)}, FAILS),
    (4, {}, HOLDS),
    (4, {"spectra": spectra(gains=(0.5, 0.5, 0.5, 0.5))}, PARTLY),
    (4, {"spectra": spectra(input_shares=(0.01, 0.02, 0.03, 0.04))}, PARTLY),
    (4, {"spectra": spectra(gains=(0.1, 0.1, 0.9, 0.9), input_shares=(0.01, 0.02, 0.03, 0.04))}, FAILS),
    (5, {}, HOLDS),
    (5, {"activation_matching": spectra(overlaps=overlaps(0.0, 0.1))}, PARTLY),
    (5, {"ste": spectra()}, PARTLY),
    (5, {"barriers": {**GOOD["barriers"], "ste": 1.0}}, PARTLY),
    (5, {"barriers": {**GOOD["barriers"], "activation_matching": 1.0, "ste": 1.0}}, FAILS),
]


@pytest.mark.parametrize(("number", "changed", "verdict"), TABLE)
def test_every_verdict_can_be_reached(number, changed, verdict):
    claim = judge_claims(**{**GOOD, **changed})[number - 1]
    assert claim.verdict == verdict
    assert not claim.figure.startswith("not measured")


UNMEASURED = [
    (1, {"spectra": None}, "the spectra after weight matching"),
    (1, {"taylor": None}, "the Taylor estimate"),
    (1, {"spectra": spectra(whole={"distance_before": 0.0, "distance_after": 0.0})}, "two models that differ"),
    (2, {"spectra": None}, "the spectra"),
    (2, {"spectra": spectra(whole={"exact": False})}, "an alignment by permutations"),
    (2, {"spectra": replace(spectra(), layers=spectra().layers[:1])}, "two layers or more"),
    (3, {"spectra": spectra(overlaps=overlaps(0.1, 0.8)[:1])}, "R at γ = 0 and 0.3"),
    (3, {"spectra": spectra(rank_correlation=None)}, "aligned differently"),
    (4, {"spectra": spectra(gains=None)}, r"the merged model \(merged=\)"),
    (4, {"spectra": spectra(input_shares=None)}, r"what the layers read \(data=\)"),
    (5, {"barriers": None}, "the barrier of naive"),
    (5, {"barriers": {**GOOD["barriers"], "ste": math.nan}}, "the barrier of ste"),
    (5, {"ste": None}, "R of ste at γ = 0.3"),
    (5, {"barriers": {**GOOD["barriers"], "naive": 0.0}}, "a naive barrier to lower"),
]


@pytest.mark.parametrize(("number", "changed", "missing"), UNMEASURED)
def test_what_was_not_measured_is_not_judged(number, changed, missing):
    claim = judge_claims(**{**GOOD, **changed})[number - 1]
    assert claim.verdict is None
    assert re.search(missing, claim.figure)
    assert claim.figure.startswith("not measured: ")


def test_without_anything_nothing_is_judged():
    found = judge_claims()
    assert [claim.verdict for claim in found] == [None] * 5
    assert len({claim.text for claim in found}) == 5
    json.dumps([claim.to_dict() for claim in found], allow_nan=False)


def test_an_unknown_barrier_is_refused():
    with pytest.raises(InputError, match="barrier 'wm': choose from naive, weight_matching"):
        judge_claims(barriers={"wm": 1.0})


def test_thresholds_are_told_as_they_are_used(monkeypatch):
    assert judge_claims(**GOOD)[0].threshold.startswith("distance falls by at most 25%")
    monkeypatch.setattr(claims, "SMALL_DISTANCE_SHARE", 0.05)
    claim = judge_claims(**GOOD)[0]
    assert claim.threshold.startswith("distance falls by at most 5%")
    assert claim.verdict == PARTLY


def test_gains_and_shares_are_their_formulas():
    one = layer("x", gains=(0.8, 0.5, 0.4, 0.1))
    large = (0.8 * 100 + 0.5 * 25) / 125
    small = (0.4 * 4 + 0.1 * 1) / 5
    assert _split_gains(one) == pytest.approx((large, small))
    assert _split_gains(layer("x", values_a=(10.0, 9.0, 8.0, 7.0))) is None
    wide = layer("x", shape=(1, 40, 100), input_shares=tuple(np.linspace(0.2, 1, 40)))
    share = np.linspace(0.2, 1, 40)[3]
    assert top_share(wide) == pytest.approx((share, 0.04))


def test_a_network_and_its_copy_are_judged():
    """At no distance and no barrier, what is defined is judged and the rest is not."""
    model = trained(MLP, 0)
    stay = identity_transforms(symmetry(MLP))
    found = measure_spectra([model, model], Alignment(symmetry(MLP), (stay, stay)), model, data_of(MLP)[:1])
    taylor = taylor_barrier(model, model, data_of(MLP)[:1])
    verdicts = judge_claims(found, taylor)
    assert [claim.verdict is None for claim in verdicts] == [True, False, True, False, True]


def test_trained_networks_are_judged_and_the_figures_are_theirs():
    models = [trained(MLP, 0), trained(MLP, 1)]
    alignment = isthmus.align(models, symmetry(MLP))
    found = measure_spectra(models, alignment, isthmus.merge(models, alignment), data_of(MLP))
    taylor = taylor_barrier(models[0], isthmus.apply(alignment, models[1], 1), data_of(MLP))
    verdicts = judge_claims(found, taylor)
    assert all(claim.verdict in (HOLDS, PARTLY, FAILS) for claim in verdicts[:4])
    assert f"{taylor.estimate:.4g}" in verdicts[0].figure
    assert f"{found.distance_after:.4g}" in verdicts[0].figure
    assert f"{found.at(0.3).after:.3f}" in verdicts[2].figure
