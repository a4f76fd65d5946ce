"""The proof: random transforms of all spaces at once must keep the function, and leaving one tensor out must not."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from isthmus.errors import InputError, SymmetryError
from isthmus.symmetry import Symmetry
from isthmus.trace.capture import share_structure
from isthmus.transform import Permutation, Transforms, move_state

# A control must exceed the tolerance by this factor to count as a change of the function, and not as rounding.
CONTROL_FACTOR = 1e3


@dataclass(frozen=True)
class Proof:
    """What `verify` found.

    Attributes:
        max_error: Largest relative change of the outputs over all trials.
        tolerance: The largest change that rounding explains.
        trials: Random transforms tried, each with new weights and inputs.
        controls: For each touched tensor, the change of the outputs when it alone is left unmoved.
        no_ops: Touched tensors that the outputs do not depend on, so that the proof says nothing about them.
        dtype: The precision that the proof ran in.
    """

    max_error: float
    tolerance: float
    trials: int
    controls: Mapping[str, float]
    no_ops: tuple[str, ...]
    dtype: str = "float64"

    @property
    def weakest_control(self) -> float:
        """The smallest change over all tensors that the outputs depend on; infinite where there is none."""
        return min((change for name, change in self.controls.items() if name not in self.no_ops), default=math.inf)


def verify(
    model: nn.Module,
    symmetry: Symmetry,
    *inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    trials: int = 2,
    seed: int = 0,
    controls: bool = True,
) -> Proof:
    """Proof that random transforms of all spaces keep the model's function; the model is left as it was.

    Runs in float64 and `eval()` on fresh weights of the model's own scale, since a trained or newly initialised network
    may hardly depend on some of its tensors. The tolerance is eps · √(longest sum) · depth · 8: a forward error bound
    with errors that add like a random walk inside a sum, and add up from one operation to the next.

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
        SymmetryError: A random transform changes the function.
    """
    if trials < 1:
        raise InputError(f"trials={trials}: a proof needs at least one")
    if not inputs and not kwargs:
        raise InputError("no example input: give verify one batch of inputs, as the model's forward takes them")
    rng = np.random.default_rng(seed)
    network = double(model)
    tolerance = rounding(symmetry, torch.finfo(torch.float64).eps)
    worst, changes = 0.0, {}
    for trial in range(trials):
        state = fresh_weights(network, symmetry, rng)
        args, named = fresh_inputs((inputs, dict(kwargs or {})), rng)
        transforms = {space.name: Permutation.random(space, rng) for space in symmetry}
        expected = outputs(network, state, args, named)
        if not any(x.abs().max() > 0 for x in expected if x.numel()) or not all(x.isfinite().all() for x in expected):
            raise SymmetryError("the model's outputs are zero or not finite on random weights: nothing can be proved")
        moved = move_state(state, transforms, symmetry)
        error = change(outputs(network, moved, args, named), expected)
        worst = max(worst, error)
        if not error <= tolerance:
            raise SymmetryError(
                f"a transform of {culprit(network, state, symmetry, transforms, args, named, tolerance)} changes the "
                f"outputs by {error:.1e} (rounding explains {tolerance:.1e}): this symmetry is wrong, do not use it"
            )
        if controls and trial == 0:
            changes = control(network, state, moved, symmetry, args, named, expected)
    silent = tuple(name for name, effect in changes.items() if effect <= CONTROL_FACTOR * tolerance)
    return Proof(worst, tolerance, trials, changes, silent)


def double(model: nn.Module) -> nn.Module:
    """A float64 copy of the model in `eval()`, on the CPU."""
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        structure = copy.deepcopy(model).to_empty(device="cpu")
    else:
        structure = copy.deepcopy(share_structure(model)).cpu()
    return structure.double().eval()


def rounding(symmetry: Symmetry, eps: float) -> float:
    """The largest relative change of outputs that rounding explains, from the longest sum and the number of sums."""
    graph = symmetry.program
    depth = (
        len(symmetry.shapes) if graph is None else sum(1 for n in graph.program.graph.nodes if n.op == "call_function")
    )
    longest = max((math.prod(shape[1:]) for shape in symmetry.shapes.values()), default=1)
    return eps * math.sqrt(max(longest, 1)) * max(depth, 1) * 8


def fresh_weights(network: nn.Module, symmetry: Symmetry, rng: np.random.Generator) -> dict[str, Tensor]:
    """Random weights of the scale of the model's own, such that every tensor matters.

    Matrices are drawn with their own root mean square; vectors are moved by 0.3 of a normal draw, so that gains stay
    near theirs; variances are drawn between 0.5 and 1.5. Tensors that no space touches stay as they are.
    """
    state = dict(network.state_dict())
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    variances = {site.parameter for space in symmetry for site in space.sites if site.role == "variance"}
    for name in symmetry.sites:
        old = state[name]
        noise = torch.randn(old.shape, generator=generator, dtype=torch.float64)
        if name in variances:
            state[name] = 0.5 + torch.rand(old.shape, generator=generator, dtype=torch.float64)
        elif old.ndim < 2:
            state[name] = (
                old if old.isfinite().all() and old.abs().max() < 1e3 else torch.zeros_like(old)
            ) + 0.3 * noise
        else:
            scale = float(old.square().mean().sqrt())
            state[name] = noise * (scale if 1e-8 < scale < 1e3 else 1 / math.sqrt(old[0].numel()))
    for alias, name in symmetry.tied.items():
        if name in state:
            state[alias] = state[name]
    return state


def fresh_inputs(inputs: Any, rng: np.random.Generator) -> Any:
    """The inputs with every floating-point tensor replaced by normal draws in float64; others as they are."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))

    def renew(x: Any) -> Any:
        if isinstance(x, Tensor) and x.is_floating_point():
            return torch.randn(x.shape, generator=generator, dtype=torch.float64)
        return x.cpu() if isinstance(x, Tensor) else x

    return pytree.tree_map(renew, inputs)


