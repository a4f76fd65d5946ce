"""Transforms form a group that acts on state dicts: there and back changes no bit, and acting twice is acting once."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import isthmus
from helpers.refusals import refuses
from helpers.zoo import ZOO, built, traced
from isthmus.errors import InputError, ModelError, TransformError
from isthmus.symmetry import Alignment, Group, LinearMap, Permutation, Site, Space, Symmetry
from isthmus.symmetry.transform import as_matrix, compose, invert, move_state
from isthmus.tracing.proof import _stirred

EPS64, EPS32 = (float(torch.finfo(dtype).eps) for dtype in (torch.float64, torch.float32))
SEEDS = st.integers(0, 2**32 - 1)
NESTED = ["GroupNormResidual", "GroupedConv", "GroupedShuffle", "Attention", "GroupedQueries", "Repeat", "ShuffleUnits"]
laws = settings(max_examples=25)


SIZES = st.tuples(*[st.integers(1, 3)] * 4, st.integers(1, 2))


def nested(sizes: tuple[int, ...], seed: int) -> tuple[Symmetry, dict[str, torch.Tensor]]:
    """A plain space and three nested ones, on tensors that hold them in any order and along several dimensions."""
    a, b, c, d, repeat = sizes
    rng = np.random.default_rng(seed)

    def sites(tensor: str, dims: tuple[int, ...], places: np.ndarray) -> dict[str, Site]:
        units = places.reshape(a, b, c, repeat)
        layouts = {"outer": (1, a, -1), "middle": (a, b, -1), "inner": (a * b, c, -1)}
        return {name: Site(tensor, dims, units.reshape(layout), "vector") for name, layout in layouts.items()}

    count = a * b * c * repeat
    flat = sites("flat", (0,), rng.permutation(count))
    # The same units spread over dimensions 0 and 2 of a tensor, in another order; the plain space lies along 1.
    spread = sites("spread", (0, 2), rng.permutation(count))
    plain = Site("spread", (1,), rng.permutation(d).reshape(1, d, 1), "covector")
    shapes = {"flat": (count, 2), "spread": (a * b, d, c * repeat), "other": (3,)}
    group = Group.PERMUTATION
    spaces = (
        Space("plain", d, group, (plain,)),
        Space("outer", a, group, (flat["outer"], spread["outer"])),
        Space("middle", b, group, (flat["middle"], spread["middle"]), "outer", a),
        Space("inner", c, group, (flat["inner"], spread["inner"]), "middle", a * b),
    )
    state = {name: torch.from_numpy(rng.normal(size=shape)) for name, shape in shapes.items()}
    return Symmetry(spaces, (), shapes), state


def drawn(symmetry: Symmetry, seed: int) -> dict[str, Permutation]:
    rng = np.random.default_rng(seed)
    return {space.name: Permutation.random(space, rng) for space in symmetry}


def identities(symmetry: Symmetry) -> dict[str, Permutation]:
    return {space.name: Permutation.identity(space) for space in symmetry}


def same(a, b) -> bool:
    """Whether two sets of permutations are equal."""
    return a.keys() == b.keys() and all(np.array_equal(a[name].indices, b[name].indices) for name in a)


def equal(a, b) -> bool:
    """Whether two state dicts are equal bit by bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def outputs(model: nn.Module, name: str) -> list[torch.Tensor]:
    args, kwargs = built(name).inputs(seed=3)
    with torch.no_grad():
        out = model.eval()(*args, **kwargs)
    return list(out.values()) if isinstance(out, dict) else list(out) if isinstance(out, tuple) else [out]


# Permutations


@laws
@given(SIZES, SEEDS)
def test_inverse_undoes(sizes, seed):
    symmetry, state = nested(sizes, 0)
    transforms = drawn(symmetry, seed)
    back = invert(transforms, symmetry)
    assert equal(move_state(move_state(state, transforms, symmetry), back, symmetry), state)
    assert equal(move_state(move_state(state, back, symmetry), transforms, symmetry), state)
    assert same(invert(back, symmetry), transforms)


@laws
@given(SIZES, SEEDS, SEEDS)
def test_composition_acts_as_one_after_the_other(sizes, first, second):
    symmetry, state = nested(sizes, 0)
    a, b = drawn(symmetry, first), drawn(symmetry, second)
    twice = move_state(move_state(state, a, symmetry), b, symmetry)
    assert equal(move_state(state, compose(b, a, symmetry), symmetry), twice)


