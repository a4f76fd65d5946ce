"""Searching for transforms by gradients of the task loss: the loss of a merged network, soft moves, and the best seen.

A search follows gradients on one part of the data and judges what it finds on the rest. Networks are run with the
statistics of the batch in layers that keep running statistics, since a merged network's own are unknown.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.func import functional_call
from torch.utils import _pytree as pytree

from isthmus.data.batches import Batch, split_batches
from isthmus.errors import DataError, InputError, ModelError
from isthmus.match.base import MatchingProblem
from isthmus.observe.running_statistics import normalisation_layers
from isthmus.observe.score import IGNORED, are_classes, class_scores, cross_entropy
from isthmus.progress import progress
from isthmus.state import State
from isthmus.symmetry.symmetry import Symmetry
from isthmus.symmetry.transform import LinearMap, Permutation, Transform, Transforms, move_site, move_state

# Share of the batches, the last ones, on which what was found is judged.
HELD_OUT = 0.1
# A search stops to judge what it has at least so often, and at least once in so many steps.
CHECKS, APART = 5, 12


class TaskLoss:
    """The task loss of a network of given weights, in float32 at least, differentiable in them.

    Args:
        problem: The models, the first of which gives the architecture, and labelled data.
        batch: Largest number of samples a gradient is taken on; larger batches of the data are split evenly. Parts
            without a target that counts are left out.

    Raises:
        DataError: No labelled data, a single batch, or no target that counts.
    """

    def __init__(self, problem: MatchingProblem, batch: int) -> None:
        problem.require("labels", "a search by the task loss")
        self.symmetry = problem.symmetry
        self.states = working_states(problem)
        self.network = copy.deepcopy(problem.models[0]).requires_grad_(False).eval()
        for tensor in [*self.network.parameters(), *self.network.buffers()]:
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(self.dtype)
        for layer in normalisation_layers(self.network):
            layer.track_running_stats = False  # or the statistics that it is given would be overwritten
            layer.train()
        fitting, self.held = split_batches(problem.data, HELD_OUT)
        parts = [part for whole in fitting for part in _parts_of(whole, batch)]
        self.fitting = [part for part in parts if _counted(part)]  # the mean loss over no target is no number
        for what, chosen in (("fitting", self.fitting), ("held-out", self.held)):
            if not any(_counted(part) for part in chosen):
                raise DataError(f"the {what} batches have no targets that count: give more batches")

    @property
    def dtype(self) -> torch.dtype:
        """The precision of all computations."""
        return next((t.dtype for t in self.states[0].values() if t.is_floating_point()), torch.float32)

    def at(self, state: State, batch: Batch) -> Tensor:
        """The mean loss of the network with these weights on a batch.

        Raises:
            DataError: A batch of one sample for a network with BatchNorm, or a target that is no class of the model.
            ModelError: The outputs are no class scores for the targets.
        """
        device = next((t.device for t in state.values()), torch.device("cpu"))
        batch = batch.to(device, self.dtype).clone()
        try:
            output = functional_call(self.network, dict(state), batch.args, dict(batch.kwargs))
        except ValueError as error:  # what BatchNorm raises where it sees one value a channel
            if batch.size > 1:
                raise
            raise DataError("a batch of one sample has no variance: use larger batches, or drop it") from error
        scores = class_scores(output)
        if scores is None or not are_classes(batch.targets, scores):
            shape = tuple(scores.shape) if scores is not None else type(output).__name__
            given = tuple(batch.targets.shape) if isinstance(batch.targets, Tensor) else type(batch.targets).__name__
            raise ModelError(
                f"outputs {shape} are no class scores for targets {given}: a search by the task loss is for "
                "classifiers; use a method that needs no labels"
            )
        return cross_entropy(output, batch.targets)

    def held_out(self, state: State) -> float:
        """The mean loss over the targets that are held out; infinite if it is no number."""
        total, count = 0.0, 0
        with torch.no_grad():
            for batch in self.held:
                if targets := _counted(batch):
                    total += float(self.at(state, batch)) * targets
                    count += targets
        return total / count if math.isfinite(total) else math.inf

    def batches(self, generator: torch.Generator) -> "Stream":
        """The fitting batches, in a new random order every time round."""
        return Stream(self.fitting, generator)

    def moved(self, index: int, transforms: Transforms) -> dict[str, Tensor]:
        """The weights of one model moved into the common frame."""
        return move_state(self.states[index], transforms, self.symmetry, reset_variances=True)


class Stream:
    """Batches without end.

    Args:
        batches: All batches.
        generator: Draws their order, a new one every time round.
    """

    def __init__(self, batches: Sequence[Batch], generator: torch.Generator) -> None:
        self.all = batches
        self.generator = generator
        self.order: list[int] = []

    def next(self) -> Batch:
        """The next batch."""
        if not self.order:
            self.order = torch.randperm(len(self.all), generator=self.generator).tolist()
        return self.all[self.order.pop()]


def working_states(problem: MatchingProblem) -> list[dict[str, Tensor]]:
    """Every model's parameters and persistent buffers under their first names, in one precision of float32 at least.

    Integer buffers are the first model's.
    """
    first = problem.models[0]
    own = {name for name, _ in [*first.named_parameters(), *first.named_buffers()]}  # tied tensors appear once
    states = [{name: t.detach() for name, t in state.items() if name in own} for state in problem.states]
    dtype = torch.float32
    for state in states:
        for tensor in state.values():
            dtype = torch.promote_types(dtype, tensor.dtype) if tensor.is_floating_point() else dtype
    return [
        {name: t.to(dtype) if t.is_floating_point() else states[0][name] for name, t in state.items()}
        for state in states
    ]


def _counted(batch: Batch) -> int:
    """How many targets of a batch count.

    Raises:
        DataError: The targets are missing or no tensor.
    """
    if not isinstance(batch.targets, Tensor):
        raise DataError(f"a batch has {type(batch.targets).__name__} as targets: give every batch a tensor of classes")
    return int((batch.targets != IGNORED).sum())


def _parts_of(batch: Batch, size: int) -> list[Batch]:
    """A batch in even parts of at most `size` samples; whole where some tensor of it is not one row a sample."""
    targets: Any = batch.targets
    tensors = [x for x in pytree.tree_leaves((batch.args, dict(batch.kwargs), targets)) if isinstance(x, Tensor)]
    if batch.size <= size or not all(x.ndim and len(x) == batch.size for x in tensors):
        return [batch]
    parts = math.ceil(batch.size / size)
    bounds = [batch.size * part // parts for part in range(parts + 1)]

    def between(start: int, end: int) -> Batch:
        return replace(batch.mapped(lambda x: x[start:end]), targets=targets[start:end])

    return [between(start, end) for start, end in pairwise(bounds)]


def mix_states(states: Sequence[State], coefficients: Sequence[float]) -> dict[str, Tensor]:
    """Σ_m c_m W_m; tensors that are no floating-point numbers are the first state's."""
    merged = {}
    for name, tensor in states[0].items():
        if tensor.is_floating_point():
            tensor = coefficients[0] * tensor
            for state, coefficient in zip(states[1:], coefficients[1:], strict=True):
                tensor = tensor + coefficient * state[name]
        merged[name] = tensor
    return merged


