import itertools

import numpy as np
import pytest

from isthmus.match.nested import family_of, paired_value, roots_of, solve_family
from isthmus.symmetry import Group, Permutation, Space, Symmetry


def nested(*shapes: tuple[str, int, int, str | None]) -> Symmetry:
    """A symmetry without tensors, of spaces (name, copies, size, parent)."""
    spaces = [Space(name, size, Group.PERMUTATION, (), parent, copies) for name, copies, size, parent in shapes]
    return Symmetry(tuple(spaces), (), {})


FAMILIES = {
    "one space": nested(("a", 1, 4, None)),
    "groups of channels": nested(("g", 1, 3, None), ("c", 3, 2, "g")),
    "groups with two kinds of units": nested(("g", 1, 2, None), ("c", 2, 3, "g"), ("d", 2, 2, "g")),
    "three levels": nested(("g", 1, 2, None), ("h", 2, 2, "g"), ("u", 4, 2, "h")),
}


def every_choice(sym: Symmetry):
    """All transforms of all spaces."""
    each = []
    for space in sym:
        rows = itertools.product(itertools.permutations(range(space.size)), repeat=space.copies)
        each.append([Permutation(np.array(choice)) for choice in rows])
    for choice in itertools.product(*each):
        yield dict(zip([s.name for s in sym], choice, strict=True))


@pytest.mark.parametrize("kind", FAMILIES)
def test_it_finds_the_best_of_all_permutations(kind):
    sym = FAMILIES[kind]
    (root,) = roots_of(sym)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        similarities = {s.name: rng.normal(size=(s.copies * s.size,) * 2) for s in sym}
        found = {name: Permutation(rows) for name, rows in solve_family(sym, root, similarities).items()}
        best = max(paired_value(sym, root, similarities, choice) for choice in every_choice(sym))
        assert paired_value(sym, root, similarities, found) == pytest.approx(best, rel=1e-12)


def test_a_space_without_similarities_follows_its_children():
    sym = FAMILIES["groups of channels"]
    rng = np.random.default_rng(0)
    similarities = {"c": rng.normal(size=(6, 6))}
    found = {name: Permutation(rows) for name, rows in solve_family(sym, sym["g"], similarities).items()}
    best = max(paired_value(sym, sym["g"], similarities, choice) for choice in every_choice(sym))
    assert paired_value(sym, sym["g"], similarities, found) == pytest.approx(best, rel=1e-12)


def test_heads_are_compared_by_the_best_pairing_of_their_units():
    """Planted heads with shuffled units; comparing units in place would not find them."""
    sym = nested(("heads", 1, 4, None), ("units", 4, 8, "heads"))
    rng = np.random.default_rng(0)
    features = rng.normal(size=(32, 5))
    moves = {"heads": Permutation.random(sym["heads"], rng), "units": Permutation.random(sym["units"], rng)}
    rows = (moves["heads"].indices[0][:, None] * 8 + moves["units"].indices).ravel()
    # slot i holds unit rows[i] of the features, and the moved model's unit j is the feature j
    found = solve_family(sym, sym["heads"], {"units": features[rows] @ features.T})
    assert np.array_equal(found["heads"], moves["heads"].indices)
    assert np.array_equal(found["units"], moves["units"].indices)


def test_a_family_is_a_root_and_all_below_it_parents_first():
    sym = nested(("a", 1, 2, None), ("b", 1, 3, None), ("c", 2, 2, "a"), ("d", 4, 2, "c"), ("e", 3, 2, "b"))
    assert [space.name for space in roots_of(sym)] == ["a", "b"]
    assert [space.name for space in family_of(sym, sym["a"])] == ["a", "c", "d"]
    assert [space.name for space in family_of(sym, sym["b"])] == ["b", "e"]