@laws
@given(SIZES, SEEDS, SEEDS, SEEDS)
def test_composition_is_that_of_a_group(sizes, first, second, third):
    symmetry, _ = nested(sizes, 0)
    a, b, c = (drawn(symmetry, seed) for seed in (first, second, third))
    one = identities(symmetry)
    assert same(compose(c, compose(b, a, symmetry), symmetry), compose(compose(c, b, symmetry), a, symmetry))
    assert same(compose(one, a, symmetry), a)
    assert same(compose(a, one, symmetry), a)
    assert same(compose(invert(a, symmetry), a, symmetry), one)
    assert same(invert(compose(b, a, symmetry), symmetry), compose(invert(a, symmetry), invert(b, symmetry), symmetry))


@laws
@given(SIZES, SEEDS)
def test_every_site_of_a_space_moves_alike(sizes, seed):
    """Labels written at the sites say where each unit went: `indices[i] = j` puts unit j into slot i."""
    symmetry, state = nested(sizes, 0)
    transforms = drawn(symmetry, seed)
    where = {"outer": np.arange(1)}
    for parent, child in (("outer", "middle"), ("middle", "inner"), ("inner", None)):
        indices = transforms[parent].indices
        flat = (where[parent][:, None] * indices.shape[1] + indices).ravel()
        if child:
            where[child] = flat
        for site in symmetry[parent].sites:
            tensor = torch.full_like(state[site.parameter], -1)
            lengths = [tensor.shape[dim] for dim in site.dims]
            at = np.unravel_index(site.positions.reshape(len(flat), -1), lengths)
            labels = torch.arange(len(flat)).double()
            index = [slice(None)] * tensor.ndim
            for dim, places in zip(site.dims, at, strict=True):
                index[dim] = torch.from_numpy(places)
            tensor = tensor.movedim(site.dims, tuple(range(len(site.dims))))
            tensor[tuple(torch.from_numpy(places) for places in at)] = labels.reshape(
                -1, 1, *[1] * (tensor.ndim - len(site.dims))
            )
            tensor = tensor.movedim(tuple(range(len(site.dims))), site.dims)
            moved = move_state({**state, site.parameter: tensor}, transforms, symmetry)[site.parameter]
            read = moved.movedim(site.dims, tuple(range(len(site.dims))))[tuple(torch.from_numpy(p) for p in at)]
            expected = torch.from_numpy(flat).double().reshape(-1, 1, *[1] * (read.ndim - 2)).expand_as(read)
            assert torch.equal(read, expected)


@laws
@given(SIZES, SEEDS)
def test_a_permutation_is_its_matrix(sizes, seed):
    symmetry, state = nested(sizes, 0)
    transforms = drawn(symmetry, seed)
    for name in ("plain", "inner"):  # no space is nested in these
        alone = {**identities(symmetry), name: transforms[name]}
        matrix = {**alone, name: as_matrix(transforms[name])}
        assert equal(move_state(state, matrix, symmetry), move_state(state, alone, symmetry))
        back = {**alone, name: as_matrix(invert(alone, symmetry)[name])}
        assert equal(move_state(move_state(state, matrix, symmetry), back, symmetry), state)


@laws
@given(SIZES)
def test_nothing_is_copied_where_nothing_moves(sizes):
    symmetry, state = nested(sizes, 0)
    moved = move_state(state, identities(symmetry), symmetry)
    assert all(moved[name] is state[name] for name in state)
    moved = move_state(state, drawn(symmetry, 0), symmetry)
    assert moved["other"] is state["other"]


@pytest.mark.parametrize("name", ZOO)
def test_there_and_back_changes_no_bit(name):
    symmetry, state = traced(name), built(name).state_dict()
    before = {key: tensor.clone() for key, tensor in state.items()}
    rng = np.random.default_rng(0)
    transforms = {space.name: _stirred(space, rng) for space in symmetry}
    moved = move_state(state, transforms, symmetry)
    assert equal(state, before)
    assert not len(symmetry) or not equal(moved, state)
    assert all(moved[key].dtype == tensor.dtype and moved[key].shape == tensor.shape for key, tensor in state.items())
    assert equal(move_state(moved, invert(transforms, symmetry), symmetry), state)


@pytest.mark.parametrize("indices", [[0, 0, 1], [1, 2, 3], [[0, 1], [1, 1]], [-1, 0, 1]])
def test_indices_that_are_no_permutation_are_refused(indices):
    with refuses(TransformError, "no permutation"):
        Permutation(np.array(indices))