def move_softly(state: State, maps: Mapping[str, LinearMap], symmetry: Symmetry) -> dict[str, Tensor]:
    """The state with every space moved by matrices, differentiable in them.

    Equal to `move_state` where the matrices are permutations. Running variances are moved as an expectation, by `into`:
    no more than a guess, good for a network that does not use them while it is searched for. Gains that were not folded
    into ones are moved as vectors, as permutations move them.
    """
    moved = dict(state)
    for name, sites in symmetry.sites.items():
        tensor = state[name]
        for space, site in sites:
            uneven = site.role == "diagonal" and bool((tensor != tensor.flatten()[0]).any())
            place = replace(site, role="vector") if site.role == "variance" or uneven else site
            tensor = move_site(tensor, place, maps[space.name])
        moved[name] = tensor
    return moved


def follow(optimizer: torch.optim.Optimizer, leaves: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> bool:
    """One step of an optimizer along the gradients, unless one of them is no number: Adam would never recover from it.

    Returns:
        Whether the step was taken.
    """
    if not all(gradient is None or bool(gradient.isfinite().all()) for gradient in gradients):
        return False
    for leaf, gradient in zip(leaves, gradients, strict=True):
        leaf.grad = gradient
    optimizer.step()
    return True


def gradients_of(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradient of a loss with respect to each leaf; None for those that it does not depend on."""
    if not loss.requires_grad:
        return [None] * len(leaves)
    return list(torch.autograd.grad(loss, list(leaves), allow_unused=True))


@dataclass(frozen=True, eq=False)
class Found:
    """What a search found.

    Attributes:
        transforms: The best ones seen, one a model.
        value: Their loss.
        converged: Whether the last check found nothing better.
        details: The losses at the start and at every check, the step at which the best was seen, and how many steps
            were skipped because a gradient was no number.
    """

    transforms: list[dict[str, Transform]]
    value: float
    converged: bool
    details: Mapping[str, Any]


def search(
    start: Sequence[Transforms],
    judge: Callable[[Sequence[Transforms]], float],
    step: Callable[[], bool],
    current: Callable[[], Sequence[Transforms]],
    steps: int,
    what: str,
) -> Found:
    """Takes steps and keeps the best of what the checks on the way judge; what was judged already is not judged again.

    Args:
        start: Transforms to be better than, one set a model.
        judge: The loss of transforms.
        step: Takes one step, or returns False.
        current: The transforms where the search is.
        steps: How many steps to take.
        what: What is being done, for the progress bar.
    """
    best, checked = [dict(each) for each in start], list(start)
    lowest = loss = first = judge(start)
    losses: list[float] = []
    best_step = skipped = 0
    count = max(CHECKS, math.ceil(steps / APART))
    checks = {max(1, round(steps * (check + 1) / count)) for check in range(count)}
    for index in progress(range(1, steps + 1), what):
        skipped += not step()
        if index not in checks:
            continue
        now = current()
        if not all(_alike(a, b) for a, b in zip(now, checked, strict=True)):
            loss, checked = judge(now), list(now)
        losses.append(loss)
        if loss < lowest:
            best, lowest, best_step = [dict(each) for each in now], loss, index
    details = {
        "start": first,
        "best": lowest,
        "best_step": best_step,
        "checks": losses,
        "steps": steps,
        "skipped": skipped,
    }
    finite = {key: None if value == math.inf else value for key, value in details.items() if key != "checks"}
    told = finite | {"checks": [None if value == math.inf else value for value in losses]}
    return Found(best, lowest, best_step < steps, told)


def _alike(a: Transforms, b: Transforms) -> bool:
    """Whether two sets of transforms are the same permutations; linear maps are never taken for the same."""
    pairs = [(transform, b[name]) for name, transform in a.items()]
    return all(
        isinstance(x, Permutation) and isinstance(y, Permutation) and bool((x.indices == y.indices).all())
        for x, y in pairs
    )


def matrices(indices: Int[Any, "copies size"], like: Tensor) -> Tensor:
    """Permutation matrices, one a copy: row i has its one in column `indices[i]`."""
    found = torch.zeros(*indices.shape, indices.shape[1], dtype=like.dtype, device=like.device)
    return found.scatter_(2, torch.from_numpy(indices).to(like.device).unsqueeze(2), 1)


def check_search(learning_rate: float, steps: int, budget: float, batch: int) -> None:
    """Refuses options with which nothing can be searched.

    Raises:
        InputError: One of them is out of range.
    """
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise InputError(f"learning_rate={learning_rate}: give a positive number")
    if steps < 1 or batch < 1:
        raise InputError(f"steps={steps}, batch={batch}: both must be at least 1")
    if not (math.isfinite(budget) and budget > 0):
        raise InputError(f"budget={budget}: give a positive number; 1 is the default number of steps")
