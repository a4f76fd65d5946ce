"""Labels: which unit sits at each position of a traced value, and what combining two values says about units.

Every index of every parameter dimension is a *unit* with an integer id. A value carries *layers*: integer arrays
of unit ids, broadcastable to its shape. Together the layers identify a position: two positions with the same labels
hold the same number. A symmetry moves units, and with them the positions that they label; so wherever two labels meet
on one axis, the pairs that occur there must be carried to pairs that occur there. `Units.relate` draws the conclusions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt64
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

Labels = Int[np.ndarray, "..."]
Ids = Int[np.ndarray, " _"]
Hashes = UInt64[np.ndarray, " _"]

# A position that no label distinguishes in this layer: the value there is the same whatever unit it might carry.
WILDCARD = -1

# Evidence level of units that a product of two activations sums over: T and T⁻¹ cannot be told apart there.
ORTHOGONAL_LEVEL = 1

# Evidence level of units that are all summed alike, or that all receive the same number.
FIXING_ONES_LEVEL = 2

# Factors that an operation hands on, so that a unit may be multiplied by them: bits of a set.
SIGN, SCALE = 1, 2
EVERY_FACTOR = SIGN | SCALE


@dataclass(frozen=True)
class Reason:
    """Why units cannot move; the first reason that froze a unit is the one reported."""

    operation: str
    module: str
    text: str
    expected: bool = True


@dataclass(frozen=True, eq=False)
class Names:
    """What the numbers in a tensor of indices mean.

    Attributes:
        ids: Number k names unit `ids[k]`.
        history: Which indices they are: tensors of one history are equal.
    """

    ids: Ids
    history: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Value:
    """A traced tensor.

    Attributes:
        shape: Its concrete shape.
        layers: Label arrays with as many dimensions as the value, each of size 1 where the labels do not vary.
        constant: Its numbers, where they do not depend on parameters or inputs.
        source: The parameter that it is a view of, if it is one.
        names: The units that its numbers name, where it holds indices of units.
    """

    shape: tuple[int, ...]
    layers: tuple[Labels, ...] = ()
    constant: Tensor | None = None
    source: str | None = None
    names: Names | None = None


@dataclass(frozen=True, eq=False)
class Choice:
    """A tensor whose slots each hold one of several alternatives, and data choose which.

    Attributes:
        values: The tensor, were the same alternative chosen everywhere.
        where: A value of the same shape whose one layer numbers the slots.
        history: Which choice it is: choices of one history choose alike in each slot.
    """

    values: tuple[Value, ...]
    where: Value
    history: tuple[str, ...]


def support(layer: Labels) -> tuple[int, ...]:
    """The dimensions along which a layer varies."""
    return tuple(d for d, size in enumerate(layer.shape) if size > 1)


def compress(layer: Labels) -> Labels:
    """The layer with every dimension along which it is constant reduced to size 1."""
    for d, size in enumerate(layer.shape):
        if size > 1:
            first = layer.take([0], axis=d)
            if (layer == first).all():
                layer = first
    return np.ascontiguousarray(layer)


def broadcast_to_support(layers: Sequence[Labels]) -> list[Labels]:
    """The layers broadcast against one another and flattened."""
    return [array.ravel() for array in np.broadcast_arrays(*layers)]


def lift(layer: Labels, ndim: int) -> Labels:
    """The layer with leading dimensions of size 1 added until it has `ndim`."""
    return layer.reshape((1,) * (ndim - layer.ndim) + layer.shape)


class Units:
    """All units of a trace: which are one and the same, which are inside which, and which cannot move."""

    def __init__(self) -> None:
        self._root = np.empty(0, dtype=np.int64)
        self._reason = np.empty(0, dtype=np.int64)  # index into reasons, or -1 where the unit can move
        self._axis = np.empty(0, dtype=np.int64)  # units made together; they are told apart wherever they meet
        self._side_by_side: list[Ids] = []  # units of several axes that were joined into one; these too are told apart
        self._kin: dict[int, int] = {}  # axes of which units were united or joined, each with a smaller one
        self._known: set[tuple[tuple[int, ...], bytes]] = set()
        self._level = np.empty(0, dtype=np.int8)  # evidence against richer groups, see GROUPS in spaces.py
        self._factors = np.empty(0, dtype=np.int8)  # by which factors a unit may be multiplied, as far as is known
        self.contracted = np.empty(0, dtype=bool)
        self.kept = np.empty(0, dtype=bool)
        self.size = 0
        self.reasons: list[Reason] = [Reason("", "", "position fixed by an operation (spatial, time, batch or slot)")]
        self.relations: list[tuple[Ids, Ids]] = []  # (children, parents): the first move with, and inside, the second
        self.occurrences: list[Labels] = []
        self.place: tuple[str, str] = ("", "")  # operation and module path that rules are working for, for reasons
        self._rigid = np.empty(0, dtype=np.int64)
        self.made_stand_ins: list[Ids] = []
        self.expected_stand_ins: list[Ids] = []  # those of the first alternative, for the others to use

    def fresh(self, count: int) -> Ids:
        """New units that can move."""
        ids = np.arange(self.size, self.size + count)
        self.size += count
        if self.size > len(self._root):
            more = max(self.size, 2 * len(self._root)) - len(self._root)
            self._root = np.concatenate([self._root, np.arange(len(self._root), len(self._root) + more)])
            self._reason = np.concatenate([self._reason, np.full(more, -1)])
            self._axis = np.concatenate([self._axis, np.zeros(more, dtype=np.int64)])
            self._level = np.concatenate([self._level, np.zeros(more, dtype=np.int8)])
            self._factors = np.concatenate([self._factors, np.full(more, EVERY_FACTOR, dtype=np.int8)])
            self.contracted = np.concatenate([self.contracted, np.zeros(more, dtype=bool)])
            self.kept = np.concatenate([self.kept, np.zeros(more, dtype=bool)])
        if count:
            self._axis[ids] = ids[0]
        return ids

    def rigid(self, count: int) -> Ids:
        """The first `count` of the units that stand for fixed positions; they are shared by all values."""
        if count > len(self._rigid):
            more = self.fresh(count - len(self._rigid))
            self._reason[more] = 0
            self._rigid = np.concatenate([self._rigid, more])
        return self._rigid[:count]

    def stand_ins(self, count: int) -> Ids:
        """Units that stand for fixed positions in one place of the graph, in all alternatives of a choice there."""
        if self.expected_stand_ins and len(self.expected_stand_ins[0]) == count:
            return self.expected_stand_ins.pop(0)
        ids = self.fresh(count)
        self._reason[ids] = 0
        self.made_stand_ins.append(ids)
        return ids

    def find(self, ids: Labels) -> Labels:
        """The representative of each unit; wildcards stay."""
        if not ids.size:
            return ids
        if ids.min() == WILDCARD:
            roots = np.full(ids.shape, WILDCARD)
            known = ids != WILDCARD
            roots[known] = self.find(ids[known])
            return roots
        roots = self._root[ids]
        while True:
            higher = self._root[roots]
            if np.array_equal(higher, roots):
                break
            roots = higher
        self._root[ids] = roots
        return roots

    def is_frozen(self, ids: Labels) -> Bool[np.ndarray, "..."]:
        """Whether each unit is fixed; wildcards count as fixed."""
        roots = self.find(ids)
        return (roots == WILDCARD) | (self._reason[roots] >= 0)

    def reasons_of(self, units: Ids) -> Ids:
        """For each unit, the index of the reason why it is fixed, or −1 where it can move."""
        return self._reason[self.find(units)]

    def reason(self, unit: int) -> Reason | None:
        """Why a unit is fixed, or None where it can move."""
        index = int(self._reason[self.find(np.array([unit]))[0]])
        return None if index < 0 else self.reasons[index]

    def freeze(self, ids: Labels, text: str, *, expected: bool = True) -> None:
        """Fixes units, for a reason found at the current place."""
        roots = np.unique(self.find(ids.ravel()))
        roots = roots[roots != WILDCARD]
        roots = roots[self._reason[roots] < 0]
        if len(roots):
            self._reason[roots] = len(self.reasons)
            self.reasons.append(Reason(*self.place, text, expected))

    def limit(self, ids: Labels, level: int, factors: int = 0) -> None:
        """Records evidence that units allow no richer group than that of `level`, and no factors but `factors`."""
        ids = ids[ids != WILDCARD]
        self._level[ids] = np.maximum(self._level[ids], level)
        self._factors[ids] &= factors

    def levels(self) -> Int[np.ndarray, " units"]:
        """The strongest evidence against richer groups, at each representative."""
        levels = np.zeros(self.size, dtype=np.int64)
        np.maximum.at(levels, self.find(np.arange(self.size)), self._level[: self.size])
        return levels

    def factors(self) -> Int[np.ndarray, " units"]:
        """The factors that all that is known leaves, at each representative."""
        factors = np.full(self.size, EVERY_FACTOR, dtype=np.int64)
        np.bitwise_and.at(factors, self.find(np.arange(self.size)), self._factors[: self.size].astype(np.int64))
        return factors

    def is_news(self, units: Labels) -> bool:
        """Whether conclusions from these units have not been drawn yet; from now on they have."""
        key = (units.shape, units.tobytes())
        news = key not in self._known
        self._known.add(key)
        return news

    def unite(self, left: Ids, right: Ids, *, ordered: bool = True) -> None:
        """Makes units one and the same, pair by pair; a unit that meets a fixed one is fixed.

        Units of one axis stay apart, since what they label differs: where the pairs would unite some, they are strung,
        or, where left and right tell nothing (`ordered` is false), fixed.
        """
        left, right = self.find(left), self.find(right)
        left, right = left[left != right], right[left != right]
        for mine, other in ((left, right), (right, left)):
            held = (self._reason[other] >= 0) & (self._reason[mine] < 0)
            if held.any():
                self._hold(mine[held], other[held])
        movable = (self._reason[left] < 0) & (self._reason[right] < 0)
        left, right = left[movable], right[movable]
        if not len(left):
            return
        ids, index = np.unique(np.concatenate([left, right]), return_inverse=True)
        if len(ids) == 2 * len(left) and not self._are_kin(left, right).any():
            self._root[np.maximum(left, right)] = np.minimum(left, right)
        else:
            ends = (index[: len(left)], index[len(left) :])
            graph = coo_matrix((np.ones(len(left)), ends), shape=(len(ids), len(ids)))
            count, member = connected_components(graph, directed=False)
            clash = self._clashes(ids, member, count)
            first = np.full(count, self.size)
            np.minimum.at(first, member, ids)
            united = ~clash[member]
            self._root[ids[united]] = first[member[united]]
            strung = clash[member[ends[0]]]
            if strung.any() and ordered:
                self._string(left[strung], right[strung])
            elif strung.any():
                text = "several units of one axis would be the same unit"
                self.freeze(np.concatenate([left[strung], right[strung]]), text, expected=False)
            left, right = left[~strung], right[~strung]
        self._become_kin(left, right)

    def tell_apart(self, ids: Ids) -> None:
        """Records that units of several axes stand side by side on one axis, where they must not become the same."""
        ids = np.unique(ids[ids != WILDCARD])
        if len(np.unique(self._axis[ids])) > 1:
            self._side_by_side.append(ids)
            self._become_kin(ids[:-1], ids[1:])

    def _become_kin(self, left: Ids, right: Ids) -> None:
        for pair in np.unique(np.stack([self._axis[left], self._axis[right]], axis=1), axis=0).tolist():
            low, high = sorted(self._kind(axis) for axis in pair)
            if low != high:
                self._kin[high] = low

    def _kind(self, axis: int) -> int:
        """The first of the axes that an axis is kin to."""
        while axis in self._kin:
            axis = self._kin[axis]
        return axis

    def _are_kin(self, left: Ids, right: Ids) -> Bool[np.ndarray, " _"]:
        """Whether two units could be united with units of one axis, or of axes that were joined."""
        axes, index = np.unique(self._axis[np.stack([left, right])], return_inverse=True)
        kinds = np.array([self._kind(axis) for axis in axes.tolist()])[index.reshape(2, -1)]
        return kinds[0] == kinds[1]

    def _clashes(self, ids: Ids, member: Ids, count: int) -> Bool[np.ndarray, " _"]:
        """For each of `count` components of representatives: whether two of them hold units of one axis."""
        everything = np.arange(self.size)
        clash = np.zeros(count, dtype=bool)
        for units, axes in (
            (everything, self._axis[: self.size]),
            *((x, np.zeros_like(x)) for x in self._side_by_side),
        ):
            roots = self.find(units)
            where = np.minimum(np.searchsorted(ids, roots), len(ids) - 1)
            held = np.flatnonzero(ids[where] == roots)
            found = np.unique(np.stack([member[where[held]], axes[held], where[held]]), axis=1)
            twice = (found[:2, 1:] == found[:2, :-1]).all(axis=0)
            clash[found[0, 1:][twice]] = True
        return clash

    def _string(self, left: Ids, right: Ids) -> None:
        """Puts units that follow one another, pair by pair, on strings: blocks that move, and fixed places in them."""
        after: dict[int, int] = dict(zip(left.tolist(), right.tolist(), strict=True))
        before: dict[int, int] = dict(zip(right.tolist(), left.tolist(), strict=True))
        if len(after) < len(left) or len(before) < len(right):
            text = "units of one axis are paired with one another in several ways"
            self.freeze(np.concatenate([left, right]), text, expected=False)
            return
        strings: dict[tuple[int, bool], list[list[int]]] = {}
        seen: set[int] = set()
        for closed, starts in ((False, sorted(set(after) - set(before))), (True, sorted(after))):
            for start in starts:
                string = []
                step: int | None = start
                while step is not None and step not in seen:
                    seen.add(step)
                    string.append(step)
                    step = after.get(step)
                if string:
                    strings.setdefault((len(string), closed), []).append(string)
        for alike in strings.values():
            units = np.array(alike)
            if not self.is_news(units):
                continue
            blocks, places = self.fresh(units.shape[0]), self.stand_ins(units.shape[1])
            self.relations.append((units.ravel(), np.repeat(blocks, units.shape[1])))
            self.relations.append((units.ravel(), np.tile(places, units.shape[0])))

    def _hold(self, units: Ids, holders: Ids) -> None:
        """Fixes units that met fixed ones, for the holders' reason where they have one of their own."""
        reasons = self._reason[holders]
        if (reasons == 0).any():
            reasons = np.where(reasons == 0, len(self.reasons), reasons)
            self.reasons.append(Reason(*self.place, "meets an axis that is fixed there"))
        self._reason[units] = reasons

    def _hold_at(self, units: Ids, places: Ids) -> None:
        """Units that meet fixed places in some pattern: only those that meet the same ones can be exchanged."""
        if not len(units):
            return
        ids, index = np.unique(units, return_inverse=True)
        content = np.zeros(len(ids), dtype=np.uint64)
        with np.errstate(over="ignore"):
            np.add.at(content, index, scramble(places.astype(np.uint64)))
        _, group, size = np.unique(content, return_inverse=True, return_counts=True)
        self.freeze(ids[size[group] == 1], "meets an axis that is fixed there")
        blocks = self.fresh(len(size))
        self._reason[blocks] = 0
        shared = size[group] > 1
        self._nest(ids[shared], blocks[group[shared]])

    def relate(self, left: Labels, right: Labels) -> None:
        """Draws the conclusions from two layers that label the same value.

        The pairs of labels that occur are split into connected components. A component with one label on either side
        says that the two are the same unit; one against many, that the many are inside the one; many against many,
        all pairs present, that both are inside a common block. Where every pair occurs, nothing follows. Anything else
        is no symmetry that permutations of units can express, and the units are fixed.
        """
        if left is right:
            return
        pairs = broadcast_to_support([left, right])
        a, b = self.find(pairs[0]), self.find(pairs[1])
        known = (a != WILDCARD) & (b != WILDCARD)
        if not known.any() or np.array_equal(a, b):
            return
        pairs_found = np.unique(a[known] * self.size + b[known])
        a, b = pairs_found // self.size, pairs_found % self.size
        if self.is_frozen(a).all() and self.is_frozen(b).all():
            return
        self.relate_pairs(a, b)

    def relate_pairs(self, a: Ids, b: Ids) -> None:
        """As `relate`, from distinct pairs of representatives."""
        a_ids, a_index = np.unique(a, return_inverse=True)
        b_ids, b_index = np.unique(b, return_inverse=True)
        if len(a) == len(a_ids) * len(b_ids) and len(a) > 1:
            if len(a_ids) == 1:
                self._nest(b, a)
            elif len(b_ids) == 1:
                self._nest(a, b)
            return
        nodes = len(a_ids) + len(b_ids)
        graph = coo_matrix((np.ones(len(a)), (a_index, len(a_ids) + b_index)), shape=(nodes, nodes))
        count, member = connected_components(graph, directed=False)
        a_count = np.bincount(member[: len(a_ids)], minlength=count)
        b_count = np.bincount(member[len(a_ids) :], minlength=count)
        component = member[a_index]
        pair_count = np.bincount(component, minlength=count)
        complete = pair_count == a_count * b_count
        broken = ~complete[component]
        if broken.any():
            for units, others in ((a, b), (b, a)):
                moving = np.zeros(count, dtype=bool)
                moving[component[~self.is_frozen(others)]] = True
                held = broken & ~moving[component]
                self._hold_at(units[held], others[held])
                broken = broken & ~held
        if broken.any():
            text = "pairs of units meet in a pattern that no permutation of either keeps"
            self.freeze(np.concatenate([a[broken], b[broken]]), text, expected=False)
        same = (complete & (a_count == 1) & (b_count == 1))[component]
        inside_a = (complete & (a_count == 1) & (b_count > 1))[component]
        inside_b = (complete & (a_count > 1) & (b_count == 1))[component]
        blocks = complete & (a_count > 1) & (b_count > 1)
        if inside_a.any():
            self._nest(b[inside_a], a[inside_a])
        if inside_b.any():
            self._nest(a[inside_b], b[inside_b])
        if blocks.any():
            block = np.zeros(count, dtype=np.int64)
            block[blocks] = self.fresh(int(blocks.sum()))
            chosen = blocks[component]
            for units in (a, b):
                found = np.unique(np.stack([units[chosen], block[component[chosen]]]), axis=1)
                self._nest(found[0], found[1])
        self.unite(a[same], b[same])

    def _nest(self, children: Ids, parents: Ids) -> None:
        other = children != parents
        children, parents = children[other], parents[other]
        stuck = self.is_frozen(children)
        if stuck.any():  # what holds a fixed unit is fixed, and nothing else follows: fixed units share their ids
            self.freeze(parents[stuck], "holds units that are fixed")
            children, parents = children[~stuck], parents[~stuck]
        if not len(children):
            return
        fixed = self.is_frozen(parents)
        if fixed.any():
            # Fixed positions share their ids; a position of this relation must not be taken for one of another.
            ids, index = np.unique(parents[fixed], return_inverse=True)
            parents[fixed] = self.stand_ins(len(ids))[index]
        self.relations.append((children, parents))

    def occur(self, layer: Labels) -> None:
        """Records that the units of a layer occur at one place of the graph, which tells them from all others."""
        self.occurrences.append(layer)


