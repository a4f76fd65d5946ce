"""ZipIt!: units of all models are merged greedily, also with units of their own model."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int

from isthmus.errors import InputError
from isthmus.match.base import Match, MatchingProblem, identity_transforms
from isthmus.match.nested import family_of, paired_value, roots_of, solve_family
from isthmus.match.pairwise import check_place
from isthmus.observe.moments import Moments, SpaceMoments
from isthmus.progress import progress
from isthmus.symmetry.alignment import Alignment
from isthmus.symmetry.spaces import Site, Space
from isthmus.symmetry.symmetry import Symmetry
from isthmus.symmetry.transform import LinearMap, Permutation, Transform

# A ban is lowered by more than any two correlations differ: banned pairs come after all others, and only then.
BAN = 3.0


@dataclass(frozen=True, eq=False)
class Zip:
    """What a space's units were merged into.

    Attributes:
        slots: The merged unit that each unit of each model went into.
        value: Sum of the similarities at which pairs were merged.
        within: Merges that brought two units of one model together, model by model.
    """

    slots: Int[np.ndarray, "models units"]
    value: float
    within: list[int]


@dataclass(frozen=True)
class ZipIt(Match):
    """Merges the most correlated pair of all models' units, again and again, until a space has its old size.

    A group is as similar to another as the least correlated of their units (the minimum), times `decay` for each
    earlier merge if the two share a model. A merged unit is the mean of its group, Σ_m M_m x_m; every model reads it
    back as each of the group's units, x_m ≈ U_m x. `merge` averages the models, so `into` is N M_m for N models, and
    `back` is U_m: use equal coefficients. Groups of one unit a model are plain permutations and returned as such, and
    stand where model 0 has that unit. Units that never vary are alike.

    Nested spaces, and spaces that would give some tensor the factor N twice, are matched to model 0 by permutations
    that maximise the summed correlation.

    Attributes:
        at: Read activations where consumers receive them (`"post"`) or where they enter a nonlinearity (`"pre"`).
        budget_within: β, the share of the merges that may bring two units of one model together; it is divided evenly
            among the models. 0 leaves permutations alone, 1 sets hardly a limit.
        decay: α, the factor on a group's similarity to units of models that it holds already. 0 does so only where
            nothing else correlates, 1 as readily as the first time.

    Source: Stoica, Bolya, Bjorner, Ramesh, Hearn, Hoffman, ZipIt!, ICLR 2024, §4 (α and β: §4.3). Uncertain and chosen
        here: α and β concern groups that share a model, where the paper seems to apply α to every merged group and to
        count a group as its first unit's model (for three and more models that would make a third model's unit less
        alike than a second unit of the same model); α makes no negative correlation larger; when all that is left is
        beyond the budget, the budget gives way; units that never vary have no correlation in the paper.
    """

    at: str = "pre"
    budget_within: float = 0.5
    decay: float = 0.5

    name: ClassVar[str] = "zipit"
    exact: ClassVar[bool] = False
    joint: ClassVar[bool] = True

    @property
    def needs(self) -> str:
        """Batches; targets are not used."""
        return "data"

    def __post_init__(self) -> None:
        check_place(self.at)
        for option in ("budget_within", "decay"):
            value = getattr(self, option)
            if not (math.isfinite(value) and 0 <= value <= 1):
                raise InputError(f"{option}={value}: give a share between 0 and 1")

    def __call__(self, problem: MatchingProblem) -> Alignment:
        """The alignment of all models at once; its objective is the summed similarity of all merged pairs.

        Raises:
            DataError: No data, or data that cannot be read.
            SymmetryError: A space can be read nowhere in the graph.
        """
        symmetry, models = problem.symmetry, len(problem.models)
        transforms: list[dict[str, Transform]] = [identity_transforms(symmetry) for _ in range(models)]
        value, within, samples = 0.0, {}, 0
        if models > 1 and len(symmetry):
            moments = problem.moments(self.at)
            samples = moments.samples
            zipped = {space.name for space in _zippable(symmetry)}
            for root in progress(roots_of(symmetry), "zipping"):
                if root.name not in zipped:
                    value += _match_family(symmetry, root, moments, transforms)
                    continue
                found = _zip_units(_correlations(moments[root.name]), models, self.budget_within, self.decay)
                for index, transform in enumerate(_transforms_of(found.slots)):
                    transforms[index][root.name] = transform
                value += found.value
                within[root.name] = found.within
        return Alignment(
            symmetry,
            tuple(transforms),
            method=self.name,
            objective=value,
            details={"samples": samples, "within": within},
        )


def _zippable(symmetry: Symmetry) -> list[Space]:
    """The spaces whose units can be merged at will: those that stand alone and scale no tensor twice.

    `into` has the number of models as a factor; a tensor that moves by two such maps at one place would get its square.
    """
    alone = [space for space in symmetry if space.copies == 1 and space.parent is None and not symmetry.children(space)]
    names = {space.name for space in alone}
    for sites in symmetry.sites.values():
        vectors = [(space.name, site) for space, site in sites if site.role != "covector"]
        for number, (name, site) in enumerate(vectors):
            for other, place in vectors[:number]:
                if _meet(site, place):
                    names -= {name, other}
    return [space for space in alone if space.name in names]


def _meet(first: Site, second: Site) -> bool:
    """Whether two sites of one tensor move a common entry."""
    if first.dims != second.dims:
        return True
    return bool(np.intersect1d(first.positions, second.positions).size)


def _match_family(symmetry: Symmetry, root: Space, moments: Moments, transforms: list[dict[str, Transform]]) -> float:
    """Matches a family of nested spaces to model 0 by correlations, into `transforms`; the summed correlation."""
    leaves = [space for space in family_of(symmetry, root) if not symmetry.children(space)]
    value = 0.0
    for index in range(1, len(transforms)):
        similarities = {space.name: moments[space.name].correlation(0, index).numpy() for space in leaves}
        solved = solve_family(symmetry, root, similarities)
        transforms[index] |= {name: Permutation(indices) for name, indices in solved.items()}
        value += paired_value(symmetry, root, similarities, transforms[index])
    return value


def _correlations(moments: SpaceMoments) -> Float[np.ndarray, "total total"]:
    """Correlations of all units of all models; units that never vary are alike, and like no other."""
    models, units = moments.mean.shape
    covariance = moments.covariance.reshape(models * units, models * units)
    deviation = moments.deviation.reshape(-1)
    varies = deviation > 0
    scale = torch.where(varies, deviation, 1.0)
    similarity = torch.where(varies[:, None] & varies, covariance / (scale[:, None] * scale), 0.0)
    similarity[~varies[:, None] & ~varies] = 1.0
    return similarity.numpy()


def _zip_units(similarity: Float[np.ndarray, "total total"], models: int, budget_within: float, decay: float) -> Zip:
    """Merges the most similar pair of groups until there are as many as one model has units.

    Similarities never rise, so each row's largest entry, once found, bounds it from above: a row is looked through
    again only when its bound is the largest of all and no longer reached. Ties go to the lowest unit.

    Args:
        similarity: Between −1 and 1, symmetric; units of the first model come first.
        models: How many models they are of.
        budget_within: β.
        decay: α.
    """
    total = len(similarity)
    units = total // models
    near = np.array(similarity, dtype=np.float64)
    np.fill_diagonal(near, -np.inf)
    holds = np.repeat(np.eye(models, dtype=bool), units, axis=0)  # the models whose units a group holds
    left = np.full(models, int(budget_within * (total - units) / models + 1e-9))
    spent = left <= 0
    near[(holds & spent) @ holds.T] -= BAN
    group = np.arange(total)
    partner = near.argmax(axis=1)
    bound = near[group, partner]
    value, within = 0.0, [0] * models
    for _ in range(total - units):
        first = int(bound.argmax())
        while near[first, partner[first]] != bound[first]:
            partner[first] = near[first].argmax()
            bound[first] = near[first, partner[first]]
            first = int(bound.argmax())
        first, second = sorted((first, int(partner[first])))
        shared = holds[first] & holds[second]
        value += near[first, second] + BAN * bool((shared & spent).any())
        lowest = np.minimum(*(near[each] + BAN * (holds @ (holds[each] & spent)) for each in (first, second)))
        holds[first] |= holds[second]
        again = (holds @ holds[first]) & (lowest > 0)
        lowest[again] *= decay
        lowest -= BAN * (holds @ (holds[first] & spent))
        lowest[first] = -np.inf
        near[second], near[:, second], bound[second] = -np.inf, -np.inf, -np.inf
        holds[second] = False
        lowest[second] = -np.inf
        near[first], near[:, first] = lowest, lowest
        partner[first] = lowest.argmax()
        bound[first] = lowest[partner[first]]
        group[group == second] = first
        for model in np.flatnonzero(shared):
            within[model] += 1
            left[model] -= 1
            if left[model] == 0:
                among = np.flatnonzero(holds[:, model])
                banned = (holds[among] & spent) @ holds[among].T
                near[np.ix_(among, among)] -= BAN * ~banned
                spent[model] = True
    return Zip(_slots_of(group.reshape(models, units)), float(value), within)


def _slots_of(group: Int[np.ndarray, "models units"]) -> Int[np.ndarray, "models units"]:
    """Slots of groups that are called by their lowest unit: model 0's unit's own slot, or else the next free one."""
    units = group.shape[1]
    names = np.unique(group)
    slot = {int(name): int(name) for name in names if name < units}
    free = iter(sorted(set(range(units)) - set(slot)))
    slot |= {int(name): next(free) for name in names if name >= units}
    return np.vectorize(slot.__getitem__, otypes=[np.int64])(group)


def _transforms_of(slots: Int[np.ndarray, "models units"]) -> list[Transform]:
    """Every model's map: permutations where each merged unit is made of one unit a model."""
    models, units = slots.shape
    if all(len(set(row)) == units for row in slots.tolist()):
        return [Permutation(np.argsort(row)) for row in slots]
    size = np.bincount(slots.ravel(), minlength=units)
    maps: list[Transform] = []
    for row in slots:
        back = torch.zeros(units, units, dtype=torch.float64)
        back[torch.arange(units), torch.from_numpy(row)] = 1
        maps.append(LinearMap(models * back.T / torch.from_numpy(size)[:, None], back))
    return maps
