"""The objective of weight matching between two models, and the similarity of units that it gives each space.

The objective is Σ_W ⟨W^A, π(W^B)⟩ over all trained tensors that some space touches. With all other spaces held, it is
linear in one space's permutation: a sum of Gram matrices of A's and B's rows, one for each place where a tensor touches
the space. Gram matrices are products in a precision of choice, kept until a space that they depend on moves; sums are
float64. Features come before units in memory, those that another space moves first, so that applying its order copies
whole rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from isthmus.match.assignment import assignment_value, solve_lap
from isthmus.match.nested import Similarity, family_of, roots_of
from isthmus.state import State
from isthmus.symmetry.spaces import Site, Space
from isthmus.symmetry.symmetry import Symmetry
from isthmus.symmetry.transform import LinearMap, Permutation, Transforms, move_site, site_length, site_order, to_front

# Singular values of unfoldings, by tensor and by the site whose units are the rows.
Spectra = dict[tuple[str, int], Tensor]


# Relative slack of the upper bound: singular values come from eigenvalues, which squares the rounding of float64.
BOUND_SLACK = 1e-6


@dataclass(eq=False)
class Term:
    """What one tensor says about one space at one site.

    Attributes:
        space: The space.
        site: Where the tensor touches it.
        first: Dimensions that come first in memory: each is moved by one of `others` alone. None if B's tensor has to
            be moved as a whole.
        others: Other spaces' sites that change B's features: their order must be applied first.
        chain: Sites of the spaces that this one is nested in, at the same place.
        coupled: Whether a space nested beside this one shares the place, so that pairs of copies cannot be compared.
        fixed: A's numbers as `_lay` puts them; None until asked for.
        laid: B's numbers, not moved, in the same way; None until asked for.
        gram: The Gram matrix at `versions`; None until asked for.
        versions: What `gram` was made from.
    """

    space: Space
    site: Site
    first: tuple[int, ...] | None
    others: list[tuple[Space, Site]]
    chain: list[tuple[Space, Site]]
    coupled: bool
    fixed: Tensor | None = None
    laid: Tensor | None = None
    gram: Similarity | None = None
    versions: tuple[int, ...] = ()


@dataclass(eq=False)
class WeightObjective:
    """The objective between a fixed model A and a moved model B.

    Args:
        symmetry: All spaces.
        fixed: A's state.
        moved: B's state.
        parameters: Names of the trained tensors.
        dtype: The precision of Gram matrices.
    """

    symmetry: Symmetry
    fixed: State
    moved: State
    parameters: frozenset[str]
    dtype: torch.dtype = torch.float32
    tensors: dict[str, list[tuple[Space, Site]]] = field(init=False)
    terms: dict[str, list[Term]] = field(init=False)
    root: dict[str, str] = field(init=False)
    version: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.tensors = {
            name: sites
            for name, sites in self.symmetry.sites.items()
            if name in self.parameters and all(site.role != "variance" for _, site in sites)
        }
        self.root = {s.name: root.name for root in roots_of(self.symmetry) for s in family_of(self.symmetry, root)}
        self.version = dict.fromkeys(self.root.values(), 0)
        self.terms = {space.name: [] for space in self.symmetry}
        for name, sites in self.tensors.items():
            for space, site in sites:
                term = self._term(name, space, site, sites)
                if term is not None:
                    self.terms[space.name].append(term)

    def _term(self, name: str, space: Space, site: Site, sites: list[tuple[Space, Site]]) -> Term | None:
        """The term of one site; None where a space nested in this one tells the same more finely."""
        others, chain, coupled = [], [], False
        mine = ancestors(self.symmetry, space)
        for other, place in sites:
            if place is site:
                continue
            meets = overlap(site, place, self.symmetry.shapes[name])
            if meets and space.name in ancestors(self.symmetry, other):
                return None
            if meets and other.name in mine:
                chain.append((other, place))
            elif meets and self.root[other.name] == self.root[space.name]:
                coupled = True
                others.append((other, place))
            elif not set(place.dims) <= set(site.dims) or meets:
                others.append((other, place))
        simple = all(len(place.dims) == 1 and place.dims[0] not in site.dims for _, place in others)
        first = tuple(dict.fromkeys(place.dims[0] for _, place in others)) if simple else None
        return Term(space, site, first, others, chain, coupled)

    def families(self) -> list[Space]:
        """The root spaces, in the symmetry's order."""
        return roots_of(self.symmetry)

    def is_coupled(self, root: Space) -> bool:
        """Whether the objective is not linear in a family: some tensor is touched by it at two places."""
        return any(
            self.root[other.name] == root.name
            for space in family_of(self.symmetry, root)
            for term in self.terms[space.name]
            for other, _ in term.others
        )

    def moved_by(self, root: Space) -> None:
        """Notes that a family's permutations changed."""
        self.version[root.name] += 1

    def stamp(self, root: Space) -> tuple[int, ...]:
        """Versions of everything that a family's similarities depend on; equal stamps give equal similarities."""
        return tuple(
            self.version[self.root[other.name]]
            for space in family_of(self.symmetry, root)
            for term in self.terms[space.name]
            for other, _ in term.others
        )

    def similarity(self, space: Space, transforms: Transforms, solved: frozenset[str] | None = None) -> Similarity:
        """Similarity of A's units (rows) with B's, over all copies, all other families held.

        Args:
            space: The space.
            transforms: Current permutations.
            solved: Families to trust; terms that depend on others are left out. None trusts all.
        """
        units = space.copies * space.size
        total = np.zeros((units, units))
        for term in self.terms[space.name]:
            trusted = solved is None or all(self.root[other.name] in solved for other, _ in term.others)
            if trusted and not term.coupled:
                total += self._gram(term, transforms)
        return total

    def _gram(self, term: Term, transforms: Transforms) -> Similarity:
        versions = tuple(self.version[self.root[other.name]] for other, _ in term.others)
        if term.gram is None or versions != term.versions:
            if term.fixed is None:
                term.fixed = _lay(self.fixed[term.site.parameter].to(self.dtype), term.site, term.first or ())
            features = term.fixed.flatten(0, -2)
            term.gram = (features.T @ self._moved_features(term, transforms)).cpu().numpy()
            term.versions = versions
        return term.gram

    def _moved_features(self, term: Term, transforms: Transforms) -> Float[Tensor, "features units"]:
        """B's features at a term's site, other spaces' orders applied."""
        tensor = self.moved[term.site.parameter]
        if term.first is None or any(isinstance(transforms[other.name], LinearMap) for other, _ in term.others):
            tensor = tensor.to(self.dtype)
            for other, place in term.others:
                tensor = move_site(tensor, place, transforms[other.name])
            return _lay(tensor, term.site, term.first or ()).flatten(0, -2)
        if term.laid is None:
            term.laid = _lay(tensor.to(self.dtype), term.site, term.first)
        laid = term.laid
        for other, place in term.others:
            transform = transforms[other.name]
            assert isinstance(transform, Permutation)
            if not transform.is_identity:
                order = site_order(place, transform.indices, site_length(tensor.shape, place))
                laid = laid.index_select(term.first.index(place.dims[0]), torch.from_numpy(order).to(laid.device))
        return laid.flatten(0, -2)

    def inner_similarity(self, space: Space, transforms: Transforms) -> Float[np.ndarray, "copies size size"]:
        """Similarity of units inside each pair of copies that face each other now, every other space in place."""
        total = np.zeros((space.copies, space.size, space.size))
        for term in self.terms[space.name]:
            tensor = self.moved[term.site.parameter].to(self.dtype)
            for other, place in [*term.chain, *term.others]:
                tensor = move_site(tensor, place, transforms[other.name])
            shape = (space.copies, space.size, -1)
            a = site_rows(self.fixed[term.site.parameter].to(self.dtype), term.site).reshape(shape)
            b = site_rows(tensor, term.site).reshape(shape)
            total += torch.bmm(a, b.transpose(1, 2)).cpu().numpy()
        return total

    def value(self, transforms: Transforms, root: Space | None = None) -> float:
        """The objective in float64, over all tensors or over those that a family touches."""
        total = 0.0
        for name, sites in self.tensors.items():
            if root is not None and not any(self.root[space.name] == root.name for space, _ in sites):
                continue
            tensor = self.moved[name].double()
            for space, site in sites:
                tensor = move_site(tensor, site, transforms[space.name])
            total += float((self.fixed[name].double() * tensor).sum())
        return total

    def spectra(self, state: State) -> Spectra:
        """Singular values of every unfolding whose rows a space permutes; no permutation changes them."""
        found: Spectra = {}
        for name, sites in self.tensors.items():
            tensor = state[name].double()
            for index, (space, place) in enumerate(sites):
                transposed = tensor.ndim == 2 and any(key[0] == name for key in found)
                if len(sites) > 1 and tensor.ndim > 1 and not transposed and self._unfolds(name, space, place):
                    found[name, index] = _singular_values(site_rows(tensor, place))
        return found

    def upper_bound(self, fixed: Spectra | None = None, moved: Spectra | None = None) -> float:
        """A bound that no permutations exceed.

        Tensors that a single un-nested space touches are bounded, space by space, by their exact optimum. Every other
        tensor is bounded by Σ s_i^A s_i^B of an unfolding whose rows the space permutes (von Neumann's trace
        inequality), or by Cauchy and Schwarz where no unfolding is covered.

        Args:
            fixed: A's `spectra`, where they are known already.
            moved: B's.
        """
        fixed = self.spectra(self.fixed) if fixed is None else fixed
        moved = self.spectra(self.moved) if moved is None else moved
        total = 0.0
        single: dict[str, Similarity] = {}
        for name, sites in self.tensors.items():
            a, b = self.fixed[name].double(), self.moved[name].double()
            space, site = sites[0]
            covered = site.positions.size == site_length(a.shape, site)
            if len(sites) == 1 and space.copies == 1 and covered:
                gram = (site_rows(a, site) @ site_rows(b, site).T).cpu().numpy()
                single[space.name] = single.get(space.name, 0.0) + gram
                continue
            bounds = [float((fixed[key] * moved[key]).sum()) for key in fixed if key[0] == name]
            total += min([float(a.norm() * b.norm()), *bounds])
        exact = sum(assignment_value(gram, solve_lap(gram)) for gram in single.values())
        return (total + exact) + BOUND_SLACK * abs(total + exact)

    def _unfolds(self, name: str, space: Space, site: Site) -> bool:
        """Whether all permutations act on the rows and on the columns of a site's unfolding, each for itself."""
        shape = self.symmetry.shapes[name]
        above = ancestors(self.symmetry, space)
        apart = all(
            place is site or other.name in above or not set(place.dims) & set(site.dims)
            for other, place in self.tensors[name]
        )
        return apart and site.positions.size == site_length(shape, site)


