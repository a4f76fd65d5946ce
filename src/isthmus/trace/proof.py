"""The proof: random transforms of all spaces at once must keep the function, and leaving one tensor out must not."""

import contextlib
import copy
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from isthmus.errors import InputError, ModelError, SymmetryError
from isthmus.gains import fold_state, foldable
from isthmus.gauges import random_factors, rescaled
from isthmus.groups import SPREAD, random_element
from isthmus.symmetry import Group, Space, Symmetry
from isthmus.trace.capture import share_structure
from isthmus.transform import Permutation, Transform, Transforms, move_state

# A control must exceed the tolerance by this factor to count as a change of the function, and not as rounding.
CONTROL_FACTOR = 1e3

# How often weights and inputs are drawn anew before outputs that are zero or not finite, or a tensor that they do not
# depend on, are taken to be so always.
DRAWS = 16

# Relative step of the weights at which a network's sensitivity is measured: the root of float64's precision.
STEP = 1.5e-8

NARROW = (torch.float16, torch.bfloat16, torch.float32)
NARROWING = (torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.float)


@dataclass(frozen=True)
class Proof:
    """What `verify` found.

    Attributes:
        max_error: Largest relative change of the outputs over all trials.
        tolerance: The largest change that rounding explains.
        trials: How often random transforms were tried, with new weights and inputs each time.
        controls: For each touched tensor, the change of the outputs when it alone is left unmoved; where a gradient
            tells it, the change to first order, as root mean square of the outputs, which is no more than the largest.
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
    trials: int = 8,
    seed: int = 0,
    controls: bool = True,
) -> Proof:
    """Proof that random transforms of all spaces keep the model's function; the model is left as it was.

    Every trial draws permutations of all spaces, uniformly. If the claim is wrong, those that do keep the function are
    a proper subgroup, which holds half of them at most: a wrong symmetry passes with probability 2^-trials or less.
    Units that are free in sign or scale (`Symmetry.gauges`) take random factors, all at once. Where a space allows
    more than permutations, the trial draws elements of all spaces' groups too: rotations uniformly, invertible maps
    with a condition number of two at most. Of these a proper subgroup holds almost none. Gains that can be folded are
    folded first, so that the folding is proved too.

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
    check_memory(model)
    rng = np.random.default_rng(seed)
    more = np.random.default_rng([seed, 1])  # of its own, so that the same permutations are tried whatever else is
    network = double(model)
    tolerance = rounding(symmetry, torch.finfo(torch.float64).eps)
    if any(space.group is Group.INVERTIBLE for space in symmetry):
        tolerance *= SPREAD**4
    worst = 0.0
    for _ in range(trials):
        sample = draw(network, symmetry, (inputs, dict(kwargs or {})), rng)
        for transforms in draw_transforms(symmetry, rng, more):
            error = sample.change(moved_by(transforms, sample.state, symmetry))
            worst = max(worst, error)
            allowed = tolerance if error <= tolerance else tolerance * max(1.0, sample.sensitivity(rng))
            if not error <= allowed:
                raise SymmetryError(
                    f"a transform of {culprit(sample, symmetry, transforms, allowed)} changes the outputs by "
                    f"{error:.1e} (rounding explains {allowed:.1e}): this symmetry is wrong, do not use it"
                )
        if symmetry.gauges:
            error = sample.change(rescaled(sample.state, symmetry, random_factors(symmetry, more)))
            worst = max(worst, error)
            allowed = tolerance if error <= tolerance else tolerance * max(1.0, sample.sensitivity(rng))
            if not error <= allowed:
                raise SymmetryError(
                    f"factors of the units of {', '.join(gauge.space for gauge in symmetry.gauges)} change the outputs "
                    f"by {error:.1e} (rounding explains {allowed:.1e}): these gauges are wrong, do not use them"
                )
    threshold = CONTROL_FACTOR * tolerance
    changes = control(network, symmetry, (inputs, dict(kwargs or {})), rng, threshold) if controls else {}
    silent = tuple(name for name, effect in changes.items() if effect <= threshold)
    return Proof(worst, tolerance, trials, changes, silent)


def check_memory(model: nn.Module) -> None:
    """Refuses a model whose proof no memory of this machine can hold: the model and two states of it, in float64.

    Raises:
        ModelError: It cannot.
    """
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):  # not told on every system
        return
    numbers = sum(tensor.numel() for tensor in {id(x): x for x in model.state_dict().values()}.values())
    needed, held = 3 * 8 * numbers, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > held:
        raise ModelError(
            f"a proof of {numbers:,} numbers in float64 takes {needed / 2**30:,.0f} GB or more, and this machine has "
            f"{held / 2**30:,.0f}: prove a narrow copy of the model, with the same layers of smaller widths"
        )