def simplify(units: Units, layers: Sequence[Labels], *, related: bool = False) -> tuple[Labels, ...]:
    """The layers without those that another layer determines.

    What follows from two layers on one axis is drawn before one of them goes, unless that was done (`related`).
    """
    dims = [d for layer in layers for d in support(layer)]
    if len(dims) == len(set(dims)) and all(map(support, layers)):
        return tuple(layers)  # none says anything about another's dimensions
    layers = without_joint(units, join_fixed(units, list(layers)), related=related)
    if len(layers) < 2:
        return tuple(layers)
    roots = [units.find(layer) for layer in layers]
    supports = [set(support(layer)) for layer in layers]
    wild = [int((layer == WILDCARD).sum()) for layer in layers]
    distinct = [len(np.unique(root)) for root in roots]
    # Coarse layers and those with wildcards are tried for removal first, so that the telling ones stay.
    order = sorted(range(len(layers)), key=lambda k: (wild[k] == 0, distinct[k], -k))
    alive = set(range(len(layers)))
    for k in order:
        for other in sorted(alive - {k}):
            if supports[k] <= supports[other] and determines(roots[other], roots[k], distinct[other], units.size):
                if not related:
                    units.relate(layers[other], layers[k])
                alive.remove(k)
                break
    return tuple(layers[k] for k in sorted(alive))


