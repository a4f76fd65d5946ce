"""Comparing: every way of merging is a row, and a row says what was measured."""

import json
import time

import pytest
import torch

import isthmus
from helpers.pairs import MLP, VGG_BN, data_of, symmetry, trained
from isthmus.errors import DataError, InputError
from isthmus.match.weight_matching import WeightMatching
from isthmus.measure.compare import _measuring
from isthmus.report.bars import draw_comparison


def test_every_way_is_a_row_that_can_be_made_again():
    models = [trained(MLP, seed) for seed in range(2)]
    found = isthmus.compare(
        models, data_of(MLP, "test"), data_of(MLP), symmetry(MLP),
        methods=["identity", "weight_matching"], averages=["mean", "pleas"],
    )  # fmt: skip
    assert [(row.method, row.average, row.repair) for row in found.rows] == [
        (method, average, kind)
        for method in ("identity", "weight_matching")
        for average in ("mean", "pleas")
        for kind in ("raw", "repair")  # no BatchNorm: nothing to reset
    ]
    assert [score.loss for score in found.parents] == [isthmus.evaluate(m, data_of(MLP, "test")).loss for m in models]
    alignment = isthmus.align(models, symmetry(MLP))
    row = found.rows[4]
    score = isthmus.evaluate(isthmus.merge(models, alignment), data_of(MLP, "test"))
    assert (row.loss, row.accuracy) == (score.loss, score.accuracy)
    assert row.barrier == pytest.approx(score.loss - sum(s.loss for s in found.parents) / 2)
    assert found.best.loss == min(row.loss for row in found.rows)
    assert all(row.seconds >= 0 for row in found.rows)


def test_a_method_may_bring_options_and_its_row_says_which():
    models = [trained(MLP, seed) for seed in range(2)]
    found = isthmus.compare(
        models, data_of(MLP), data_of(MLP), symmetry(MLP), repairs=["raw"],
        methods=["weight_matching?restarts=1&max_sweeps=3", WeightMatching()], averages=["slerp"],
    )  # fmt: skip
    assert [row.method for row in found.rows] == ["weight_matching?restarts=1&max_sweeps=3", "weight_matching"]
    with pytest.raises(InputError, match=r"weight_matching has no option 'restart' .did you mean 'restarts'"):
        isthmus.compare(models, data_of(MLP), data_of(MLP), methods=["weight_matching?restart=1"])


def test_what_cannot_be_done_says_why():
    models = [trained(VGG_BN, seed) for seed in range(2)]
    found = isthmus.compare(
        models, data_of(VGG_BN), data_of(VGG_BN), symmetry(VGG_BN),
        methods=["subset_selection"], averages=["mean"],
    )  # fmt: skip
    notes = {row.repair: row.note for row in found.rows}
    assert "linear map" in notes["raw"]
    assert "reset" in notes["repair"]
    assert notes["reset"] == ""
    assert "linear map" in found.to_markdown()


def test_methods_without_their_data_are_left_out_by_default():
    models = [trained(MLP, seed) for seed in range(2)]
    found = isthmus.compare(models, data_of(MLP), symmetry=symmetry(MLP), averages=["mean"], repairs=["raw"])
    assert {row.method for row in found.rows} >= {"identity", "weight_matching"}
    assert "activation_matching" not in {row.method for row in found.rows}


def test_bad_questions_are_refused():
    models = [trained(MLP, seed) for seed in range(2)]
    with pytest.raises(InputError, match="at least two"):
        isthmus.compare(models[:1], data_of(MLP))
    with pytest.raises(InputError, match="choose from"):
        isthmus.compare(models, data_of(MLP), repairs=["mend"])
    with pytest.raises(InputError, match="did you mean"):
        isthmus.compare(models, data_of(MLP), data_of(MLP), methods=["weight_maching"])
    with pytest.raises(DataError, match="calibration"):
        isthmus.compare(models, data_of(MLP))


def test_the_picture_and_the_json_hold_all_rows():
    models = [trained(MLP, seed) for seed in range(2)]
    found = isthmus.compare(
        models, data_of(MLP), data_of(MLP), symmetry(MLP), methods=["identity", "weight_matching"], averages=["mean"]
    )
    plain = json.loads(json.dumps(found.to_dict()))
    for dark in (False, True):
        picture = draw_comparison(plain, "svg", dark=dark).decode()
        assert "weight matching · mean" in picture
        assert picture == draw_comparison(plain, "svg", dark=dark).decode()
    assert draw_comparison(plain, "png").startswith(b"\x89PNG")


def test_time_and_memory_are_those_of_the_step():
    with _measuring() as spent:
        held = torch.ones(50_000_000)  # 200 MB, written to
        time.sleep(0.1)
    assert spent.seconds >= 0.1
    assert spent.memory is None or spent.memory > 0.8 * held.nbytes
