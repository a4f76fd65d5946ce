"""What follows from labels that meet, against brute force: every permutation that is allowed keeps what was seen."""

from collections import Counter
from itertools import permutations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.tracing.blocks import pin, reduce
from isthmus.tracing.labels import (
    Value,
    as_parameter,
    combine,
    compress,
    concatenate,
    constant_value,
    one_to_one,
    reshape,
    simplify,
    support,
    unsqueeze,
    with_rigid,
)
from isthmus.tracing.relations import close_relations
from isthmus.tracing.units import WILDCARD, UnitTable

laws = settings(max_examples=60)


def allowed(units: UnitTable, *axes: np.ndarray) -> list[dict[int, int]]:
    """Every permutation within each axis that fixed units, united units and relations leave open, by trying all."""
    ids = np.concatenate(axes).tolist()
    root = {unit: int(units.find(np.array([unit]))[0]) for unit in range(units.size)}
    held = {unit: bool(units.is_frozen(np.array([unit]))[0]) for unit in range(units.size)}
    records = [{(root[c], root[p]) for c, p in zip(c.tolist(), p.tolist(), strict=True)} for c, p in units.relations]
    own = {root[unit] for unit in ids}
    blocks = sorted({p for record in records for _, p in record if p not in own and not held[p]})
    found = []
    for orders in product(*(permutations(axis.tolist()) for axis in axes)):
        move = dict(zip(ids, (unit for order in orders for unit in order), strict=True))
        if any(held[a] and a != b for a, b in move.items()):
            continue
        roots: dict[int, int] = {}
        if any(roots.setdefault(root[a], root[b]) != root[b] for a, b in move.items()):
            continue
        for order in permutations(blocks):
            full = {**{p: p for record in records for _, p in record}, **roots, **dict(zip(blocks, order, strict=True))}
            if all({(full[c], full[p]) for c, p in record} == record for record in records):
                found.append(move)
                break
    return found


def keeps(move: dict[int, int], left: np.ndarray, right: np.ndarray) -> bool:
    """Whether a permutation carries the pairs of labels that occur to pairs that occur; wildcards say nothing."""
    pairs = {(a, b) for a, b in zip(left.tolist(), right.tolist(), strict=True) if WILDCARD not in (a, b)}
    return {(move[a], move[b]) for a, b in pairs} == pairs


def ranked(labels: list[int]) -> np.ndarray:
    """The labels renumbered from 0 without gaps; wildcards stay."""
    known = sorted({label for label in labels if label != WILDCARD})
    return np.array([WILDCARD if label == WILDCARD else known.index(label) for label in labels])


def on_axis(axis: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.where(labels == WILDCARD, WILDCARD, axis[np.maximum(labels, 0)])


def roots(units: UnitTable, layer: np.ndarray) -> list:
    return units.find(layer).ravel().tolist()


# relate


def pairs_of_labels(smallest: int) -> st.SearchStrategy:
    pair = st.tuples(st.integers(smallest, 2), st.integers(smallest, 2))
    return st.lists(pair, min_size=1, max_size=6).filter(lambda x: max(a for a, _ in x) >= 0 <= max(b for _, b in x))


@pytest.mark.parametrize("smallest", [0, WILDCARD])
@laws
@given(st.data())
def test_two_axes_that_meet_keep_their_pairs(smallest, data):
    seen = data.draw(pairs_of_labels(smallest))
    a, b = (ranked([pair[k] for pair in seen]) for k in (0, 1))
    units = UnitTable()
    first, second = units.fresh(int(a.max()) + 1), units.fresh(int(b.max()) + 1)
    left, right = on_axis(first, a), on_axis(second, b)
    units.relate(left, right)
    for move in allowed(units, first, second):
        known = (left != WILDCARD) & (right != WILDCARD)
        assert keeps(move, left[known], right[known])


@laws
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=6))
def test_an_axis_that_meets_itself_keeps_its_pairs(seen):
    labels = ranked([label for pair in seen for label in pair]).reshape(-1, 2)
    units = UnitTable()
    axis = units.fresh(int(labels.max()) + 1)
    left, right = axis[labels[:, 0]], axis[labels[:, 1]]
    units.relate(left, right)
    moves = allowed(units, axis)
    assert dict(zip(axis.tolist(), axis.tolist(), strict=True)) in moves
    for move in moves:
        # Units that occur on one side only are not exchanged with others: their colours differ.
        if all({move[unit] for unit in side.tolist()} == set(side.tolist()) for side in (left, right)):
            assert keeps(move, left, right)


