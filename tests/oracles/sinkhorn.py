"""Sinkhorn Re-Basin transcribed for multilayer perceptrons: turns of normalisation and their derivative by hand.

Networks and batches are those of `oracles.ste`. A map of hidden layer l is a pair of matrices: `into`
carries its units into the common frame, `back` carries them back.

Source: Peña, Medeiros, Dubail, Aminbeidokhti, Granger, Pedersoli, Re-basin via implicit Sinkhorn differentiation, CVPR
    2023. Written from its description, with unrolled turns. The choice on held-out batches is the library's.
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from oracles.ste import Adam, Layers, Permutations, Sample, combined, gradients_of, held_out_loss, permuted

Maps = Sequence[np.ndarray]


def turns_of(latent: np.ndarray, temperature: float, turns: int) -> list[np.ndarray]:
    """exp(X / τ), and the matrix after every normalisation: rows, columns, rows, …"""
    matrices = [np.exp(latent / temperature)]
    for _ in range(turns):
        rows = matrices[-1].copy()
        for i in range(len(rows)):
            rows[i] = rows[i] / rows[i].sum()
        columns = rows.copy()
        for j in range(len(rows)):
            columns[:, j] = columns[:, j] / columns[:, j].sum()
        matrices += [rows, columns]
    return matrices


def back_through_turns(matrices: Sequence[np.ndarray], slope: np.ndarray, temperature: float) -> np.ndarray:
    """The derivative by X from that by the last matrix: M = A / ΣA gives dA = (dM − Σ dM·M) / ΣA."""
    for index in reversed(range(1, len(matrices))):
        axis = 1 if index % 2 else 0
        before, after = matrices[index - 1], matrices[index]
        slope = (slope - (slope * after).sum(axis, keepdims=True)) / before.sum(axis, keepdims=True)
    return slope * matrices[0] / temperature


def moved_by(layers: Layers, intos: Maps, backs: Maps) -> Layers:
    """T_l W_l S_{l-1} and T_l b_l, with T into the frame and S back from it."""
    intos = [*intos, np.eye(len(layers[-1][1]))]
    backs = [np.eye(layers[0][0].shape[1]), *backs]
    return [(intos[layer] @ W @ backs[layer], intos[layer] @ b) for layer, (W, b) in enumerate(layers)]


def slopes_of_maps(layers: Layers, intos: Maps, backs: Maps, slopes: Layers) -> tuple[list, list]:
    """The derivatives by all T and S from those by the moved weights."""
    by_into, by_back = [], []
    for layer in range(len(intos)):
        W, b = layers[layer]
        before = np.eye(W.shape[1]) if layer == 0 else backs[layer - 1]
        by_into.append(slopes[layer][0] @ (W @ before).T + np.outer(slopes[layer][1], b))
        after = np.eye(len(layers[layer + 1][1])) if layer + 1 == len(intos) else intos[layer + 1]
        by_back.append((after @ layers[layer + 1][0]).T @ slopes[layer + 1][0])
    return by_into, by_back


def nearest(latent: np.ndarray) -> np.ndarray:
    """The permutation that gathers most of a matrix."""
    return linear_sum_assignment(latent, maximize=True)[1]


def squared_distance(a: Layers, b: Layers) -> float:
    """Σ ‖W^A − W^B‖²."""
    return sum(float(np.sum((p - q) ** 2)) for x, y in zip(a, b, strict=True) for p, q in zip(x, y, strict=True))


def slopes_of_distance(fixed: Layers, moved: Layers) -> Layers:
    """Its derivative by the moved weights."""
    return [(2 * (V - W), 2 * (c - b)) for (W, b), (V, c) in zip(fixed, moved, strict=True)]


def slopes_of_task(fixed: Layers, moved: Layers, t: float, batch: Sample) -> Layers:
    """The derivative of the loss at (1 − t) A + t B by the moved weights."""
    return [(t * W, t * b) for W, b in gradients_of(combined([fixed, moved], [1 - t, t]), batch)]


def slopes_of_latents(
    layers: Layers, latents: Sequence[np.ndarray], temperature: float, turns: int, slopes: Callable[[Layers], Layers]
) -> list[np.ndarray]:
    """The derivative by every X of a loss of the moved weights, S = Tᵀ."""
    matrices = [turns_of(latent, temperature, turns) for latent in latents]
    maps = [each[-1] for each in matrices]
    backs = [each.T for each in maps]
    by_into, by_back = slopes_of_maps(layers, maps, backs, slopes(moved_by(layers, maps, backs)))
    return [
        back_through_turns(each, into + back.T, temperature)
        for each, into, back in zip(matrices, by_into, by_back, strict=True)
    ]


def sinkhorn(
    fixed: Layers,
    moved: Layers,
    start: Permutations,
    draws: Sequence[tuple[float, Sample] | None],
    held: Sequence[Sample],
    places: Sequence[float],
    temperature: float,
    turns: int,
    rate: float,
) -> tuple[Permutations, list[float]]:
    """One step a draw (t, batch), or None for the distance; the best permutations, and losses: start, every step."""

    def judge(permutations: Permutations) -> float:
        there = permuted(moved, permutations)
        if not places:
            return squared_distance(fixed, there)
        return float(np.mean([held_out_loss(combined([fixed, there], [1 - t, t]), held) for t in places]))

    latents = [np.eye(len(p))[p] for p in start]
    adam = [Adam(rate) for _ in latents]
    best, losses = start, [judge(start)]
    for draw in draws:

        def slopes(there: Layers, draw=draw) -> Layers:
            return slopes_of_distance(fixed, there) if draw is None else slopes_of_task(fixed, there, *draw)

        found = slopes_of_latents(moved, latents, temperature, turns, slopes)
        latents = [step(latent, slope) for step, latent, slope in zip(adam, latents, found, strict=True)]
        here = [nearest(latent) for latent in latents]
        loss = judge(here)
        if loss < min(losses):
            best = here
        losses.append(loss)
    return best, losses
