"""What became of each unit: laws of a merge that loses nothing, and every score against plain loops."""

import copy

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr

import isthmus
from helpers.pairs import CNN, MLP, VGG_BN, data_of, inputs_of, lively, planted, symmetry, trained
from helpers.refusals import refuses
from isthmus.errors import DataError, InputError
from isthmus.explain.features import respond
from isthmus.explain.moves import SlotMap
from isthmus.explain.units import LOST, SHARED, _derangement, _label, _overlap, _respond_everywhere, measure_units

# float32 activations and products of 4,096 rows, moments of order one
CLOSE = 1e-5
GROUPS = "resnet20?width=0.5&norm=group"


def images(spec):
    return [inputs_of(lively(spec, 0), 32), inputs_of(lively(spec, 0), 20)] if spec == GROUPS else data_of(spec)


def scored(spec, models, method="weight_matching", **options):
    alignment = isthmus.align(models, symmetry(spec), method, data=images(spec))
    merged = isthmus.merge(models, alignment)
    merged = isthmus.repair(merged, images(spec)) if merged.needs_repair or spec == VGG_BN else merged
    return alignment, merged, measure_units(models, alignment, merged, images(spec), **options)


@pytest.mark.parametrize("spec", [MLP, CNN, VGG_BN, GROUPS])
def test_of_a_model_and_itself_every_unit_is_shared(spec):
    model = lively(spec, 0)
    models = [model, copy.deepcopy(model)]
    alignment = isthmus.align(models, symmetry(spec), "identity")
    units = measure_units(models, alignment, model, images(spec), naive=model)
    assert list(units.spaces) == [space.name for space in symmetry(spec)]
    for own in units.spaces.values():
        assert set(own.labels) == set(own.naive_labels) == {SHARED}
        for correlation in (own.before, own.matched, own.merged, own.naive):
            torch.testing.assert_close(correlation, torch.ones_like(correlation), atol=CLOSE, rtol=0)
        torch.testing.assert_close(own.norm_ratio, torch.ones_like(own.norm_ratio), atol=CLOSE, rtol=0)
        assert (own.overlap == 1).all()
        assert (own.naive_overlap == 1).all()


@pytest.mark.parametrize("spec", [MLP, CNN, GROUPS])
def test_shuffled_copies_are_shared_once_they_are_matched(spec):
    model = lively(spec, 0)
    models = [model, *(planted(model, symmetry(spec), seed)[0] for seed in (1, 2))]
    _, _, units = scored(spec, models)
    for own in units.spaces.values():
        assert own.names == ("A", "B", "C")
        assert set(own.labels) == {SHARED}
        assert own.before.mean() < own.matched.mean()
        assert (own.sources[0] == np.arange(own.sources.shape[1])).all()
        assert (np.sort(own.sources, axis=1) == own.sources[0]).all()


@pytest.mark.parametrize("method", ["weight_matching", "procrustes"])
def test_scores_are_those_of_plain_loops(method):
    models = [trained(MLP, seed) for seed in range(2)]
    naive = isthmus.merge(models)
    alignment, merged, units = scored(MLP, models, method, naive=naive, top=5)
    x = torch.cat([x for x, _ in data_of(MLP)])
    for number, space in enumerate(symmetry(MLP)):
        own = units.spaces[space.name]
        linear = [[m for m in model.modules() if isinstance(m, torch.nn.Linear)] for model in (*models, merged, naive)]

        def before_relu(layers, number=number):
            value = x
            with torch.no_grad():
                for layer in layers[:number]:
                    value = layer(value).relu()
                return layers[number](value).double().numpy()

        a, b, mean, plain = (before_relu(layers) for layers in linear)
        maps = [
            np.asarray(isthmus.symmetry.transform.as_matrix(t[space.name]).into[0], dtype=float)
            for t in alignment.transforms
        ]
        moved = [a @ maps[0].T, b @ maps[1].T]
        for unit in range(space.size):
            assert own.matched[unit] == pytest.approx(pearsonr(moved[0][:, unit], moved[1][:, unit])[0], abs=CLOSE)
            assert own.before[unit] == pytest.approx(pearsonr(a[:, unit], b[:, unit])[0], abs=CLOSE)
            for model in range(2):
                expected = pearsonr(moved[model][:, unit], mean[:, unit])[0]
                assert own.merged[model, unit] == pytest.approx(expected, abs=CLOSE)
                expected = pearsonr((a, b)[model][:, unit], plain[:, unit])[0]
                assert own.naive[model, unit] == pytest.approx(expected, abs=CLOSE)
                both = [set(np.argsort(-values[:, unit])[:5]) for values in (mean, moved[model])]
                assert own.overlap[model, unit] == pytest.approx(len(both[0] & both[1]) / len(both[0] | both[1]))
                both = [set(np.argsort(-values[:, unit])[:5]) for values in (plain, (a, b)[model])]
                assert own.naive_overlap[model, unit] == pytest.approx(len(both[0] & both[1]) / len(both[0] | both[1]))
            ratio = mean[:, unit].std() / np.mean([values[:, unit].std() for values in moved])
            assert own.norm_ratio[unit] == pytest.approx(ratio, rel=1e-4)