@laws
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 2), st.lists(st.permutations(range(3)), min_size=1, max_size=2)),
        min_size=1,
        max_size=4,
    )
)
def test_many_meetings_keep_all_their_pairs(meetings):
    """Three axes of three units that meet one another, and themselves, in one order or several."""
    units = UnitTable()
    axes = [units.fresh(3) for _ in range(3)]
    seen = []
    for one, other, orders in meetings:
        left = np.concatenate([axes[one]] * len(orders))
        right = np.concatenate([axes[other][list(order)] for order in orders])
        units.relate(left, right)
        seen.append((left, right))
    before = allowed(units, *axes)
    assert all(keeps(move, left, right) for move in before for left, right in seen)
    close_relations(units)
    assert all(move in before for move in allowed(units, *axes))


@laws
@given(st.lists(st.tuples(st.integers(1, 2), st.integers(1, 2)), min_size=1, max_size=2))
def test_blocks_in_which_all_pairs_occur_lose_nothing(sizes):
    """One against one, one against many, many against many: what is allowed is all that keeps the pairs."""
    units = UnitTable()
    first, second = units.fresh(sum(n for n, _ in sizes)), units.fresh(sum(m for _, m in sizes))
    pairs, i, j = [], 0, 0
    for n, m in sizes:
        pairs += product(range(i, i + n), range(j, j + m))
        i, j = i + n, j + m
    left, right = first[[a for a, _ in pairs]], second[[b for _, b in pairs]]
    units.relate(left, right)
    orders = product(permutations(first.tolist()), permutations(second.tolist()))
    moves = [dict(zip([*first, *second], [*a, *b], strict=True)) for a, b in orders]
    kept = [move for move in moves if keeps(move, left, right)]
    assert len(allowed(units, first, second)) == len(kept)


def test_one_against_one_is_the_same_unit():
    units = UnitTable()
    a, b = units.fresh(3), units.fresh(3)
    units.relate(a, b[[2, 0, 1]])
    assert roots(units, a) == roots(units, b[[2, 0, 1]])
    assert len(set(roots(units, a))) == 3
    assert not units.relations


def test_many_against_one_are_inside_it():
    units = UnitTable()
    a, b = units.fresh(2), units.fresh(4)
    units.relate(a.repeat(2), b)
    ((children, parents),) = units.relations
    assert children.tolist() == b.tolist()
    assert parents.tolist() == a.repeat(2).tolist()


def test_many_against_many_are_inside_one_block():
    units = UnitTable()
    a, b = units.fresh(4), units.fresh(4)
    grid = [(i, j) for half in (0, 2) for i in (half, half + 1) for j in (half, half + 1)]
    units.relate(a[[i for i, _ in grid]], b[[j for _, j in grid]])
    inside = {child: parent for c, p in units.relations for child, parent in zip(c.tolist(), p.tolist(), strict=True)}
    assert inside[a[0]] == inside[a[1]] == inside[b[0]] == inside[b[1]]
    assert inside[a[2]] == inside[b[3]] != inside[a[0]]
    assert not set(inside.values()) & {*a.tolist(), *b.tolist()}


def test_where_every_pair_occurs_nothing_follows():
    units = UnitTable()
    a, b = units.fresh(2), units.fresh(3)
    units.relate(a.repeat(3), np.tile(b, 2))
    assert not units.relations
    assert len(allowed(units, a, b)) == 2 * 6


def test_an_irregular_pattern_fixes_its_units_and_no_others():
    units = UnitTable()
    a, b = units.fresh(4), units.fresh(4)
    units.place = ("aten.add", "block")
    units.relate(a[[0, 0, 1, 2, 3]], b[[0, 1, 1, 2, 3]])  # a path of three pairs; two pairs alone
    assert units.is_frozen(a).tolist() == [True, True, False, False]
    assert units.is_frozen(b).tolist() == [True, True, False, False]
    reason = units.reason(int(a[0]))
    assert (reason.operation, reason.module, reason.expected) == ("aten.add", "block", False)


def test_layers_are_related_where_they_overlap_after_broadcasting():
    units = UnitTable()
    a, b = units.fresh(3), units.fresh(3)
    units.relate(a.reshape(3, 1), np.broadcast_to(b.reshape(3, 1), (3, 2)))
    assert roots(units, a) == roots(units, b)


# unite, freeze


