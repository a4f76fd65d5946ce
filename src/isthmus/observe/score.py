"""Scores: loss and accuracy of a model, or of several whose answers are averaged, on labelled data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.data.batches import Data, read_batches
from isthmus.errors import DataError, ModelError, check_kind
from isthmus.observe.given import as_modules
from isthmus.wording.short import told_by_fields

Loss = Callable[[Any, Any], Tensor]

# Targets that torch's cross-entropy leaves out, such as padding.
IGNORED = -100


@dataclass(frozen=True)
class Score:
    """Mean loss and share of right predictions over `count` targets; accuracy is None where targets are no classes."""

    loss: float
    accuracy: float | None
    count: int

    __repr__ = told_by_fields


def evaluate(model: nn.Module, data: Data | None, *, loss: Loss | None = None) -> Score:
    """Mean loss and accuracy of a model, in `eval()`, on labelled batches.

    Args:
        model: The model.
        data: Re-iterable labelled batches.
        loss: Mean loss from outputs and targets; cross-entropy by default.

    Raises:
        DataError: Data without targets, empty, or readable only once; or a target that is no class of the model.
        InputError: The model is no module.
        ModelError: The outputs are no class scores and no `loss` was given; or the model holds NaN or infinite weights.
    """
    check_kind(model, nn.Module, "model", "give a module")
    return evaluate_checked(as_modules([model])[0], data, loss=loss)


def evaluate_checked(model: nn.Module, data: Data | None, *, loss: Loss | None = None) -> Score:
    """As `evaluate`, of a checked module in `eval()`.

    Raises:
        DataError: Data without targets, empty, or readable only once; or a target that is no class of the model.
        ModelError: The outputs are no class scores and no `loss` was given.
    """
    total, right, count, classes = 0.0, 0, 0, True
    for batch in read_batches(data, like=model.state_dict()):
        if batch.targets is None:
            raise DataError("the data has no targets: scoring a model needs batches (x, y)")
        with torch.no_grad():
            output = model(*batch.args, **batch.kwargs)
        size = batch.targets.numel() if isinstance(batch.targets, Tensor) else batch.size
        mean = loss(output, batch.targets) if loss is not None else cross_entropy(output, batch.targets)
        scores = class_scores(output)
        if scores is not None and are_classes(batch.targets, scores):
            size -= int((batch.targets == IGNORED).sum())
            right += int((scores.argmax(dim=-1) == batch.targets).sum())
        else:
            classes = False
        total += float(mean) * size if size else 0.0
        count += size
    if not count:
        raise DataError("the data has no targets that count: scoring a model needs at least one")
    return Score(total / count, right / count if classes else None, count)


class Ensemble(nn.Module):
    """The mean of several models' class scores: what merging is measured against, at the cost of all of them."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The mean class scores."""
        scores = [class_scores(model(*args, **kwargs)) for model in self.models]
        return torch.stack([x for x in scores if x is not None]).mean(dim=0)


def class_scores(output: Any) -> Tensor | None:
    """The class scores in a model's output, classes last: a tensor, the first of a tuple, or the entry `logits`."""
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) and output.ndim >= 2 else None


def are_classes(targets: object, scores: Tensor) -> TypeGuard[Tensor]:
    """Whether targets are numbers of classes, one for each row of scores."""
    return isinstance(targets, Tensor) and not targets.is_floating_point() and targets.shape == scores.shape[:-1]


def cross_entropy(output: Any, targets: Any) -> Tensor:
    """Mean cross-entropy of class scores, computed in float32 at least.

    Raises:
        DataError: A target is no class that the model knows.
        ModelError: The output holds no class scores for these targets.
    """
    scores = class_scores(output)
    if scores is None or not are_classes(targets, scores):
        shape = tuple(scores.shape) if scores is not None else type(output).__name__
        told = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
        raise ModelError(f"outputs {shape} are no class scores for targets {told}: give loss=, a function of both")
    classes = scores.shape[-1]
    wrong = targets[(targets != IGNORED) & ((targets < 0) | (targets >= classes))]
    if len(wrong):
        raise DataError(
            f"target {int(wrong[0])} for a model of {classes} classes: give the data that it was trained on"
        )
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return F.cross_entropy(scores.reshape(-1, scores.shape[-1]), targets.reshape(-1).long())
