"""Sinkhorn Re-Basin: permutations relaxed to doubly stochastic matrices and found by gradients."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from isthmus.errors import InputError
from isthmus.match.assignment import solve_laps
from isthmus.match.base import MatchingProblem, identity_transforms
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
    working_states,
)
from isthmus.match.pairwise import Pair, PairwiseMethod, all_to_one
from isthmus.match.weight_objective import WeightObjective
from isthmus.state import State
from isthmus.symmetry.alignment import Alignment
from isthmus.symmetry.transform import LinearMap, Permutation, Transform, Transforms, move_state

LOSSES = ("l2", "midpoint", "random")
STARTS = ("weight_matching", "identity")
# λ at which permutations are judged where the loss is taken at a random one.
LAMBDAS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Sinkhorn(PairwiseMethod):
    """P = Sinkhorn(X/τ): free matrices X, made doubly stochastic, follow the gradient of a loss by Adam.

    Rows and columns of exp(X/τ) are normalised in turn, in log space, and the gradient goes back through all turns.
    Every tensor of B is moved by P on the units it produces and by Pᵀ on those it reads. At the end, and at checks on
    the way, each P is rounded to the permutation that a linear assignment problem on X finds; the one with the lowest
    loss is kept, the start among them.

    Losses: `"l2"`, the squared distance of A from the moved B; `"midpoint"`, the task loss at (A + π(B)) / 2;
    `"random"`, the task loss at λ ~ U(0, 1). Task losses are followed on one part of the data and judged on the rest,
    at ½, or at ¼, ½ and ¾. BatchNorm normalises by the batch meanwhile.

    Attributes:
        loss: `"l2"` (needs nothing), `"midpoint"` or `"random"` (need labels).
        temperature: τ; X starts at the start's permutation matrices, so that τ says how sharp P is.
        iterations: Turns of normalisation.
        learning_rate: Adam's.
        steps: Steps of Adam.
        budget: Multiplies the number of steps.
        batch: Samples a gradient is taken on, at most; larger batches of the data are split.
        start: Weight matching's permutations, or the models as they are (`"identity"`).

    Source: Peña, Medeiros, Dubail, Aminbeidokhti, Granger, Pedersoli, Re-basin via implicit Sinkhorn differentiation,
        CVPR 2023. The paper differentiates the fixed point implicitly; here the turns are unrolled. Its values of τ, of
        the number of turns and of the learning rate could not be checked. The start from weight matching, and judging
        on held-out batches, are this project's own.
    """

    loss: str = "midpoint"
    temperature: float = 0.1
    iterations: int = 10
    learning_rate: float = 0.05
    steps: int = 60
    budget: float = 1.0
    batch: int = 100
    start: str = "weight_matching"

    name: ClassVar[str] = "sinkhorn"
    exact: ClassVar[bool] = True
    by_gradient: ClassVar[bool] = True

    @property
    def needs(self) -> str:
        """Labels, unless the loss is the distance of weights and the reference needs no loss either."""
        return super().needs or ("" if self.loss == "l2" else "labels")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_search(self.learning_rate, self.steps, self.budget, self.batch)
        if self.loss not in LOSSES:
            raise InputError(f"loss={self.loss!r}: use one of {', '.join(LOSSES)}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise InputError(f"temperature={self.temperature}: give a positive number")
        if self.iterations < 1:
            raise InputError(f"iterations={self.iterations}: give at least 1")
        if self.start not in STARTS:
            raise InputError(f"start={self.start!r}: use one of {', '.join(STARTS)}")

    @classmethod
    def brief(cls) -> "Sinkhorn":
        """Few steps, each wide enough to try other permutations."""
        return cls(steps=10, learning_rate=0.2)

    def __call__(self, problem: MatchingProblem) -> Alignment:
        """The alignment; its objective is the negative loss of the kept permutations, summed over pairs.

        Raises:
            DataError: A task loss without labelled data, or a single batch, so that none can be held out.
            ModelError: The outputs are no class scores for the targets.
        """
        if self.loss == "l2" or len(problem.models) < 2 or not len(problem.symmetry):
            return super().__call__(problem)
        task = TaskLoss(problem, self.batch)  # for all pairs: the data is read once
        return all_to_one(problem, self.name, partial(self.match_pair, problem, task=task), self.reference)

    def match_pair(self, problem: MatchingProblem, fixed: int, moved: int, task: TaskLoss | None = None) -> Pair:
        """The permutations with the lowest loss; the objective is the negative of it.

        Args:
            problem: The models and the data.
            fixed: Number of the model whose frame is kept.
            moved: Number of the model that is moved into it.
            task: The task loss, where that is the loss; read from the data if left out.
        """
        if self.loss != "l2" and task is None:
            task = TaskLoss(problem, self.batch)
        states = working_states(problem) if task is None else task.states
        return self._follow(problem, states[fixed], states[moved], task)

    def _follow(self, problem: MatchingProblem, fixed: State, moved: State, task: TaskLoss | None) -> Pair:
        """The permutations that move the second state into the frame of the first."""
        symmetry, names = problem.symmetry, problem.parameters
        start = identity_transforms(symmetry)
        if self.start == "weight_matching":
            objective = WeightObjective(symmetry, fixed, moved, names)
            start, _, _ = best_of_starts(objective, 3, 100, problem.seed)
        begun = move_state(moved, start, symmetry, reset_variances=True)
        if all(torch.equal(fixed[name], begun[name]) for name in names):
            return Pair(start, details={"equal": True})
        like = next(t for t in fixed.values() if t.is_floating_point())
        latents = {
            name: matrices(start[name].indices, like).requires_grad_()  # type: ignore[union-attr]
            for name in start
        }
        optimizer = torch.optim.Adam(list(latents.values()), lr=self.learning_rate)
        generator = torch.Generator().manual_seed(problem.seed)
        batches = None if task is None else task.batches(generator)

        def loss_at(state: State) -> Tensor:
            if batches is None or task is None:
                return _squared_distance(fixed, state, names)
            t = 0.5
            if self.loss == "random":
                t = float(torch.rand((), generator=generator))
            return task.at(mix_states([fixed, state], [1 - t, t]), batches.next())

        def step() -> bool:
            maps = {name: _doubly_stochastic(x, self.temperature, self.iterations) for name, x in latents.items()}
            loss = loss_at(move_softly(moved, maps, symmetry))
            leaves = list(latents.values())
            return follow(optimizer, leaves, gradients_of(loss, leaves))

        def judge(transforms: Sequence[Transforms]) -> float:
            state = move_state(moved, transforms[0], symmetry)
            if task is None:
                return float(_squared_distance(fixed, state, names))
            places = LAMBDAS if self.loss == "random" else (0.5,)
            return sum(task.held_out(mix_states([fixed, state], [1 - t, t])) for t in places) / len(places)

        steps = max(1, round(self.steps * self.budget))
        found = search([start], judge, step, lambda: [_rounded(latents)], steps, "sinkhorn")
        return Pair(
            found.transforms[0],
            -found.value if math.isfinite(found.value) else None,
            converged=found.converged,
            details=found.details,
        )


def _doubly_stochastic(latent: Float[Tensor, "copies size size"], temperature: float, iterations: int) -> LinearMap:
    """Sinkhorn(X/τ) in log space; the last turn makes the sums of columns exactly one.

    Its transpose stands for the inverse, which it is where it is a permutation.
    """
    logarithm = latent / temperature
    for _ in range(iterations):
        logarithm = logarithm - logarithm.logsumexp(dim=2, keepdim=True)
        logarithm = logarithm - logarithm.logsumexp(dim=1, keepdim=True)
    matrix = logarithm.exp()
    return LinearMap(matrix, matrix.transpose(1, 2))


def _rounded(latents: Mapping[str, Tensor]) -> dict[str, Transform]:
    """The permutations that gather most of the latent matrices."""
    return {name: Permutation(solve_laps(latent.detach().double().cpu().numpy())) for name, latent in latents.items()}


def _squared_distance(fixed: State, moved: State, names: frozenset[str]) -> Tensor:
    """Σ_W ‖W^A − W^B‖² over trained tensors, summed in float64."""
    return torch.stack([(fixed[name] - moved[name]).square().sum(dtype=torch.float64) for name in sorted(names)]).sum()