def test_units_of_one_axis_are_never_made_one():
    """x + x.flip: opposite units move together, yet they stay two."""
    units = UnitTable()
    axis = units.fresh(4)
    units.relate(axis, axis[::-1].copy())
    assert len(set(roots(units, axis))) == 4
    moves = [tuple(move.values()) for move in allowed(units, axis)]
    assert sorted(moves) == [tuple(axis), tuple(axis[[1, 0, 3, 2]])]


def test_units_of_one_axis_are_not_made_one_through_another():
    units = UnitTable()
    axis, other = units.fresh(3), units.fresh(3)
    units.relate(axis, other)
    units.relate(axis[[1, 2, 0]], other)
    assert len(set(roots(units, axis))) == 3
    assert all(keeps(move, axis, axis[[1, 2, 0]]) for move in allowed(units, axis, other))


def test_a_ring_of_units_does_not_move():
    units = UnitTable()
    axis = units.fresh(4)
    units.relate(axis, np.roll(axis, 1))
    assert len(allowed(units, axis)) == 1


def test_two_rings_change_places():
    units = UnitTable()
    axis = units.fresh(6)
    units.relate(axis, axis[[1, 2, 0, 4, 5, 3]])
    assert len(allowed(units, axis)) == 2


def test_the_same_conclusion_is_drawn_once():
    units = UnitTable()
    axis = units.fresh(4)
    for _ in range(3):
        units.relate(axis, axis[::-1].copy())
    assert len(units.relations) == 2  # which block, and which place in it


def test_what_meets_a_fixed_unit_is_fixed_for_the_same_reason():
    units = UnitTable()
    a, b = units.fresh(3), units.fresh(3)
    units.place = ("aten.sort", "layer")
    units.freeze(a[:2], "reaches an operation without a rule", expected=False)
    units.place = ("aten.add", "other")
    units.freeze(a[:1], "another reason")
    units.unite(a, b)
    assert units.is_frozen(b).tolist() == [True, True, False]
    assert units.reason(int(b[0])).operation == "aten.sort"
    assert units.reason(int(b[2])) is None


def test_what_meets_a_position_is_fixed_where_it_meets_it():
    units = UnitTable()
    a = units.fresh(3)
    units.place = ("aten.mul", "mask")
    units.relate(a, units.rigid(3))
    assert units.is_frozen(a).all()
    assert units.reason(int(a[1])).operation == "aten.mul"


def test_units_inside_a_position_may_still_move():
    """Three units before a joint and two behind it: each part moves in itself."""
    units = UnitTable()
    a = units.fresh(5)
    units.relate(a, units.rigid(2)[[0, 0, 0, 1, 1]])
    assert not units.is_frozen(a).any()
    assert len(allowed(units, a)) == 6 * 2


def test_wildcards_are_nobody():
    units = UnitTable()
    a = units.fresh(2)
    layer = np.array([WILDCARD, *a, WILDCARD])
    assert roots(units, layer) == layer.tolist()
    assert units.is_frozen(layer).tolist() == [True, False, False, True]
    units.freeze(np.array([WILDCARD]), "nothing")
    units.relate(layer, units.fresh(4))
    assert not units.is_frozen(a).any()


# Values


def test_a_parameter_has_one_unit_for_each_index_of_each_dimension():
    units = UnitTable()
    value = as_parameter(units, "w", (3, 1, 2))
    assert [support(layer) for layer in value.layers] == [(0,), (2,)]
    assert len({unit for layer in value.layers for unit in layer.ravel().tolist()}) == 5


def test_a_constant_is_fixed_where_it_varies():
    units = UnitTable()
    value = constant_value(units, torch.tensor([[1.0, 2.0], [1.0, 2.0]]))
    assert [support(layer) for layer in value.layers] == [(1,)]
    assert all(units.is_frozen(layer).all() for layer in value.layers)
    assert constant_value(units, torch.ones(3, 4)).layers == ()


@laws
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=3), min_size=1, max_size=3).filter(
        lambda rows: len({len(row) for row in rows}) == 1
    )
)
def test_a_reduction_keeps_what_each_place_holds(rows):
    """A permutation that is allowed carries the units of every place to those of some place."""
    labels = ranked([label for row in rows for label in row]).reshape(len(rows), -1)
    units = UnitTable()
    axis = units.fresh(int(labels.max()) + 1)
    out = reduce(units, Value(labels.shape, (axis[labels],)), [1])
    held = [sorted(axis[row].tolist()) for row in labels]
    times = Counter(unit for row in held for unit in row)
    for move in allowed(units, axis):
        # Units that occur more often are not exchanged with others: their colours differ.
        if all(times[a] == times[b] for a, b in move.items()):
            assert all(sorted(move[unit] for unit in row) in held for row in held)
    label = np.zeros(len(rows), dtype=int)
    for layer in out.layers:
        label = np.broadcast_to(units.find(layer), (len(rows),))
    for one, two in product(range(len(rows)), repeat=2):
        if label[one] == label[two]:
            assert held[one] == held[two]


