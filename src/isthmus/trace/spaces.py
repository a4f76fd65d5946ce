"""From labels to spaces: which units can be exchanged, what is nested in what, and where each tensor touches them."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Int

from isthmus.symmetry import Frozen, Gain, Gauge, Group, Site, Space
from isthmus.trace.capture import Program
from isthmus.trace.execute import BatchNorm, Contraction, Tracing
from isthmus.trace.labels import (
    ORTHOGONAL_LEVEL,
    SCALE,
    SIGN,
    WILDCARD,
    Hashes,
    Ids,
    Labels,
    Units,
    Value,
    compress,
    scramble,
    support,
)

# By level of evidence: nothing but linear maps, squared norms, norms of centred values, units used one by one.
GROUPS = (Group.INVERTIBLE, Group.ORTHOGONAL, Group.ORTHOGONAL_FIXING_ONES, Group.PERMUTATION)


# A fixed unit that a unit is inside of, after the number of the relation that says so.
Tag = tuple[int, int]


class IrregularError(Exception):
    """The places of a space's units in a tensor do not correspond to one another."""


@dataclass(eq=False)
class Graph:
    """The traced graph: where in it each space can be read.

    Attributes:
        program: The captured program.
        activations: For nodes that carry units: every space there and its positions in the node's value.
        post: For each space, the nodes that its consumers read.
        pre: For each space, the nodes that enter a nonlinear operation; those of `post` where there are none.
        contractions: Products of activations with parameters.
        batch_norms: Normalisations by running statistics.
        partial: Nodes that carry units of which `activations` does not tell, or not of all.
    """

    program: Program
    activations: dict[str, list[tuple[str, Site]]]
    post: dict[str, tuple[str, ...]]
    pre: dict[str, tuple[str, ...]]
    contractions: list[Contraction]
    batch_norms: list[BatchNorm]
    partial: frozenset[str] = frozenset()


@dataclass(eq=False)
class Block:
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

    blocks: list[Block]
    coordinates: dict[int, Coordinates]
    colours: Hashes

    def ancestors(self, block: int) -> list[int]:
        """A space and the spaces that it is nested in, innermost first."""
        chain = [block]
        while (parent := self.blocks[chain[-1]].parent) is not None:
            chain.append(parent)
        return chain

    def flat_index(self, root: int, block: int) -> int:
        """A unit's index in a space, counted over all copies; −1 where the space does not move it."""
        coordinates = self.coordinates.get(root)
        if coordinates is None:
            return -1
        flat = 0
        for each in reversed(self.ancestors(block)):
            if each not in coordinates.spaces:
                return -1
            flat = flat * self.blocks[each].size + coordinates.spaces[each]
        return flat


def solve(tracing: Tracing) -> Solution:
    """Finds all spaces; freezes what turns out irregular and starts again until nothing does."""
    units = tracing.units
    units.place = ("", "")
    while True:
        edges = close_relations(units)
        colours = colour_units(units, edges)
        solution, irregular = build_blocks(units, edges, colours, units_of_interest(tracing))
        if irregular is None:
            irregular = irregular_sites(tracing, solution)
        if irregular is None:
            return solution
        units.freeze(irregular, "its units meet others in an irregular pattern", expected=False)


def close_relations(units: Units) -> Int[np.ndarray, "edges 3"]:
    """All triples (child, parent, relation), after drawing every conclusion that two relations of one child allow."""
    while True:
        before = (
            len(units.relations),
            int(np.count_nonzero(units.find(np.arange(units.size)) != np.arange(units.size))),
        )
        records = canonical_relations(units)
        for children, parents in records:
            order = np.argsort(children, kind="stable")
            same = np.flatnonzero(children[order][1:] == children[order][:-1])
            if len(same):  # a function has one value: two parents of one child in one relation are the same unit
                units.unite(parents[order[same]], parents[order[same + 1]], ordered=False)
        movable = [(c, p) for c, p in records if not units.is_frozen(p).all()]
        for first, second in overlapping(movable):
            relate_images(units, movable[first], movable[second])
        after = (
            len(units.relations),
            int(np.count_nonzero(units.find(np.arange(units.size)) != np.arange(units.size))),
        )
        if before == after:
            break
    # Which relation says so matters: in x_i − x_j one parent is the first and one the second.
    edges = [
        np.stack([children, parents, np.full_like(children, number)], axis=1)
        for number, (children, parents) in enumerate(canonical_relations(units))
    ]
    found = np.concatenate(edges) if edges else np.empty((0, 3), dtype=np.int64)
    while True:  # a fixed unit fixes what it is inside of
        stuck = units.is_frozen(found[:, 0]) & ~units.is_frozen(found[:, 1])
        if not stuck.any():
            return found
        units.freeze(found[stuck, 1], "holds units that are fixed")


