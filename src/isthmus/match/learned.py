"""Learned matching: maps of every space, held in its group by construction, found by gradients of the task loss."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from isthmus.errors import InputError
from isthmus.match.assignment import solve_laps
from isthmus.match.base import MatchingProblem
from isthmus.match.coordinate_ascent import best_of_starts
from isthmus.match.gradient_search import (
    TaskLoss,
    check_search,
    follow,
    gradients_of,
    matrices,
    mix_states,
    move_softly,
    search,
)
from isthmus.match.pairwise import Pair, PairwiseMethod, all_to_one
from isthmus.match.weight_objective import WeightObjective
from isthmus.state import State
from isthmus.symmetry.alignment import Alignment
from isthmus.symmetry.transform import LinearMap, Permutation, Transform, Transforms, move_state

# Adam's learning rate in each group; for linear maps it is divided by the number of units. An entry moves by about the
# rate in a step, so that a map of n units then changes by this at most, whatever its size.
LEARNING_RATES = {"permutation": 0.01, "orthogonal": 0.05, "invertible": 0.05}
# λ, the share of B, is drawn between these.
LAMBDAS = (0.4, 0.6)


@dataclass(frozen=True)
class Learned(PairwiseMethod):
    """Latent matrices follow the gradient of the task loss at (1 − λ) A + λ T(B), λ ~ U(0.4, 0.6), by Adam.

    All spaces start at weight matching's permutations P. What T is depends on the group. `"permutation"`: the
    permutation nearest to a latent matrix Z; the gradient passes straight through to Z. Z starts at the similarity of
    units that weight matching ended with, whose nearest permutation P is, divided by its mean over paired units: pairs
    that weight matching nearly chose are near. `"orthogonal"`: the Cayley transform (I − K)⁻¹ (I + K) P with
    K = (X − Xᵀ) / 2 and X starting at 0. `"invertible"`: (I + X) P with X starting at 0.

    The maps with the lowest loss at λ = ½ on held-out batches are kept, the start among them. BatchNorm normalises by
    the batch while the loss is taken.

    Under any but permutations a moved model does not compute what it did, wherever a nonlinearity or a gain of each
    unit stands between; only the merged one is aimed at. Spaces that allow for more than permutations (`Space.group`)
    are permuted too unless more is asked for, since a rotation is exact only after gains are absorbed. Nested spaces,
    and those held in copies, are always permuted.

    Attributes:
        group: What every space may undergo: `"permutation"` (exact), `"orthogonal"` or `"invertible"`.
        learning_rate: Adam's; None takes the group's own, 0.01 for permutations and 0.05 for linear maps, where it is
            divided by the number of units.
        steps: Steps of Adam.
        budget: Multiplies the number of steps.
        batch: Samples a gradient is taken on, at most; larger batches of the data are split.

    Source: generalized linear mode connectivity for Transformers, NeurIPS 2025; only a summary of it could be read:
        the start, the groups and the range of λ are the paper's. The latents' start, the Cayley transform,
        the parameters of invertible maps, the learning rates and the judgement on held-out batches are this project's
        own.
    """

    group: str = "permutation"
    learning_rate: float | None = None
    steps: int = 60
    budget: float = 1.0
    batch: int = 100

    name: ClassVar[str] = "learned"
    exact: ClassVar[bool] = True  # of the default group
    by_gradient: ClassVar[bool] = True

    @property
    def folds(self) -> bool:
        """Whether it may use linear maps."""
        return self.group != "permutation"

    @property
    def needs(self) -> str:
        """Batches with targets."""
        return "labels"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group not in LEARNING_RATES:
            raise InputError(f"group={self.group!r}: use one of {', '.join(LEARNING_RATES)}")
        check_search(1.0 if self.learning_rate is None else self.learning_rate, self.steps, self.budget, self.batch)

    @classmethod
    def brief(cls) -> "Learned":
        """Few steps, each wide enough to try other permutations."""
        return cls(steps=10, learning_rate=0.05)

    def __call__(self, problem: MatchingProblem) -> Alignment:
        """The alignment; its objective is the negative loss of the kept maps, summed over pairs.

        Raises:
            DataError: No labelled data, or a single batch, so that none can be held out.
            ModelError: The outputs are no class scores for the targets.
        """
        if len(problem.models) < 2 or not len(problem.symmetry):
            return super().__call__(problem)
        task = TaskLoss(problem, self.batch)  # for all pairs: the data is read once
        return all_to_one(problem, self.name, partial(self.match_pair, problem, task=task), self.reference)

    def match_pair(self, problem: MatchingProblem, fixed: int, moved: int, task: TaskLoss | None = None) -> Pair:
        """The maps with the lowest loss; the objective is the negative of it.

        Args:
            problem: The models and the data.
            fixed: Number of the model whose frame is kept.
            moved: Number of the model that is moved into it.
            task: The task loss; read from the data if left out.
        """
        task = task or TaskLoss(problem, self.batch)
        return self._follow(problem, task, task.states[fixed], task.states[moved])

    def _follow(self, problem: MatchingProblem, task: TaskLoss, fixed: State, moved: State) -> Pair:
        """The maps that move the second state into the frame of the first."""
        symmetry, names = problem.symmetry, problem.parameters
        start, _, _ = best_of_starts(WeightObjective(symmetry, fixed, moved, names), 3, 100, problem.seed)
        begun = move_state(moved, start, symmetry)
        if all(torch.equal(fixed[name], begun[name]) for name in names):
            return Pair(start, details={"equal": True})
        latents = Latents(WeightObjective(symmetry, fixed, moved, names), start, self.group, task.dtype)
        optimizer = torch.optim.Adam(latents.at_rates(self.learning_rate))
        generator = torch.Generator().manual_seed(problem.seed)
        batches = task.batches(generator)

        def step() -> bool:
            low, high = LAMBDAS
            t = low + (high - low) * float(torch.rand((), generator=generator))
            state = move_softly(moved, latents.maps(), symmetry)
            loss = task.at(mix_states([fixed, state], [1 - t, t]), batches.next())
            leaves = list(latents.free.values())
            return follow(optimizer, leaves, gradients_of(loss, leaves))

        def judge(transforms: Sequence[Transforms]) -> float:
            state = move_state(moved, transforms[0], symmetry, reset_variances=True)
            return task.held_out(mix_states([fixed, state], [0.5, 0.5]))

        steps = max(1, round(self.steps * self.budget))
        found = search([start], judge, step, lambda: [latents.transforms()], steps, "learned matching")
        return Pair(
            found.transforms[0],
            -found.value if math.isfinite(found.value) else None,
            converged=found.converged,
            details=found.details,
        )


class Latents:
    """Free matrices of every space, and the maps that they stand for.

    Args:
        objective: Tells how similar units are.
        start: The permutations that the maps start at.
        group: What spaces that stand alone undergo; all others are permuted.
        dtype: The precision of the matrices.
    """

    def __init__(
        self, objective: WeightObjective, start: Mapping[str, Transform], group: str, dtype: torch.dtype
    ) -> None:
        symmetry = objective.symmetry
        like = torch.zeros((), dtype=dtype)
        self.group: dict[str, str] = {}
        self.start: dict[str, Tensor] = {}
        self.free: dict[str, Tensor] = {}
        for space in symmetry:
            permutation = start[space.name]
            assert isinstance(permutation, Permutation)
            nested = space.copies > 1 or space.parent is not None or bool(symmetry.children(space))
            self.group[space.name] = "permutation" if nested else group
            self.start[space.name] = matrix = matrices(permutation.indices, like)
            if self.group[space.name] == "permutation":
                similarity = torch.from_numpy(objective.inner_similarity(space, start)).to(matrix)
                free = _similarity_around(similarity, permutation, matrix)
            else:
                free = torch.zeros_like(matrix)
            self.free[space.name] = free.requires_grad_()

    def at_rates(self, rate: float | None) -> list[dict[str, Any]]:
        """The free matrices with a learning rate each, for an optimizer."""
        groups = []
        for name, free in self.free.items():
            group = self.group[name]
            own = LEARNING_RATES[group] if rate is None else rate
            groups.append({"params": [free], "lr": own if group == "permutation" else own / free.shape[1]})
        return groups

    def maps(self) -> dict[str, LinearMap]:
        """The maps as matrices, differentiable in the free ones."""
        return {name: self.map(name) for name in self.free}

    def map(self, name: str) -> LinearMap:
        """One space's map.

        Raises:
            InputError: Steps so long that an invertible map became singular.
        """
        free, start = self.free[name], self.start[name]
        if self.group[name] == "permutation":
            hard = matrices(_nearest(free).indices, free)
            through = hard + (free - free.detach())  # the value of `hard`, the gradient of `free`
            return LinearMap(through, through.transpose(1, 2))
        identity = torch.eye(free.shape[1], dtype=free.dtype)
        if self.group[name] == "orthogonal":
            skew = (free - free.transpose(1, 2)) / 2
            into = torch.linalg.solve(identity - skew, identity + skew) @ start
            return LinearMap(into, into.transpose(1, 2))
        change = identity + free
        inverse, info = torch.linalg.inv_ex(change)
        if info.any():
            raise InputError(f"space {name}: its map became singular; give a smaller learning_rate")
        return LinearMap(change @ start, start.transpose(1, 2) @ inverse)

    def transforms(self) -> dict[str, Transform]:
        """The maps as they are kept: permutations as indices."""
        found: dict[str, Transform] = {}
        with torch.no_grad():
            for name, free in self.free.items():
                if self.group[name] == "permutation":
                    found[name] = _nearest(free)
                else:
                    kept = self.map(name)
                    found[name] = LinearMap(kept.into.contiguous(), kept.back.contiguous())
        return found


def _nearest(latent: Tensor) -> Permutation:
    """The permutation nearest to a matrix, one a copy."""
    return Permutation(solve_laps(latent.detach().double().cpu().numpy()))


def _similarity_around(
    similarity: Float[Tensor, "copies size size"],
    permutation: Permutation,
    matrix: Float[Tensor, "copies size size"],
) -> Float[Tensor, "copies size size"]:
    """The similarity over its mean on paired units, if the permutation is the nearest to it; else its matrix.

    It is not the nearest where a space's own places do not tell all, as in families of nested spaces.
    """
    scale = (similarity * matrix).sum() / matrix.sum()
    if scale > 0 and np.array_equal(_nearest(similarity).indices, permutation.indices):
        return similarity / scale
    return matrix.clone()