def _singular_values(rows: Float[Tensor, "units features"]) -> Float[Tensor, " values"]:
    """Singular values in descending order, from the smaller Gram matrix."""
    gram = rows @ rows.T if rows.shape[0] <= rows.shape[1] else rows.T @ rows
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(0)


def _lay(tensor: Tensor, site: Site, first: Sequence[int]) -> Float[Tensor, "... units"]:
    """A tensor's numbers at a site: dimensions `first`, a unit's places, all other dimensions, and last the units.

    Contiguous in memory, so that an order along one of the first dimensions moves whole rows. The units are
    counted over all copies.
    """
    rest = [d for d in range(tensor.ndim) if d not in site.dims]
    shape = [tensor.shape[d] for d in rest]
    rows = site_rows(tensor, site).reshape(-1, site.positions.shape[2], *shape)
    later = [d for d in rest if d not in first]
    order = [*(2 + rest.index(d) for d in first), 1, *(2 + rest.index(d) for d in later), 0]
    return rows.permute(order).contiguous()


def site_rows(tensor: Tensor, site: Site) -> Float[Tensor, "units features"]:
    """A tensor's numbers at a site, one row a unit, over all copies."""
    copies, size, _ = site.positions.shape
    flat, where = to_front(tensor, site.dims), site.positions.reshape(-1)
    if not np.array_equal(where, np.arange(len(flat))):
        flat = flat.index_select(0, torch.from_numpy(where).to(tensor.device))
    return flat.reshape(copies * size, -1)


def ancestors(symmetry: Symmetry, space: Space) -> set[str]:
    """Names of the spaces that a space is nested in."""
    found: set[str] = set()
    while space.parent is not None:
        space = symmetry[space.parent]
        found.add(space.name)
    return found


def overlap(first: Site, second: Site, shape: tuple[int, ...]) -> bool:
    """Whether two sites of one tensor touch common positions along common dimensions."""
    if not set(first.dims) & set(second.dims):
        return False
    if first.dims == second.dims:
        return bool(np.intersect1d(first.positions, second.positions).size)
    return True
