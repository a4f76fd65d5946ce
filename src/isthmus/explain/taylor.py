"""The second-order Taylor estimate of the barrier, beside the real one."""

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from isthmus.data.batches import Batch, check_data, read_batches
from isthmus.errors import ModelError
from isthmus.measure.connect import interpolate
from isthmus.observe.given import as_modules
from isthmus.observe.score import IGNORED, Loss, are_classes, class_scores, cross_entropy, evaluate
from isthmus.state import State, first_float
from isthmus.wording.short import told_by_fields


@dataclass(frozen=True)
class TaylorBarrier:
    """The barrier at λ = ½ as a second-order expansion around both ends sees it, and as it is.

    Attributes:
        first_order: ¼ μᵀ(∇L(θ_a) − ∇L(θ_b)) with μ = θ_b − θ_a.
        second_order: 1/16 μᵀ(H_a + H_b) μ.
        real: L at the midpoint minus the mean of L at both ends.
        count: Targets that the loss is the mean of.
    """

    first_order: float
    second_order: float
    real: float
    count: int

    __repr__ = told_by_fields

    @property
    def estimate(self) -> float:
        """The barrier that the expansion foretells; exact for a quadratic loss."""
        return self.first_order + self.second_order

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain JSON values."""
        return {**asdict(self), "estimate": self.estimate}


def taylor_barrier(model_a: nn.Module, model_b: nn.Module, data: Any, *, loss: Loss | None = None) -> TaylorBarrier:
    """The second-order estimate of the loss barrier at the midpoint of two models, beside the real one.

    Each end is expanded along the line: half of the way costs L + ½ φ' + ⅛ φ'', with φ', φ'' the first two derivatives
    at that end along the whole of it, μ. The mean of both ends' expansions minus the mean of both losses is the
    estimate. Derivatives are taken by automatic differentiation twice, in float32 at least, and summed over batches in
    float64.

    The second derivative of ReLU is zero wherever it exists: the bends between its pieces are not in the estimate.

    The networks run in `eval()`. The running statistics of BatchNorm belong to θ: they are interpolated at the midpoint
    as they are, not measured anew, and the derivatives include them.

    Args:
        model_a: The model at λ = 0.
        model_b: The model at λ = 1, in the frame of the first.
        data: Re-iterable labelled batches.
        loss: Mean loss from outputs and targets; cross-entropy by default.

    Raises:
        DataError: Data without targets, empty, or readable only once.
        ModelError: The models are not of one architecture, or a buffer moves through which no derivative passes.

    Source: Ito, Yamada, Kumagai, ICLR 2025, report that such an estimate fails; the formula is this project's own
        derivation, since theirs could not be read.
    """
    check_data(data)
    modules = [in_float(model) for model in as_modules([model_a, model_b])]
    middle = interpolate(modules[0], modules[1], 0.5)
    scores = [evaluate(model, data, loss=loss) for model in (*modules, middle)]
    states = [model.state_dict() for model in modules]
    steps = {
        name: states[1][name].detach() - tensor.detach()
        for name, tensor in states[0].items()
        if tensor.is_floating_point()
    }
    first_a, second_a = _slopes(modules[0], steps, data, loss)
    first_b, second_b = _slopes(modules[1], steps, data, loss)
    return TaylorBarrier(
        first_order=(first_a - first_b) / 4,
        second_order=(second_a + second_b) / 16,
        real=scores[2].loss - (scores[0].loss + scores[1].loss) / 2,
        count=scores[0].count,
    )


def in_float(model: nn.Module) -> nn.Module:
    """A copy of a model in float32 at least, whose parameters ask for no gradient."""
    dtype = torch.promote_types(first_float(model.state_dict()).dtype, torch.float32)
    return copy.deepcopy(model).to(dtype).eval().requires_grad_(False)


class DifferentiableStatistics(TorchFunctionMode):
    """Writes BatchNorm in `eval()` out, so that derivatives pass through its running statistics too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The function's result, by elementary operations where it is a BatchNorm that measures nothing."""
        kwargs = kwargs or {}
        if func is not F.batch_norm:
            return func(*args, **kwargs)
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        given = dict(zip(names, args, strict=False)) | kwargs
        mean, variance = given["running_mean"], given["running_var"]
        if given.get("training", False) or mean is None or variance is None:
            return func(*args, **kwargs)
        shape = (1, -1, *[1] * (given["input"].ndim - 2))
        scale = (variance + given.get("eps", 1e-5)).rsqrt()
        scale = scale if given.get("weight") is None else scale * given["weight"]
        shift = -mean * scale if given.get("bias") is None else given["bias"] - mean * scale
        return given["input"] * scale.view(shape) + shift.view(shape)


def _slopes(model: nn.Module, steps: State, data: Any, loss: Loss | None) -> tuple[float, float]:
    """The first and second derivative of the mean loss along `steps`, at the model: μᵀ∇L and μᵀHμ.

    Raises:
        ModelError: A buffer moves, and no derivative passes through it.
    """
    parameters = {name for name, _ in model.named_parameters()}
    own = parameters | {name for name, _ in model.named_buffers()}  # tied tensors appear once
    state = {name: tensor.detach() for name, tensor in model.state_dict().items() if name in own}
    buffers = [name for name in state if name not in parameters and name in steps and bool(steps[name].any())]
    reference = first_float(state)
    first, second, count = [], [], 0
    for batch in read_batches(data, like=state):
        place = torch.zeros((), dtype=reference.dtype, device=reference.device, requires_grad=True)
        moved = {name: tensor + place * steps[name] if name in steps else tensor for name, tensor in state.items()}
        with DifferentiableStatistics(), sdpa_kernel(SDPBackend.MATH):  # the faster kernels have no second derivative
            output = functional_call(model, moved, batch.args, dict(batch.kwargs))
            mean = cross_entropy(output, batch.targets) if loss is None else loss(output, batch.targets)
        size = _targets_of(output, batch)
        if not size:
            continue
        if not count:
            _check_passed(mean, moved, buffers)
        if mean.requires_grad:
            (slope,) = torch.autograd.grad(mean, place, create_graph=True)
            first.append(float(slope.detach()) * size)
            if slope.requires_grad:
                (bend,) = torch.autograd.grad(slope, place, allow_unused=True)
                second.append(float(bend) * size if bend is not None else 0.0)
        count += size
    return math.fsum(first) / count, math.fsum(second) / count


def _check_passed(mean: Tensor, moved: State, buffers: Sequence[str]) -> None:
    """Refuses buffers that move while no derivative passes through them.

    Raises:
        ModelError: There is one.
    """
    if not buffers:
        return
    passed = torch.autograd.grad(mean, [moved[name] for name in buffers], retain_graph=True, allow_unused=True)
    for name, gradient in zip(buffers, passed, strict=True):
        if gradient is None:
            raise ModelError(f"{name} differs between the models, and no derivative of the loss passes through it")


def _targets_of(output: Any, batch: Batch) -> int:
    """How many targets a batch's mean loss is the mean of."""
    size = batch.targets.numel() if isinstance(batch.targets, Tensor) else batch.size
    scores = class_scores(output)
    if scores is not None and are_classes(batch.targets, scores):
        size -= int((batch.targets == IGNORED).sum())
    return size
