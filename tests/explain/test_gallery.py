"""The gallery: which units it picks, that strips show the images they name, and what changes a picture."""

import base64
import io
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import colormaps
from matplotlib.image import imread
from test_questions import units
from torch import nn

import isthmus
from helpers.pairs import MLP, data_of, planted, symmetry
from helpers.refusals import refuses
from isthmus.errors import InputError
from isthmus.explain.gallery import (
    CELLS,
    GROUPS,
    SHOWN,
    SIDE,
    Shown,
    _choose_units,
    _percentiles,
    _picture_uri,
    _smaller,
    draw_gallery,
    draw_matches,
    spaced,
    takes_images,
)
from isthmus.explain.units import MERGED, NAIVE, measure_units
from isthmus.observe.moments import SpaceMoments
from isthmus.symmetry import Alignment

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
PLANTED = 37  # in the second batch
# Pixels are rounded to 1/255, and what a strip shows went through one normalisation and back in float32.
LEVEL = 0.5 / 255 + 1e-5


class Eyes(nn.Module):
    """Two layers on images of 3 × 6 × 6; the first unit of the first answers to the planted image above all."""

    def __init__(self, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first, self.second = nn.Conv2d(3, 9, 6), nn.Linear(9, 5)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            self.first.weight[0] = pixels()[PLANTED] - pixels().mean(dim=0)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)).flatten(1))


def pixels():
    """Sixty dim images of noise and one bright one, in [0, 1]."""
    generator = torch.Generator().manual_seed(5)
    images = 0.4 + 0.1 * torch.rand(60, 3, 6, 6, generator=generator)
    images[PLANTED] = torch.rand(3, 6, 6, generator=generator).round()
    return images


def batches():
    mean, std = (torch.tensor(each)[:, None, None] for each in (MEAN, STD))
    return [(part, torch.zeros(len(part), dtype=torch.long)) for part in ((pixels() - mean) / std).split(25)]


def shown_by(uri: str) -> np.ndarray:
    """The pixels of a data URI, in [0, 1], rows × columns × red, green and blue."""
    head, _, code = uri.partition(",")
    assert head == "data:image/png;base64"
    return imread(io.BytesIO(base64.b64decode(code)))[..., :3]


@pytest.fixture(scope="module")
def scored():
    """Two networks of which both are shuffled into a common frame, what they became, and their units' scores."""
    sym = isthmus.trace(Eyes(0), batches()[0][0][:2])
    models = [Eyes(seed) for seed in (0, 1)]
    rng = np.random.default_rng(3)
    moves = [{space.name: isthmus.Permutation.random(space, rng) for space in sym} for _ in models]
    alignment = Alignment(sym, tuple(moves), method="by hand")
    merged, naive = isthmus.merge(models, alignment), isthmus.merge(models)
    found = measure_units(models, alignment, merged, batches(), naive=naive)
    return SimpleNamespace(
        networks={"A": models[0], "B": models[1], MERGED: merged, NAIVE: naive}, sym=sym, units=found
    )


def drawn(scored, **options):
    return draw_gallery(scored.networks, scored.sym, scored.units, batches(), **{"steps": 1, "each": 1} | options)


# ---- which units


@settings(max_examples=30)
@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=1, max_size=20), st.integers(1, 4))
def test_the_best_the_middle_and_the_worst_are_chosen(scores, each):
    merged = torch.tensor(scores, dtype=torch.float64).T
    found = _choose_units(units(merged.tolist()), each)
    level = merged.min(dim=0).values.tolist()
    groups = {name: [level[unit] for unit, group in found if group == name] for name in GROUPS}
    assert len(dict(found)) == len(found)
    ranked = sorted(level, reverse=True)
    assert groups["best"] == ranked[:each]
    assert sorted(level[unit] for unit, _ in found)[0] == ranked[-1]  # the worst of all is shown, whatever it is called
    if len(scores) >= 3 * each + 1:
        assert groups["worst"] == ranked[-each:]
        # As many units are better as worse, give or take one.
        place = len(scores) // 2 - each // 2
        assert groups["median"] == ranked[place : place + each]
        assert abs(place - (len(scores) - place - each)) <= 1


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 12))
def test_spaces_are_evenly_spaced(count, wanted):
    names = [str(index) for index in range(count)]
    found = [int(name) for name in spaced(names, wanted)]
    assert len(found) == len(set(found)) == min(count, wanted)
    assert found == sorted(found)
    assert found[0] == 0
    assert found[-1] == count - 1 or wanted == 1
    steps = np.diff(found)
    assert len(steps) == 0 or steps.max() - steps.min() <= 1


