"""What a symmetry is: its JSON says all of it, and its hash says what transforms depend on."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from helpers.refusals import refuses
from helpers.zoo import ZOO, traced
from isthmus.errors import SymmetryError
from isthmus.symmetry import Frozen, Group, Site, Space, Symmetry
from isthmus.symmetry.encoding import _decode_positions, _encode_positions

STRUCTURES = pytest.mark.parametrize("name", ZOO)
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))


def with_space(symmetry: Symmetry, **changes) -> Symmetry:
    """The symmetry with its first space changed."""
    first, *rest = symmetry.spaces
    return replace(symmetry, spaces=(replace(first, **changes), *rest))


@STRUCTURES
def test_json_says_all_but_the_graph(name):
    symmetry = traced(name)
    again = Symmetry.from_json(symmetry.to_json())
    assert again.to_json() == symmetry.to_json()
    assert again.hash == symmetry.hash
    assert (again.frozen, again.shapes, again.tied, again.untouched) == (
        symmetry.frozen,
        symmetry.shapes,
        symmetry.tied,
        symmetry.untouched,
    )
    for a, b in zip(symmetry, again, strict=True):
        assert (a.name, a.size, a.copies, a.parent, a.group) == (b.name, b.size, b.copies, b.parent, b.group)
        for s, t in zip(a.sites, b.sites, strict=True):
            assert (s.parameter, s.dims, s.role) == (t.parameter, t.dims, t.role)
            np.testing.assert_array_equal(s.positions, t.positions)
            assert t.positions.dtype == np.int64


@given(arrays.arrays(np.int64, SHAPES, elements=st.integers(0, 50)))
def test_any_positions_survive_encoding(positions):
    written = json.loads(json.dumps(_encode_positions(positions)))
    np.testing.assert_array_equal(_decode_positions(written), positions)


@given(SHAPES, st.integers(0, 9), st.lists(st.integers(-3, 5), min_size=3, max_size=3))
def test_regular_positions_are_written_as_strides(shape, start, strides):
    grids = np.indices(shape)
    positions = start + sum(s * g for s, g in zip(strides, grids, strict=True))
    written = _encode_positions(positions)
    assert "values" not in written or not positions.size
    np.testing.assert_array_equal(_decode_positions(written), positions)


def test_a_symmetry_is_a_collection_of_its_spaces():
    symmetry = traced("GroupNormResidual")
    assert len(symmetry) == 4 == len(list(symmetry))
    stem = symmetry["stem"]
    assert stem is symmetry.spaces[0]
    assert [child.parent for child in symmetry.children(stem)] == ["stem"]
    assert symmetry.free_units == 3 + 3 * 2 + 2 + 2 * 2
    with refuses(SymmetryError, "no space 'stme': the spaces are stem,"):
        symmetry["stme"]
    with refuses(SymmetryError, "none"):
        traced("NothingToMove")["anything"]


@STRUCTURES
def test_sites_come_by_tensor_and_parents_first(name):
    symmetry = traced(name)
    order = [space.name for space in symmetry]
    assert sum(len(sites) for sites in symmetry.sites.values()) == sum(len(space.sites) for space in symmetry)
    for tensor, sites in symmetry.sites.items():
        assert all(site.parameter == tensor for _, site in sites)
        positions = [order.index(space.name) for space, _ in sites]
        assert positions == sorted(positions)
        for space, _ in sites:
            assert space.parent is None or order.index(space.parent) < order.index(space.name)


def test_the_hash_depends_on_spaces_and_sites_only():
    symmetry = traced("PlainMLP")
    frozen = Frozen("layers.0.weight", "1", 3, "", "", "another reason")
    assert replace(symmetry, frozen=(frozen,), untouched=("x",), graph=None).hash == symmetry.hash
    first = symmetry.spaces[0]
    others = [
        with_space(symmetry, name="another"),
        with_space(symmetry, group=Group.ORTHOGONAL),
        with_space(symmetry, sites=first.sites[1:]),
        with_space(symmetry, sites=(replace(first.sites[0], role="covector"), *first.sites[1:])),
        with_space(
            symmetry, sites=(replace(first.sites[0], positions=first.sites[0].positions[:, ::-1]), *first.sites)
        ),
        replace(symmetry, spaces=symmetry.spaces[1:]),
    ]
    assert replace(symmetry, spaces=symmetry.spaces[::-1]).hash == symmetry.hash
    assert with_space(symmetry, sites=first.sites[::-1]).hash == symmetry.hash
    assert len({symmetry.hash, *(other.hash for other in others)}) == len(others) + 1


def test_a_role_is_one_of_three():
    with refuses(SymmetryError, "role 'bias' of w: use one of vector, covector, variance"):
        Site("w", (0,), np.zeros((1, 1, 1), dtype=np.int64), "bias")


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:-20],
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text.replace('"permutation"', '"rotation"'),
        lambda text: text.replace('"positions"', '"places"'),
        lambda text: text.replace('"strides": [', '"strides": [1, '),
        lambda text: text.replace('"covector"', '"bias"'),
        lambda text: json.dumps({**json.loads(text), "shapes": []}),
        lambda text: json.dumps({**json.loads(text), "shapes": {"w": 3}}),
        lambda text: json.dumps({**json.loads(text), "spaces": 3}),
        lambda text: json.dumps({**json.loads(text), "frozen": [{"unit": 3}]}),
    ],
)
def test_what_is_no_symmetry_is_refused(damage):
    text = traced("PlainMLP").to_json()
    assert damage(text) != text
    with pytest.raises(SymmetryError) as caught:
        Symmetry.from_json(damage(text))
    assert len(str(caught.value).splitlines()) == 1


def test_copies_count_as_free_units():
    space = Space("heads/units", 3, Group.PERMUTATION, (), parent="heads", copies=4)
    assert Symmetry((space,), (), {}).free_units == 12