def without_joint(units: Units, layers: list[Labels], *, related: bool) -> list[Labels]:
    """The layers without those that a layer of units and a layer of fixed positions determine together.

    A layer over units and positions whose every unit is inside of one unit of another layer, itself told apart on
    axes of its own, says only which part of the fixed positions each of its units stands for. That is known of the
    units once they are related; the array, which is as large as both axes together, is not needed any more.
    """
    for joint in [layer for layer in layers if len(support(layer)) > 1]:
        dims = set(support(joint))
        others = [x for x in layers if x is not joint and support(x) and set(support(x)) < dims]
        fixed = [x for x in others if units.is_frozen(x).all() and tells_apart(units, x)]
        for whole in others:
            rest = dims - set(support(whole))
            place = next((x for x in fixed if set(support(x)) == rest), None)
            if place is None or not tells_apart(units, whole):
                continue
            root = units.find(joint)
            if determines(root, units.find(whole), len(np.unique(root)), units.size):
                if not related:
                    units.relate(joint, whole)
                    units.relate(joint, place)
                layers = [x for x in layers if x is not joint]
                break
    return layers


def tells_apart(units: Units, layer: Labels) -> bool:
    """Whether no two positions of a layer have the same label."""
    root = units.find(layer)
    return len(np.unique(root)) == root.size and not (root == WILDCARD).any()