def test_what_takes_images():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.table(x).relu())

    assert takes_images(isthmus.trace(Eyes(0), batches()[0][0][:2]).graph.program)
    assert not takes_images(symmetry(MLP).graph.program)  # vectors
    assert not takes_images(isthmus.trace(Words(), torch.zeros(2, 5, dtype=torch.long)).graph.program)


# ---- what they show


def test_a_strip_begins_with_the_planted_image(scored):
    gallery = drawn(scored, each=3, mean=MEAN, std=STD)
    own = scored.units.spaces["first"]
    slot = own.sources[0].tolist().index(0)  # where A's unit that answers to the planted image stands
    assert own.top["A"][slot][0] == PLANTED
    assert [entry.unit for entry in gallery.chosen["first"]] == [unit for unit, _ in _choose_units(own, 3)]
    assert slot in {entry.unit for entry in gallery.chosen["first"]}
    strip = shown_by(gallery.pictures["first"][str(slot)]["top"]["A"])
    assert strip.shape == (6, SHOWN * 6 + SHOWN - 1, 3)
    np.testing.assert_allclose(strip[:, :6], pixels()[PLANTED].permute(1, 2, 0), atol=LEVEL)
    np.testing.assert_array_equal(strip[:, 6], 1)  # the gap


def test_every_strip_holds_the_top_images_of_its_unit(scored):
    gallery = drawn(scored, mean=MEAN, std=STD)
    own = scored.units.spaces["first"]
    for text, entry in gallery.pictures["first"].items():
        for network, uri in entry["top"].items():
            # The naive average stands beside A in A's own order.
            row = own.sources[0][int(text)] if network == NAIVE else int(text)
            parts = np.split(shown_by(uri), [k for i in range(1, SHOWN) for k in (7 * i - 1, 7 * i)], axis=1)[::2]
            for part, index in zip(parts, own.top[network][row], strict=False):
                np.testing.assert_allclose(part, pixels()[int(index)].permute(1, 2, 0), atol=LEVEL)


def test_without_statistics_the_range_becomes_black_and_white():
    shown = Shown(batches(), {0, PLANTED, 59}, None, None)
    assert set(shown.images) == {0, PLANTED, 59}
    values = torch.stack(list(shown.images.values()))
    assert (float(values.min()), float(values.max())) == pytest.approx((0, 1), abs=1e-6)


@pytest.mark.parametrize("size", [(6, 6), (64, 64), (65, 20), (224, 224), (28, 130)])
def test_large_images_become_smaller(size):
    image = torch.full((3, *size), 0.25)
    shown = _smaller(image)
    assert max(shown.shape[1:]) <= SIDE
    assert max(size) > SIDE or shown is image
    torch.testing.assert_close(shown, torch.full_like(shown, 0.25))


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_pictures_of_any_number_of_channels(channels):
    image = torch.rand(channels, 4, 5, generator=torch.Generator().manual_seed(0))
    found = shown_by(_picture_uri(image))
    expected = image if channels == 3 else image.mean(dim=0, keepdim=True).expand(3, -1, -1)
    np.testing.assert_allclose(found, expected.permute(1, 2, 0), atol=LEVEL)


def test_percentiles_count_images_that_excite_less():
    answers, usual = torch.tensor([[2.5, 0.0], [0.0, -1.0]]), torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [9, 0]])
    assert _percentiles(answers, usual) == [0.5, 0.0]