def test_blocks_of_a_reduction_move_with_their_units_inside():
    units = UnitTable()
    axis = units.fresh(6)
    out = reduce(units, Value((3, 2), (axis.reshape(3, 2),)), [1])
    (block,) = out.layers
    assert out.shape == (3,)
    assert len(set(roots(units, block))) == 3
    ((children, parents),) = units.relations
    assert children.tolist() == axis.tolist()
    assert parents.tolist() == block.repeat(2).tolist()
    assert len(allowed(units, axis)) == 6 * 2**3


def test_a_single_unit_is_its_own_block():
    units = UnitTable()
    axis = units.fresh(3)
    out = reduce(units, Value((3, 2), (np.repeat(axis.reshape(3, 1), 2, axis=1),)), [1])
    assert roots(units, out.layers[0]) == axis.tolist()
    assert not units.relations


def test_a_reduction_over_all_of_an_axis_leaves_no_label():
    units = UnitTable()
    axis = units.fresh(3)
    value = Value((2, 3), (units.rigid(2).reshape(2, 1), axis.reshape(1, 3)))
    assert [support(layer) for layer in reduce(units, value, [1], keepdim=True).layers] == [(0,)]
    assert reduce(units, value, [0, 1]).layers == ()
    assert len(allowed(units, axis)) == 6


def test_overlapping_sums_fix_their_units():
    units = UnitTable()
    axis = units.fresh(3)
    reduce(units, Value((2, 2), (axis[[[0, 1], [1, 2]]],)), [1])
    assert units.is_frozen(axis).all()


def test_units_that_meet_numbers_in_a_turning_order_are_fixed():
    """A circular convolution: place i holds all units, but each with another number than place j does."""
    units = UnitTable()
    axis = units.fresh(3)
    turned = axis[(np.arange(3)[:, None] + np.arange(3)) % 3]
    out = reduce(units, Value((3, 3), (turned, units.rigid(3).reshape(1, 3))), [1])
    assert units.is_frozen(axis).all()
    assert len(set(roots(units, out.layers[0]))) == 3
    # Without the numbers, every place holds the same.
    units = UnitTable()
    axis = units.fresh(3)
    assert reduce(units, Value((3, 3), (turned,)), [1]).layers == ()
    assert not units.is_frozen(axis).any()


def test_fixed_positions_are_reduced_to_what_they_hold():
    units = UnitTable()
    value = Value((2, 4), (units.rigid(4)[[[0, 0, 1, 1], [2, 2, 3, 3]]],))
    (layer,) = reduce(units, value, [0]).layers
    found = roots(units, layer)
    assert found[0] == found[1] != found[2] == found[3]


def joint(units: UnitTable, value: Value) -> list[tuple]:
    """All labels of each position."""
    arrays = [np.broadcast_to(units.find(layer), value.shape).ravel().tolist() for layer in value.layers]
    return list(zip(*arrays, strict=True)) if arrays else [()] * int(np.prod(value.shape))


@laws
@given(
    st.lists(st.tuples(st.integers(1, 3), st.sampled_from(["own", "shared", "fixed", "none"])), min_size=1, max_size=3)
)
def test_parts_of_a_concatenation_are_told_apart(parts):
    """Two positions have the same labels only in one part, and only if they had the same labels there."""
    units = UnitTable()
    common = units.fresh(3)
    batch = units.rigid(2).reshape(2, 1)
    values, before = [], []
    for part, (size, kind) in enumerate(parts):
        ids = {"own": units.fresh(size), "shared": common[:size], "fixed": units.rigid(size), "none": None}[kind]
        layers = (batch,) if ids is None or size == 1 else (batch, ids.reshape(1, size))
        values.append(Value((2, size), layers))
        before.append(np.array([(part, str(label)) for label in joint(units, values[-1])]).reshape(2, size, 2))
    out = concatenate(units, values, 1)
    assert out.shape == (2, sum(size for size, _ in parts))
    after = joint(units, out)
    expected = [tuple(x) for x in np.concatenate(before, axis=1).reshape(-1, 2).tolist()]
    for a, b in product(range(len(after)), repeat=2):
        if after[a] == after[b]:
            assert expected[a] == expected[b]
    assert len(allowed(units, common)) == 6