def outputs(
    network: nn.Module, state: Mapping[str, Tensor], args: Sequence[Any], named: Mapping[str, Any]
) -> list[Tensor]:
    """All floating-point tensors that the network returns."""
    with torch.no_grad():
        # Cloned, since a network may work in place on what it is given.
        args, named = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (tuple(args), dict(named)))
        result = functional_call(network, dict(state), args, dict(named), tie_weights=False)
    return [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor) and x.is_floating_point()]


def change(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative difference: the largest deviation over the largest value of that output."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if b.numel():
            scale = float(b.abs().max())
            deviation = float((a - b).abs().max())
            worst = max(worst, deviation / scale if scale else deviation)
    return worst


def control(
    network: nn.Module,
    state: Mapping[str, Tensor],
    moved: Mapping[str, Tensor],
    symmetry: Symmetry,
    args: Sequence[Any],
    named: Mapping[str, Any],
    expected: Sequence[Tensor],
) -> dict[str, float]:
    """For each touched tensor, the change of the outputs when all are moved but it."""
    changes = {}
    aliases = {name: [alias for alias, first in symmetry.tied.items() if first == name] for name in symmetry.sites}
    for name in symmetry.sites:
        partial = dict(moved)
        for each in (name, *aliases[name]):
            partial[each] = state[name]
        changes[name] = change(outputs(network, partial, args, named), expected)
    return changes


def culprit(
    network: nn.Module,
    state: Mapping[str, Tensor],
    symmetry: Symmetry,
    transforms: Transforms,
    args: Sequence[Any],
    named: Mapping[str, Any],
    tolerance: float,
) -> str:
    """The first space whose transform alone changes the function."""
    expected = outputs(network, state, args, named)
    for space in symmetry:
        alone = {s.name: transforms[s.name] if s is space else Permutation.identity(s) for s in symmetry}
        if not change(outputs(network, move_state(state, alone, symmetry), args, named), expected) <= tolerance:
            return f"space {space.name}"
    return "several spaces together"
