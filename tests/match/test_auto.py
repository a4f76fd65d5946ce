"""Auto chooses by held-out data, and tells why."""

import pytest

import isthmus
from helpers.pairs import MLP, VGG_BN, data_of, symmetry, trained
from isthmus.data.batches import split_batches
from isthmus.errors import DataError, InputError
from isthmus.match import METHODS
from isthmus.match.auto import Auto


def models_of(name: str) -> list:
    return [trained(name, seed) for seed in range(2)]


def test_it_returns_what_the_best_candidate_returns_on_all_data():
    models, data = models_of(VGG_BN), data_of(VGG_BN)
    found = isthmus.align(models, symmetry(VGG_BN), Auto(("identity", "weight_matching", "activation_matching")), data)
    scores = found.details["scores"]
    assert found.details["chosen"] == min(scores, key=scores.get) != "identity"
    assert list(scores.values()) == sorted(scores.values())
    again = isthmus.align(models, symmetry(VGG_BN), found.details["chosen"], data)
    for space in symmetry(VGG_BN):
        assert (found.transforms[1][space.name].indices == again.transforms[1][space.name].indices).all()


def test_a_candidates_score_is_its_loss_on_the_part_held_out():
    models, data = models_of(MLP), data_of(MLP)
    found = isthmus.align(models, symmetry(MLP), Auto(("weight_matching",), held_out=0.5), data)
    _, held = split_batches(data, 0.5)
    merged = isthmus.merge(models, isthmus.align(models, symmetry(MLP)))
    assert found.details["scores"]["weight_matching"] == isthmus.evaluate(merged, held).loss


def test_without_labels_it_is_judged_by_the_ensemble():
    models = models_of(MLP)
    unlabelled = [x for x, _ in data_of(MLP)]
    found = isthmus.align(models, symmetry(MLP), Auto(("identity", "weight_matching")), unlabelled)
    assert found.details["chosen"] == "weight_matching"
    assert "ensemble" in found.details["why"]


def test_without_data_it_is_judged_by_the_weights():
    found = isthmus.align(models_of(MLP), symmetry(MLP), Auto(("identity", "weight_matching", "activation_matching")))
    assert found.details["chosen"] == "weight_matching"
    assert found.details["left_out"] == {"activation_matching": "needs data"}


def test_what_is_held_out_is_never_fitted_to():
    fitting, held = split_batches(data_of(MLP), 0.2)
    whole = [batch.args[0] for batch in (*fitting, *held)]
    assert len(whole) == len(data_of(MLP))
    assert held
    with pytest.raises(DataError, match="one batch"):
        split_batches(data_of(MLP)[:1], 0.2)


def test_bad_options_are_refused():
    for options in ({"candidates": ()}, {"candidates": ("auto",)}, {"candidates": ("cc",)}, {"held_out": 1.0}):
        with pytest.raises(InputError):
            Auto(**options)
    assert Auto("identity, weight_matching").candidates == ("identity", "weight_matching")


def test_it_tries_the_whole_table_but_what_trains():
    names = {method.name for method in Auto().methods()}
    assert names == set(METHODS) - {"auto", "ste", "sinkhorn", "learned"}
