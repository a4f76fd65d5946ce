"""Spaces under construction: their units, every unit's coordinates in them, and where a tensor touches them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from jaxtyping import Int

from isthmus.tracing.labels import Value, compress, support
from isthmus.tracing.units import WILDCARD, Hashes, Ids, Labels, UnitTable, scramble

# A fixed unit that a unit is inside of, after the number of the relation that says so.
Tag = tuple[int, int]

# A touched space in a tensor: the dimensions, the positions in them, and the layer that says so.
Place = tuple[tuple[int, ...], Int[np.ndarray, "copies size repeat"], Labels]


class IrregularError(Exception):
    """The places of a space's units in a tensor do not correspond to one another."""


@dataclass(eq=False)
class DraftSpace:
    """A space under construction: its units' representatives, row by row, one row a copy."""

    roots: Int[np.ndarray, "copies size"]
    parent: int | None
    level: int = 0
    factors: int = 0

    @property
    def copies(self) -> int:
        """Number of rows."""
        return self.roots.shape[0]

    @property
    def size(self) -> int:
        """Units in one row."""
        return self.roots.shape[1]


@dataclass(frozen=True)
class Coordinates:
    """Where a unit stands: its index in every space that moves it, and what tells it from others at that index."""

    spaces: Mapping[int, int] = field(default_factory=dict)
    tags: tuple[Tag, ...] = ()


@dataclass(eq=False)
class Solution:
    """Spaces under construction, and every unit's coordinates."""

    blocks: list[DraftSpace]
    coordinates: dict[int, Coordinates]
    colours: Hashes

    def ancestors(self, block: int) -> list[int]:
        """A space and the spaces that it is nested in, innermost first."""
        chain = [block]
        while (parent := self.blocks[chain[-1]].parent) is not None:
            chain.append(parent)
        return chain


@dataclass(frozen=True, eq=False)
class Members:
    """The units that a space moves, in ascending order, and what is known of each."""

    units: Ids
    flat: Ids  # index over all copies; −1 where the unit is not in one of the space's ancestors
    hashes: Hashes  # of the index in this space alone


