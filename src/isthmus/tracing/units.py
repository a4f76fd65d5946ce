"""Units: which are one and the same, which are inside which, which cannot move, and how large a group they allow."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, UInt64
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

Labels = Int[np.ndarray, "..."]
Ids = Int[np.ndarray, " _"]
Hashes = UInt64[np.ndarray, " _"]

# A position that no label distinguishes in this layer: the value there is the same whatever its unit might be.
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


def broadcast_to_support(layers: Sequence[Labels]) -> list[Labels]:
    """The layers broadcast against one another and flattened."""
    return [array.ravel() for array in np.broadcast_arrays(*layers)]


class UnitTable:
    """All units of a trace: which are one and the same, which are inside which, and which cannot move."""

    def __init__(self) -> None:
        self._root = np.empty(0, dtype=np.int64)
        self._reason = np.empty(0, dtype=np.int64)  # index into reasons, or -1 where the unit can move
        self._axis = np.empty(0, dtype=np.int64)  # units made together; they are told apart wherever they meet
        self._side_by_side: list[Ids] = []  # units of several axes that were joined into one; these too are told apart
        self._kin: dict[int, int] = {}  # an axis → a smaller one, where units of the two were united or joined
        self._known: set[tuple[tuple[int, ...], bytes]] = set()
        self._level = np.empty(0, dtype=np.int8)  # evidence against richer groups, see GROUPS in description.py
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
        self.expected_stand_ins: list[Ids] = []  # stand-ins made for a choice's first alternative; the others use them

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

        Units of one axis number different things and are never united with each other. Pairs that would unite some of
        them (0 with 1, 1 with 2) put these units into an order instead, from left to right: they are strung, see
        `_string`. Where left and right stand in no order (`ordered` is false), such units are fixed.
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
        """Strings units that follow one another pair by pair: each string is a block, which can move as a whole.

        The units of a string keep their order: each is inside the string's block and at a fixed place in it.
        """
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

        Example:
            Four numbers in two rows, and then a bias for each row:

            >>> units = UnitTable()
            >>> rows, numbers, bias = units.fresh(2), units.fresh(4), units.fresh(2)
            >>> units.relate(np.array([0, 0, 1, 1]), numbers)  # one with many: the numbers are inside the rows
            >>> units.relations
            [(array([2, 3, 4, 5]), array([0, 0, 1, 1]))]
            >>> units.relate(rows, bias)  # one with one: units 6 and 7 are units 0 and 1
            >>> units.find(bias)
            array([0, 1])
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


def scramble(x: Hashes) -> Hashes:
    """A 64-bit hash of each number (splitmix64)."""
    with np.errstate(over="ignore"):
        x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
