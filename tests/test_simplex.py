"""The simplex of several models, and the plane through three: what lies where, and that it is what a merge is."""

import copy
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import isthmus
from helpers.pairs import CNN, MLP, data_of, fresh, learnt, lively, trained
from helpers.refusals import refuses
from isthmus.errors import DataError, InputError, ModelError
from isthmus.measure.simplex import (
    Plane,
    Simplex,
    _barycentric,
    _face_centres,
    _grid_lines,
    _plane_coordinates,
    _triangle_grid,
)
from oracles import git_rebasin as oracle


def three(name: str) -> list[nn.Module]:
    return [trained(name, seed) for seed in range(3)]


def simplex_of(losses, accuracies=(), coefficients=None) -> Simplex:
    places = tuple(coefficients or _triangle_grid(3))
    return Simplex(places, tuple(losses), tuple(accuracies), tuple(losses), tuple(accuracies), None)


# Where it is measured


@pytest.mark.parametrize("points", [2, 3, 4, 5, 6, 7, 8])
def test_the_grid_of_a_triangle(points):
    places = _triangle_grid(points)
    grid = points * (points + 1) // 2
    assert len(places) == len(set(places)) == grid + ((points - 1) % 3 != 0)
    assert all(sum(place) == pytest.approx(1) and min(place) >= 0 for place in places)
    assert {place for place in places if 1.0 in place} == {(1, 0, 0), (0, 1, 0), (0, 0, 1)}
    assert any(place == pytest.approx((1 / 3, 1 / 3, 1 / 3)) for place in places)
    for model in range(3):
        on_edge = sorted(place[(model + 1) % 3] for place in places if place[model] == 0)
        assert on_edge == [index / (points - 1) for index in range(points)]


@pytest.mark.parametrize(("models", "places"), [(3, 7), (4, 15), (5, 26), (6, 42)])
def test_the_faces_of_more_models(models, places):
    found = _face_centres(models)
    assert len(found) == len(set(found)) == places
    for place in found:
        counting = [c for c in place if c]
        assert counting == [1 / len(counting)] * len(counting)
        assert len(counting) in (1, 2, 3, models)


# The figures


def test_the_barrier_is_the_largest_rise_above_the_mixed_vertices():
    # Places of triangle_grid(3): A, ½A+½B, ½A+½C, B, ½B+½C, C, centre.
    simplex = simplex_of([1.0, 3.0, 2.0, 2.0, 3.5, 3.0, 5.0], [0.9, 0.5, 0.8, 0.8, 0.7, 0.7, 0.2])
    assert simplex.barrier == pytest.approx(5.0 - 2.0)
    assert simplex.centre_barrier == pytest.approx(3.0)
    assert simplex.error_barrier == pytest.approx(0.8 - 0.2)
    assert simplex.centre_error_barrier == pytest.approx(0.6)
    beside = simplex_of([1.0, 4.0, 2.0, 2.0, 2.5, 3.0, 2.0])
    assert beside.barrier == pytest.approx(4.0 - 1.5)
    assert beside.centre_barrier == pytest.approx(0.0)
    assert math.isnan(beside.error_barrier)
    assert math.isnan(beside.centre_error_barrier)
    below = simplex_of([1.0, 0.5, 0.5, 1.0, 0.5, 1.0, 0.1])
    assert below.barrier == 0
    assert below.centre_barrier == pytest.approx(-0.9)


def test_a_loss_that_is_not_a_number_is_no_low_barrier():
    for place in range(7):
        losses = [1.0] * 7
        losses[place] = math.nan
        assert math.isnan(simplex_of(losses).barrier)
    assert simplex_of([1.0] * 6 + [math.inf]).barrier == math.inf


@given(st.lists(st.floats(-100, 100), min_size=4, max_size=4))
def test_a_loss_that_is_linear_in_the_coefficients_has_no_barrier(vertices):
    coefficients = tuple(_face_centres(4))
    losses = [math.fsum(c * v for c, v in zip(place, vertices, strict=True)) for place in coefficients]
    simplex = simplex_of(losses, coefficients=coefficients)
    # Sums of numbers below 100, whose rounding is 1e-14.
    assert abs(simplex.barrier) < 1e-12
    assert simplex.coefficients[simplex.centre] == (0.25,) * 4