def test_a_matched_copy_stands_on_the_diagonal():
    model = isthmus.models.load_model(MLP).eval()
    sym = symmetry(MLP)
    other, _ = planted(model, sym, 1)
    alignment = isthmus.align([model, other], sym, "weight_matching")
    found = measure_units([model, other], alignment, model, data_of(MLP))
    space = next(iter(sym)).name
    own, moments = found.spaces[space], found.moments.spaces[space]
    pictures = {name: shown_by(uri) for name, uri in draw_matches(own, moments).items()}
    correlation = moments.correlation(0, 1).numpy()
    paint = colormaps["RdBu_r"]
    shuffled = correlation[:, own.sources[1]]
    for name, expected in (("before", correlation), ("after", shuffled)):
        np.testing.assert_allclose(pictures[name], paint((expected.clip(-1, 1) + 1) / 2)[..., :3], atol=LEVEL + 1 / 255)
    np.testing.assert_allclose(np.diag(shuffled), 1, atol=1e-5)  # of float32 activations of order one
    assert not np.allclose(np.diag(correlation), 1, atol=0.1)


def test_many_units_are_thinned():
    count = 2 * CELLS + 1
    own = replace(units([[0.0] * count] * 2), sources=np.stack([np.arange(count), np.arange(count)[::-1]]))
    same = torch.eye(count, dtype=torch.float64).repeat(2, 2).reshape(2, count, 2, count)
    moments = SpaceMoments(9, torch.zeros(2, count, dtype=torch.float64), same)
    pictures = draw_matches(own, moments)
    assert all(shown_by(uri).shape[:2] == (CELLS, CELLS) for uri in pictures.values())
    red, white = (colormaps["RdBu_r"]((value + 1) / 2)[:3] for value in (1, 0))
    found = shown_by(pictures["after"])
    for index in (0, 50, CELLS - 1):
        np.testing.assert_allclose(found[index, CELLS - 1 - index], red, atol=2 / 255)
    np.testing.assert_allclose(found[0, 0], white, atol=2 / 255)


# ---- seeds, and what it cannot do


def test_the_same_seed_gives_the_same_bytes_and_another_another_picture(scored):
    before = [{name: t.clone() for name, t in m.state_dict().items()} for m in scored.networks.values()]
    state = torch.random.get_rng_state()
    first, again, other = (drawn(scored, seed=seed) for seed in (1, 1, 2))
    assert (first.chosen, first.pictures) == (again.chosen, again.pictures)
    assert torch.equal(torch.random.get_rng_state(), state)
    for model, kept in zip(scored.networks.values(), before, strict=True):
        assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    for text, entry in first.pictures["first"].items():
        changed = other.pictures["first"][text]
        assert changed["top"] == entry["top"]  # what the data hold does not depend on the seed
        assert changed["pictures"]["A"] != entry["pictures"]["A"]


def test_pictures_are_of_all_networks_and_cross_activations_of_all_models(scored):
    gallery = drawn(scored)
    assert list(gallery.pictures) == list(gallery.chosen) == ["first"]
    for entry in gallery.chosen["first"]:
        assert len(entry.cross_activation) == len(entry.naive_cross_activation) == 2
        assert all(0 <= share <= 1 for share in (*entry.cross_activation, *entry.naive_cross_activation))
    for entry in gallery.pictures["first"].values():
        assert list(entry["pictures"]) == list(entry["top"]) == ["A", "B", MERGED, NAIVE]
        assert all(shown_by(uri).shape == (6, 6, 3) for uri in entry["pictures"].values())
    assert drawn(scored, spaces=["none such"]).pictures == {}


def test_what_it_cannot_draw_is_refused(scored):
    with refuses(InputError, "each=0"):
        drawn(scored, each=0)
    with refuses(InputError, "take no images"):
        draw_gallery(scored.networks, symmetry(MLP), scored.units, data_of(MLP))
