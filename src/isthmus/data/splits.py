"""Splits that give each model its own part of the training data."""

import numpy as np
import torch
from jaxtyping import Int64, Integer
from torch import Tensor

from isthmus.errors import DataError, InputError


def split_for_models(
    y: Integer[Tensor, " samples"],
    kind: str,
    *,
    models: int = 2,
    seed: int = 0,
) -> list[Int64[Tensor, " _"]]:
    """The samples of every model, ascending.

    - `none`: every model gets all samples.
    - `80-20`: two models only. Model 0 gets 20 % of every class in the first half of the classes and 80 % of every
      other class; model 1 gets the rest.
    - `dirichlet`: every class is cut in proportions drawn from a symmetric Dirichlet(0.5) over the models.
    - `classes`: the classes, in an order drawn from the seed, are cut into groups of nearly equal number, one a model.

    Raises:
        DataError: no samples, or a model would get none.
        InputError: unknown kind, fewer than one model, or `80-20` with a number of models other than two.

    Source: Horoi et al. 2024 (arXiv 2407.05385).
    """
    if len(y) == 0:
        raise DataError("there are no samples to split between the models")
    if models < 1:
        raise InputError(f"models is {models}; it must be 1 or more")
    labels, rng = y.unique(), np.random.default_rng(seed)
    if kind == "none":
        return [torch.arange(len(y)) for _ in range(models)]
    if kind == "classes":
        groups = np.array_split(rng.permutation(labels.numpy()), models)
        parts = [[torch.isin(y, torch.from_numpy(group)).nonzero()[:, 0]] for group in groups]
    elif kind == "80-20" or kind == "dirichlet":
        if kind == "80-20" and models != 2:
            raise InputError(f"the split 80-20 is for 2 models, not {models}; use 'dirichlet' or 'classes'")
        parts = [[] for _ in range(models)]
        for rank, label in enumerate(labels):
            members = rng.permutation((y == label).nonzero()[:, 0].numpy())
            first = 0.2 if rank < len(labels) / 2 else 0.8
            shares = [first, 1 - first] if kind == "80-20" else rng.dirichlet([0.5] * models)
            cuts = np.rint(np.cumsum(shares)[:-1] * len(members)).astype(int)
            for part, chosen in zip(parts, np.split(members, cuts), strict=True):
                part.append(torch.from_numpy(chosen))
    else:
        raise InputError(f"no split {kind!r}; take one of none, 80-20, dirichlet, classes")
    indices = [torch.cat(part).sort().values for part in parts]
    for model, chosen in enumerate(indices):
        if len(chosen) == 0:
            raise DataError(f"the split {kind} of {len(y)} samples with seed {seed} leaves model {model} without any")
    return indices
