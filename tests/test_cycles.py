import itertools
import json
import math
from typing import ClassVar

import numpy as np
import pytest
import torch

import isthmus
from helpers.pairs import CNN, MLP, data_of, lively, planted, symmetry, trained
from helpers.refusals import refuses
from helpers.zoo import ZOO as STRUCTURES
from isthmus.errors import DataError, InputError
from isthmus.match.base import Match, identity_transforms
from isthmus.match.weight_matching import WeightMatching
from isthmus.measure.cycles import CycleError, cycle_error, pairwise_barriers
from isthmus.symmetry import LinearMap, Permutation

ALL_TO_ONE = WeightMatching(restarts=1, many="all_to_one")


class Drawn(Match):
    """A method that gives every ordered pair of models its own random permutations, without looking at them."""

    name: ClassVar[str] = "drawn"
    exact: ClassVar[bool] = True

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.given = []

    def __call__(self, problem):
        drawn = {space.name: Permutation.random(space, self.rng) for space in problem.symmetry}
        self.given.append(drawn)
        return isthmus.Alignment(problem.symmetry, (identity_transforms(problem.symmetry), drawn), self.name)


class Turned(Drawn):
    """As `Drawn`, by matrices that are no permutations."""

    def __call__(self, problem):
        drawn = {}
        for space in problem.symmetry:
            into = torch.from_numpy(self.rng.standard_normal((space.copies, space.size, space.size)))
            drawn[space.name] = LinearMap(into, torch.linalg.inv(into))
        self.given.append(drawn)
        return isthmus.Alignment(problem.symmetry, (identity_transforms(problem.symmetry), drawn), self.name)


def test_where_all_models_are_one_nothing_is_lost():
    model, sym = lively(CNN, 0), symmetry(CNN)
    models = [model, planted(model, sym, 1)[0], planted(model, sym, 2)[0], model]
    found = cycle_error(models, sym)
    assert found.share_lost == found.distance == 0
    assert len(found.triangles) == 8
    assert set(found.triangles) == {t for t in itertools.permutations(range(4), 3) if t[0] == min(t)}


def test_networks_that_were_never_trained_have_little_in_common():
    models = [lively(MLP, seed) for seed in range(3)]
    found = cycle_error(models, symmetry(MLP), WeightMatching(restarts=1))
    assert found.method == "weight_matching?restarts=1"
    # Three matchings of noise with noise: a unit comes back by chance, one in 24 of them.
    assert 0.5 < found.share_lost <= 1


def matrices(given, name: str) -> dict[tuple[int, int], np.ndarray]:
    """What was drawn for each ordered pair, as matrices from the first model to the second."""
    found = {}
    for pair, transforms in zip(itertools.permutations(range(3), 2), given, strict=True):
        transform = transforms[name]
        into = transform.into[0].numpy() if isinstance(transform, LinearMap) else np.eye(24)[transform.indices[0]]
        found[pair] = into
    return found


@pytest.mark.parametrize("method", [Drawn, Turned])
def test_maps_are_composed_around_triangles_as_matrices_are(method):
    drawn = method(3)
    models = [lively(MLP, seed) for seed in range(3)]
    found = cycle_error(models, symmetry(MLP), drawn)
    assert found.triangles == ((0, 1, 2), (0, 2, 1))
    for space in symmetry(MLP):
        maps = matrices(drawn.given, space.name)
        for index, (a, b, c) in enumerate(found.triangles):
            around = maps[c, a] @ maps[b, c] @ maps[a, b]
            away = np.linalg.norm(around - np.eye(24)) / math.sqrt(24)
            assert found.distances[space.name][index] == pytest.approx(away, rel=1e-9)
            if method is Drawn:
                assert found.lost[space.name][index] == np.mean(np.diag(around) == 0)
    assert bool(found.lost) == (method is Drawn)