def test_labels():
    correlations = torch.tensor([[0.9, 0.9, 0.2, 0.1, 0.9], [0.9, 0.2, 0.9, 0.1, 0.9], [0.9, 0.1, 0.1, 0.1, 0.1]])
    assert _label(correlations, "ABC", 0.5) == (SHARED, "A's", "B's", LOST, "A's and B's")


def test_a_mixture_of_two_unrelated_units_is_lost():
    models = [trained(MLP, seed) for seed in range(2)]
    found = measure_units(models, isthmus.align(models, symmetry(MLP), "identity"), isthmus.merge(models), data_of(MLP))
    last = found.spaces[[space.name for space in symmetry(MLP)][-1]]
    unrelated = last.before.abs() < 0.05
    assert unrelated.any()
    assert SHARED not in {told for told, here in zip(last.labels, unrelated.tolist(), strict=True) if here}


def test_shuffled_units_are_a_floor():
    _, _, units = scored(MLP, [trained(MLP, seed) for seed in range(2)])
    for own in units.spaces.values():
        assert own.shuffled.median() < own.merged.median() - 0.2
        assert own.shuffled_overlap.mean() < own.overlap.mean()


@pytest.mark.parametrize("units", [1, 2, 3, 50])
def test_a_derangement_leaves_no_unit_in_place(units):
    order = _derangement(units, torch.Generator().manual_seed(3))
    assert sorted(order.tolist()) == list(range(units))
    assert units == 1 or not (order == torch.arange(units)).any()


@pytest.mark.parametrize("spec", [MLP, CNN, VGG_BN, GROUPS])
@pytest.mark.parametrize("at", ["pre", "post"])
def test_all_spaces_in_one_pass_answer_as_each_on_its_own(spec, at):
    model, data = lively(spec, 0), images(spec)
    if spec == MLP:
        answers = _respond_everywhere(model, symmetry(spec), data, at)
        assert all(each.shape[0] == sum(len(x) for x, _ in data) for each in answers.values())
        return
    answers = _respond_everywhere(model, symmetry(spec), data, at)
    for space in symmetry(spec):
        alone = respond(model, symmetry(spec), space.name, data, at=at)
        torch.testing.assert_close(answers[space.name], alone, rtol=1e-4, atol=1e-4)  # sums in another order


def test_moves_undo():
    alignment, _, _ = scored(MLP, [trained(MLP, seed) for seed in range(2)], "procrustes")
    values = torch.randn(7, 24, dtype=torch.float64)
    for space in symmetry(MLP):
        move = SlotMap.of(alignment.transforms[1], symmetry(MLP), space)
        torch.testing.assert_close(move.undone(move.of_columns(values)), values)


def test_overlap_of_sets():
    first, second = torch.tensor([[0, 1, 2], [0, 1, 2]]), torch.tensor([[2, 1, 0], [2, 3, 4]])
    assert _overlap(first, second).tolist() == [1.0, 0.2]


def test_the_same_seed_gives_the_same_scores_and_nothing_changes():
    models = [trained(VGG_BN, seed).train() for seed in range(2)]
    states = [copy.deepcopy(model.state_dict()) for model in models]
    first, second = (scored(VGG_BN, models, seed=4)[2] for _ in range(2))
    for name, own in first.spaces.items():
        assert torch.equal(own.merged, second.spaces[name].merged)
        assert torch.equal(own.shuffled, second.spaces[name].shuffled)
    for model, state in zip(models, states, strict=True):
        assert model.training
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
        model.eval()


def test_what_it_cannot_do_is_refused():
    models = [trained(MLP, seed) for seed in range(2)]
    alignment = isthmus.align(models, symmetry(MLP))
    merged = isthmus.merge(models, alignment)
    with refuses(InputError, "1 models, but the alignment holds 2"):
        measure_units(models[:1], alignment, merged, data_of(MLP))
    with refuses(DataError, "top=5000 of 400 images"):
        measure_units(models, alignment, merged, data_of(MLP), top=5000)
    with refuses(InputError, "threshold=1.5"):
        measure_units(models, alignment, merged, data_of(MLP), threshold=1.5)
