"""The proof: random transforms of all spaces at once must keep the function, and leaving one tensor out must not."""

import copy
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from isthmus.errors import InputError, ModelError, SymmetryError
from isthmus.graph.capture import share_structure
from isthmus.symmetry.gains import fold_state
from isthmus.symmetry.gauges import random_factors, random_turns, rescaled, turned
from isthmus.symmetry.groups import SPREAD, random_element
from isthmus.symmetry.spaces import Group, Space
from isthmus.symmetry.symmetry import Symmetry
from isthmus.symmetry.transform import Permutation, Transform, Transforms, move_state
from isthmus.tracing.random_network import DRAWS, Sample, draw_network
from isthmus.wording.short import counted, told

# A control must exceed the tolerance by this factor to count as a change of the function, and not as rounding.
CONTROL_FACTOR = 1e3


@dataclass(frozen=True)
class Proof:
    """What `verify` found.

    Attributes:
        max_error: Largest relative change of the outputs over all trials.
        tolerance: The largest change that rounding explains.
        trials: How often random transforms were tried, with new weights and inputs each time.
        controls: For each touched tensor, the change of the outputs when it alone is left unmoved. Where a gradient
            tells it, it is the change to first order, as a root mean square over the outputs, which is never more
            than the largest change.
        no_ops: Touched tensors that the outputs do not depend on, so that the proof says nothing about them.
        dtype: The precision that the proof ran in.
    """

    max_error: float
    tolerance: float
    trials: int
    controls: Mapping[str, float]
    no_ops: tuple[str, ...]
    dtype: str = "float64"

    def __repr__(self) -> str:
        errors = f"largest error {self.max_error:.1e} of {self.tolerance:.1e} allowed"
        controls = f"{counted(len(self.controls), 'control')}, weakest {self.weakest_control:.1e}"
        idle = counted(len(self.no_ops), "tensor without effect", "tensors without effect") if self.no_ops else None
        return told(self, errors, counted(self.trials, "trial"), controls if self.controls else None, idle)

    @property
    def weakest_control(self) -> float:
        """The smallest change over all tensors that the outputs depend on; infinite where there is none."""
        return min((change for name, change in self.controls.items() if name not in self.no_ops), default=math.inf)


def verify(
    model: nn.Module,
    symmetry: Symmetry,
    *inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    trials: int = 8,
    seed: int = 0,
    controls: bool = True,
) -> Proof:
    """Proof that random transforms of all spaces keep the model's function; the model is left as it was.

    Every trial draws permutations of all spaces, uniformly. If the claim is wrong, those that do keep the function are
    a proper subgroup, which holds half of them at most: a wrong symmetry passes with probability 2^-trials or less.
    Units that are free in sign or scale, and pairs that are free to be turned (`Symmetry.gauges`), take random ones,
    all at once. Where a space allows more than permutations, the trial draws elements of all spaces' groups too:
    rotations uniformly, invertible maps with a condition number of two at most. Of these a proper subgroup holds almost
    none. Gains that can be folded are folded first, so that the folding is proved too.

    Runs in float64 and `eval()` on fresh weights of the model's own scale, since a trained or newly initialised network
    may hardly depend on some of its tensors. The tolerance is eps · √(longest sum) · depth · 8: a forward error bound
    with errors that add like a random walk inside a sum, and add up from one operation to the next. Weights at which
    the network itself magnifies errors (a norm over nearly equal numbers) raise it by the measured factor. Invertible
    maps and their inverses magnify rounding by their condition numbers, whose product raises the tolerance.

    Args:
        model: A model of the traced architecture.
        symmetry: What `trace` returned for it.
        inputs: Example inputs; floating-point ones are replaced by random numbers of the same shape and scale.
        kwargs: Example keyword inputs.
        trials: How many random transforms to try.
        seed: Seeds weights, inputs and transforms.
        controls: Whether to leave out each touched tensor once; the proof is worth little without.

    Raises:
        InputError: No inputs, or no trials.
        ModelError: The model cannot run in float64, or is larger than memory.
        SymmetryError: A random transform changes the function.
    """
    if trials < 1:
        raise InputError(f"trials={trials}: a proof needs at least one")
    if not inputs and not kwargs:
        raise InputError("no example input: give verify one batch of inputs, as the model's forward takes them")
    _check_memory(model)
    rng = np.random.default_rng(seed)
    more = np.random.default_rng([seed, 1])  # of its own, so that the same permutations are tried whatever else is
    network = _runnable(model)
    tolerance = _rounding(symmetry, torch.finfo(torch.float64).eps)
    if any(space.group is Group.INVERTIBLE for space in symmetry):
        tolerance *= SPREAD**4
    worst = 0.0
    for _ in range(trials):
        sample = draw_network(network, symmetry, (inputs, dict(kwargs or {})), rng)
        for transforms in _draw_transforms(symmetry, rng, more):
            error, allowed = sample.change_allowed(_moved_by(transforms, sample.state, symmetry), tolerance, rng)
            worst = max(worst, error)
            if not error <= allowed:
                raise SymmetryError(
                    f"a transform of {_culprit(sample, symmetry, transforms, allowed)} changes the outputs by "
                    f"{error:.1e} (rounding explains {allowed:.1e}): this symmetry is wrong, do not use it"
                )
        if symmetry.gauges:
            scaled = rescaled(sample.state, symmetry, random_factors(symmetry, more))
            moved = turned(scaled, symmetry, random_turns(symmetry, more))
            error, allowed = sample.change_allowed(moved, tolerance, rng)
            worst = max(worst, error)
            if not error <= allowed:
                raise SymmetryError(
                    f"factors or turns of units of {', '.join(g.space for g in symmetry.gauges)} change the outputs "
                    f"by {error:.1e} (rounding explains {allowed:.1e}): these gauges are wrong, do not use them"
                )
    threshold = CONTROL_FACTOR * tolerance
    changes = _control(network, symmetry, (inputs, dict(kwargs or {})), rng, threshold) if controls else {}
    silent = tuple(name for name, effect in changes.items() if effect <= threshold)
    return Proof(worst, tolerance, trials, changes, silent)