def test_a_simplex_is_plain_json():
    told = simplex_of([1.0, 3.0, 2.0, 2.0, 3.5, 3.0, 5.0], [0.9] * 7).to_dict()
    again = json.loads(json.dumps(told))
    assert again == told
    assert again["barrier"] == pytest.approx(3.0)
    assert again["coefficients"][1] == [0.5, 0.5, 0.0]
    assert again["repair"] is None


# On models


@pytest.mark.parametrize("repair", ["reset", None])
def test_every_place_is_the_merge_with_those_coefficients(repair):
    models, data, calibration = three(CNN), data_of(CNN, "test", 200), data_of(CNN)[:2]
    simplex = isthmus.walk_simplex(models, data, 3, repair, calibration)
    assert simplex.repair == repair
    assert len(simplex.losses) == 7
    for place, coefficients in enumerate(simplex.coefficients):
        merged = isthmus.merge(models, coefficients=coefficients)
        raw = isthmus.evaluate(merged, data)
        assert (simplex.raw_losses[place], simplex.raw_accuracies[place]) == (raw.loss, raw.accuracy)
        mended = isthmus.evaluate(isthmus.repair(merged, calibration) if repair else merged, data)
        assert (simplex.losses[place], simplex.accuracies[place]) == (mended.loss, mended.accuracy)
    for seed, model in enumerate(models):
        vertex = simplex.coefficients.index(tuple(float(m == seed) for m in range(3)))
        assert simplex.raw_losses[vertex] == isthmus.evaluate(model, data).loss
    assert simplex.coefficients[simplex.centre] == (1 / 3,) * 3
    centre = isthmus.evaluate(isthmus.merge(models), data)
    assert simplex.raw_losses[simplex.centre] == centre.loss


@pytest.mark.parametrize(("name", "points"), [(MLP, 5), (CNN, 3)])
def test_an_edge_is_what_connect_measures(name, points):
    models, data, calibration = three(name), data_of(name, "test", 200), data_of(name)[:2]
    simplex = isthmus.walk_simplex(models, data, points, calibration=calibration)
    for a, b in itertools.permutations(range(3), 2):
        curve = isthmus.connect(models[a], models[b], data, points, calibration=calibration)
        edge = simplex.edge(a, b)
        if a < b:
            assert edge == curve
        else:  # the same weights, summed in another order
            assert edge.lambdas == curve.lambdas
            assert edge.losses == pytest.approx(curve.losses, rel=1e-5)
        assert edge.barrier <= simplex.barrier + 1e-12


def test_the_grid_is_the_oracles():
    models = three(MLP)
    simplex = isthmus.walk_simplex(models, data_of(MLP)[:1], 4)
    assert (1 / 3, 1 / 3, 1 / 3) in simplex.coefficients
    states = [model.state_dict() for model in models]
    for place, loss in zip(simplex.coefficients, simplex.losses, strict=True):
        mixed = copy.deepcopy(models[0])
        mixed.load_state_dict({k: sum(c * s[k] for c, s in zip(place, states, strict=True)) for k in states[0]})
        # Weights summed in float32 here: 1e-7 of each, through three layers.
        assert loss == pytest.approx(oracle.mean_loss(mixed, data_of(MLP)[:1]), rel=1e-4)


@pytest.mark.parametrize("name", [MLP, CNN])
def test_between_copies_of_one_model_there_is_no_barrier(name):
    model = trained(name, 0)
    copies = [model, copy.deepcopy(model), copy.deepcopy(model).state_dict()]
    simplex = isthmus.walk_simplex(copies, data_of(name)[:1], calibration=data_of(name)[:1])
    assert len(simplex.coefficients) == 16
    assert len(set(simplex.losses)) == len(set(simplex.accuracies)) == 1
    # The coefficients sum to one but for rounding.
    assert abs(simplex.barrier) < 1e-12
    assert abs(simplex.centre_barrier) < 1e-12
    assert abs(simplex.error_barrier) < 1e-12


