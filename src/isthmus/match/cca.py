"""CCA Merge: canonical correlations map one model's features onto another's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from isthmus.data.batches import Batch, split_batches
from isthmus.errors import DataError, InputError
from isthmus.match.base import MatchingProblem
from isthmus.match.held_out import judge_by
from isthmus.match.linear_maps import map_spaces
from isthmus.match.pairwise import Pair, PairwiseDataMethod, all_to_one
from isthmus.match.polar import polar_factor
from isthmus.observe.collect import collect_checked
from isthmus.observe.moments import Moments
from isthmus.progress import progress
from isthmus.symmetry.alignment import Alignment
from isthmus.symmetry.transform import LinearMap

# Ridges that are tried, as shares of the mean variance of a unit.
GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)

# A share of the batches is held out to choose the ridge, and this many inputs at most are used to judge one.
HELD_OUT = 0.2
FITTING_INPUTS, HELD_INPUTS = 2000, 1000


@dataclass(frozen=True)
class CCA(PairwiseDataMethod):
    """T = S_AA^½ U Vᵀ S_BB^-½, where U, V are the singular vectors of S_AA^-½ S_AB S_BB^-½.

    A ridge γ·s is added to both covariances, s the mean variance of all units of the space in both models: without it
    (γ = 0) this is full canonical correlation analysis; for large γ it tends to the rotation of `procrustes`. T moves
    vectors, T⁻¹ the weights that read them. Nested spaces are permuted, by correlation.

    A moved model does not compute what it did (ReLU and BatchNorm do not commute with T): only the average is claimed
    to work, and BatchNorm statistics must be reset. As in the authors' code, the gain and shift of a BatchNorm are
    multiplied by T like its layer's weights; `isthmus.fold_batch_norms` takes them into the layers first.

    Attributes:
        gamma: The ridge as a share of the mean variance; None chooses it on a held-out part of the data, by the loss of
            the merged model if there are targets, else by its distance from the mean of the models' class scores.
            (The paper adds an absolute number, chosen by test accuracy.)

    Source: Horoi, Orozco Camacho, Belilovsky, Wolf, "Harmony in Diversity: Merging Neural Networks with Canonical
        Correlation Analysis", ICML 2024.
    """

    gamma: float | None = None

    name: ClassVar[str] = "cca"
    exact: ClassVar[bool] = False
    joint: ClassVar[bool] = True  # one ridge is chosen for all models together

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma is not None and not (math.isfinite(self.gamma) and self.gamma >= 0):
            raise InputError(f"gamma={self.gamma}: give 0 or more, or leave it out to have it chosen")

    def __call__(self, problem: MatchingProblem) -> Alignment:
        """The alignment; its objective is the summed canonical correlations.

        Raises:
            DataError: No data; a single batch, from which nothing can be held out; or, without a ridge, fewer samples
                than units.
            SymmetryError: A space can be read nowhere in the graph.
        """
        if not len(problem.symmetry) or len(problem.models) == 1:
            return super().__call__(problem)
        if self.gamma is not None:
            return self._align_all(problem, problem.moments(self.at))
        fitting, held = split_batches(problem.data, HELD_OUT)
        moments = collect_checked(problem.models, problem.symmetry, fitting, at=self.at)
        judge, criterion = judge_by(problem, _first_inputs(fitting, FITTING_INPUTS), _first_inputs(held, HELD_INPUTS))
        scores = {
            gamma: judge(replace(self, gamma=gamma)._align_all(problem, moments))
            for gamma in progress(GRID, "choosing the ridge")
        }
        finite = {gamma: score for gamma, score in scores.items() if math.isfinite(score)}
        if not finite:
            raise DataError("no ridge gave a merged model with finite outputs: give gamma=, or more data")
        chosen = min(finite, key=lambda gamma: finite[gamma])
        every = moments.joined(collect_checked(problem.models, problem.symmetry, held, at=self.at))
        found = replace(self, gamma=chosen)._align_all(problem, every)
        details = {
            "gamma": chosen,
            "criterion": criterion,
            "scores": {str(gamma): score for gamma, score in scores.items() if gamma in finite},
        }
        return replace(found, details=dict(found.details) | details)

    def match_pair(self, problem: MatchingProblem, fixed: int, moved: int, moments: Moments | None = None) -> Pair:
        """The maps of one ridge; the objective is the summed canonical correlations.

        Args:
            problem: The models and the data.
            fixed: Number of the model whose frame is kept.
            moved: Number of the model that is moved into it.
            moments: Moments of the activations; read from the data where they are left out.

        Raises:
            DataError: No data; or, without a ridge, fewer samples than units.
            InputError: The ridge is yet to be chosen.
            SymmetryError: A space can be read nowhere in the graph.
        """
        if self.gamma is None:
            raise InputError("gamma=None: the ridge is chosen for all models together; give gamma= to match one pair")
        moments = moments or problem.moments(self.at)
        if self.gamma == 0:
            _check_samples(moments)
        return map_spaces(problem, moments, fixed, moved, partial(_canonical_map, gamma=self.gamma))

    def _align_all(self, problem: MatchingProblem, moments: Moments) -> Alignment:
        """The alignment with this ridge, by moments that were read."""
        found = all_to_one(problem, self.name, partial(self.match_pair, problem, moments=moments), self.reference)
        return replace(found, details=dict(found.details) | {"gamma": self.gamma})


def _canonical_map(
    own: Float[Tensor, "units units"],
    other: Float[Tensor, "units units"],
    between: Float[Tensor, "units units"],
    gamma: float,
) -> tuple[LinearMap, float]:
    """The map of regularised canonical correlation analysis, and the summed canonical correlations.

    A Cholesky factor is a square root up to a rotation, L = S^½ Q, which cancels: with U, V from L_A⁻¹ S_AB L_B⁻ᵀ,
    L_A U Vᵀ L_B⁻¹ is S_AA^½ U Vᵀ S_BB^-½.
    """
    size = len(own)
    mean = (own.diagonal().mean() + other.diagonal().mean()) / 2
    # Units that never vary leave a covariance singular: what the ridge is to float64 keeps it positive.
    ridge = (gamma + size * torch.finfo(own.dtype).eps) * mean.clamp_min(torch.finfo(own.dtype).tiny)
    eye = torch.eye(size, dtype=own.dtype, device=own.device)
    first, second = torch.linalg.cholesky(own + ridge * eye), torch.linalg.cholesky(other + ridge * eye)
    whitened = torch.linalg.solve_triangular(first, between, upper=False)
    whitened = torch.linalg.solve_triangular(second, whitened.T, upper=False).T
    turned, values = polar_factor(whitened, own.diagonal(), other.diagonal())
    unwhiten = torch.linalg.solve_triangular(second, eye, upper=False)
    into = first @ turned @ unwhiten
    back = second @ turned.T @ torch.linalg.solve_triangular(first, eye, upper=False)
    return LinearMap(into, back), float(values.sum())


def _check_samples(moments: Moments) -> None:
    """Refuses full canonical correlation analysis on fewer samples than units.

    Raises:
        DataError: Some space has more units than samples were read.
    """
    for name, read in moments.spaces.items():
        units = read.mean.shape[1]
        if read.count <= units:
            raise DataError(
                f"space {name} has {units} units and {read.count} samples: full CCA (gamma=0) is ill-posed; "
                "give more data, or gamma=0.1"
            )


def _first_inputs(batches: Sequence[Batch], count: int) -> list[Batch]:
    """The first batches that hold `count` inputs together; all where there are fewer."""
    found: list[Batch] = []
    for batch in batches:
        if sum(each.size for each in found) >= count:
            break
        found.append(batch)
    return found
