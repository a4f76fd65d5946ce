"""Subset selection: which units of which model, or which means of matched units, the merged network keeps.

Suffixes: N models, U units of a space, C candidates (the units of every model and the means of matched ones).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from isthmus.errors import InputError
from isthmus.match.base import Match, MatchingProblem
from isthmus.match.coordinate_ascent import match_by_weights
from isthmus.match.correlation import pair_by_activations
from isthmus.match.pairwise import all_to_one, check_place, check_reference
from isthmus.observe.layers import Layer, folded, layers_of
from isthmus.observe.moments import Moments
from isthmus.progress import progress
from isthmus.symmetry.alignment import Alignment
from isthmus.symmetry.spaces import Site, Space
from isthmus.symmetry.symmetry import Symmetry
from isthmus.symmetry.transform import LinearMap, Transform, flat_indices, move_site

# A candidate whose variance has fallen below this share of the largest adds nothing that is not chosen already.
SPANNED = 1e-7

# Share of the mean variance that steadies the regression of all units on the chosen ones.
RIDGE = 1e-9


@dataclass(frozen=True, eq=False)
class Selection:
    """What a space's merged units are made of.

    Attributes:
        into: Merged units from every model's own, Σ_m into[m] x_m.
        back: Every model's units as the best linear prediction from the merged ones.
        kinds: Chosen units of each model, and last the chosen means.
        unexplained: Share of what the next layers read that the chosen units leave open, and the same for the means.
    """

    into: Float[Tensor, "models units units"]
    back: Float[Tensor, "models units units"]
    kinds: list[int]
    unexplained: tuple[float, float]


@dataclass(frozen=True)
class SubsetSelection(Match):
    """Chooses the merged units among all models' units and the means of matched units: column subset selection.

    The models are first matched by permutations. Then, from the output back to the input, each space's units are chosen
    one by one, each time the candidate that explains most of what is left of the mean of the next layers'
    pre-activations, at the units chosen there. A pair that agrees is kept as its mean; a pair that does not is
    kept as one model's unit, the other's, both, or neither. `back` is the linear regression of each model's units on
    the chosen ones. Spaces of a nested family, and those that can be read nowhere in the graph, keep their permutation.

    The maps are linear: a moved model does not compute what it did. The average `pleas` fits the layers to the chosen
    units.

    Attributes:
        pairing: The permutations it starts from: `"activation_matching"` or `"weight_matching"`.
        at: Where activations are read: `"post"`, as consumers receive them, or `"pre"`.
        reference: Three and more models: the reference of the pairing, `"first"`, `"best"` or `"medoid"`.

    Source: this project. The greedy choice is column subset selection's (Farahat, Ghodsi, Kamel, 2011, "An
        efficient greedy method for unsupervised feature selection"); merging within and across models is the idea of
        Stoica et al., ZipIt!, ICLR 2024.
    """

    pairing: str = "activation_matching"
    at: str = "post"
    reference: str = "first"

    name: ClassVar[str] = "subset_selection"
    exact: ClassVar[bool] = False
    joint: ClassVar[bool] = True

    @property
    def needs(self) -> str:
        """Batches; with targets if the reference is the best model."""
        return "labels" if self.reference == "best" else "data"

    def __post_init__(self) -> None:
        if self.pairing not in ("activation_matching", "weight_matching"):
            raise InputError(f"pairing={self.pairing!r}: use 'activation_matching' or 'weight_matching'")
        check_place(self.at)
        check_reference(self.reference)

    def __call__(self, problem: MatchingProblem) -> Alignment:
        """The alignment; its objective is the mean share, over spaces, of the next layers' inputs that is explained.

        Raises:
            DataError: No data, or data that cannot be read.
        """
        symmetry = problem.symmetry
        paired = self._pair(problem)
        chosen: dict[str, Selection] = {}
        if len(problem.models) > 1 and len(symmetry):
            chosen = _select_spaces(problem, paired, problem.moments(self.at))
        transforms: list[Mapping[str, Transform]] = []
        for index, permutations in enumerate(paired.transforms):
            found = dict(permutations)
            for name, selection in chosen.items():
                # The sum over models has no factor 1/N, which a mean over them has.
                into = len(problem.models) * selection.into[index]
                found[name] = LinearMap(into.float(), selection.back[index].float())
            transforms.append(found)
        explained = [1 - selection.unexplained[0] for selection in chosen.values()]
        return Alignment(
            symmetry,
            tuple(transforms),
            method=self.name,
            objective=sum(explained) / len(explained) if explained else 0.0,
            details={
                "pairing": paired.method,
                "spaces": {
                    name: {"kinds": s.kinds, "unexplained": s.unexplained[0], "unexplained_by_means": s.unexplained[1]}
                    for name, s in chosen.items()
                },
            },
        )

    def _pair(self, problem: MatchingProblem) -> Alignment:
        """The permutations that the selection starts from."""
        if self.pairing == "weight_matching":
            return match_by_weights(problem)
        match_pair = partial(pair_by_activations, problem, self.at, "correlation")
        return all_to_one(problem, "activation_matching", match_pair, self.reference)


def _select_spaces(problem: MatchingProblem, paired: Alignment, moments: Moments) -> dict[str, Selection]:
    """The chosen units of every space that stands alone, last spaces first; in the models' own order of units."""
    symmetry = problem.symmetry
    layers = {layer.contraction.weight: layer for layer in layers_of(symmetry)}
    states = problem.states
    chosen: dict[str, Selection] = {}
    for space in progress(list(reversed(symmetry.spaces)), "selecting units"):
        alone = space.copies == 1 and space.parent is None and not symmetry.children(space)
        if not alone or space.name not in moments.spaces or not _resizable(symmetry, space):
            continue
        # Every model's units in the order that the pairing gives them.
        orders = [torch.from_numpy(flat_indices(t, symmetry, space)) for t in paired.transforms]
        read = [
            [_next_layer(symmetry, layers, state, site, chosen, paired, index) for index, state in enumerate(states)]
            for site in space.sites
            if site.role == "covector"
        ]
        if not read:
            continue
        consumers = torch.stack(
            [torch.cat([per_model[m] for per_model in read], dim=1)[order] for m, order in enumerate(orders)]
        )
        covariance = moments[space.name].covariance
        covariance = torch.stack([covariance[m][order] for m, order in enumerate(orders)])
        covariance = torch.stack([covariance[:, :, m][:, :, order] for m, order in enumerate(orders)], dim=2)
        selection = _select_units(covariance, consumers)
        into, back = torch.empty_like(selection.into), torch.empty_like(selection.back)
        for m, order in enumerate(orders):
            into[m][:, order], back[m][order] = selection.into[m], selection.back[m]
        chosen[space.name] = Selection(into, back, selection.kinds, selection.unexplained)
    return chosen