def canonical_relations(units: Units) -> list[tuple[Ids, Ids]]:
    """The relations between representatives, without repetitions; they replace the recorded ones."""
    unique: dict[bytes, tuple[Ids, Ids]] = {}
    for children, parents in units.relations:
        pairs = np.stack([units.find(children), units.find(parents)])
        pairs = np.unique(pairs[:, (pairs[0] != pairs[1]) & (pairs >= 0).all(axis=0)], axis=1)
        if pairs.shape[1]:
            unique.setdefault(pairs.tobytes(), (pairs[0], pairs[1]))
    units.relations = list(unique.values())
    return units.relations[:]


def overlapping(records: Sequence[tuple[Ids, Ids]]) -> list[tuple[int, int]]:
    """Pairs of relations that share a child."""
    holders: dict[int, list[int]] = defaultdict(list)
    for index, (children, _) in enumerate(records):
        for child in np.unique(children).tolist():
            holders[child].append(index)
    found: set[tuple[int, int]] = set()
    for group in {tuple(indices) for indices in holders.values()}:
        found |= {(a, b) for i, a in enumerate(group) for b in group[i + 1 :]}
    return sorted(found)


def relate_images(units: Units, first: tuple[Ids, Ids], second: tuple[Ids, Ids]) -> None:
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


def colour_units(units: Units, edges: Int[np.ndarray, "edges 3"]) -> Hashes:
    """A number for each unit, equal for units that occur at the same places and stand in the same relations.

    Colour refinement (Weisfeiler and Leman, 1968): start from the places of the graph where a unit occurs, and how
    often; then add the colours of what it is inside of and of what it holds, until no more units are told apart.
    """
    count = units.size
    colours = np.zeros(count, dtype=np.uint64)
    seen: dict[int, tuple[Ids, Ids]] = {}
    with np.errstate(over="ignore"):
        for place, layer in enumerate(units.occurrences):
            if id(layer) not in seen:
                ids, times = np.unique(units.find(layer.ravel()), return_counts=True)
                seen[id(layer)] = (ids[ids != WILDCARD], times[ids != WILDCARD])
            ids, times = seen[id(layer)]
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


def units_of_interest(tracing: Tracing) -> Ids:
    """Representatives of all movable units that lie along a parameter."""
    layers = [layer.ravel() for value in tracing.parameters.values() for layer in value.layers]
    if not layers:
        return np.empty(0, dtype=np.int64)
    roots = np.unique(tracing.units.find(np.concatenate(layers)))
    return roots[~tracing.units.is_frozen(roots)]


def build_blocks(
    units: Units, edges: Int[np.ndarray, "edges 3"], colours: Hashes, wanted: Ids
) -> tuple[Solution, Ids | None]:
    """Spaces from colours: exchangeable units that share what they are inside of form one copy of a space.

    Returns:
        The solution, and units to freeze before trying again, or None.
    """
    parents: dict[int, list[int]] = defaultdict(list)
    tags: dict[int, list[Tag]] = defaultdict(list)
    frozen_parent = units.is_frozen(edges[:, 1])
    for (child, parent, number), fixed in zip(edges.tolist(), frozen_parent.tolist(), strict=True):
        if fixed:
            tags[child].append((number, parent))
        elif parent not in parents[child]:
            parents[child].append(parent)
    solution = Solution([], {}, colours)
    depths, cycle = depth_of(wanted.tolist(), parents)
    if cycle:
        return solution, np.array(cycle)
    classes: dict[int, list[int]] = defaultdict(list)
    for root in depths:
        classes[int(colours[root])].append(root)
    levels, factors = units.levels(), units.factors()
    while (levels[edges[:, 1]] < levels[edges[:, 0]]).any():  # what holds for units holds for what they are inside of
        np.maximum.at(levels, edges[:, 1], levels[edges[:, 0]])
    while (factors[edges[:, 1]] & ~factors[edges[:, 0]]).any():
        np.bitwise_and.at(factors, edges[:, 1], factors[edges[:, 0]])
    for members in sorted(classes.values(), key=lambda group: (depths[group[0]], min(group))):
        above = {root: direct_parents(root, parents) for root in members}
        families: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for root in sorted(members):
            families[tuple(above[root])].append(root)
        if not place_class(solution, families, tags, levels):
            return solution, np.array(members)
    for block in solution.blocks:
        block.factors = int(np.bitwise_and.reduce(factors[block.roots.ravel()]))
    return solution, None