def join_fixed(units: Units, layers: list[Labels]) -> list[Labels]:
    """The layers with those of fixed positions that overlap made into one."""
    fixed = [layer for layer in layers if units.is_frozen(layer).all()]
    others = [layer for layer in layers if not any(layer is x for x in fixed)]
    while fixed:
        one = fixed.pop(0)
        partner = next((x for x in fixed if set(support(x)) & set(support(one))), None)
        if partner is None:
            others.append(one)
        else:
            fixed = [x for x in fixed if x is not partner]
            fixed.append(join(units, [one, partner]))
    return others


def determines(fine: Labels, coarse: Labels, distinct: int, size: int) -> bool:
    """Whether each label of `fine` occurs with one label of `coarse` only."""
    if fine.shape == coarse.shape and np.array_equal(fine, coarse):
        return True
    a, b = broadcast_to_support([fine, coarse])
    return len(np.unique((a + 1) * (size + 1) + (b + 1))) == distinct


def one_to_one(units: Units, left: Labels, right: Labels) -> bool:
    """Whether two layers tell the same positions apart, all of them."""
    if left.shape != right.shape:
        return False
    a, b = units.find(left).ravel(), units.find(right).ravel()
    pairs = np.unique(np.stack([a, b]), axis=1)
    return bool((pairs != WILDCARD).all()) and pairs.shape[1] == len(np.unique(a)) == len(np.unique(b))