def test_a_row_of_indices_is_one_copy():
    assert Permutation(np.array([2, 0, 1])).indices.shape == (1, 3)
    assert Permutation(np.array([[0, 1, 2]])).is_identity
    assert not Permutation(np.array([[0, 1], [1, 0]])).is_identity


# Linear maps


def stretched(size: int, frame: int | None = None, copies: int = 1, seed: int = 0) -> LinearMap:
    """A random map with singular values between 1/2 and 2, and its left inverse."""
    rng = np.random.default_rng(seed)
    frame = frame or size
    left, right = (np.linalg.qr(rng.normal(size=(copies, n, n)))[0] for n in (frame, size))
    into = left[:, :, :size] * rng.uniform(0.5, 2, (copies, 1, size)) @ right
    return LinearMap(torch.from_numpy(into), torch.from_numpy(np.linalg.pinv(into)))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def forward(name: str, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """The network's output in float64 with other weights, which may be wider than its own."""
    model = copy.deepcopy(built(name)).double().eval()
    for key, tensor in state.items():
        module, _, leaf = key.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(tensor))
    (x,), _ = model.inputs(seed=3)
    with torch.no_grad():
        return model(x.double())


def state64(name: str) -> dict[str, torch.Tensor]:
    return {key: tensor.double() for key, tensor in built(name).state_dict().items()}


# Two maps of condition number 4 and their inverses, over at most three layers of sums of at most 32 terms.
LINEAR = 100 * EPS64


@pytest.mark.parametrize("frame", [None, 6, 9])
@pytest.mark.parametrize("name", ["DeepLinear", "LinearFlattened", "LinearFlattenedLast", "LowRankUpdate"])
def test_inverse_pairs_keep_a_linear_networks_function(name, frame):
    symmetry, state = traced(name), state64(name)
    transforms: dict = identities(symmetry)
    for seed, space in enumerate(symmetry):
        if space.group is Group.INVERTIBLE:
            transforms[space.name] = stretched(space.size, frame, seed=seed)
    moved = move_state(state, transforms, symmetry)
    touched = {site.parameter for space in symmetry for site in space.sites}
    widths = sum(sum(moved[key].shape) - sum(state[key].shape) for key in touched)
    assert (widths > 0) == (frame is not None)
    assert relative(forward(name, moved), forward(name, state)) <= LINEAR


def test_a_map_one_way_only_changes_the_function():
    symmetry, state = traced("DeepLinear"), state64("DeepLinear")
    transforms = {space.name: stretched(space.size) for space in symmetry}
    wrong = {name: LinearMap(map_.into, map_.into.transpose(1, 2)) for name, map_ in transforms.items()}
    assert relative(forward("DeepLinear", move_state(state, wrong, symmetry)), forward("DeepLinear", state)) > 1e-3


def test_linear_maps_invert_and_compose():
    symmetry, state = traced("DeepLinear"), state64("DeepLinear")
    a = {space.name: stretched(space.size, seed=1) for space in symmetry}
    b = {space.name: stretched(space.size, seed=2) for space in symmetry}
    p = drawn(symmetry, 3)
    there = move_state(state, a, symmetry)
    back = move_state(there, invert(a, symmetry), symmetry)
    for first, second in ((a, b), (a, p), (p, a)):
        twice = move_state(move_state(state, first, symmetry), second, symmetry)
        once = move_state(state, compose(second, first, symmetry), symmetry)
        assert all(relative(once[key], twice[key]) <= LINEAR for key in state)
    assert all(relative(back[key], state[key]) <= LINEAR for key in state)


def test_copies_of_a_nested_space_each_have_their_map():
    symmetry, state = traced("GroupedQueries"), state64("GroupedQueries")
    child = next(space for space in symmetry if space.name.startswith("value") and space.parent)
    map_ = stretched(child.size, copies=child.copies)
    transforms: dict = {**drawn(symmetry, 0), child.name: map_}
    moved = move_state(state, transforms, symmetry)
    # Values are only summed over positions: any map of a head's values keeps the function, after the heads have moved.
    assert relative(forward("GroupedQueries", moved), forward("GroupedQueries", state)) <= LINEAR
    back = move_state(moved, invert(transforms, symmetry), symmetry)
    assert all(relative(back[key], state[key]) <= LINEAR for key in state)
    twice = move_state(moved, transforms, symmetry)
    once = move_state(state, compose(transforms, transforms, symmetry), symmetry)
    assert all(relative(once[key], twice[key]) <= LINEAR for key in state)