class Places:
    """Where tensors touch the spaces of a finished solution.

    Every look-up works on whole label arrays: a table over all units is filled for one space and cleared again.
    """

    def __init__(self, units: UnitTable, solution: Solution) -> None:
        self.units = units
        self.solution = solution
        self._flat = np.full(units.size + 1, -1, dtype=np.int64)  # the last entry stands for wildcards
        self._hash = np.zeros(units.size + 1, dtype=np.uint64)
        self._roots: dict[int, tuple[Labels, Labels]] = {}
        self._found: dict[tuple[int, ...], list[Place]] = {}
        self._keep: list[Value] = []

    @cached_property
    def members(self) -> list[Members]:
        """For every space, the units that it moves."""
        found: list[tuple[list[int], list[int]]] = [([], []) for _ in self.solution.blocks]
        for root, coordinates in self.solution.coordinates.items():
            for block, index in coordinates.spaces.items():
                found[block][0].append(root)
                found[block][1].append(index)
        ids, places = [], []
        for roots, indices in found:
            order = np.argsort(np.array(roots, dtype=np.int64))
            ids.append(np.array(roots, dtype=np.int64)[order])
            places.append(np.array(indices, dtype=np.int64)[order])
        members = []
        for block, (own, index) in enumerate(zip(ids, places, strict=True)):
            flat = np.zeros(len(own), dtype=np.int64)
            whole = np.ones(len(own), dtype=bool)
            for each in reversed(self.solution.ancestors(block)):
                self._flat[ids[each]] = places[each]
                there = self._flat[own]
                whole &= there >= 0
                flat = flat * self.solution.blocks[each].size + there
                self._flat[ids[each]] = -1
            with np.errstate(over="ignore"):
                hashes = scramble(scramble(np.uint64(block) + np.zeros(len(own), np.uint64)) ^ index.astype(np.uint64))
            members.append(Members(own, np.where(whole, flat, -1), hashes))
        return members

    @cached_property
    def _signatures(self) -> tuple[Int[np.ndarray, " _"], list[tuple[int, ...]]]:
        """For each unit the number of its set of spaces (0: none), and these sets."""
        numbers: dict[tuple[int, ...], int] = {(): 0}
        table = np.zeros(self.units.size + 1, dtype=np.int64)
        for root, coordinates in self.solution.coordinates.items():
            table[root] = numbers.setdefault(tuple(sorted(coordinates.spaces)), len(numbers))
        return table, list(numbers)

    @cached_property
    def _identities(self) -> Hashes:
        """For each unit a hash of all that tells it from others: colour, tags, and its index in every space."""
        identities = scramble(np.arange(self.units.size + 1, dtype=np.uint64) ^ np.uint64(2**63))
        alike: dict[tuple[Tag, ...], int] = {}
        roots = np.fromiter(self.solution.coordinates, dtype=np.int64, count=len(self.solution.coordinates))
        tags = [alike.setdefault(each.tags, len(alike)) for each in self.solution.coordinates.values()]
        colours = self.solution.colours[roots]
        identities[roots] = scramble(colours ^ scramble(np.array(tags, dtype=np.uint64)))
        with np.errstate(over="ignore"):
            for members in self.members:
                identities[members.units] += members.hashes
        return identities

    def roots(self, layer: Labels) -> Labels:
        """The representatives of a layer's units."""
        known = self._roots.get(id(layer))
        if known is None:
            known = self._roots[id(layer)] = (layer, self.units.find(layer))  # holds the layer, so that its id stays
        return known[1]

    def blocks_in(self, value: Value) -> list[int]:
        """The spaces that move some unit of a value."""
        table, sets = self._signatures
        found: set[int] = set()
        for layer in value.layers:
            for number in np.unique(table[self.roots(layer)]).tolist():
                found.update(sets[number])
        return sorted(found)

    def index(self, roots: Labels, block: int) -> Labels:
        """Each unit's index in a space, counted over all copies; −1 where the space does not move it."""
        members = self.members[block]
        self._flat[members.units] = members.flat
        found = self._flat[roots]
        self._flat[members.units] = -1
        return found

    def residual(self, roots: Labels, own: Iterable[int]) -> Labels:
        """A number for all that tells a unit apart once its index in the spaces `own` is taken away; wildcards: −1.

        Numbers follow the order of units.
        """
        ids, inverse = np.unique(roots, return_inverse=True)
        hashes = self._identities[ids]
        with np.errstate(over="ignore"):
            for block in own:
                members = self.members[block]
                self._hash[members.units] = members.hashes
                hashes = hashes - self._hash[ids]
                self._hash[members.units] = 0
        _, first, number = np.unique(hashes, return_index=True, return_inverse=True)
        rank = np.empty(len(first), dtype=np.int64)
        rank[np.argsort(first)] = np.arange(len(first))
        return np.where(ids == WILDCARD, -1, rank[number])[inverse].reshape(roots.shape)

    def locate(self, value: Value, block: int) -> list[Place]:
        """Every place where a value touches a space.

        Raises:
            IrregularError: The units' places do not correspond to one another.
        """
        key = (block, *value.shape, *(id(layer) for layer in value.layers))
        if key not in self._found:
            self._found[key] = self._locate(value, block)
            self._keep.append(value)  # so that the ids in the key stay its own
        return self._found[key]

    def _locate(self, value: Value, block: int) -> list[Place]:
        found: list[Place] = []
        slots: list[Labels] = []
        roots = [self.roots(layer) for layer in value.layers]
        for layer, root in zip(value.layers, roots, strict=True):
            index = self.index(root, block)
            if (index < 0).all():
                continue
            index = compress(index)
            if any(np.array_equal(index, slot) for slot in slots if slot.shape == index.shape):
                continue
            slots.append(index)
            dims = support(index)
            if not dims:
                continue
            positions = self._positions(value, roots, index, dims, block)
            while beyond := self._carried_along(value, roots, positions, dims, block):
                dims = tuple(sorted({*dims, *beyond}))
                positions = self._positions(value, roots, index, dims, block)
            found.append((dims, positions, layer))
        return found

    def _carried_along(
        self, value: Value, roots: Sequence[Labels], positions: Labels, dims: tuple[int, ...], block: int
    ) -> set[int]:
        """Further dimensions along which the labels differ from unit to unit of a space, so that they move with it."""
        own = set(self.solution.ancestors(block))
        for root in roots:
            beyond = set(support(root)) - set(dims)
            if beyond and beyond != set(support(root)):
                shape = tuple(size if d in dims or d in beyond else 1 for d, size in enumerate(value.shape))
                rest = np.broadcast_to(self.residual(root, own), shape)
                rows = rest.transpose(_moved_to_front(dims, len(shape))).reshape(
                    -1, math.prod(shape[d] for d in beyond)
                )
                found = rows[positions]
                if not (found == found[:1, :1]).all():
                    return beyond
        return set()

    def _positions(
        self, value: Value, roots: Sequence[Labels], index: Labels, dims: tuple[int, ...], block: int
    ) -> Int[np.ndarray, "copies size repeat"]:
        """Positions along the flattened `dims` of a space's units, so that equal r means corresponding places."""
        shape = tuple(value.shape[d] if d in dims else 1 for d in range(len(value.shape)))
        front = _moved_to_front(dims, len(shape))
        unit = np.broadcast_to(index, shape).transpose(front).ravel()
        own = set(self.solution.ancestors(block))
        rests = [
            np.broadcast_to(self.residual(root, own), shape).transpose(front).ravel()
            for root in roots
            if set(support(root)) <= set(dims)
        ]
        touched = np.flatnonzero(unit >= 0)
        keys = np.stack([unit[touched], *(rest[touched] for rest in rests)])
        order = np.lexsort(keys[::-1])  # by unit, then by what tells its places apart; ties keep their order
        copies, size = self.solution.blocks[block].roots.shape
        total = copies * size
        times = len(touched) // total
        if len(touched) % total or not np.array_equal(keys[0][order], np.repeat(np.arange(total), times)):
            raise IrregularError("not every unit has the same number of places")
        arranged = keys[1:, order].reshape(len(rests), total, times)
        if not (arranged == arranged[:, :1]).all():
            raise IrregularError("the places of two units do not correspond")
        return touched[order].reshape(copies, size, -1)


def _moved_to_front(dims: tuple[int, ...], ndim: int) -> list[int]:
    """The order of dimensions that puts `dims` first."""
    return [*dims, *(d for d in range(ndim) if d not in dims)]