def depth_of(wanted: Sequence[int], parents: Mapping[int, list[int]]) -> tuple[dict[int, int], list[int]]:
    """How deeply each unit and each of its ancestors is nested; or the units of a cycle."""
    depths: dict[int, int] = {}
    for start in wanted:
        stack, path = [start], set()
        while stack:
            root = stack[-1]
            open_parents = [p for p in parents.get(root, ()) if p not in depths]
            if root in depths:
                stack.pop()
            elif not open_parents:
                depths[root] = 1 + max((depths[p] for p in parents.get(root, ())), default=-1)
                stack.pop()
                path.discard(root)
            elif any(p in path for p in open_parents):
                return depths, sorted(path)
            else:
                path.add(root)
                stack += open_parents
    return depths, []


def direct_parents(root: int, parents: Mapping[int, list[int]]) -> list[int]:
    """A unit's parents without those that another of its parents is itself inside of."""
    direct = sorted(parents.get(root, ()))
    if len(direct) < 2:
        return direct
    higher: set[int] = set()
    stack = [p for parent in direct for p in parents.get(parent, ())]
    while stack:
        one = stack.pop()
        if one not in higher:
            higher.add(one)
            stack += parents.get(one, ())
    return [p for p in direct if p not in higher]


def place_class(
    solution: Solution, families: Mapping[tuple[int, ...], list[int]], tags: Mapping[int, list[Tag]], levels: Ids
) -> bool:
    """Gives coordinates to a class of exchangeable units; False where their families differ in size."""
    sizes = {len(family) for family in families.values()}
    if len(sizes) != 1:
        return False
    size = sizes.pop()
    base = {key: inherit(solution, key) for key in families}
    if any(coordinates is None for coordinates in base.values()):
        return False
    parent, is_chain = innermost(solution, [c for c in base.values() if c is not None])
    own: int | None = None
    if size > 1 and is_chain:
        copies = 1 if parent is None else solution.blocks[parent].copies * solution.blocks[parent].size
        if len(families) != copies:
            return False
        own = len(solution.blocks)
        roots = np.empty((copies, size), dtype=np.int64)
        for key, family in families.items():
            row = 0 if parent is None else flat_of(solution, base[key], parent)
            roots[row] = family
        solution.blocks.append(Block(roots, parent, max(int(levels[r]) for r in roots.ravel())))
    for key, family in families.items():
        inherited = base[key]
        assert inherited is not None
        for index, root in enumerate(family):
            # Siblings that cannot move on their own keep a fixed place among themselves.
            place = ((-1, index),) if own is None and size > 1 else ()
            spaces = dict(inherited.spaces) | ({} if own is None else {own: index})
            told = (*inherited.tags, *sorted(tags.get(root, ())), *place)
            solution.coordinates[root] = Coordinates(spaces, told)
    return True


def inherit(solution: Solution, key: tuple[int, ...]) -> Coordinates | None:
    """The coordinates that a unit has from its parents; None where two parents stand in one space at two places."""
    spaces: dict[int, int] = {}
    tags: list[Tag] = []
    for parent in key:
        coordinates = solution.coordinates[parent]
        for block, index in coordinates.spaces.items():
            if spaces.setdefault(block, index) != index:
                return None
        tags += coordinates.tags
    return Coordinates(spaces, tuple(tags))


