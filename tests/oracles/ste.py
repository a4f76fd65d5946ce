"""The straight-through estimator transcribed for multilayer perceptrons: gradients, Adam and projections by hand.

A network is a list of layers (W [out, in], b [out]) with ReLU between them. `permutations[layer][i] = j` puts hidden
unit j of that layer of the moved network into slot i of the fixed one. Everything is float64.

Source: Ainsworth, Hayase, Srinivasa, Git Re-Basin, ICLR 2023, Algorithm 2; Kingma, Ba, Adam, ICLR 2015. Written from
    their descriptions. The choice on held-out batches is the library's.
"""

import copy
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

Layers = list[tuple[np.ndarray, np.ndarray]]
Permutations = list[np.ndarray]
Sample = tuple[np.ndarray, np.ndarray]


def layers_of(model: nn.Module) -> Layers:
    """The layers of `isthmus.models.MLP`."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return [(m.weight.detach().double().numpy().copy(), m.bias.detach().double().numpy().copy()) for m in linears]


def as_sample(x: Tensor, y: Tensor) -> Sample:
    """A batch as arrays."""
    return x.double().flatten(1).numpy(), y.numpy()


def loss_by_batch(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Mean cross-entropy of a network whose BatchNorm normalises by each batch."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.train()
    with torch.no_grad():
        losses = [(F.cross_entropy(model(x).double().movedim(-1, 1), y), y.numel()) for x, y in batches]
    return sum(float(loss) * size for loss, size in losses) / sum(size for _, size in losses)


# The network


def forward(layers: Layers, x: np.ndarray) -> list[np.ndarray]:
    """The inputs of every layer, and the logits."""
    values = [x]
    for index, (W, b) in enumerate(layers):
        z = values[-1] @ W.T + b
        values.append(np.maximum(z, 0) if index < len(layers) - 1 else z)
    return values


def loss_of(layers: Layers, batch: Sample) -> float:
    """Mean cross-entropy."""
    z, y = forward(layers, batch[0])[-1], batch[1]
    z = z - z.max(axis=1, keepdims=True)
    return float(np.mean(np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(y)), y]))


def gradients_of(layers: Layers, batch: Sample) -> Layers:
    """The derivative of the mean cross-entropy with respect to all weights, by backpropagation."""
    values, y = forward(layers, batch[0]), batch[1]
    z = values[-1] - values[-1].max(axis=1, keepdims=True)
    error = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    error[np.arange(len(y)), y] -= 1
    error /= len(y)
    found: Layers = []
    for index in reversed(range(len(layers))):
        found.insert(0, (error.T @ values[index], error.sum(axis=0)))
        error = (error @ layers[index][0]) * (values[index] > 0)
    return found


def held_out_loss(layers: Layers, batches: Sequence[Sample]) -> float:
    """Mean cross-entropy over all samples of several batches."""
    return sum(loss_of(layers, batch) * len(batch[1]) for batch in batches) / sum(len(y) for _, y in batches)


def combined(networks: Sequence[Layers], weights: Sequence[float]) -> Layers:
    """Σ_m c_m W_m."""
    return [
        tuple(sum(c * network[index][part] for c, network in zip(weights, networks, strict=True)) for part in (0, 1))
        for index in range(len(networks[0]))
    ]


class Adam:
    """Adam of one array; its moments are corrected for their start at zero."""

    def __init__(self, rate: float) -> None:
        self.rate, self.steps, self.mean, self.square = rate, 0, 0.0, 0.0

    def __call__(self, weight: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        self.steps += 1
        self.mean = 0.9 * self.mean + 0.1 * gradient
        self.square = 0.999 * self.square + 0.001 * gradient**2
        mean, square = self.mean / (1 - 0.9**self.steps), self.square / (1 - 0.999**self.steps)
        return weight - self.rate * mean / (np.sqrt(square) + 1e-8)


# Permutations


def permuted(layers: Layers, permutations: Permutations) -> Layers:
    """P_ℓ W_ℓ P_{ℓ-1}ᵀ and P_ℓ b_ℓ with explicit permutation matrices."""
    matrices = [np.eye(len(p))[p] for p in permutations]
    matrices = [np.eye(layers[0][0].shape[1]), *matrices, np.eye(len(layers[-1][1]))]
    return [
        (matrices[layer + 1] @ W @ matrices[layer].T, matrices[layer + 1] @ b) for layer, (W, b) in enumerate(layers)
    ]


def agreement(free: Layers, moved: Layers) -> float:
    """⟨θ, π(B)⟩ over the tensors that some permutation moves: all but the last bias."""
    total = sum(float(np.sum(A * W)) for (A, _), (W, _) in zip(free, moved, strict=True))
    return total + sum(float(a @ b) for (_, a), (_, b) in zip(free[:-1], moved[:-1], strict=True))


def project_by_trying_all(
    free: Layers, moved: Layers, permutations: Permutations, rng: np.random.Generator
) -> Permutations:
    """argmax over all permutations of ⟨θ, π(B)⟩; for a few units a layer."""
    choices = [list(itertools.permutations(range(len(p)))) for p in permutations]
    best = max(
        itertools.product(*choices), key=lambda found: agreement(free, permuted(moved, [np.array(p) for p in found]))
    )
    return [np.array(p) for p in best]


def project_in_turn(free: Layers, moved: Layers, permutations: Permutations, rng: np.random.Generator) -> Permutations:
    """Coordinate descent: one assignment problem a layer, layers in random order, until nothing improves."""
    permutations = list(permutations)
    while True:
        improved = False
        for layer in rng.permutation(len(permutations)):
            now = permuted(moved, [np.arange(len(p)) if i == layer else p for i, p in enumerate(permutations)])
            (A, a), (B, b) = free[layer], now[layer]
            after_a, after_b = free[layer + 1][0], now[layer + 1][0]
            similarity = A @ B.T + np.outer(a, b) + after_a.T @ after_b
            rows, columns = linear_sum_assignment(similarity, maximize=True)
            gained = similarity[rows, columns].sum() - similarity[rows, permutations[layer]].sum()
            if gained > 1e-6 * abs(similarity[rows, columns].sum()):  # the library's rule: less is its rounding
                permutations[layer] = columns
                improved = True
        if not improved:
            return permutations


Project = Callable[[Layers, Layers, Permutations, np.random.Generator], Permutations]


class Walk:
    """Free weights of every network but the first, all starting at the first one's, and their projections."""

    def __init__(
        self,
        networks: Sequence[Layers],
        starts: Sequence[Permutations],
        rate: float,
        rng: np.random.Generator,
        project: Project,
    ) -> None:
        self.networks, self.rng, self.project = networks, rng, project
        self.free = [[(W.copy(), b.copy()) for W, b in networks[0]] for _ in networks[1:]]
        self.adam = [[(Adam(rate), Adam(rate)) for _ in networks[0]] for _ in networks[1:]]
        self.permutations = [
            project(free, b, p, rng) for free, b, p in zip(self.free, networks[1:], starts, strict=True)
        ]

    def merged(self, weights: Sequence[float]) -> Layers:
        """The combination of the first network and all projections."""
        moved = [permuted(b, p) for b, p in zip(self.networks[1:], self.permutations, strict=True)]
        return combined([self.networks[0], *moved], weights)

    def step(self, batch: Sample) -> None:
        """Moves the free weights along the gradient that passed straight through, and projects them."""
        count = len(self.networks)
        weights = [0.5, 0.5] if count == 2 else self.rng.dirichlet(np.ones(count)).tolist()
        gradients = gradients_of(self.merged(weights), batch)
        for m in range(count - 1):
            free, adam = self.free[m], self.adam[m]
            for layer, (W, b) in enumerate(free):
                by_weight, by_bias = (weights[m + 1] * part for part in gradients[layer])
                last = layer == len(free) - 1
                free[layer] = (adam[layer][0](W, by_weight), b if last else adam[layer][1](b, by_bias))
            self.permutations[m] = self.project(free, self.networks[m + 1], self.permutations[m], self.rng)


def ste(
    networks: Sequence[Layers],
    starts: Sequence[Permutations],
    batches: Sequence[Sample],
    held: Sequence[Sample],
    rate: float,
    rng: np.random.Generator,
    project: Project = project_in_turn,
) -> tuple[list[Permutations], list[float]]:
    """One step a batch; the best permutations seen, and the held-out losses: start, every step."""
    uniform = [1 / len(networks)] * len(networks)
    first = [networks[0], *(permuted(b, p) for b, p in zip(networks[1:], starts, strict=True))]
    best, losses = [list(p) for p in starts], [held_out_loss(combined(first, uniform), held)]
    walk = Walk(networks, starts, rate, rng, project)
    for batch in batches:
        walk.step(batch)
        loss = held_out_loss(walk.merged(uniform), held)
        if loss < min(losses):
            best = [list(p) for p in walk.permutations]
        losses.append(loss)
    return best, losses