def merge(units: Units, values: Sequence[Value]) -> Value:
    """The value of an elementwise operation: shapes broadcast, layers that meet are related."""
    shape = tuple(np.broadcast_shapes(*(value.shape for value in values)))
    merged: list[Labels] = []
    for value in values:
        incoming = [lift(layer, len(shape)) for layer in value.layers]
        for new in incoming:
            for old in merged:
                if set(support(new)) & set(support(old)):
                    units.relate(old, new)
        merged += incoming
    for layer in merged:
        if len(support(layer)) > 1 and not units.is_frozen(layer).all():
            relate_jointly(units, layer, [x for x in merged if x is not layer])
    return Value(shape, simplify(units, merged, related=True))


def relate_jointly(units: Units, layer: Labels, others: Sequence[Labels]) -> None:
    """Draws what follows from a layer and several others that lie along different axes of it, taken together.

    A bias for each distance between two positions meets every first and every second position: pair by pair nothing
    follows, and yet each unit belongs to certain pairs of positions.
    """
    inner = [x for x in others if support(x) and set(support(x)) < set(support(layer))]
    fixed = [x for x in inner if units.is_frozen(x).all()]
    if len(fixed) > 1:
        places = join(units, fixed)
        if units.is_news(np.concatenate([units.find(x).ravel() for x in (layer, places)])):
            units.relate(layer, places)
    free = [x for x in inner if not units.is_frozen(x).all()]
    axes = [d for x in (*free, *fixed) for d in support(x)]
    if not free or len(free) + len(fixed) < 2 or len(set(axes)) < len(axes):
        return
    roots = [units.find(x) for x in (layer, *free, *fixed)]
    if units.is_news(np.concatenate([root.ravel() for root in roots])) and not is_rectangular(roots):
        text = "units of several axes meet in a pattern that no permutation of one of them keeps"
        units.freeze(np.concatenate([root.ravel() for root in roots]), text, expected=False)