def test_permuting_the_models_permutes_the_coefficients():
    models, data, calibration = three(CNN), data_of(CNN)[:1], data_of(CNN)[:1]
    simplex = isthmus.walk_simplex(models, data, 3, calibration=calibration)
    for order in ((1, 2, 0), (1, 0, 2)):
        turned = isthmus.walk_simplex([models[m] for m in order], data, 3, calibration=calibration)
        for place, loss, raw in zip(turned.coefficients, turned.losses, turned.raw_losses, strict=True):
            own = [0.0] * 3
            for slot, model in enumerate(order):
                own[model] = place[slot]
            there = simplex.coefficients.index(tuple(own))
            # The same weights, summed in another order: the last bit of a float32.
            assert loss == pytest.approx(simplex.losses[there], rel=1e-5)
            assert raw == pytest.approx(simplex.raw_losses[there], rel=1e-5)
        assert turned.barrier == pytest.approx(simplex.barrier, rel=1e-4)


def test_more_than_three_models():
    models = [lively(MLP, seed) for seed in range(4)]
    data = data_of(MLP)[:1]
    simplex = isthmus.walk_simplex(models, data)
    assert (simplex.models, len(simplex.losses), simplex.centre) == (4, 15, 14)
    assert simplex.losses[-1] == isthmus.evaluate(isthmus.merge(models), data).loss
    assert simplex.edge(1, 3) == isthmus.connect(models[1], models[3], data, 3)


def test_state_dicts_and_losses_of_ones_own():
    models = [lively(MLP, seed) for seed in range(3)]
    data = [(x, torch.ones(len(x), 10)) for x, _ in data_of(MLP)[:1]]
    simplex = isthmus.walk_simplex(models, data, 3, loss=F.mse_loss)
    assert simplex.accuracies == ()
    assert simplex.edge(0, 2).accuracies == ()
    states = [model.state_dict() for model in models]
    assert isthmus.walk_simplex(states, data, 3, loss=F.mse_loss, module=fresh(MLP, 9)) == simplex


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_precision(dtype):
    models = [copy.deepcopy(model).to(dtype) for model in three(MLP)]
    data = data_of(MLP)[:1]
    single = isthmus.walk_simplex(three(MLP), data, 3)
    simplex = isthmus.walk_simplex(models, data, 3)
    # bfloat16 has 8 bits
    assert simplex.losses == pytest.approx(single.losses, rel=2e-2)
    plane = isthmus.walk_plane(models, data, 2, 0.0)
    assert plane.losses[0][0] == simplex.losses[0]


def test_nothing_is_changed_and_the_same_call_gives_the_same():
    models = [copy.deepcopy(model).train() for model in three(CNN)]
    before = [copy.deepcopy(model.state_dict()) for model in models]
    rng = torch.get_rng_state()
    data = data_of(CNN)[:1]
    walks = [isthmus.walk_simplex(models, data, 2, calibration=data) for _ in range(2)]
    planes = [isthmus.walk_plane(models, data, 2, calibration=data) for _ in range(2)]
    assert walks[0] == walks[1]
    assert planes[0] == planes[1]
    assert torch.equal(rng, torch.get_rng_state())
    for model, state in zip(models, before, strict=True):
        assert model.training
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_matching_lowers_the_barrier_of_three_trained_models():
    models = [learnt(MLP, seed) for seed in range(3)]
    symmetry = isthmus.trace(models[0], data_of(MLP)[0][0])
    alignment = isthmus.align(models, symmetry)
    moved = [isthmus.apply(alignment, model, index) for index, model in enumerate(models)]
    naive, aligned = (isthmus.walk_simplex(each, data_of(MLP), 3) for each in (models, moved))
    assert 0 < aligned.barrier < naive.barrier - 0.3  # measured: 1.2 and 2.3
    assert 0 < aligned.centre_barrier < naive.centre_barrier - 0.3  # 1.2 and 2.0


# The plane