def _resizable(symmetry: Symmetry, space: Space) -> bool:
    """Whether no tensor is touched by the space at two places, where two linear maps would meet."""
    return all(
        sum(other.name == space.name for other, _ in symmetry.sites[site.parameter]) == 1 for site in space.sites
    )


def _next_layer(
    symmetry: Symmetry,
    layers: Mapping[str, Layer],
    state: Mapping[str, Tensor],
    site: Site,
    chosen: Mapping[str, Selection],
    paired: Alignment,
    index: int,
) -> Float[Tensor, "units features"]:
    """What one model's next layer does with each unit: its share of the units chosen there, BatchNorm folded in."""
    models = len(paired.transforms)
    layer = layers.get(site.parameter)
    weight = folded(layer, state)[0] if layer else state[site.parameter].double()
    for space, place in symmetry.sites[site.parameter]:
        if place is site:
            continue
        if space.name in chosen and place.role == "vector":
            into = chosen[space.name].into[index]
            weight = move_site(weight, place, LinearMap(into, into.T.contiguous()))
        else:
            weight = move_site(weight, place, paired.transforms[index][space.name])
    if not any(space.name in chosen for space, place in symmetry.sites[site.parameter] if place is not site):
        weight = weight / models
    units = weight.movedim(site.dims, tuple(range(len(site.dims)))).flatten(0, len(site.dims) - 1).flatten(1)
    where = torch.from_numpy(site.positions[0])
    return units[where].flatten(1)