def is_rectangular(roots: Sequence[Labels]) -> bool:
    """Whether each label of the first layer meets all combinations of those labels of the others that it meets."""
    first, *others = broadcast_to_support(roots)
    ids, label = np.unique(first, return_inverse=True)
    expected = np.ones(len(ids), dtype=np.int64)
    cell = np.zeros(len(first), dtype=np.int64)
    for other in others:
        found, index = np.unique(other, return_inverse=True)
        pairs = np.unique(label * len(found) + index)
        expected *= np.bincount(pairs // len(found), minlength=len(ids))
        _, cell = np.unique(cell * len(found) + index, return_inverse=True)
    cells = int(cell.max(initial=0)) + 1
    met = np.bincount(np.unique(label * cells + cell) // cells, minlength=len(ids))
    return bool((met == expected)[ids != WILDCARD].all())


def reduce(units: Units, value: Value, dims: Sequence[int], *, keepdim: bool = False) -> Value:
    """The value of a symmetric reduction (sum, mean, maximum, …) over `dims`."""
    ndim = len(value.shape)
    gone = {d % ndim for d in dims} if ndim else set()
    kept = [d for d in range(ndim) if d not in gone]
    layers: list[Labels] = []
    for layer in value.layers:
        touched = set(support(layer))
        if touched <= gone:
            continue
        partners = entangled(units, layer, value.layers, gone)
        if partners:
            for one in (layer, *partners):
                units.freeze(one, "a reduction over units that meet others in a pattern", expected=False)
            places = tuple(1 if d in gone else size for d, size in enumerate(layer.shape))
            layers.append(units.rigid(math.prod(places)).reshape(places))
        else:
            layers.append(reduce_layer(units, layer, sorted(gone)) if touched & gone else layer)
    if keepdim:
        shape = tuple(1 if d in gone else size for d, size in enumerate(value.shape))
    else:
        shape = tuple(value.shape[d] for d in kept)
        layers = [layer.reshape([layer.shape[d] for d in kept]) for layer in layers]
    return Value(shape, simplify(units, [layer for layer in layers if support(layer)]))


def entangled(units: Units, layer: Labels, layers: Sequence[Labels], gone: set[int]) -> list[Labels]:
    """The layers whose units meet those of `layer`, along a reduction's axes, some at one place and some at another.

    Each layer is reduced on its own. That is right where, place by place, the units of one layer meet all those of the
    other that they meet anywhere.
    """
    found = []
    for other in layers:
        if other is not layer and set(support(layer)) & set(support(other)) & gone:
            a, b = (units.find(x) for x in broadcast_to_support([layer, other]))
            shape = np.broadcast_shapes(layer.shape, other.shape)
            kept = [1 if d in gone else size for d, size in enumerate(shape)]
            place = np.broadcast_to(np.arange(math.prod(kept)).reshape(kept), shape).ravel()
            if not meet_alike(a, b, place):
                found.append(other)
    return found


def meet_alike(a: Ids, b: Ids, place: Ids) -> bool:
    """Whether at each place all pairs of labels occur that occur anywhere between the labels found there."""
    pairs, index = np.unique(np.stack([a, b]), axis=1, return_inverse=True)
    a_ids, a_index = np.unique(pairs[0], return_inverse=True)
    b_ids, b_index = np.unique(pairs[1], return_inverse=True)
    nodes = len(a_ids) + len(b_ids)
    graph = coo_matrix((np.ones(pairs.shape[1]), (a_index, len(a_ids) + b_index)), shape=(nodes, nodes))
    count, member = connected_components(graph, directed=False)
    group = place * count + member[a_index[index.ravel()]]
    alone, other, both = (
        np.bincount(np.unique(np.stack([group, *x]), axis=1)[0], minlength=int(group.max()) + 1)
        for x in ((a,), (b,), (a, b))
    )
    return bool((both == alone * other).all())


def scramble(x: Hashes) -> Hashes:
    """A 64-bit hash of each number (splitmix64)."""
    with np.errstate(over="ignore"):
        x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def reduce_layer(units: Units, layer: Labels, dims: Sequence[int]) -> Labels:
    """The labels of the blocks that remain when a layer is reduced over some of the dimensions that it varies along."""
    kept_shape = tuple(1 if d in dims else size for d, size in enumerate(layer.shape))
    kept_index = np.broadcast_to(np.arange(int(np.prod(kept_shape))).reshape(kept_shape), layer.shape).ravel()
    label = units.find(layer.ravel())
    known = label != WILDCARD
    if units.is_frozen(label[known]).all():
        content = np.zeros(int(np.prod(kept_shape)), dtype=np.uint64)  # equal where the same labels are reduced
        with np.errstate(over="ignore"):
            np.add.at(content, kept_index, scramble(label.astype(np.uint64)))
        _, index = np.unique(content, return_inverse=True)
        return compress(units.rigid(int(index.max()) + 1)[index].reshape(kept_shape))
    pairs, times = np.unique(np.stack([label[known], kept_index[known]]), axis=1, return_counts=True)
    ids, label_index = np.unique(pairs[0], return_inverse=True)
    places, place_index = np.unique(pairs[1], return_inverse=True)
    nodes = len(ids) + len(places)
    graph = coo_matrix((np.ones(pairs.shape[1]), (label_index, len(ids) + place_index)), shape=(nodes, nodes))
    count, member = connected_components(graph, directed=False)
    labels_in = np.bincount(member[: len(ids)], minlength=count)
    places_in = np.bincount(member[len(ids) :], minlength=count)
    component = member[label_index]
    complete = np.bincount(component, minlength=count) == labels_in * places_in
    usual = np.zeros(len(ids), dtype=np.int64)
    usual[label_index] = times
    complete[component[times != usual[label_index]]] = False  # a unit counts more at one place than at another
    out = np.full(int(np.prod(kept_shape)), WILDCARD)
    place_component = member[len(ids) :]
    if not complete.all():
        broken = ids[~complete[member[: len(ids)]]]
        units.freeze(broken, "a reduction over overlapping sets of units", expected=False)
        lost = places[~complete[place_component]]
        out[lost] = units.rigid(len(out))[lost]
    if complete.all() and count == 1 and len(places) == len(out):
        return out.reshape(kept_shape)[(slice(0, 1),) * len(kept_shape)]  # every block holds the same units
    block = units.fresh(count)
    single = labels_in == 1
    owner = np.zeros(count, dtype=np.int64)
    owner[member[: len(ids)]] = ids
    block = np.where(single, owner, block)
    chosen = complete[member[: len(ids)]] & ~single[member[: len(ids)]]
    if chosen.any():
        units.relations.append((ids[chosen], block[member[: len(ids)][chosen]]))
    fine = complete[place_component]
    out[places[fine]] = block[place_component[fine]]
    return compress(out.reshape(kept_shape))


def rigid_value(units: Units, shape: Sequence[int]) -> Value:
    """A value whose every position is fixed."""
    return Value(tuple(shape), rigid_layers(units, shape, range(len(shape))))


def rigid_layers(units: Units, shape: Sequence[int], dims: Sequence[int]) -> tuple[Labels, ...]:
    """One layer of fixed positions for each of `dims`."""
    layers = []
    for d in dims:
        if shape[d] > 1:
            layout = [1] * len(shape)
            layout[d] = shape[d]
            layers.append(units.rigid(shape[d]).reshape(layout))
    return tuple(layers)


def constant_value(units: Units, tensor: Tensor) -> Value:
    """The value of numbers that depend on no parameter or input: fixed along each dimension in which they vary."""
    varying = [
        d
        for d in range(tensor.ndim)
        if tensor.shape[d] > 1 and not torch.equal(tensor, tensor.narrow(d, 0, 1).expand_as(tensor))
    ]
    layers = rigid_layers(units, tuple(tensor.shape), varying)
    return Value(tuple(tensor.shape), layers, constant=tensor)


def pin(units: Units, value: Value, dims: Sequence[int], text: str) -> Value:
    """The value with `dims` reduced to size 1 after fixing what lies along them."""
    gone = {d % len(value.shape) for d in dims}
    for layer in value.layers:
        along = set(support(layer))
        if along and along <= gone:
            units.freeze(layer, text)
        elif along & gone:
            shape = tuple(size if d in gone else 1 for d, size in enumerate(layer.shape))
            units.relate(layer, units.rigid(int(np.prod(shape))).reshape(shape))
    return replace(reduce(units, value, sorted(gone), keepdim=True), source=value.source)


def with_rigid(units: Units, value: Value, shape: Sequence[int], dims: Sequence[int]) -> Value:
    """The value grown to `shape` with fresh fixed positions along `dims`, where it had size 1."""
    return Value(tuple(shape), (*value.layers, *rigid_layers(units, shape, dims)))


def join(units: Units, layers: Sequence[Labels]) -> Labels:
    """One layer that stands for several: a unit for each combination that occurs, inside each of its parts."""
    arrays = np.broadcast_arrays(*layers)
    roots = [units.find(array.ravel()) for array in arrays]
    combos, index = np.unique(np.stack(roots), axis=1, return_inverse=True)
    frozen = np.stack([units.is_frozen(row) for row in combos]).all(axis=0)
    ids = np.where(frozen, units.rigid(combos.shape[1]), 0)
    movable = np.flatnonzero(~frozen)
    ids[movable] = units.fresh(len(movable))
    for row in combos:
        known = movable[row[movable] != WILDCARD]
        if len(known):
            units.relations.append((ids[known], row[known]))
    return compress(ids[index.ravel()].reshape(arrays[0].shape))


def concatenate(units: Units, values: Sequence[Value], dim: int) -> Value:
    """The value of joining values along `dim`."""
    dim %= len(values[0].shape)
    shape = list(values[0].shape)
    shape[dim] = sum(value.shape[dim] for value in values)
    per_value = [[canonical(units, layer) for layer in value.layers] for value in values]
    shared = [
        layer
        for layer in per_value[0]
        if layer.shape[dim] == 1 and all(contains(units, others, layer) for others in per_value[1:])
    ]
    for layer in (layer for own in per_value for layer in own):
        # Fixed positions across the joint may distinguish more than there is to distinguish: it does no harm.
        if layer.shape[dim] == 1 and units.is_frozen(layer).all() and not contains(units, shared, layer):
            shared.append(layer)
    layers: list[Labels] = list(shared)
    lengths = [value.shape[dim] for value in values]
    for along in (True, False):
        parts = []
        for own in per_value:
            rest = [x for x in own if (x.shape[dim] > 1) == along and not contains(units, shared, x)]
            parts.append(join(units, rest) if len(rest) > 1 else rest[0] if rest else None)
        if any(part is not None for part in parts):
            layers += concatenate_layers(units, parts, lengths, dim, len(shape))
    if len(layers) == len(shared):  # equal labels on different numbers: only their place tells them apart
        layers.append(parts_layer(units, lengths, dim, len(shape)))
    return Value(tuple(shape), simplify(units, [x for x in (compress(layer) for layer in layers) if support(x)]))


def concatenate_layers(
    units: Units, parts: Sequence[Labels | None], lengths: Sequence[int], dim: int, ndim: int
) -> list[Labels]:
    """Layers joined along `dim`, and a layer that names the part where labels alone would not tell."""
    blank = np.full((1,) * ndim, WILDCARD)
    arrays = [blank if part is None else part for part in parts]
    told = [part for part in parts if part is not None]
    if all(units.is_frozen(part).all() for part in told):
        # A single place beside fixed ones is fixed as well, and is none of them.
        taken = max(part.size for part in told)
        for index, (part, length) in enumerate(zip(parts, lengths, strict=True)):
            if part is None and length == 1:
                taken += 1
                arrays[index] = units.rigid(taken)[-1:].reshape((1,) * ndim)
    common = list(np.broadcast_shapes(*((*array.shape[:dim], 1, *array.shape[dim + 1 :]) for array in arrays)))
    grown = []
    for array, length in zip(arrays, lengths, strict=True):
        common[dim] = length
        grown.append(np.broadcast_to(array, common))
    joined = np.concatenate(grown, axis=dim)
    seen = [np.unique(units.find(array.ravel())) for array in arrays]
    if sum(len(ids) for ids in seen) == len(np.unique(np.concatenate(seen))):
        units.tell_apart(joined.ravel())
        return [joined]
    return [joined, parts_layer(units, lengths, dim, ndim)]


def parts_layer(units: Units, lengths: Sequence[int], dim: int, ndim: int) -> Labels:
    """A layer that says which of several parts, side by side along `dim`, a position belongs to."""
    layout = [1] * ndim
    layout[dim] = sum(lengths)
    return np.repeat(units.rigid(len(lengths)), lengths).reshape(layout)


def canonical(units: Units, layer: Labels) -> Labels:
    """A layer of fixed units re-labelled by rank, so that fixed axes of different origin compare equal."""
    if not units.is_frozen(layer).all():
        return layer
    _, index = np.unique(units.find(layer.ravel()), return_inverse=True)
    return units.rigid(int(index.max()) + 1)[index].reshape(layer.shape)


def contains(units: Units, layers: Sequence[Labels], wanted: Labels) -> bool:
    """Whether `wanted` is among `layers`, up to units known to be the same."""
    return any(
        layer.shape == wanted.shape and np.array_equal(units.find(layer), units.find(wanted)) for layer in layers
    )


def identifies(units: Units, value: Value) -> bool:
    """Whether no two positions of a value have the same labels; may say no where it is hard to tell."""
    along = [d for layer in value.layers for d in support(layer)]
    every = [d for d, size in enumerate(value.shape) if size > 1]
    return sorted(along) == every and all(len(np.unique(units.find(x))) == x.size for x in value.layers)


def as_parameter(
    units: Units, name: str, shape: Sequence[int], groups: Sequence[tuple[int, ...]] | None = None
) -> Value:
    """A parameter's value: fresh units along each of its dimensions, or along several of them together.

    Args:
        units: All units so far.
        name: The parameter's name.
        shape: Its shape.
        groups: For each layer of labels, the dimensions that it varies along; by default each dimension alone.
    """
    layers: list[Labels] = []
    groups = groups if groups is not None else [(d,) for d in range(len(shape))]
    for group in groups:
        sizes = [shape[d] for d in group]
        if math.prod(sizes) > 1:
            # Units of two parts of a stack may turn out to be the same: each part is an axis of its own.
            parts = math.prod(size for d, size in zip(group, sizes, strict=True) if (d,) in groups and group != (d,))
            ids = np.concatenate([units.fresh(math.prod(sizes) // parts) for _ in range(parts)])
            layers.append(ids.reshape([size if d in group else 1 for d, size in enumerate(shape)]))
    return Value(tuple(shape), tuple(layers), source=name)


def relate_parts(units: Units, value: Value) -> None:
    """Says of a stack's units in which part they are, once it is known which of them are the same in all parts."""
    for part in value.layers:
        for layer in value.layers:
            if set(support(part)) < set(support(layer)):
                units.relate(part, layer)


def unsqueeze(value: Value, dim: int) -> Value:
    """The value with a dimension of size 1 put in at `dim`."""
    dim %= len(value.shape) + 1
    shape = (*value.shape[:dim], 1, *value.shape[dim:])
    return replace(value, shape=shape, layers=tuple(np.expand_dims(x, dim) for x in value.layers), constant=None)


def narrow(units: Units, value: Value, dim: int, start: int, length: int) -> Value:
    """A slice of a value."""
    shape = (*value.shape[:dim], length, *value.shape[dim + 1 :])
    cut = [x.take(range(start, start + length), axis=dim) if x.shape[dim] > 1 else x for x in value.layers]
    layers = [compress(layer) for layer in cut]
    for layer in layers:
        units.occur(layer)
    return Value(shape, tuple(layer for layer in layers if support(layer)), source=value.source)


def reshape(value: Value, shape: Sequence[int]) -> Value:
    """The value under another shape of the same number of elements."""
    shape = tuple(shape)
    layers = (compress(np.broadcast_to(layer, value.shape).reshape(shape)) for layer in value.layers)
    return replace(value, shape=shape, layers=tuple(x for x in layers if support(x)), constant=None)