def innermost(solution: Solution, bases: Sequence[Coordinates]) -> tuple[int | None, bool]:
    """The space that a class is nested in, and whether its coordinates are just that space and its ancestors."""
    blocks = set(bases[0].spaces)
    if any(set(base.spaces) != blocks for base in bases):
        return None, False
    if not blocks:
        return None, True
    deepest = max(blocks, key=lambda block: len(solution.ancestors(block)))
    return deepest, set(solution.ancestors(deepest)) == blocks


def flat_of(solution: Solution, coordinates: Coordinates | None, block: int) -> int:
    """The flat index, over all copies, of coordinates in a space."""
    assert coordinates is not None
    flat = 0
    for each in reversed(solution.ancestors(block)):
        flat = flat * solution.blocks[each].size + coordinates.spaces[each]
    return flat


def locate(
    tracing: Tracing, solution: Solution, value: Value, block: int
) -> list[tuple[tuple[int, ...], Labels, Labels]]:
    """Every place where a value touches a space: its dimensions, its positions, and the layer that says so.

    Raises:
        IrregularError: The units' places do not correspond to one another.
    """
    found: list[tuple[tuple[int, ...], Labels, Labels]] = []
    slots: list[Labels] = []
    roots = [tracing.units.find(layer) for layer in value.layers]
    for layer, root in zip(value.layers, roots, strict=True):
        index = compress(lookup(root, lambda unit: solution.flat_index(unit, block)))
        if (index < 0).all() or any(np.array_equal(index, slot) for slot in slots if slot.shape == index.shape):
            continue
        slots.append(index)
        dims = support(index)
        if not dims:
            continue
        positions = positions_of(solution, value, roots, index, dims, block)
        while beyond := carried_along(solution, value, roots, positions, dims, block):
            dims = tuple(sorted({*dims, *beyond}))
            positions = positions_of(solution, value, roots, index, dims, block)
        found.append((dims, positions, layer))
    return found


def carried_along(
    solution: Solution, value: Value, roots: Sequence[Labels], positions: Labels, dims: tuple[int, ...], block: int
) -> set[int]:
    """Further dimensions along which not all units of a space carry the same, so that these move with them."""
    own = set(solution.ancestors(block))
    for root in roots:
        beyond = set(support(root)) - set(dims)
        if beyond and beyond != set(support(root)):
            shape = tuple(size if d in dims or d in beyond else 1 for d, size in enumerate(value.shape))
            rest = np.broadcast_to(residual_ids(solution, root, own), shape)
            rows = rest.transpose(moved_to_front(dims, len(shape))).reshape(-1, math.prod(shape[d] for d in beyond))
            carried = rows[positions]
            if not (carried == carried[:1, :1]).all():
                return beyond
    return set()


def lookup(roots: Labels, table: "Mapping[int, int] | object") -> Labels:
    """A function of units applied to every label; wildcards give −1."""
    ids, inverse = np.unique(roots, return_inverse=True)
    assert callable(table)
    values = np.array([-1 if unit == WILDCARD else table(unit) for unit in ids.tolist()], dtype=np.int64)
    return values[inverse].reshape(roots.shape)