def test_maps_act_in_at_least_float32_and_keep_the_type():
    symmetry = traced("DeepLinear")
    state = {key: tensor.to(torch.bfloat16) for key, tensor in built("DeepLinear").state_dict().items()}
    transforms = {space.name: stretched(space.size) for space in symmetry}
    moved = move_state(state, transforms, symmetry)
    exact = move_state({key: tensor.double() for key, tensor in state.items()}, transforms, symmetry)
    for key in symmetry.sites:
        assert moved[key].dtype == torch.bfloat16
        # Two sites of float32 work, each rounded once to 8 bits: half a unit of 2^-8 each.
        assert relative(moved[key].double(), exact[key]) <= 2 * 2**-9 * 1.01


def test_a_running_variance_cannot_be_mixed():
    symmetry, state = traced("BatchNorm"), built("BatchNorm").state_dict()
    first = symmetry.spaces[0]
    transforms: dict = {**identities(symmetry), first.name: stretched(first.size)}
    with refuses(TransformError, "layers.1.running_var: a running variance .* repair"):
        move_state(state, transforms, symmetry)
    moved = move_state(state, transforms, symmetry, reset_variances=True)
    assert torch.equal(moved["layers.1.running_var"], torch.ones(4))
    assert torch.equal(moved["layers.5.running_var"], state["layers.5.running_var"])


def test_maps_that_do_not_fit_are_refused():
    symmetry, state = traced("DeepLinear"), built("DeepLinear").state_dict()
    with refuses(TransformError, "linear map of shape"):
        move_state(state, {**identities(symmetry), "layers.0": stretched(3)}, symmetry)
    with refuses(TransformError, "permutation of"):
        move_state(state, {**identities(symmetry), "layers.0": Permutation(np.array([1, 0, 2]))}, symmetry)
    with refuses(TransformError, "no transform for space layers.1"):
        move_state(state, {"layers.0": stretched(5)}, symmetry)
    grouped = traced("GroupNorm")
    parent = next(space for space in grouped if grouped.children(space))
    with refuses(TransformError, "has no indices"):
        move = {**identities(grouped), parent.name: stretched(parent.size)}
        invert(move, grouped)
    # Two spaces share the columns that read the concatenation: the width of one alone cannot change there.
    concat = traced("TwoInputs")
    wider: dict = {**identities(concat), "left": stretched(4, 6)}
    with refuses(TransformError, "needs a space that fills one whole dimension"):
        move_state(built("TwoInputs").state_dict(), wider, concat)


def test_a_state_dict_of_another_architecture_is_refused():
    symmetry, state = traced("PlainMLP"), built("PlainMLP").state_dict()
    with refuses(ModelError, "missing key layers.0.weight"):
        move_state({}, drawn(symmetry, 0), symmetry)
    with refuses(ModelError, "layers.0.bias has shape"):
        move_state({**state, "layers.0.bias": torch.zeros(6)}, drawn(symmetry, 0), symmetry)


# Alignments


def aligned(name: str, count: int = 3) -> Alignment:
    return Alignment(traced(name), tuple(drawn(traced(name), seed) for seed in range(count)), details={"restarts": 2})


@pytest.mark.parametrize("name", NESTED)
def test_between_goes_from_one_models_own_frame_to_anothers(name):
    alignment, symmetry = aligned(name), traced(name)
    state = built(name).state_dict()
    for target in range(3):
        for source in range(3):
            frame = move_state(state, alignment.transforms[source], symmetry)
            expected = move_state(frame, invert(alignment.transforms[target], symmetry), symmetry)
            assert equal(move_state(state, alignment.between(target, source), symmetry), expected)
    round_trip = compose(
        alignment.between(0, 1), compose(alignment.between(1, 2), alignment.between(2, 0), symmetry), symmetry
    )
    assert same(round_trip, identities(symmetry))


@pytest.mark.parametrize("name", NESTED)
@pytest.mark.parametrize("reference", [0, 2])
def test_rebasing_leaves_the_reference_where_it_is(name, reference):
    alignment = aligned(name)
    moved = alignment.rebased(reference)
    assert same(moved.transforms[reference], identities(traced(name)))
    for target in range(3):
        for source in range(3):
            assert same(moved.between(target, source), alignment.between(target, source))
    assert same(moved.rebased(1).transforms[0], alignment.rebased(1).transforms[0])
    assert moved.details == {"restarts": 2}