def _select_units(
    covariance: Float[Tensor, "models units models units"], consumers: Float[Tensor, "models units features"]
) -> Selection:
    """Greedy column subset selection for one space.

    Args:
        covariance: Covariance of all models' units, matched units at one index.
        consumers: What the mean of the next layers reads from each unit.
    """
    models, units = covariance.shape[:2]
    total = models * units
    K = covariance.reshape(total, total).double()
    flat = consumers.reshape(total, -1)
    read = flat @ flat.T  # the inner products of what is read from two units
    values, vectors = torch.linalg.eigh(read)
    root = (vectors * values.clamp_min(0).sqrt()).T
    eye = torch.eye(units, dtype=K.dtype, device=K.device)
    means = torch.cat([eye / models] * models, dim=1)
    candidates = torch.cat([torch.eye(total, dtype=K.dtype, device=K.device), means])
    picks = _greedy_subset(candidates @ K @ candidates.T, root @ K @ candidates.T, units)
    # What is left adds nothing on the data: means of pairs without a chosen unit come first.
    taken = {pick % units for pick in picks}
    spare = sorted(set(range(units)) - {pick - total for pick in picks}, key=lambda unit: unit in taken)
    picks += [total + unit for unit in spare[: units - len(picks)]]
    picks.sort(key=lambda pick: (pick % units, pick // units))
    chosen = candidates[picks]
    back, unexplained = _regress_units(K, read, chosen)
    kinds = torch.bincount(torch.tensor(picks) // units, minlength=models + 1).tolist()
    return Selection(
        chosen.reshape(units, models, units).transpose(0, 1).contiguous(),
        back.reshape(models, units, units),
        kinds,
        (unexplained, _regress_units(K, read, means)[1]),
    )


def _greedy_subset(
    covariance: Float[Tensor, "candidates candidates"], wanted: Float[Tensor, "targets candidates"], count: int
) -> list[int]:
    """Up to `count` candidates, each the one that explains most of what those before it leave open.

    Args:
        covariance: Covariance of the candidates.
        wanted: Covariance of what is to be explained with the candidates.
        count: How many to choose; fewer are returned where nothing is left to explain.
    """
    # What the picks leave open is never formed as a whole: cov - lefts columnsᵀ and wanted - opens columnsᵀ.
    targets, size = wanted.shape
    lefts, columns = covariance.new_zeros(size, count), covariance.new_zeros(size, count)
    opens = covariance.new_zeros(targets, count)
    variance, explained = covariance.diagonal().clone(), wanted.square().sum(dim=0)
    floor = SPANNED * variance.max()
    picks: list[int] = []
    for step in range(count):
        gain = torch.where(variance > floor, explained / variance.clamp_min(floor), 0.0)
        gain[picks] = 0.0
        pick = int(gain.argmax())
        if not gain[pick] > 0:
            break
        left = covariance[:, pick] - lefts[:, :step] @ columns[pick, :step]
        open_ = wanted[:, pick] - opens[:, :step] @ columns[pick, :step]
        column = left / left[pick]
        shared = open_ @ wanted - columns[:, :step] @ (open_ @ opens[:, :step])
        explained = (explained - 2 * column * shared + column.square() * (open_ @ open_)).clamp_min(0)
        variance = (variance - column * left).clamp_min(0)
        lefts[:, step], columns[:, step], opens[:, step] = left, column, open_
        picks.append(pick)
    return picks


def _regress_units(
    covariance: Float[Tensor, "units units"], read: Float[Tensor, "units units"], chosen: Float[Tensor, "merged units"]
) -> tuple[Float[Tensor, "units merged"], float]:
    """All units predicted from the chosen ones, and the share of what is read from them that stays unexplained."""
    cross = covariance @ chosen.T
    gram = chosen @ cross
    ridge = RIDGE * covariance.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    back = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), cross.T).T
    open_ = (read * (covariance - back @ cross.T)).sum()
    return back, float(open_ / (read * covariance).sum().clamp_min(torch.finfo(gram.dtype).tiny))