def _check_memory(model: nn.Module) -> None:
    """Refuses a model whose proof no memory of this machine can hold: two states of it, in float64.

    Raises:
        ModelError: It cannot.
    """
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):  # not told on every system
        return
    numbers = sum(tensor.numel() for tensor in {id(x): x for x in model.state_dict().values()}.values())
    needed, held = 2 * 8 * numbers, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > held:
        raise ModelError(
            f"a proof of {numbers:,} numbers in float64 takes {needed / 2**30:,.0f} GB or more, and this machine has "
            f"{held / 2**30:,.0f}: prove a narrow copy of the model, with the same layers of smaller widths"
        )


def _runnable(model: nn.Module) -> nn.Module:
    """A copy of the module tree in `eval()`, to be run on other weights, on the CPU and in float64.

    It shares the model's own weights, which only tell their scale, so that a proof needs no copy of them.
    """
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        return copy.deepcopy(model).to_empty(device="cpu").double().train().eval()
    shared = share_structure(model)
    stored = set(shared.state_dict())
    for path, module in shared.named_modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if (f"{path}.{name}" if path else name) not in stored:
                module._buffers[name] = buffer.cpu().double() if buffer.is_floating_point() else buffer.cpu()
    return shared


def _rounding(symmetry: Symmetry, eps: float) -> float:
    """The largest relative change of outputs that rounding explains, from the longest sum and the number of sums."""
    graph = symmetry.graph
    depth = (
        len(symmetry.shapes) if graph is None else sum(1 for n in graph.program.graph.nodes if n.op == "call_function")
    )
    longest = max((math.prod(shape[1:]) for shape in symmetry.shapes.values()), default=1)
    return eps * math.sqrt(max(longest, 1)) * max(depth, 1) * 8


def _stirred(space: Space, rng: np.random.Generator) -> Permutation:
    """A random permutation that leaves no unit where it is: one cycle through each copy."""
    indices = np.empty((space.copies, space.size), dtype=np.int64)
    for row in indices:
        order = rng.permutation(space.size)
        row[order] = np.roll(order, 1)
    return Permutation(indices)


def _control(
    network: nn.Module, symmetry: Symmetry, inputs: Any, rng: np.random.Generator, threshold: float
) -> dict[str, float]:
    """For each touched tensor, the largest change of the outputs when all are moved but it.

    One gradient tells the effect of all tensors to first order; those that no gradient reaches are left out one by one.
    A tensor may be silent by chance, behind a unit that is off for every input: silent ones get another sample, until
    `DRAWS` samples in a row find no more effect; in the last of these they are left out one by one, too.
    """
    changes = dict.fromkeys(symmetry.sites, 0.0)
    aliases = {name: [alias for alias, first in symmetry.tied.items() if first == name] for name in symmetry.sites}
    silent, idle = list(changes), 0
    while silent and idle < DRAWS:
        sample = draw_network(network, symmetry, inputs, rng)
        moved = move_state(sample.state, {space.name: _stirred(space, rng) for space in symmetry}, symmetry)
        effects = sample.first_order(moved, {name: aliases[name] for name in silent}, rng)
        for name in silent:
            if name not in effects or (idle == DRAWS - 1 and effects[name] <= threshold):
                unmoved = dict.fromkeys((name, *aliases[name]), sample.state[name])
                effects[name] = sample.change({**moved, **unmoved})
            changes[name] = max(changes[name], effects[name])
        still = [name for name in silent if changes[name] <= threshold]
        idle = idle + 1 if len(still) == len(silent) else 0
        silent = still
    return changes


def _draw_transforms(
    symmetry: Symmetry, rng: np.random.Generator, more: np.random.Generator
) -> list[dict[str, Transform]]:
    """Random permutations of all spaces, and, where some space allows more, random elements of all spaces' groups.

    Args:
        symmetry: The spaces.
        rng: Draws permutations.
        more: Draws what is no permutation.
    """
    drawn: list[dict[str, Transform]] = [{space.name: Permutation.random(space, rng) for space in symmetry}]
    if any(space.group is not Group.PERMUTATION for space in symmetry):
        drawn.append({space.name: random_element(space, more) for space in symmetry})
    return drawn


def _moved_by(transforms: Transforms, state: Mapping[str, Tensor], symmetry: Symmetry) -> dict[str, Tensor]:
    """The state under transforms; gains are folded first where some space is not just permuted."""
    if not all(isinstance(transform, Permutation) for transform in transforms.values()):
        state = fold_state(state, symmetry)
    return move_state(state, transforms, symmetry)


def _culprit(sample: Sample, symmetry: Symmetry, transforms: Transforms, tolerance: float) -> str:
    """The first space whose transform alone changes the function."""
    for space in symmetry:
        alone = {s.name: transforms[s.name] if s is space else Permutation.identity(s) for s in symmetry}
        if not sample.change(_moved_by(alone, sample.state, symmetry)) <= tolerance:
            return f"space {space.name}"
    return "several spaces together"