@pytest.mark.parametrize("name", ["PlainMLP", "Attention", "GroupedShuffle", "NothingToMove"])
def test_saving_and_loading_changes_nothing(name, tmp_path):
    facts = {
        "method": "m",
        "objective": 0.1,
        "upper_bound": None,
        "converged": False,
        "seconds": 1.5,
        "details": {"n": 1},
    }
    path, again = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    alignment = Alignment(traced(name), aligned(name).transforms, **facts)
    alignment.save(path)
    for loaded in (Alignment.load(path), Alignment.load(path, traced(name))):
        assert len(loaded) == 3
        assert {key: getattr(loaded, key) for key in facts} == facts
        assert loaded.symmetry.hash == traced(name).hash
        assert all(same(a, b) for a, b in zip(loaded.transforms, alignment.transforms, strict=True))
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()


def test_linear_maps_survive_a_file(tmp_path):
    symmetry = traced("DeepLinear")
    maps = {space.name: stretched(space.size) for space in symmetry}
    Alignment(symmetry, (identities(symmetry), maps)).save(tmp_path / "a.safetensors")
    loaded = Alignment.load(tmp_path / "a.safetensors")
    assert not loaded.is_exact
    for name, map_ in maps.items():
        assert torch.equal(loaded.transforms[1][name].into, map_.into)
        assert torch.equal(loaded.transforms[1][name].back, map_.back)


def test_an_alignment_of_another_symmetry_is_not_loaded(tmp_path):
    aligned("PlainMLP").save(tmp_path / "a.safetensors")
    with refuses(TransformError, "belongs to another symmetry"):
        Alignment.load(tmp_path / "a.safetensors", traced("EqualWidths"))
    isthmus.checkpoint.save_state({"w": torch.zeros(2)}, tmp_path / "w.safetensors")
    with refuses(TransformError, "holds no alignment"):
        Alignment.load(tmp_path / "w.safetensors")


def test_an_alignment_holds_a_fitting_transform_for_every_space():
    symmetry = traced("PlainMLP")
    with refuses(TransformError, "model 1 has no transform for space layers.2"):
        Alignment(symmetry, (identities(symmetry), {"layers.0": Permutation(np.arange(5))}))
    with refuses(TransformError, "model 0, space layers.0: indices"):
        Alignment(symmetry, ({**identities(symmetry), "layers.0": Permutation(np.arange(4))},))
    assert aligned("PlainMLP").is_exact


# Ten layers at most, each a sum of at most 144 terms in float32.
SINGLE = EPS32 * 144**0.5 * 10


@pytest.mark.parametrize("name", ZOO)
def test_applying_keeps_the_function_and_the_arguments(name):
    model = copy.deepcopy(built(name))
    alignment = aligned(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    indices = [{key: t.indices.copy() for key, t in transforms.items()} for transforms in alignment.transforms]
    moved = isthmus.apply(alignment, model, index=1)
    assert moved is not model
    assert moved.training == model.training
    assert equal(model.state_dict(), before)
    assert all(
        (t.indices == old[key]).all()
        for old, new in zip(indices, alignment.transforms, strict=True)
        for key, t in new.items()
    )
    assert equal(moved.state_dict(), move_state(before, alignment.transforms[1], traced(name)))
    for found, expected in zip(outputs(moved, name), outputs(model, name), strict=True):
        assert relative(found.double(), expected.double()) <= SINGLE or found.equal(expected)


def test_tied_weights_stay_tied():
    moved = isthmus.apply(aligned("TiedEmbedding"), built("TiedEmbedding"), index=0)
    assert moved.head.weight is moved.embed.weight
    assert not torch.equal(moved.embed.weight, built("TiedEmbedding").embed.weight)
    state = move_state(built("TiedEmbedding").state_dict(), drawn(traced("TiedEmbedding"), 0), traced("TiedEmbedding"))
    assert torch.equal(state["head.weight"], state["embed.weight"])


@pytest.mark.parametrize("index", [-1, 3])
def test_a_model_that_the_alignment_does_not_hold_is_refused(index):
    with refuses(InputError, rf"index {index}: the alignment holds models 0 … 2"):
        isthmus.apply(aligned("PlainMLP"), built("PlainMLP"), index=index)


def test_a_copy_with_fewer_spaces_moves_less():
    symmetry = traced("PlainMLP")
    part = replace(symmetry, spaces=symmetry.spaces[:1])
    moved = move_state(built("PlainMLP").state_dict(), drawn(part, 0), part)
    assert torch.equal(moved["layers.4.weight"], built("PlainMLP").layers[4].weight)