def distance(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return math.sqrt(sum(float((p.detach().double() - q.detach().double()).square().sum()) for p, q in pairs))


@pytest.mark.parametrize("name", [MLP, CNN])
def test_coordinates_keep_the_distances_of_the_models(name):
    models = three(name)
    corners = _plane_coordinates(models)
    assert corners[0] == (0, 0)
    assert corners[1][1] == 0
    for a, b in itertools.combinations(range(3), 2):
        assert math.dist(corners[a], corners[b]) == pytest.approx(distance(models[a], models[b]), rel=1e-12)


def test_running_statistics_count_for_no_distance():
    models = [copy.deepcopy(model) for model in three(CNN)]
    corners = _plane_coordinates(models)
    models[1].features[1].running_mean += 5
    assert _plane_coordinates(models) == corners


def test_the_models_stand_on_the_grid():
    models, data, calibration = three(CNN), data_of(CNN, "test", 100), data_of(CNN)[:1]
    plane = isthmus.walk_plane(models, data, 4, calibration=calibration)
    (width, height), corners = (plane.models[1][0], plane.models[2][1]), plane.models
    simplex = isthmus.walk_simplex(models, data, 2, calibration=calibration)
    for model, (x, y) in enumerate(corners):
        column, row = (
            min(range(len(g)), key=lambda i, g=g, v=v: abs(g[i] - v)) for g, v in ((plane.x, x), (plane.y, y))
        )
        assert abs(plane.x[column] - x) <= 1e-6 * width
        assert abs(plane.y[row] - y) <= 1e-6 * height
        vertex = simplex.coefficients.index(tuple(float(m == model) for m in range(3)))
        # C's own coefficients carry the rounding of its coordinates, 1e-16.
        assert plane.losses[row][column] == pytest.approx(simplex.losses[vertex], rel=1e-5)
    low, high = min(x for x, _ in corners), max(x for x, _ in corners)
    assert (plane.x[0], plane.x[-1]) == pytest.approx((low - 0.25 * (high - low), high + 0.25 * (high - low)))
    assert (plane.y[0], plane.y[-1]) == pytest.approx((-0.25 * height, 1.25 * height))
    for grid in (plane.losses, plane.accuracies):
        assert [len(row) for row in grid] == [len(plane.x)] * len(plane.y)
    assert json.loads(json.dumps(plane.to_dict())) == plane.to_dict()


def test_a_point_of_the_plane_is_what_its_definition_says():
    """Against Garipov et al.'s own words: û = B − A, v̂ = (C − A) − <C − A, û> û / ‖û‖², both scaled to length one."""
    models, data = three(MLP), data_of(MLP)[:1]
    plane = isthmus.walk_plane(models, data, 3)
    a, b, c = (nn.utils.parameters_to_vector(model.parameters()).detach().double() for model in models)
    u = b - a
    v = (c - a) - ((c - a) @ u) / (u @ u) * u
    for row, column in ((0, 0), (-1, -1), (1, 1)):
        point = a + plane.x[column] * u / u.norm() + plane.y[row] * v / v.norm()
        there = copy.deepcopy(models[0])
        nn.utils.vector_to_parameters(point.float(), there.parameters())
        assert plane.losses[row][column] == pytest.approx(isthmus.evaluate(there, data).loss, rel=1e-5)
        coefficients = plane.coefficients(plane.x[column], plane.y[row])
        assert sum(coefficients) == pytest.approx(1)
        assert min(coefficients) < 0 or (row, column) == (1, 1)


@given(st.floats(0.1, 10), st.floats(-10, 10), st.floats(0.1, 10), st.floats(-20, 20), st.floats(-20, 20))
def test_barycentric_coefficients_give_the_point_back(width, along, height, x, y):
    corners = ((0.0, 0.0), (width, 0.0), (along, height))
    found = _barycentric(corners, x, y)
    back = [sum(c * corner[axis] for c, corner in zip(found, corners, strict=True)) for axis in (0, 1)]
    # Numbers up to 20 · 10 / 0.1² / … stay below 1e5, whose rounding is 1e-11.
    assert back == pytest.approx([x, y], abs=1e-8)
    for m, corner in enumerate(corners):
        assert _barycentric(corners, *corner) == pytest.approx([float(m == n) for n in range(3)], abs=1e-12)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=3), st.integers(2, 12), st.floats(0, 1))
