"""STE, the straight-through estimator: permutations found by gradients of the merged network's loss."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from isthmus.errors import InputError
from isthmus.match.base import Match, MatchingProblem, identity_transforms
from isthmus.match.coordinate_ascent import coordinate_ascent, pair_by_weights
from isthmus.match.gradient_search import TaskLoss, check_search, follow, gradients_of, mix_states, search
from isthmus.match.pairwise import all_to_one
from isthmus.match.weight_objective import WeightObjective
from isthmus.symmetry.alignment import Alignment
from isthmus.symmetry.transform import Transform, Transforms

# Sweeps of one projection.
SWEEPS = 100
STARTS = ("weight_matching", "identity")


@dataclass(frozen=True)
class STE(Match):
    """Free weights follow the gradient of the merged network's loss, which passes straight through their projection.

    The free weights θ start at model A. Each step projects them on the orbit of B, π = argmax ⟨θ, π(B)⟩ by the
    coordinate ascent of weight matching from the last π on; takes the gradient of the loss at (A + π(B)) / 2 with
    respect to π(B), as if π(B) were θ; and moves θ by Adam. The π with the lowest loss on held-out batches is kept, the
    start among them. N models have free weights each, all but the first, and every step merges them with weights drawn
    uniformly from the simplex; they are judged by their mean.

    BatchNorm normalises by the batch while the loss is taken. Models that the start makes equal are left there: nothing
    lies between them.

    Attributes:
        learning_rate: Adam's.
        steps: Steps of Adam.
        budget: Multiplies the number of steps.
        batch: Samples a gradient is taken on, at most; larger batches of the data are split.
        start: Projections go on from weight matching's permutations, or from where the models are (`"identity"`).

    Source: Ainsworth, Hayase, Srinivasa, Git Re-Basin, ICLR 2023, Algorithm 2. For three and more models the idea is
        the straight-through estimator's for many models (STE-MM), ICML 2025; only a summary of it could be read:
        uniform weights on the simplex are an assumption. The held-out judgement and the start from weight
        matching are this project's own.
    """

    learning_rate: float = 3e-3
    steps: int = 60
    budget: float = 1.0
    batch: int = 100
    start: str = "weight_matching"

    name: ClassVar[str] = "ste"
    exact: ClassVar[bool] = True
    joint: ClassVar[bool] = True
    by_gradient: ClassVar[bool] = True

    @property
    def needs(self) -> str:
        """Batches with targets."""
        return "labels"

    def __post_init__(self) -> None:
        check_search(self.learning_rate, self.steps, self.budget, self.batch)
        if self.start not in STARTS:
            raise InputError(f"start={self.start!r}: use one of {', '.join(STARTS)}")

    @classmethod
    def brief(cls) -> "STE":
        """Few steps, each wide enough to try other permutations."""
        return cls(steps=10, learning_rate=0.03)

    def __call__(self, problem: MatchingProblem) -> Alignment:
        """The alignment; its objective is the negative loss of the models' mean on the held-out batches.

        Raises:
            DataError: No labelled data, or a single batch, so that none can be held out.
            ModelError: The outputs are no class scores for the targets.
        """
        symmetry, count = problem.symmetry, len(problem.models)
        still = [identity_transforms(symmetry) for _ in range(count)]
        if count < 2 or not len(symmetry):
            return Alignment(symmetry, tuple(still), self.name)
        start = still
        if self.start == "weight_matching":
            matched = all_to_one(problem, self.name, partial(pair_by_weights, problem))
            start = [dict(each) for each in matched.transforms]
        task = TaskLoss(problem, self.batch)
        walk = Walk(problem, task, start, self.learning_rate)
        if walk.is_over:
            return Alignment(symmetry, tuple(start), self.name, details={"equal": True})

        def judge(transforms: Sequence[Transforms]) -> float:
            moved = [task.moved(index, each) for index, each in enumerate(transforms)]
            return task.held_out(mix_states(moved, [1 / count] * count))

        steps = max(1, round(self.steps * self.budget))
        found = search(start, judge, walk.step, lambda: walk.transforms, steps, "straight-through estimator")
        return Alignment(
            symmetry,
            tuple(found.transforms),
            method=self.name,
            objective=-found.value if math.isfinite(found.value) else None,
            converged=found.converged,
            details=found.details,
        )


class Walk:
    """Free weights of every model but the first, and the permutations that they are projected to.

    Args:
        problem: The models.
        task: Their loss.
        start: Permutations of every model that the first projections go on from.
        learning_rate: Adam's.
    """

    def __init__(
        self, problem: MatchingProblem, task: TaskLoss, start: Sequence[dict[str, Transform]], learning_rate: float
    ) -> None:
        self.symmetry, self.parameters, self.task = problem.symmetry, problem.parameters, task
        self.transforms = [dict(each) for each in start]
        self.moved = [task.moved(index, each) for index, each in enumerate(start)]
        self.names = [name for name in problem.symmetry.sites if name in problem.parameters]
        self.free: list[dict[str, Tensor]] = [
            {name: task.states[0][name].clone() for name in self.names} for _ in range(1, len(start))
        ]
        self.optimizer = torch.optim.Adam([t for each in self.free for t in each.values()], lr=learning_rate)
        self.rng = np.random.default_rng([problem.seed, len(start)])
        self.batches = task.batches(torch.Generator().manual_seed(problem.seed))
        self.project()

    @property
    def is_over(self) -> bool:
        """Whether all moved models are equal."""
        first, *others = self.moved
        return all(torch.equal(first[name], other[name]) for other in others for name in self.parameters)

    def step(self) -> bool:
        """Moves the free weights along the gradient, and projects them; False if the gradient is no number."""
        count = len(self.moved)
        weights = [0.5, 0.5] if count == 2 else self.rng.dirichlet(np.ones(count)).tolist()
        merged = mix_states(self.moved, weights)
        leaves = [merged[name].requires_grad_() for name in self.names]
        loss = self.task.at(merged, self.batches.next())
        gradients = gradients_of(loss, leaves)
        free = [tensor for each in self.free for tensor in each.values()]
        shares = [None if each is None else weight * each for weight in weights[1:] for each in gradients]
        taken = follow(self.optimizer, free, shares)
        if taken:
            self.project()
        return taken

    def project(self) -> None:
        """The permutations of every model that bring it nearest to its free weights, from the last ones on."""
        for index, free in enumerate(self.free, start=1):
            objective = WeightObjective(self.symmetry, free, self.task.states[index], frozenset(self.names))
            self.transforms[index], _ = coordinate_ascent(objective, self.transforms[index], SWEEPS, self.rng)
            self.moved[index] = self.task.moved(index, self.transforms[index])
