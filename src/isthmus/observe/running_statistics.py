"""The running statistics of normalisation layers: where they are, and measuring them anew."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from isthmus.data.batches import Data, read_batches
from isthmus.errors import DataError
from isthmus.progress import progress


def running_statistics(model: nn.Module) -> set[str]:
    """Names of the running means and variances of all normalisation layers."""
    return {
        f"{path}.{name}" if path else name
        for path, layer in model.named_modules()
        if isinstance(layer, _BatchNorm)
        for name, buffer in layer.named_buffers(recurse=False)
        if buffer.is_floating_point()
    }


def normalisation_layers(model: nn.Module) -> list[_BatchNorm]:
    """The layers that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def reset_statistics(model: nn.Module, data: Data | None, layers: Sequence[_BatchNorm] | None = None) -> None:
    """Estimates the running statistics of `model` anew, in place: the plain average over all batches.

    Only normalisation layers (of these the ones that `layers` names, if it does) are put into training mode, so that
    dropout stays off; all are put back as they were.

    Raises:
        DataError: No data, empty data, or a batch of one sample, which has no variance.
    """
    layers = normalisation_layers(model) if layers is None else layers
    if not layers:
        return
    before = [(layer.momentum, layer.training) for layer in layers]
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # a cumulative average
            layer.train()
        with torch.no_grad():
            for batch in progress(read_batches(data, like=model.state_dict()), "estimating statistics", data):
                try:
                    model(*batch.args, **batch.kwargs)
                except ValueError as error:  # what BatchNorm raises where it sees one value a channel
                    if batch.size > 1:
                        raise
                    raise DataError("a batch of one sample has no variance: use larger batches, or drop it") from error
    finally:
        for layer, (momentum, training) in zip(layers, before, strict=True):
            layer.momentum = momentum
            layer.train(training)
