"""Gradient ascent from noise to the pictures that excite units most."""

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from isthmus.errors import InputError, ModelError
from isthmus.explain.images import ImageStatistics
from isthmus.explain.parametrisations import Parametrisation
from isthmus.explain.target import Target
from isthmus.progress import progress

# Adam's two averages are torch's and the paper's; its ε is far below any gradient, so that the scale of a unit's
# activations does not matter.
BETAS = (0.9, 0.999)

EPSILON = 1e-12


def ascend_images(
    target: Target,
    state: Mapping[str, Tensor],
    units: Sequence[int],
    slots: Sequence[int],
    method: Parametrisation,
    statistics: ImageStatistics,
    seed: int,
    steps: int,
) -> tuple[Float[Tensor, "units channels height width"], Float[Tensor, " units"]]:
    """The pictures of some units in one optimisation, and what the units answer to them.

    Adam works on each number alone, so that the sum of all units' objectives has the solution of each.

    Raises:
        InputError: No gradient arrives at the pictures.
        ModelError: A unit answers with NaN or infinity.
    """
    generators = [_generator_of(seed, target.space, slot) for slot in slots]
    numbers = torch.stack([method.start(target.shape, g) for g in generators]).to(target.device)
    draws = torch.stack([torch.rand(steps, 4, generator=g) * 2 - 1 for g in generators], dim=1).to(target.device)
    index = torch.tensor(units, device=target.device)[:, None]
    mean = statistics.mean.to(target.device, torch.float32)
    first, second = torch.zeros_like(numbers), torch.zeros_like(numbers)
    for step in progress(range(steps), f"drawing {target.space}"):
        with torch.enable_grad():
            free = numbers.clone().requires_grad_()
            images = _shaken(method.images(free, statistics, target.shape), draws[step], method, mean)
            reached = target.values(state, images).gather(1, index).sum()
            if not reached.requires_grad:
                raise InputError(f"space {target.space} cannot be drawn: no gradient arrives at the images")
            (gradient,) = torch.autograd.grad(reached, free)
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
        ahead = first / (1 - BETAS[0] ** (step + 1))
        spread = (second / (1 - BETAS[1] ** (step + 1))).sqrt()
        numbers = numbers + method.learning_rate * ahead / (spread + EPSILON)
    with torch.no_grad():
        images = method.images(numbers, statistics, target.shape)
        activations = target.values(state, images).gather(1, index)[:, 0]
    if not (images.isfinite().all() and activations.isfinite().all()):
        raise ModelError(f"units of space {target.space} answer their pictures with NaN or infinity: check the weights")
    return images.cpu(), activations.cpu()


def _shaken(
    images: Float[Tensor, "images channels height width"],
    draws: Float[Tensor, "images 4"],
    method: Parametrisation,
    mean: Float[Tensor, " channels"],
) -> Float[Tensor, "images channels height width"]:
    """The images moved, scaled and turned; the draws in [−1, 1] say how much of what the method allows."""
    if not (method.jitter or method.scale or method.rotate):
        return images
    height, width = images.shape[2:]
    across, down, size, turn = draws.unbind(1)
    size = 1 + method.scale * size
    turn = math.radians(method.rotate) * turn
    cosine, sine = turn.cos() / size, turn.sin() / size
    rows = [
        torch.stack([cosine, -sine * (height / width), across * (2 * method.jitter)], dim=1),
        torch.stack([sine * (width / height), cosine, down * (2 * method.jitter)], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    mean = mean[:, None, None]
    return F.grid_sample(images - mean, grid, padding_mode="zeros", align_corners=False) + mean


def _generator_of(seed: int, space: str, slot: int) -> torch.Generator:
    """A generator of its own for every seed, space and slot."""
    digest = hashlib.sha256(f"{seed}\n{space}\n{slot}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
