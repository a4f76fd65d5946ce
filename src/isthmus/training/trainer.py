"""The trainer that makes comparable parents: the papers' recipes, resumable, the same bytes from the same seed."""

import copy
import dataclasses
import json
import math
import os
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped, UInt8
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from isthmus.data.sets import Batches, DataSet, normalise
from isthmus.errors import CheckpointError, DataError, InputError
from isthmus.models import load_model
from isthmus.training.presets import START_FACTOR, WARM_FRACTION, TrainOptions

PADDING = 4  # pixels on every side before the random crop


@dataclass(frozen=True)
class Epoch:
    """Mean cross-entropy in nats and accuracy in [0, 1] over one epoch.

    Attributes:
        loss: mean loss on the training batches while the weights move, augmented and smoothed as trained.
        accuracy: accuracy on these batches.
        validation_loss: mean loss on the held-out samples after the epoch; None where none are held out.
        validation_accuracy: accuracy on the held-out samples; None where none are held out.
    """

    loss: float
    accuracy: float
    validation_loss: float | None = None
    validation_accuracy: float | None = None


class Trained(NamedTuple):
    """A trained network in evaluation mode, and one `Epoch` for every epoch."""

    model: nn.Module
    history: tuple[Epoch, ...]


def train(
    model: nn.Module | str,
    data: DataSet,
    options: TrainOptions,
    *,
    seed: int,
    indices: Int64[Tensor, " chosen"] | None = None,
    holdout: int = 0,
    resume: str | Path | None = None,
    progress: bool = False,
) -> Trained:
    """A trained copy of the model and its history; torch's global random state is left as it was.

    The same arguments give the same bytes on the same machine with the same number of threads, also when the training
    was interrupted and resumed.

    Args:
        model: a network whose output is logits [batch, classes] (or [batch, block, tokens]); or what `load_model`
            reads, and then the seed draws the initial weights too.
        data: its training part is trained on; the test part is never read.
        options: the recipe.
        seed: seeds the order of the samples, augmentation, dropout, and the initial weights if `model` is text.
        indices: only these training samples, as from `split_for_models`.
        holdout: training samples held out and scored after every epoch (`DataSet.validation`).
        resume: a checkpoint written after every epoch, and continued from where it exists.
        progress: shows a progress bar, if stdout and stderr are a terminal.

    Raises:
        DataError: no samples left, or labels and outputs that do not fit.
        InputError: the network cannot take the samples or has nothing to train, augmentation of what is not a uint8
            image, or a loss that is not finite.
        ModelError: model is text and cannot be built.
        CheckpointError: the checkpoint cannot be read or written, or belongs to another training.
    """
    path = Path(resume) if resume is not None else None
    if path is not None and not path.parent.is_dir():
        raise CheckpointError(f"checkpoint {path}: the folder {path.parent} does not exist; create it")
    # The networks of load_model are on the CPU; a module is trained where it is.
    parameter = None if isinstance(model, str) else next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = load_model(model) if isinstance(model, str) else copy.deepcopy(model)
        samples = data.train_indices(holdout, indices)
        validation = data.validation(holdout=holdout) if holdout else None
        _check(model, data, options, samples, device)
        run = _Run(model, data, options, samples, device)
        fingerprint = _fingerprint(model, data, options, seed, samples, holdout)
        history = run.restore(path, fingerprint) if path is not None and path.exists() else []
        shown = progress and sys.stdout.isatty() and sys.stderr.isatty()
        with Progress(console=Console(stderr=True), disable=not shown) as bar:
            task = bar.add_task("training", total=options.epochs * run.steps, completed=len(history) * run.steps)
            while len(history) < options.epochs:
                epoch = run.epoch(len(history), lambda: bar.advance(task))
                if not math.isfinite(epoch.loss):
                    raise InputError(
                        f"training: the loss is {epoch.loss} in epoch {len(history) + 1}; lower learning_rate"
                    )
                if validation is not None:
                    epoch = dataclasses.replace(epoch, **run.validate(validation))
                history.append(epoch)
                bar.update(
                    task, description=f"epoch {len(history)}: loss {epoch.loss:.3f}, accuracy {epoch.accuracy:.3f}"
                )
                if path is not None:
                    run.save(path, fingerprint, history)
    model.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue] (not in torch's stub)
    return Trained(model.eval(), tuple(history))


def _learning_rate(options: TrainOptions, step: int, steps: int) -> float:
    """The learning rate of a step (from 0), with `steps` in an epoch."""
    total, warm = options.epochs * steps, options.warmup * steps
    if options.schedule == "one_cycle":
        warm = WARM_FRACTION * total
        if step < warm:
            rise = 0.5 - 0.5 * math.cos(math.pi * step / warm)
            return options.learning_rate * (START_FACTOR + (1 - START_FACTOR) * rise)
    elif step + 1 < warm:
        return options.learning_rate * (step + 1) / warm
    if options.schedule == "constant":
        return options.learning_rate
    done = min(max((step - warm) / max(total - warm, 1), 0.0), 1.0)
    factor = 1 - done if options.schedule == "linear" else 0.5 + 0.5 * math.cos(math.pi * done)
    return options.learning_rate * factor


def _flip_and_crop(x: UInt8[Tensor, "batch channels height width"]) -> UInt8[Tensor, "batch channels height width"]:
    """Each image flipped with probability ½ and shifted by up to 4 pixels over black, by the global generator.

    The result is laid out channels last.
    """
    batch, _, height, width = x.shape
    flip = torch.rand(batch, 1) < 0.5
    top, left = torch.randint(2 * PADDING + 1, (2, batch, 1)).unbind()
    rows = top + torch.arange(height)
    columns = left + torch.where(flip, torch.arange(width).flip(0), torch.arange(width))
    padded = F.pad(x, (PADDING,) * 4).permute(0, 2, 3, 1).contiguous()
    chosen = padded[torch.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return chosen.permute(0, 3, 1, 2)


class _Run:
    """Everything that changes during a training, and that a checkpoint therefore holds."""

    def __init__(
        self, model: nn.Module, data: DataSet, options: TrainOptions, samples: Int64[Tensor, " n"], device: torch.device
    ) -> None:
        self.model, self.data, self.options, self.samples, self.device = model, data, options, samples, device
        self.steps = math.ceil(len(samples) / options.batch_size)
        if options.channels_last:
            model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] (not in torch's stub)
        if options.optimizer == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
                model.parameters(),
                lr=options.learning_rate,
                momentum=options.momentum,
                weight_decay=options.weight_decay,
            )
        else:
            kind = torch.optim.Adam if options.optimizer == "adam" else torch.optim.AdamW
            self.optimizer = kind(model.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)

    def epoch(self, number: int, advance: Callable[[], None]) -> Epoch:
        """The scores of one epoch of training."""
        self.model.train()
        loss_sum, correct, count = 0.0, 0, 0
        order = self.samples[torch.randperm(len(self.samples))]
        for step, chosen in enumerate(order.tensor_split(self.steps)):
            for group in self.optimizer.param_groups:
                group["lr"] = _learning_rate(self.options, number * self.steps + step, self.steps)
            x, y = self.data.x_train[chosen], self.data.y_train[chosen].to(self.device)
            x = _flip_and_crop(x) if self.options.augment else x
            loss, hits = self.score(normalise(x.to(self.device), self.data.mean, self.data.std), y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss_sum, correct, count = loss_sum + float(loss.detach()) * y.numel(), correct + hits, count + y.numel()
            advance()
        return Epoch(loss_sum / count, correct / count)

    def validate(self, batches: Batches) -> dict[str, float]:
        """The `validation_loss` and the `validation_accuracy`."""
        self.model.eval()
        loss_sum, correct, count = 0.0, 0, 0
        with torch.no_grad():
            for x, y in batches:
                loss, hits = self.score(x.to(self.device), y.to(self.device))
                loss_sum, correct, count = loss_sum + float(loss) * y.numel(), correct + hits, count + y.numel()
        return {"validation_loss": loss_sum / count, "validation_accuracy": correct / count}

    def score(
        self, x: Shaped[Tensor, "batch *sample"], y: Int64[Tensor, "batch *label"]
    ) -> tuple[Float[Tensor, ""], int]:
        """The mean loss of a batch and the number of labels that the largest logit hits."""
        if self.options.channels_last and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16"):
            logits = self.model(x)
        logits, labels = logits.float().flatten(0, -2), y.flatten()
        smoothing = self.options.label_smoothing if self.model.training else 0.0
        hits = int((logits.argmax(1) == labels).sum())
        return F.cross_entropy(logits, labels, label_smoothing=smoothing), hits

    def save(self, path: Path, fingerprint: str, history: list[Epoch]) -> None:
        """Writes the checkpoint: the old file or the new one is there at any time, never half of one."""
        state = {
            "fingerprint": fingerprint,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "random_device": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "history": [dataclasses.astuple(epoch) for epoch in history],
        }
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as a RuntimeError
            cause = " ".join(str(error).split())
            raise CheckpointError(
                f"checkpoint {path} cannot be written: {cause}; free space or name another"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    def restore(self, path: Path, fingerprint: str) -> list[Epoch]:
        """The history of the checkpoint, after its state has been taken over."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged pickles end in errors of many types
            raise CheckpointError(
                f"checkpoint {path} cannot be read ({type(error).__name__}); delete it to start again"
            ) from error
        if not isinstance(state, Mapping) or state.get("fingerprint") != fingerprint:
            raise CheckpointError(
                f"checkpoint {path} is of another training (model, data, options or seed differ); name another file"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        if state["random_device"] is not None:
            torch.cuda.set_rng_state(state["random_device"], self.device)
        return [Epoch(*values) for values in state["history"]]


def _check(
    model: nn.Module, data: DataSet, options: TrainOptions, samples: Int64[Tensor, " n"], device: torch.device
) -> None:
    if len(samples) == 0:
        raise DataError(f"{data.name}: no training sample is left; hold out fewer, or choose other indices")
    if options.augment and (data.x_train.ndim != 4 or data.x_train.dtype != torch.uint8):
        raise InputError(
            f"augment flips and crops uint8 images; {data.name} has {data.x_train.dtype} {list(data.sample_shape)}"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"{type(model).__name__} has no parameter that requires a gradient: there is nothing to train")
    x = normalise(data.x_train[samples[:2]].to(device), data.mean, data.std)
    model.eval()
    with torch.no_grad():
        try:
            logits = model(x)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise InputError(
                f"{type(model).__name__} cannot take samples {list(data.sample_shape)} of {data.name}: "
                f"{' '.join(str(error).split())}"
            ) from error
    wanted = (*data.y_train[samples[:2]].shape, data.classes)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != wanted[:-1] or logits.shape[-1] < data.classes:
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise DataError(
            f"{type(model).__name__} returns {found} where {data.name} needs logits {list(wanted)}; set its classes"
        )


def _fingerprint(
    model: nn.Module, data: DataSet, options: TrainOptions, seed: int, samples: Int64[Tensor, " n"], holdout: int
) -> str:
    weights = {name: [list(tensor.shape), _checksum(tensor)] for name, tensor in model.state_dict().items()}
    parts = [_checksum(tensor) for tensor in (data.x_train, data.y_train, samples)]
    return json.dumps([dataclasses.asdict(options), seed, data.name, parts, holdout, weights])


def _checksum(tensor: Shaped[Tensor, "*shape"]) -> int:
    return zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