class Exchanged(Drawn):
    """Exchanges the copies of all nested spaces between models 0 and 1, and moves nothing else."""

    def __init__(self, linear: bool):
        super().__init__(0)
        self.linear = linear

    def __call__(self, problem):
        own = {}
        for space in problem.symmetry:
            own[space.name] = Permutation.identity(space)
            if problem.symmetry.children(space) and not self.given:
                own[space.name] = Permutation(np.roll(np.arange(space.size), 1))
            if self.linear and space.parent is not None:
                eye = torch.eye(space.size, dtype=torch.float64).repeat(space.copies, 1, 1)
                own[space.name] = LinearMap(eye, eye)
        self.given.append(own)
        return isthmus.Alignment(problem.symmetry, (identity_transforms(problem.symmetry), own), self.name)


@pytest.mark.parametrize("linear", [False, True])
def test_units_of_a_copy_that_moved_are_lost(linear):
    torch.manual_seed(0)
    models = [STRUCTURES["Attention"]().eval() for _ in range(3)]
    sym = isthmus.trace(models[0], models[0].inputs()[0][0])
    nested = [space for space in sym if space.parent is not None]
    assert nested
    found = cycle_error(models, sym, Exchanged(linear))
    for space in nested:  # 0 → 1 is walked by the first triangle only
        assert found.distances[space.name] == pytest.approx((math.sqrt(2), 0.0))
        assert found.lost.get(space.name) == (None if linear else (1.0, 0.0))


def test_linear_maps_have_a_distance_and_no_share():
    models = [trained(MLP, seed) for seed in range(3)]
    found = cycle_error(models, symmetry(MLP), "procrustes", data_of(MLP))
    assert found.lost == {}
    assert math.isnan(found.share_lost)
    assert found.to_dict()["share_lost"] is None
    assert 0 < found.distance <= 2  # ‖Q − I‖_F / √n of an orthogonal Q is 2 at most


def test_the_figures_are_plain_json():
    found = CycleError("m", ((0, 1, 2), (0, 2, 1)), {"a": (0.5, 1.0), "b": (0.0, 0.5)}, {"a": (1.0, math.sqrt(2))})
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["share_lost"] == 0.5
    assert told["distance"] == pytest.approx((1 + math.sqrt(2)) / 2)
    assert told["triangles"] == [[0, 1, 2], [0, 2, 1]]
    assert told["lost"] == {"a": [0.5, 1.0], "b": [0.0, 0.5]}
    assert CycleError("m", ()).to_dict()["distance"] is None


@pytest.mark.parametrize("name", [MLP, CNN])
def test_every_pair_of_moved_models_is_connected(name):
    models = [trained(name, seed) for seed in range(3)]
    found = isthmus.align(models, symmetry(name), ALL_TO_ONE)
    curves = pairwise_barriers(models, found, data_of(name)[:1], data_of(name)[1:2], 3)
    assert list(curves) == [(0, 1), (0, 2), (1, 2)]
    for (a, b), curve in curves.items():
        moved = [isthmus.apply(found, models[index], index) for index in (a, b)]
        assert curve == isthmus.connect(*moved, data_of(name)[:1], 3, calibration=data_of(name)[1:2])


def test_state_dicts_are_as_good_as_modules():
    models = [trained(MLP, seed) for seed in range(3)]
    states = [model.state_dict() for model in models]
    found = isthmus.align(models, symmetry(MLP), ALL_TO_ONE)
    told = [pairwise_barriers(each, found, data_of(MLP)[:1], points=2, module=models[0]) for each in (models, states)]
    assert told[0] == told[1]
    errors = [cycle_error(each, symmetry(MLP), ALL_TO_ONE, module=models[0]) for each in (models, states)]
    assert errors[0] == errors[1]


def test_what_does_not_fit_is_refused():
    models = [lively(CNN, seed) for seed in range(2)]
    with refuses(InputError, "2 models: a cycle needs three"):
        cycle_error(models, symmetry(CNN))
    found = isthmus.align(models, symmetry(CNN), "identity")
    with refuses(InputError, "1 models, and an alignment of 2"):
        pairwise_barriers(models[:1], found, data_of(CNN))
    with refuses(DataError, "give calibration="):
        pairwise_barriers(models, found, data_of(CNN))
    with refuses(DataError, "needs data"):
        cycle_error([*models, models[0]], symmetry(CNN), "activation_matching")