def positions_of(
    solution: Solution, value: Value, roots: Sequence[Labels], index: Labels, dims: tuple[int, ...], block: int
) -> Int[np.ndarray, "copies size repeat"]:
    """Positions along the flattened `dims` of every unit of a space, so that equal r means corresponding places."""
    shape = tuple(value.shape[d] if d in dims else 1 for d in range(len(value.shape)))
    unit = np.broadcast_to(index, shape).transpose(moved_to_front(dims, len(shape))).ravel()
    own = set(solution.ancestors(block))
    rests = []
    for root in roots:
        if set(support(root)) <= set(dims):
            rest = residual_ids(solution, root, own)
            rests.append(np.broadcast_to(rest, shape).transpose(moved_to_front(dims, len(shape))).ravel())
    touched = np.flatnonzero(unit >= 0)
    keys = np.stack([unit[touched], *(rest[touched] for rest in rests)])
    order = np.lexsort(keys[::-1])  # by unit, then by what tells its places apart; ties keep their order
    total = solution.blocks[block].copies * solution.blocks[block].size
    if len(touched) % total or not np.array_equal(keys[0][order], np.repeat(np.arange(total), len(touched) // total)):
        raise IrregularError("not every unit has the same number of places")
    arranged = keys[1:, order].reshape(len(rests), total, len(touched) // total)
    if not (arranged == arranged[:, :1]).all():
        raise IrregularError("the places of two units do not correspond")
    return touched[order].reshape(solution.blocks[block].copies, solution.blocks[block].size, -1)


def moved_to_front(dims: tuple[int, ...], ndim: int) -> list[int]:
    """The order of dimensions that puts `dims` first."""
    return [*dims, *(d for d in range(ndim) if d not in dims)]


def residual_ids(solution: Solution, root: Labels, own: set[int]) -> Labels:
    """A number for all that tells a unit apart once its index in the spaces `own` is taken away."""
    numbers: dict[tuple[object, ...], int] = {}

    def residual(unit: int) -> int:
        coordinates = solution.coordinates.get(unit)
        if coordinates is None:
            key: tuple[object, ...] = ("fixed", unit)
        else:
            rest = tuple(sorted((b, i) for b, i in coordinates.spaces.items() if b not in own))
            key = (int(solution.colours[unit]), rest, coordinates.tags)
        return numbers.setdefault(key, len(numbers))

    return lookup(root, residual)


def irregular_sites(tracing: Tracing, solution: Solution) -> Ids | None:
    """The units of the first space that some parameter touches irregularly; None where all are regular."""
    for block, value in touched_pairs(tracing, solution):
        try:
            locate(tracing, solution, value, block)
        except IrregularError:
            return solution.blocks[block].roots.ravel()
    return None


def touched_pairs(tracing: Tracing, solution: Solution) -> Iterable[tuple[int, Value]]:
    """Every pair of a space and a parameter that touches it."""
    for value in tracing.parameters.values():
        for block in blocks_in(tracing.units, solution, value):
            yield block, value


def blocks_in(units: Units, solution: Solution, value: Value) -> list[int]:
    """The spaces that move some unit of a value."""
    blocks: set[int] = set()
    for layer in value.layers:
        for unit in np.unique(units.find(layer.ravel())).tolist():
            coordinates = solution.coordinates.get(unit)
            if coordinates is not None:
                blocks |= set(coordinates.spaces)
    return sorted(blocks)


def describe_spaces(
    tracing: Tracing, solution: Solution, names: Sequence[str], gains: Sequence[Gain] = ()
) -> tuple[list[Space], list[Gauge], list[str]]:
    """The public spaces, parents first, their gauges, and every block's name ("" where it has no space).

    Args:
        tracing: What was learnt from the graph.
        solution: The spaces under construction.
        names: The state dict's, in order.
        gains: The norms' gains.
    """
    variances = {norm.variance for norm in tracing.batch_norms}
    absorbed = {gain.parameter for gain in gains if not gain.obstacle}
    sites: dict[int, list[Site]] = defaultdict(list)
    gauged = {index for index, block in enumerate(solution.blocks) if block.factors}
    levels = [block.level for block in solution.blocks]
    ordered = sorted(tracing.parameters.items(), key=lambda item: names.index(item[0]))
    for name, value in ordered:
        for block in blocks_in(tracing.units, solution, value):
            for dims, positions, layer in locate(tracing, solution, value, block):
                ids = layer[layer != WILDCARD]
                contracted, kept = tracing.units.contracted[ids].any(), tracing.units.kept[ids].any()
                if contracted and kept:
                    gauged.discard(block)
                    # It moves by T and by T⁻¹ at once.
                    levels[block] = max(levels[block], ORTHOGONAL_LEVEL)
                role = "variance" if name in variances else "covector" if contracted and not kept else "vector"
                sites[block].append(Site(name, dims, positions, role))
    has_children = {block.parent for block in solution.blocks}
    for block, level in enumerate(levels):
        if block not in has_children and GROUPS[level] is not Group.PERMUTATION:
            sites[block] = [replace(s, role="diagonal") if s.parameter in absorbed else s for s in sites[block]]
    chosen: dict[int, str] = {}
    taken: set[str] = set()
    for block in range(len(solution.blocks)):
        if sites[block]:
            chosen[block] = unique_name(sites[block], solution.blocks[block].parent is not None, taken)
    spaces: list[Space] = []
    gauges: list[Gauge] = []
    for block, found in enumerate(solution.blocks):
        if block not in chosen:
            continue
        if block in gauged - has_children and GROUPS[levels[block]] is Group.PERMUTATION:
            kinds = [kind for bit, kind in ((SIGN, "sign"), (SCALE, "scale")) if found.factors & bit]
            gauges += [Gauge(chosen[block], kind) for kind in kinds]
        spaces.append(
            Space(
                name=chosen[block],
                size=found.size,
                # Units that hold others are no vectors: only whole units can change places.
                group=Group.PERMUTATION if block in has_children else GROUPS[levels[block]],
                sites=tuple(sites[block]),
                parent=None if found.parent is None else chosen[found.parent],
                copies=found.copies,
            )
        )
    return spaces, gauges, [chosen.get(block, "") for block in range(len(solution.blocks))]


def unique_name(sites: Sequence[Site], nested: bool, taken: set[str]) -> str:
    """The path of the module whose parameter first produces the units, made unique."""
    producer = next((site for site in sites if site.role == "vector"), sites[0])
    base = producer.parameter.rpartition(".")[0] or producer.parameter
    base = f"{base}/units" if nested else base
    name, number = base, 2
    while name in taken:
        name, number = f"{base}#{number}", number + 1
    taken.add(name)
    return name


def describe_frozen(tracing: Tracing, solution: Solution) -> list[Frozen]:
    """What cannot move, dimension by dimension, with the reason that froze it."""
    found: list[Frozen] = []
    for name, value in tracing.parameters.items():
        for layer in value.layers:
            roots = tracing.units.find(layer.ravel())
            counts: dict[tuple[str, str, str, bool], int] = defaultdict(int)
            for unit in np.unique(roots).tolist():
                coordinates = solution.coordinates.get(unit)
                if coordinates is not None and coordinates.spaces:
                    continue
                reason = tracing.units.reason(unit)
                if reason is None:
                    counts["", "", "no other unit takes part in the same operations", True] += 1
                else:
                    counts[reason.operation, reason.module, reason.text, reason.expected] += 1
            dims = ",".join(str(d) for d in support(layer))
            for (operation, module, text, expected), number in counts.items():
                found.append(Frozen(name, dims, number, operation, module, text, expected))
    return found


def describe_graph(tracing: Tracing, solution: Solution, program: Program, names: Sequence[str]) -> Graph:
    """Where in the graph each space can be read."""
    sources = [contraction.source for contraction in tracing.contractions]
    wanted = {
        *sources,
        *(contraction.node for contraction in tracing.contractions),
        *(norm.node for norm in tracing.batch_norms),
        *tracing.nonlinear,
    }
    activations: dict[str, list[tuple[str, Site]]] = {}
    partial: set[str] = set()
    for node in program.graph.nodes:
        value = tracing.values.get(node.name)
        if node.name not in wanted or not isinstance(value, Value):
            continue
        places = []
        for block in blocks_in(tracing.units, solution, value):
            try:
                located = locate(tracing, solution, value, block)
            except IrregularError:
                partial.add(node.name)
                continue  # a part of a space, or several spaces side by side: it cannot stand for the whole
            if names[block]:
                places += [(names[block], Site(node.name, dims, at, "vector")) for dims, at, _ in located]
        if places:
            activations[node.name] = places
    read_at = {
        name: tuple(node for node in activations if node in sources and any(s == name for s, _ in activations[node]))
        for name in names
        if name
    }
    made_at = {
        name: tuple(
            node for node in activations if node in tracing.nonlinear and any(s == name for s, _ in activations[node])
        )
        for name in read_at
    }
    produced = {
        name: tuple(c.node for c in tracing.contractions if any(s == name for s, _ in activations.get(c.node, ())))
        for name in read_at
    }
    post = {name: nodes or produced[name] for name, nodes in read_at.items()}
    return Graph(
        program=program,
        activations=activations,
        post=post,
        pre={name: nodes or post[name] for name, nodes in made_at.items()},
        contractions=tracing.contractions,
        batch_norms=tracing.batch_norms,
        partial=frozenset(partial),
    )
