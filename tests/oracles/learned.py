"""Learned matching transcribed for multilayer perceptrons: every group's map and its derivative by hand.

Networks, batches and maps are those of `oracles.ste` and `oracles.sinkhorn`.

Source: generalized linear mode connectivity for Transformers, NeurIPS 2025, of which only a summary could be read. The
    parametrisations transcribed here are the library's own.
"""

from collections.abc import Sequence

import numpy as np

from oracles.sinkhorn import moved_by, nearest, slopes_of_maps, slopes_of_task
from oracles.ste import Adam, Layers, Permutations, Sample, combined, held_out_loss, permuted

Map = tuple[np.ndarray, np.ndarray]


def cayley(latent: np.ndarray) -> np.ndarray:
    """(I − K)⁻¹ (I + K) with K = (X − Xᵀ) / 2."""
    skew, one = (latent - latent.T) / 2, np.eye(len(latent))
    return np.linalg.inv(one - skew) @ (one + skew)


def map_of(group: str, latent: np.ndarray, start: np.ndarray) -> Map:
    """`into` and `back` of one layer; `start` is the permutation matrix that it started at."""
    if group == "permutation":
        into = np.eye(len(latent))[nearest(latent)]
        return into, into.T
    if group == "orthogonal":
        into = cayley(latent) @ start
        return into, into.T
    change = np.eye(len(latent)) + latent
    return change @ start, start.T @ np.linalg.inv(change)


def slope_of_latent(
    group: str, latent: np.ndarray, start: np.ndarray, by_into: np.ndarray, by_back: np.ndarray
) -> np.ndarray:
    """The derivative by X from those by `into` and `back`."""
    if group == "permutation":  # straight through
        return by_into + by_back.T
    one = np.eye(len(latent))
    if group == "orthogonal":  # Q = (I − K)⁻¹ (I + K) gives dQ = (I − K)⁻¹ dK (I + Q)
        skew, by_rotation = (latent - latent.T) / 2, (by_into + by_back.T) @ start.T
        by_skew = np.linalg.inv(one - skew).T @ by_rotation @ (one + cayley(latent)).T
        return (by_skew - by_skew.T) / 2
    inverse = np.linalg.inv(one + latent)  # d(C⁻¹) = −C⁻¹ dC C⁻¹
    return by_into @ start.T - inverse.T @ (start @ by_back) @ inverse.T


def first_latent(fixed: Layers, moved: Layers, start: Permutations, layer: int) -> np.ndarray:
    """The similarity of A's units with B's at the start, all other layers in place, over its mean on paired units."""
    others = [np.arange(len(p)) if i == layer else p for i, p in enumerate(start)]
    there = permuted(moved, others)
    (A, a), (B, b) = fixed[layer], there[layer]
    similarity = A @ B.T + np.outer(a, b) + fixed[layer + 1][0].T @ there[layer + 1][0]
    return similarity / similarity[np.arange(len(a)), start[layer]].mean()


def learned(
    group: str,
    fixed: Layers,
    moved: Layers,
    start: Permutations,
    draws: Sequence[tuple[float, Sample]],
    held: Sequence[Sample],
    rate: float,
) -> tuple[list[Map], list[float]]:
    """One step a draw (λ, batch); the best maps seen, and the held-out losses: start, every step.

    Linear maps of n units take steps of `rate` / n.
    """

    def judge(maps: Sequence[Map]) -> float:
        there = moved_by(moved, *zip(*maps, strict=True))
        return held_out_loss(combined([fixed, there], [0.5, 0.5]), held)

    starts = [np.eye(len(p))[p] for p in start]
    latents = [np.zeros_like(matrix) for matrix in starts]
    if group == "permutation":
        latents = [first_latent(fixed, moved, start, layer) for layer in range(len(start))]
    adam = [Adam(rate / (1 if group == "permutation" else len(latent))) for latent in latents]
    best = [(matrix, matrix.T) for matrix in starts]
    losses = [judge(best)]
    for t, batch in draws:
        maps = [map_of(group, latent, begun) for latent, begun in zip(latents, starts, strict=True)]
        intos, backs = zip(*maps, strict=True)
        slopes = slopes_of_task(fixed, moved_by(moved, intos, backs), t, batch)
        by_into, by_back = slopes_of_maps(moved, intos, backs, slopes)
        for layer in range(len(latents)):
            slope = slope_of_latent(group, latents[layer], starts[layer], by_into[layer], by_back[layer])
            latents[layer] = adam[layer](latents[layer], slope)
        here = [map_of(group, latent, begun) for latent, begun in zip(latents, starts, strict=True)]
        loss = judge(here)
        if loss < min(losses):
            best = here
        losses.append(loss)
    return best, losses
