"""From labels to spaces under construction: which units can be exchanged, and what is nested in what."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from isthmus.tracing.execute import Tracing
from isthmus.tracing.relations import close_relations, colour_units
from isthmus.tracing.solution import Coordinates, DraftSpace, IrregularError, Places, Solution, Tag
from isthmus.tracing.units import Hashes, Ids, UnitTable


def find_spaces(tracing: Tracing) -> Places:
    """Finds all spaces; freezes what turns out irregular and starts again until nothing does."""
    units = tracing.units
    units.place = ("", "")
    while True:
        edges = close_relations(units)
        colours = colour_units(units, edges)
        solution, irregular = _build_blocks(units, edges, colours, _units_of_interest(tracing))
        places = Places(units, solution)
        if irregular is None:
            irregular = _irregular_sites(tracing, places)
        if irregular is None:
            return places
        units.freeze(irregular, "its units meet others in an irregular pattern", expected=False)


def _units_of_interest(tracing: Tracing) -> Ids:
    """Representatives of all movable units that lie along a parameter."""
    layers = [layer.ravel() for value in tracing.parameters.values() for layer in value.layers]
    if not layers:
        return np.empty(0, dtype=np.int64)
    roots = np.unique(tracing.units.find(np.concatenate(layers)))
    return roots[~tracing.units.is_frozen(roots)]


def _build_blocks(
    units: UnitTable, edges: Int[np.ndarray, "edges 3"], colours: Hashes, wanted: Ids
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
    depths, cycle = _depth_of(wanted.tolist(), parents)
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
        above = {root: _direct_parents(root, parents) for root in members}
        families: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for root in sorted(members):
            families[tuple(above[root])].append(root)
        if not _place_class(solution, families, tags, levels):
            return solution, np.array(members)
    for block in solution.blocks:
        block.factors = int(np.bitwise_and.reduce(factors[block.roots.ravel()]))
    return solution, None


def _depth_of(wanted: Sequence[int], parents: Mapping[int, list[int]]) -> tuple[dict[int, int], list[int]]:
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


def _direct_parents(root: int, parents: Mapping[int, list[int]]) -> list[int]:
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


def _place_class(
    solution: Solution, families: Mapping[tuple[int, ...], list[int]], tags: Mapping[int, list[Tag]], levels: Ids
) -> bool:
    """Gives coordinates to a class of exchangeable units; False where their families differ in size."""
    sizes = {len(family) for family in families.values()}
    if len(sizes) != 1:
        return False
    size = sizes.pop()
    base = {key: _inherit(solution, key) for key in families}
    if any(coordinates is None for coordinates in base.values()):
        return False
    parent, is_chain = _innermost(solution, [c for c in base.values() if c is not None])
    own: int | None = None
    if size > 1 and is_chain:
        copies = 1 if parent is None else solution.blocks[parent].copies * solution.blocks[parent].size
        if len(families) != copies:
            return False
        own = len(solution.blocks)
        roots = np.empty((copies, size), dtype=np.int64)
        for key, family in families.items():
            row = 0 if parent is None else _flat_of(solution, base[key], parent)
            roots[row] = family
        solution.blocks.append(DraftSpace(roots, parent, max(int(levels[r]) for r in roots.ravel())))
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


def _inherit(solution: Solution, key: tuple[int, ...]) -> Coordinates | None:
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


def _innermost(solution: Solution, bases: Sequence[Coordinates]) -> tuple[int | None, bool]:
    """The space that a class is nested in, and whether its coordinates are just that space and its ancestors."""
    blocks = set(bases[0].spaces)
    if any(set(base.spaces) != blocks for base in bases):
        return None, False
    if not blocks:
        return None, True
    deepest = max(blocks, key=lambda block: len(solution.ancestors(block)))
    return deepest, set(solution.ancestors(deepest)) == blocks


def _flat_of(solution: Solution, coordinates: Coordinates | None, block: int) -> int:
    """The flat index, over all copies, of coordinates in a space."""
    assert coordinates is not None
    flat = 0
    for each in reversed(solution.ancestors(block)):
        flat = flat * solution.blocks[each].size + coordinates.spaces[each]
    return flat


def _irregular_sites(tracing: Tracing, places: Places) -> Ids | None:
    """The units of the first space that some parameter touches irregularly; None where all are regular."""
    for value in tracing.parameters.values():
        for block in places.blocks_in(value):
            try:
                places.locate(value, block)
            except IrregularError:
                return places.solution.blocks[block].roots.ravel()
    return None