def test_grid_lines_run_through_the_models_and_are_about_evenly_spaced(through, points, margin):
    low, high = min(through), max(through)
    if high - low < 1e-3:
        return
    lines = _grid_lines(through, points, margin)
    assert list(lines) == sorted(set(lines))
    assert set(through) <= set(lines)
    assert lines[0] == pytest.approx(low - margin * (high - low))
    assert lines[-1] == pytest.approx(high + margin * (high - low))
    assert len(lines) <= points + len(through)
    step = (high - low) * (1 + 2 * margin) / (points - 1)
    # The even place after a model's is less than 1.5 steps away; where it gives way, it is to a model half a step off.
    assert max(b - a for a, b in itertools.pairwise(lines)) <= 2 * step + 1e-9


# Refusals

MODEL, DATA = fresh(CNN, 0), data_of(CNN)[:1]
GOOD = {"models": [fresh(CNN, seed) for seed in range(3)], "data": DATA, "calibration": DATA}
EVERYWHERE = {
    "two models": ({"models": [MODEL, MODEL]}, InputError, "2 models: a (simplex needs|plane runs through) three"),
    "no models": ({"models": []}, InputError, "no models"),
    "one point": ({"points": 1}, InputError, "points=1: .* needs .*two"),
    "no calibration": ({"calibration": None}, DataError, "give calibration="),
    "a generator to calibrate": ({"calibration": (x for x in DATA)}, DataError, "only once"),
    "empty calibration": ({"calibration": []}, DataError, "data is empty"),
    "no data": ({"data": None}, DataError, "no data"),
    "a generator": ({"data": (x for x in DATA)}, DataError, "only once"),
    "no targets": ({"data": [DATA[0][0]]}, DataError, "has no targets"),
    "another architecture": ({"models": [MODEL, MODEL, fresh(MLP, 0)]}, ModelError, "model 2"),
    "only state dicts": ({"models": [MODEL.state_dict()] * 3}, InputError, "give module="),
}
OF_SIMPLEX = {
    "REPAIR": ({"repair": "repair"}, InputError, "'reset' or left as they are"),
    "a grid of four models": ({"models": [MODEL] * 4, "points": 3}, InputError, "points=3 with 4 models"),
}
OF_PLANE = {
    "four models": ({"models": [MODEL] * 4}, InputError, "4 models: a plane runs through three"),
    "one model thrice": ({"models": [MODEL] * 3}, InputError, "on one line or on one point"),
    "C on A": ({"models": [MODEL, fresh(CNN, 1), MODEL]}, InputError, "on one line or on one point"),
    "a negative margin": ({"margin": -0.1}, InputError, "margin=-0.1"),
    "no margin": ({"margin": math.nan}, InputError, "margin=nan"),
}


@pytest.mark.parametrize("what", EVERYWHERE | OF_SIMPLEX)
def test_the_simplex_refuses(what):
    changed, kind, told = (EVERYWHERE | OF_SIMPLEX)[what]
    with refuses(kind, told):
        isthmus.walk_simplex(**{**GOOD, **changed})


@pytest.mark.parametrize("what", EVERYWHERE | OF_PLANE)
def test_the_plane_refuses(what):
    changed, kind, told = (EVERYWHERE | OF_PLANE)[what]
    with refuses(kind, told):
        isthmus.walk_plane(**{**GOOD, **changed})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_models_on_one_line_are_refused_in_any_precision(dtype):
    """Their mean, rounded to the precision that they are in, is no third direction."""
    a, b = (copy.deepcopy(lively(MLP, seed)).to(dtype) for seed in range(2))
    middle = isthmus.merge([a, b])
    with refuses(InputError, "on one line"):
        isthmus.walk_plane([a, b, middle], data_of(MLP)[:1])


def test_an_edge_needs_two_models_of_the_simplex():
    simplex = simplex_of([1.0] * 7)
    for a, b in ((0, 0), (0, 3), (-1, 1)):
        with refuses(InputError, "name two different models, numbered 0 to 2"):
            simplex.edge(a, b)


def test_without_classes_a_plane_has_no_accuracies():
    models = [lively(MLP, seed) for seed in range(3)]
    data = [(x, torch.ones(len(x), 10)) for x, _ in data_of(MLP)[:1]]
    plane = isthmus.walk_plane(models, data, 2, 0.0, loss=F.mse_loss)
    assert isinstance(plane, Plane)
    assert plane.accuracies == ()
    assert plane.losses[0][0] == isthmus.evaluate(models[0], data, loss=F.mse_loss).loss
