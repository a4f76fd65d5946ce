"""Families of nested spaces: from similarities of units to the best permutations of a space and all nested in it.

The similarity of two units that hold other units (two heads, two groups of channels) is the value of the best
assignment between what they hold; scores of unaligned inner units would be wrong.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int

from isthmus.match.assignment import assignment_value, solve_lap
from isthmus.symmetry.spaces import Space
from isthmus.symmetry.symmetry import Symmetry
from isthmus.symmetry.transform import Transform, flat_indices

# Similarity of every unit of a space with every unit of the other model's, counted over all copies.
Similarity = Float[np.ndarray, "units units"]
Indices = Int[np.ndarray, "copies size"]


def family_of(symmetry: Symmetry, root: Space) -> list[Space]:
    """A space and all spaces nested in it, parents first."""
    found = [root]
    for space in symmetry:
        if space.parent in {each.name for each in found}:
            found.append(space)
    return found


def roots_of(symmetry: Symmetry) -> list[Space]:
    """The spaces that are nested in no other."""
    return [space for space in symmetry if space.parent is None]


def solve_family(symmetry: Symmetry, root: Space, similarities: Mapping[str, Similarity]) -> dict[str, Indices]:
    """The permutations of a root space and of all spaces nested in it that maximise the total similarity.

    Args:
        symmetry: All spaces.
        root: A space without a parent.
        similarities: For each space of the family, the similarity of its units in slots of the frame (rows) with units
            of the moved model (columns), over all copies; a space may be left out, which counts as zero.

    Example:
        Two heads of two units each. Head 0 of the frame is like head 1 of the moved model, with its units reversed:

        >>> from isthmus.symmetry.spaces import Group
        >>> heads = Space("heads", 2, Group.PERMUTATION, ())
        >>> inner = Space("heads/units", 2, Group.PERMUTATION, (), parent="heads", copies=2)
        >>> alike = np.eye(4)[[3, 2, 0, 1]]  # unit 0 of the frame is like unit 3 of the model, 1 like 2, …
        >>> found = solve_family(Symmetry((heads, inner), (), {}), heads, {"heads/units": alike})
        >>> found["heads"].tolist(), found["heads/units"].tolist()
        ([[1, 0]], [[1, 0], [0, 1]])
    """
    family = family_of(symmetry, root)
    values: dict[str, Similarity] = {}
    for space in reversed(family):
        units = space.copies * space.size
        total = np.array(similarities.get(space.name, np.zeros((units, units))), dtype=np.float64)
        for child in symmetry.children(space):
            total += assignment_values(values[child.name], child)
        values[space.name] = total
    found: dict[str, Indices] = {}
    rows: dict[str, Int[np.ndarray, " copies"]] = {root.name: np.arange(root.copies)}
    for space in family:
        blocks = as_blocks(values[space.name], space)
        found[space.name] = np.stack([solve_lap(blocks[c, r]) for c, r in enumerate(rows[space.name])])
        flat = (rows[space.name][:, None] * space.size + found[space.name]).ravel()
        for child in symmetry.children(space):
            rows[child.name] = flat
    return found


def as_blocks(similarity: Similarity, space: Space) -> Float[np.ndarray, "copies copies size size"]:
    """A similarity split into one block for each pair of copies."""
    shape = (space.copies, space.size, space.copies, space.size)
    return similarity.reshape(shape).transpose(0, 2, 1, 3)


def assignment_values(similarity: Similarity, space: Space) -> Float[np.ndarray, "copies copies"]:
    """The value of the best assignment between each pair of copies."""
    blocks = as_blocks(similarity, space)
    values = np.empty((space.copies, space.copies))
    slots = np.arange(space.size)
    for row in range(space.copies):
        for column in range(space.copies):
            block = blocks[row, column]
            values[row, column] = block[slots, solve_lap(block)].sum()
    return values


def paired_value(
    symmetry: Symmetry, root: Space, similarities: Mapping[str, Similarity], transforms: Mapping[str, Transform]
) -> float:
    """The summed similarity of the units of a family that face each other."""
    return sum(
        assignment_value(similarities[space.name], flat_indices(transforms, symmetry, space))
        for space in family_of(symmetry, root)
        if space.name in similarities
    )