def test_parts_with_units_of_their_own_need_no_other_name():
    units = UnitTable()
    a, b = units.fresh(2), units.fresh(3)
    out = concatenate(units, [Value((2,), (a,)), Value((3,), (b,))], 0)
    assert [layer.tolist() for layer in out.layers] == [[*a, *b]]


def test_a_part_without_units_is_a_wildcard():
    units = UnitTable()
    a = units.fresh(2)
    out = concatenate(units, [Value((2,), (a,)), Value((2,))], 0)
    assert [layer.tolist() for layer in out.layers] == [[*a, WILDCARD, WILDCARD]]


def test_stacked_values_of_the_same_units_are_told_apart():
    units = UnitTable()
    a = units.fresh(3)
    out = concatenate(units, [unsqueeze(Value((3,), (a,)), 1) for _ in range(2)], 1)
    assert out.shape == (3, 2)
    assert len(set(joint(units, out))) == 6


def test_a_sum_relates_its_terms_and_keeps_the_finer_labels():
    units = UnitTable()
    a, b = units.fresh(2), units.fresh(4)
    coarse, fine = Value((4,), (a.repeat(2),)), Value((4,), (b,))
    (layer,) = combine(units, [coarse, fine]).layers
    assert layer.tolist() == b.tolist()
    assert len(units.relations) == 1


def test_what_two_layers_say_of_each_other_is_kept_when_one_goes():
    """The diagonal of an outer product: either factor's units are where the other's are."""
    units = UnitTable()
    a, b = units.fresh(3), units.fresh(3)
    assert len(simplify(units, [a, b])) == 1
    assert roots(units, a) == roots(units, b)


def test_units_along_positions_keep_their_places_in_them():
    """A linear layer that makes all pixels of all channels: channels move, each with its pixels."""
    units = UnitTable()
    value = reshape(as_parameter(units, "b", (6,)), (2, 3))  # two channels of three pixels
    (made,) = value.layers
    (channel,) = pin(units, value, [1], "slides").layers
    assert channel.shape == (2, 1)
    assert len(set(roots(units, channel))) == 2
    moves = [np.array([*move.values()]).reshape(2, 3) - made.min() for move in allowed(units, made.ravel())]
    assert sorted(move.tolist() for move in moves) == [[[0, 1, 2], [3, 4, 5]], [[3, 4, 5], [0, 1, 2]]]


def test_what_lies_along_positions_only_is_fixed():
    units = UnitTable()
    value = as_parameter(units, "w", (2, 3))
    pinned = pin(units, value, [1], "slides")
    assert units.is_frozen(value.layers[1]).all()
    assert not units.is_frozen(value.layers[0]).any()
    grown = with_rigid(units, pinned, (2, 5), [1])
    assert [support(layer) for layer in grown.layers] == [(0,), (1,)]


@laws
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_compressed_layers_say_the_same(a, b, c):
    rng = np.random.default_rng(a + 4 * b + 16 * c)
    small = rng.integers(0, 2, (a, 1, c))
    layer = np.broadcast_to(small, (a, b, c))
    np.testing.assert_array_equal(np.broadcast_to(compress(layer), layer.shape), layer)
    for d, size in enumerate(compress(layer).shape):
        assert size == (1 if (layer == layer.take([0], axis=d)).all() else layer.shape[d])


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ([0, 1, 2], [0, 1, 2], True),
        ([0, 1, 2], [2, 0, 1], True),
        ([0, 1, 1], [0, 1, 2], False),
        ([0, 1, 1], [0, 1, 1], True),
        ([0, 1, WILDCARD], [0, 1, 2], False),
    ],
)
def test_layers_tell_the_same_apart(left, right, expected):
    units = UnitTable()
    a, b = units.fresh(3), units.fresh(3)
    assert one_to_one(units, on_axis(a, np.array(left)), on_axis(b, np.array(right))) == expected


@pytest.mark.parametrize("told_apart", [True, False])
def test_rows_that_meet_fixed_positions_in_a_pattern_lose_nothing_where_they_remain_at_fixed_ones(told_apart):
    units = UnitTable()
    rows = units.fresh(3)[np.array([[1, 0], [2, 1]])]  # one for each distance of two places
    fixed = units.rigid(2)
    layers = (rows, fixed.reshape(1, 2), fixed.reshape(2, 1)) if told_apart else (rows, fixed.reshape(1, 2))
    reduce(units, Value((2, 2), layers), [1])
    reason = units.reason(int(rows[0, 0]))
    assert reason is not None
    assert reason.expected == told_apart
