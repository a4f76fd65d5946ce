"""Relations between units, closed under all conclusions, and the colours of units that stand in the same ones."""

import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from isthmus.tracing.units import WILDCARD, Hashes, Ids, UnitTable, scramble


def close_relations(units: UnitTable) -> Int[np.ndarray, "edges 3"]:
    """All triples (child, parent, relation), after drawing every conclusion that two relations of one child allow.

    Example:
        Four numbers are inside two heads, and the same four are inside two groups, two by two alike. So the heads and
        the groups meet one with one, and are the same units; the second relation is then a repetition of the first.

        >>> units = UnitTable()
        >>> numbers, heads, groups = units.fresh(4), units.fresh(2), units.fresh(2)
        >>> units.relate(np.repeat(heads, 2), numbers)  # 4 4 5 5 meet 0 1 2 3
        >>> units.relate(np.repeat(groups, 2), numbers)  # 6 6 7 7 meet 0 1 2 3
        >>> close_relations(units).tolist()
        [[0, 4, 0], [1, 4, 0], [2, 5, 0], [3, 5, 0]]
        >>> units.find(groups)
        array([4, 5])
    """
    while True:
        before = (
            len(units.relations),
            int(np.count_nonzero(units.find(np.arange(units.size)) != np.arange(units.size))),
        )
        records = _canonical_relations(units)
        for children, parents in records:
            order = np.argsort(children, kind="stable")
            same = np.flatnonzero(children[order][1:] == children[order][:-1])
            if len(same):  # a function has one value: two parents of one child in one relation are the same unit
                units.unite(parents[order[same]], parents[order[same + 1]], ordered=False)
        movable = [(c, p) for c, p in records if not units.is_frozen(p).all()]
        for first, second in _overlapping(movable):
            _relate_images(units, movable[first], movable[second])
        after = (
            len(units.relations),
            int(np.count_nonzero(units.find(np.arange(units.size)) != np.arange(units.size))),
        )
        if before == after:
            break
    # Which relation says so matters: in x_i − x_j one parent is the first and one the second.
    edges = [
        np.stack([children, parents, np.full_like(children, number)], axis=1)
        for number, (children, parents) in enumerate(_canonical_relations(units))
    ]
    found = np.concatenate(edges) if edges else np.empty((0, 3), dtype=np.int64)
    while True:  # a fixed unit fixes what it is inside of
        stuck = units.is_frozen(found[:, 0]) & ~units.is_frozen(found[:, 1])
        if not stuck.any():
            return found
        units.freeze(found[stuck, 1], "holds units that are fixed")


def _canonical_relations(units: UnitTable) -> list[tuple[Ids, Ids]]:
    """The relations between representatives, without repetitions; they replace the recorded ones."""
    unique: dict[bytes, tuple[Ids, Ids]] = {}
    for children, parents in units.relations:
        pairs = np.stack([units.find(children), units.find(parents)])
        pairs = np.unique(pairs[:, (pairs[0] != pairs[1]) & (pairs >= 0).all(axis=0)], axis=1)
        if pairs.shape[1]:
            unique.setdefault(pairs.tobytes(), (pairs[0], pairs[1]))
    units.relations = list(unique.values())
    return units.relations[:]


def _overlapping(records: Sequence[tuple[Ids, Ids]]) -> list[tuple[int, int]]:
    """Pairs of relations that share a child."""
    if not records:
        return []
    # Each child once for a relation; then children that stand in the same relations count once.
    pairs = [
        np.stack([np.unique(children), np.full(len(np.unique(children)), k)]) for k, (children, _) in enumerate(records)
    ]
    held = np.concatenate(pairs, axis=1)
    _, child = np.unique(held[0], return_inverse=True)
    signature = np.zeros(int(child.max()) + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        np.add.at(signature, child, scramble(held[1].astype(np.uint64)))
    _, first = np.unique(signature, return_index=True)
    order = np.argsort(child, kind="stable")
    starts = np.searchsorted(child[order], np.arange(len(signature) + 1))
    found: set[tuple[int, int]] = set()
    for one in first.tolist():
        group = held[1][order[starts[one] : starts[one + 1]]].tolist()
        found |= {(a, b) for i, a in enumerate(group) for b in group[i + 1 :]}
    return sorted(found)


def _relate_images(units: UnitTable, first: tuple[Ids, Ids], second: tuple[Ids, Ids]) -> None:
    """Two maps on one set of children induce pairs of parents; those pairs are a relation like any other."""
    shared, a, b = np.intersect1d(first[0], second[0], return_indices=True)
    if len(shared) < 2:
        return
    left, right = units.find(first[1][a]), units.find(second[1][b])
    differ = left != right
    if differ.any():
        pairs = np.unique(np.stack([left, right]), axis=1)
        if not (units.is_frozen(pairs[0]).all() or units.is_frozen(pairs[1]).all()) and units.is_news(pairs):
            units.relate_pairs(pairs[0], pairs[1])


def colour_units(units: UnitTable, edges: Int[np.ndarray, "edges 3"]) -> Hashes:
    """A number for each unit, equal for units that occur at the same places and stand in the same relations.

    Colour refinement (Weisfeiler and Leman, 1968): start from the places of the graph where a unit occurs, and how
    often; then add the colours of what it is inside of and of what it holds, until no more units are told apart.
    """
    count = units.size
    colours = np.zeros(count, dtype=np.uint64)
    seen: dict[bytes, tuple[Ids, Ids]] = {}
    with np.errstate(over="ignore"):
        for place, layer in enumerate(units.occurrences):
            roots = units.find(layer.ravel())
            key = hashlib.sha256(roots.tobytes()).digest()
            if key not in seen:
                ids, times = np.unique(roots, return_counts=True)
                seen[key] = (ids[ids != WILDCARD], times[ids != WILDCARD])
            ids, times = seen[key]
            colours[ids] += scramble(np.uint64(place) * np.uint64(2**32) + times.astype(np.uint64))
        frozen = units.is_frozen(np.arange(count))
        colours[frozen] = scramble(np.arange(count, dtype=np.uint64))[frozen]
        children, parents = edges[:, 0], edges[:, 1]
        kinds = scramble(edges[:, 2].astype(np.uint64))
        distinct = 0
        while True:
            above, below = np.zeros(count, dtype=np.uint64), np.zeros(count, dtype=np.uint64)
            np.add.at(above, children, scramble(colours[parents] ^ kinds ^ np.uint64(1)))
            np.add.at(below, parents, scramble(colours[children] ^ kinds ^ np.uint64(2)))
            refined = scramble(scramble(colours) + scramble(above) * np.uint64(3) + scramble(below) * np.uint64(5))
            refined[frozen] = colours[frozen]
            found = len(np.unique(refined))
            if found == distinct:
                return colours
            colours, distinct = refined, found