def double(model: nn.Module) -> nn.Module:
    """A float64 copy of the model in `eval()`, on the CPU."""
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        structure = copy.deepcopy(model).to_empty(device="cpu")
    else:
        structure = copy.deepcopy(share_structure(model)).cpu()
    return structure.double().train().eval()


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
    near theirs (a gain of shape [n, 1, 1] is a vector too); variances, and gains that can be folded, are drawn between
    0.5 and 1.5. Tensors that no space touches are drawn too, since a site may be missing; buffers among them keep signs
    and infinities, being scaled by 0.5 to 1.5 unless they are all zero.
    """
    state = dict(network.state_dict())
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    variances = {site.parameter for space in symmetry for site in space.sites if site.role == "variance"}
    gains = {gain.parameter: gain for gain in foldable(symmetry)}
    drawn = set(symmetry.sites) | {name for name, _ in network.named_parameters()}
    for name, old in state.items():
        if not old.is_floating_point() or not old.numel() or name in symmetry.tied:
            continue
        if name in variances:
            state[name] = around_one(old.shape, generator)
        elif name in gains:
            state[name] = around_one(old.shape, generator) - gains[name].offset
        elif name not in drawn:
            state[name] = old * around_one(old.shape, generator) if old.any() else 0.3 * normal(old.shape, generator)
        elif old.numel() == max(old.shape, default=1):
            usable = old.isfinite().all() and old.abs().max() < 1e3
            state[name] = (old if usable else torch.zeros_like(old)) + 0.3 * normal(old.shape, generator)
        else:
            scale = float(old.square().mean().sqrt())
            usable = 1e-8 < scale < 1e3
            state[name] = normal(old.shape, generator) * (scale if usable else 1 / math.sqrt(old[0].numel()))
    for alias, name in symmetry.tied.items():
        if name in state:
            state[alias] = state[name]
    return state


def normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Normal draws; of single precision, which costs a third, held in double."""
    return torch.randn(shape, generator=generator).double()


