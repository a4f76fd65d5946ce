"""A network with random weights and inputs, run in float64: what a proof looks at."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from isthmus.errors import ModelError, SymmetryError
from isthmus.graph.capture import share_structure
from isthmus.symmetry.gains import foldable
from isthmus.symmetry.symmetry import Symmetry

# How often weights and inputs are drawn anew before outputs that are zero or not finite, or a tensor that they do not
# depend on, are taken to be so always.
DRAWS = 16

# Relative step of the weights at which a network's sensitivity is measured: the root of float64's precision.
STEP = 1.5e-8

NARROW = (torch.float16, torch.bfloat16, torch.float32)
NARROWING = (torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.float)


def _fresh_weights(network: nn.Module, symmetry: Symmetry, rng: np.random.Generator) -> dict[str, Tensor]:
    """Random weights of the scale of the model's own, such that every tensor matters.

    Matrices are drawn with their own root mean square; vectors are moved by 0.3 of a normal draw, so that gains stay
    near theirs (a gain of shape [n, 1, 1] is a vector too); variances, and gains that can be folded, are drawn between
    0.5 and 1.5. Tensors that no space touches are drawn too, since a site may be missing; buffers among them keep signs
    and infinities, being scaled by 0.5 to 1.5 unless they are all zero.
    """
    state = {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    variances = {site.parameter for space in symmetry for site in space.sites if site.role == "variance"}
    gains = {gain.parameter: gain for gain in foldable(symmetry)}
    drawn = set(symmetry.sites) | {name for name, _ in network.named_parameters()}
    for name, old in state.items():
        if not old.is_floating_point():
            continue
        old = state[name] = old.double()
        if not old.numel() or name in symmetry.tied:
            continue
        if name in variances:
            state[name] = _around_one(old.shape, generator)
        elif name in gains:
            state[name] = _around_one(old.shape, generator) - gains[name].offset
        elif name not in drawn:
            state[name] = old * _around_one(old.shape, generator) if old.any() else 0.3 * _normal(old.shape, generator)
        elif old.numel() == max(old.shape, default=1):
            usable = old.isfinite().all() and old.abs().max() < 1e3
            state[name] = (old if usable else torch.zeros_like(old)) + 0.3 * _normal(old.shape, generator)
        else:
            scale = float(old.square().mean().sqrt())
            usable = 1e-8 < scale < 1e3
            state[name] = _normal(old.shape, generator) * (scale if usable else 1 / math.sqrt(old[0].numel()))
    symmetry.tie(state)
    return state


def _normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Normal draws; of single precision, which costs a third, held in double."""
    return torch.randn(shape, generator=generator).double()


def _around_one(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draws between 0.5 and 1.5."""
    return 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)


def _fresh_inputs(inputs: Any, rng: np.random.Generator) -> Any:
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
        return func(*pytree.tree_map(_widen, args), **pytree.tree_map(_widen, kwargs or {}))


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


def _normalisation(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Normalisation | None:
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
    """Spells out batch normalisation by stored statistics, since torch has no derivative by the statistics."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The function's result."""
        norm = _normalisation(func, args, kwargs or {})
        if norm is None:
            return func(*args, **(kwargs or {}))
        assert norm.mean is not None
        assert norm.variance is not None
        x = (norm.x - norm.mean.view(norm.shape)) / (norm.variance.view(norm.shape) + norm.epsilon).sqrt()
        x = x if norm.weight is None else x * norm.weight.view(norm.shape)
        return x if norm.bias is None else x + norm.bias.view(norm.shape)


class Settling(TorchFunctionMode):
    """Sets stored statistics near the statistics of what arrives, so that signals neither die nor grow with depth.

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
        norm = _normalisation(func, args, kwargs or {})
        mean, variance = (None, None) if norm is None else (self.names.get(id(x)) for x in (norm.mean, norm.variance))
        if norm is None or mean is None or variance is None:
            return func(*args, **(kwargs or {}))
        if mean not in self.settled:
            others = [d for d in range(norm.x.ndim) if d != 1]
            centre = norm.x.mean(others)
            spread = (norm.x - centre.view(norm.shape)).square().mean()
            if spread > 0 and spread.isfinite():
                noise = _normal(centre.shape, self.generator)
                self.settled[mean] = centre + 0.3 * spread.sqrt() * noise
                self.settled[variance] = spread * _around_one(centre.shape, self.generator)
        centre, spread = self.settled.get(mean, norm.mean), self.settled.get(variance, norm.variance)
        return torch.nn.functional.batch_norm(norm.x, centre, spread, norm.weight, norm.bias, False, 0.0, norm.epsilon)


def _outputs(
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
            args, named = pytree.tree_map(_copy_of, (tuple(args), dict(named)))
            # On a copy, since some networks keep what they made of the weights for the next run.
            result = functional_call(share_structure(network), dict(state), args, dict(named), tie_weights=False)
    finally:
        torch.set_default_dtype(default)
    return [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor) and x.is_floating_point()]


def _widen(x: Any) -> Any:
    """float64 in place of a narrower floating-point type; anything else as it is."""
    return torch.float64 if isinstance(x, torch.dtype) and x in NARROW else x


def _copy_of(x: Any) -> Any:
    """A copy of a tensor; anything else as it is."""
    return x.clone() if isinstance(x, Tensor) else x


def _change(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
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
    args: Sequence[object]
    named: Mapping[str, object]
    expected: Sequence[Tensor]

    def change(self, state: Mapping[str, Tensor]) -> float:
        """How much the outputs change under other weights."""
        return _change(_outputs(self.network, state, self.args, self.named), self.expected)

    def change_allowed(
        self, state: Mapping[str, Tensor], tolerance: float, rng: np.random.Generator
    ) -> tuple[float, float]:
        """How much the outputs change under other weights, and how much rounding explains.

        That is the tolerance, and more only where the network itself magnifies errors, which is measured if need be.
        """
        error = self.change(state)
        return error, tolerance if error <= tolerance else tolerance * max(1.0, self.sensitivity(rng))

    def first_order(
        self, moved: Mapping[str, Tensor], names: Mapping[str, Sequence[str]], rng: np.random.Generator
    ) -> dict[str, float]:
        """The change of the outputs when one tensor goes back from where it was moved, to first order, in one gradient.

        It is seen in one random direction of the outputs: each figure is a draw whose root mean square is the root mean
        square of the relative change. Tensors that no gradient reaches are left out; so are all, where there is none.

        Args:
            moved: The moved state.
            names: The tensors to tell of, each with its other names in the state.
            rng: Draws the direction.
        """
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        leaves = {name: moved[name].detach().clone().requires_grad_() for name in names}
        state = {**moved, **leaves, **{alias: leaves[name] for name in names for alias in names[name]}}
        try:
            found = _outputs(self.network, state, self.args, self.named, mode=ThroughStatistics(), differentiable=True)
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


def draw_network(network: nn.Module, symmetry: Symmetry, inputs: Any, rng: np.random.Generator) -> Sample:
    """A sample whose outputs say something: they are finite, and not all zero, as a small network's sometimes are.

    Raises:
        ModelError: The network cannot run in float64.
        SymmetryError: No such sample was found.
    """
    for _ in range(DRAWS):
        state = _fresh_weights(network, symmetry, rng)
        args, named = _fresh_inputs(inputs, rng)
        settling = Settling(state, torch.Generator().manual_seed(int(rng.integers(2**62))))
        try:
            expected = _outputs(network, state, args, named, mode=settling)
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