def around_one(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draws between 0.5 and 1.5."""
    return 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)


def fresh_inputs(inputs: Any, rng: np.random.Generator) -> Any:
    """The inputs with every floating-point tensor replaced by normal draws in float64; others as they are."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))

    def renew(x: Any) -> Any:
        if isinstance(x, Tensor) and x.is_floating_point():
            return torch.randn(x.shape, generator=generator, dtype=torch.float64)
        return x.cpu() if isinstance(x, Tensor) else x

    return pytree.tree_map(renew, inputs)


class InDouble(TorchFunctionMode):
    """Makes a network that casts to a narrower floating-point type stay in float64, so that rounding stays small."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The function's result, with every cast to a narrower type replaced."""
        func = torch.Tensor.double if func in NARROWING else func
        return func(*pytree.tree_map(widen, args), **pytree.tree_map(widen, kwargs or {}))


@dataclass(frozen=True, eq=False)
class Normalisation:
    """The arguments of a batch normalisation, under the names of `torch.nn.functional.batch_norm`."""

    x: Tensor
    mean: Tensor | None
    variance: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float | None = 0.1
    epsilon: float = 1e-5

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in which statistics broadcast."""
        return (1, -1, *[1] * (self.x.ndim - 2))


def normalisation(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Normalisation | None:
    """The batch normalisation by stored statistics that a call is, or None."""
    if func is torch.batch_norm:
        x, weight, bias, mean, variance, training, momentum, epsilon, _ = (*args, *kwargs.values())
        found = Normalisation(x, mean, variance, weight, bias, training, momentum, epsilon)
    elif func is torch.nn.functional.batch_norm:
        named = {"running_mean": "mean", "running_var": "variance", "input": "x", "eps": "epsilon"}
        found = Normalisation(*args, **{named.get(name, name): value for name, value in kwargs.items()})
    else:
        return None
    return None if found.training or found.mean is None or found.variance is None else found


class ThroughStatistics(TorchFunctionMode):
    """Spells batch normalisation by stored statistics out, of which torch has no derivative by the statistics."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The function's result."""
        norm = normalisation(func, args, kwargs or {})
        if norm is None:
            return func(*args, **(kwargs or {}))
        assert norm.mean is not None
        assert norm.variance is not None
        x = (norm.x - norm.mean.view(norm.shape)) / (norm.variance.view(norm.shape) + norm.epsilon).sqrt()
        x = x if norm.weight is None else x * norm.weight.view(norm.shape)
        return x if norm.bias is None else x + norm.bias.view(norm.shape)


class Settling(TorchFunctionMode):
    """Moves stored statistics near those of what arrives at them, so that signals neither die nor grow with depth.

    Each channel gets a mean near its own, and a variance near the mean of all channels', which a small batch tells
    better than any one.

    Args:
        state: The network's tensors.
        generator: Draws how far from the batch's statistics the stored ones are.
    """

    def __init__(self, state: Mapping[str, Tensor], generator: torch.Generator) -> None:
        super().__init__()
        self.names = {id(tensor): name for name, tensor in state.items()}
        self.generator = generator
        self.settled: dict[str, Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The function's result."""
        norm = normalisation(func, args, kwargs or {})
        mean, variance = (None, None) if norm is None else (self.names.get(id(x)) for x in (norm.mean, norm.variance))
        if norm is None or mean is None or variance is None:
            return func(*args, **(kwargs or {}))
        if mean not in self.settled:
            others = [d for d in range(norm.x.ndim) if d != 1]
            centre = norm.x.mean(others)
            spread = (norm.x - centre.view(norm.shape)).square().mean()
            if spread > 0 and spread.isfinite():
                noise = normal(centre.shape, self.generator)
                self.settled[mean] = centre + 0.3 * spread.sqrt() * noise
                self.settled[variance] = spread * around_one(centre.shape, self.generator)
        centre, spread = self.settled.get(mean, norm.mean), self.settled.get(variance, norm.variance)
        return torch.nn.functional.batch_norm(norm.x, centre, spread, norm.weight, norm.bias, False, 0.0, norm.epsilon)


def outputs(
    network: nn.Module,
    state: Mapping[str, Tensor],
    args: Sequence[Any],
    named: Mapping[str, Any],
    *,
    mode: TorchFunctionMode | None = None,
    differentiable: bool = False,
) -> list[Tensor]:
    """All floating-point tensors that the network returns, under a mode of torch's functions."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.set_grad_enabled(differentiable), InDouble(), mode or contextlib.nullcontext():
            # Cloned, since a network may work in place on what it is given.
            args, named = pytree.tree_map(copy_of, (tuple(args), dict(named)))
            # On a copy, since some networks keep what they made of the weights for the next run.
            result = functional_call(share_structure(network), dict(state), args, dict(named), tie_weights=False)
    finally:
        torch.set_default_dtype(default)
    return [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor) and x.is_floating_point()]


def widen(x: Any) -> Any:
    """float64 in place of a narrower floating-point type; anything else as it is."""
    return torch.float64 if isinstance(x, torch.dtype) and x in NARROW else x


def copy_of(x: Any) -> Any:
    """A copy of a tensor; anything else as it is."""
    return x.clone() if isinstance(x, Tensor) else x


def change(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative difference: the largest deviation over the largest value of that output."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if b.numel():
            scale = float(b.abs().max())
            deviation = float((a - b).abs().max())
            worst = max(worst, deviation / scale if scale else deviation)
    return worst


@dataclass(frozen=True, eq=False)
class Sample:
    """A network with random weights, random inputs, and what it makes of them."""

    network: nn.Module
    state: Mapping[str, Tensor]
    args: Sequence[Any]
    named: Mapping[str, Any]
    expected: Sequence[Tensor]

    def change(self, state: Mapping[str, Tensor]) -> float:
        """How much the outputs change under other weights."""
        return change(outputs(self.network, state, self.args, self.named), self.expected)

    def first_order(
        self, moved: Mapping[str, Tensor], names: Mapping[str, Sequence[str]], rng: np.random.Generator
    ) -> dict[str, float]:
        """The change of the outputs when one tensor goes back from where it was moved, to first order, in one gradient.

        It is seen in one random direction of the outputs; what is found is a draw whose root mean square is that of the
        relative change. Nothing is found for tensors that no gradient reaches, or of a network that has none.

        Args:
            moved: The moved state.
            names: The tensors to tell of, each with its other names in the state.
            rng: Draws the direction.
        """
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        leaves = {name: moved[name].detach().clone().requires_grad_() for name in names}
        state = {**moved, **leaves, **{alias: leaves[name] for name in names for alias in names[name]}}
        try:
            found = outputs(self.network, state, self.args, self.named, mode=ThroughStatistics(), differentiable=True)
            seen = []
            for x in (x for x in found if x.numel() and x.requires_grad):
                direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
                seen.append((x * direction).sum() / (float(x.detach().square().max().sqrt()) or 1.0) / x.numel() ** 0.5)
            if not seen:
                return {}
            total = torch.stack(seen).sum() / len(seen) ** 0.5
            slopes = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        except RuntimeError:  # an operation without a derivative, or one that writes over what a derivative needs
            return {}
        effects = {}
        for (name, leaf), slope in zip(leaves.items(), slopes, strict=True):
            effect = math.nan if slope is None else abs(float(((self.state[name] - leaf.detach()) * slope).sum()))
            if math.isfinite(effect):
                effects[name] = effect
        return effects

    def sensitivity(self, rng: np.random.Generator) -> float:
        """Relative change of the outputs for a relative change of the weights, measured at one small random step."""
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        state = dict(self.state)
        for name, tensor in state.items():
            if tensor.is_floating_point():
                sign = 2.0 * torch.randint(2, tensor.shape, generator=generator, dtype=torch.float64) - 1
                state[name] = tensor * (1 + STEP * sign)
        return self.change(state) / STEP


def draw(network: nn.Module, symmetry: Symmetry, inputs: Any, rng: np.random.Generator) -> Sample:
    """A sample whose outputs say something: finite, and not all zero as those of a small network sometimes are.

    Raises:
        ModelError: The network cannot run in float64.
        SymmetryError: No such sample was found.
    """
    for _ in range(DRAWS):
        state = fresh_weights(network, symmetry, rng)
        args, named = fresh_inputs(inputs, rng)
        settling = Settling(state, torch.Generator().manual_seed(int(rng.integers(2**62))))
        try:
            expected = outputs(network, state, args, named, mode=settling)
        except RuntimeError as error:  # an operation that knows no float64, for example
            told = str(error).strip().partition("\n")[0]
            raise ModelError(
                f"the model cannot run in float64, in which a proof is made: {told}; if it can be told to use another "
                "implementation of that operation, do so"
            ) from error
        state = {**state, **settling.settled}
        if any(x.abs().max() > 0 for x in expected if x.numel()) and all(x.isfinite().all() for x in expected):
            return Sample(network, state, args, named, expected)
    raise SymmetryError("the model's outputs are zero or not finite on random weights: nothing can be proved")


def stirred(space: Space, rng: np.random.Generator) -> Permutation:
    """A random permutation that leaves no unit where it is: one cycle through each copy."""
    indices = np.empty((space.copies, space.size), dtype=np.int64)
    for row in indices:
        order = rng.permutation(space.size)
        row[order] = np.roll(order, 1)
    return Permutation(indices)


def control(
    network: nn.Module, symmetry: Symmetry, inputs: Any, rng: np.random.Generator, threshold: float
) -> dict[str, float]:
    """For each touched tensor, the largest change of the outputs when all are moved but it.

    One gradient tells the effect of all tensors to first order; those that no gradient reaches are left out one by one.
    A tensor may be silent by chance, behind a unit that is off for every input: silent ones get another sample, until
    `DRAWS` samples in a row find no more effect, in the last of which they are left out one by one, too.
    """
    changes = dict.fromkeys(symmetry.sites, 0.0)
    aliases = {name: [alias for alias, first in symmetry.tied.items() if first == name] for name in symmetry.sites}
    silent, idle = list(changes), 0
    while silent and idle < DRAWS:
        sample = draw(network, symmetry, inputs, rng)
        moved = move_state(sample.state, {space.name: stirred(space, rng) for space in symmetry}, symmetry)
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


def draw_transforms(
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


def moved_by(transforms: Transforms, state: Mapping[str, Tensor], symmetry: Symmetry) -> dict[str, Tensor]:
    """The state under transforms; gains are folded first where some space is not just permuted."""
    if not all(isinstance(transform, Permutation) for transform in transforms.values()):
        state = fold_state(state, symmetry)
    return move_state(state, transforms, symmetry)


def culprit(sample: Sample, symmetry: Symmetry, transforms: Transforms, tolerance: float) -> str:
    """The first space whose transform alone changes the function."""
    for space in symmetry:
        alone = {s.name: transforms[s.name] if s is space else Permutation.identity(s) for s in symmetry}
        if not sample.change(moved_by(alone, sample.state, symmetry)) <= tolerance:
            return f"space {space.name}"
    return "several spaces together"
