"""Batches of any common form, checked once, in one shape for every later room."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset

from isthmus.errors import DataError
from isthmus.state import State, first_float
from isthmus.wording.short import told_by_fields

# What `check_data` accepts: a Dataset, a DataLoader, or anything else that yields its batches afresh whenever it is
# iterated over, each in a form that `as_batch` knows: `(x, y)`, `x`, a dict of tensors, or a `Batch`.
Data: TypeAlias = Dataset[Any] | Iterable[Any]

DATASET_BATCH = 256
TARGET_KEYS = ("labels", "label", "targets")


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch: the model's positional and keyword inputs, and the targets where the data has them."""

    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    targets: object = None

    __repr__ = told_by_fields

    @property
    def size(self) -> int:
        """Number of samples."""
        return next((len(x) for x in pytree.tree_leaves((self.args, dict(self.kwargs))) if isinstance(x, Tensor)), 0)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Batch":
        """The batch on a device, floating-point inputs in `dtype`."""
        moved = self.mapped(lambda x: x.to(device, dtype if x.is_floating_point() else None))
        targets = self.targets.to(device) if isinstance(self.targets, Tensor) else self.targets
        return Batch(moved.args, moved.kwargs, targets)

    def like(self, state: State) -> "Batch":
        """The batch on the device of a network's tensors, floating-point inputs in their precision."""
        reference = first_float(state)
        return self.to(reference.device, reference.dtype)

    def clone(self) -> "Batch":
        """A copy that a model may overwrite."""
        return self.mapped(lambda x: x.clone())

    def head(self, count: int) -> "Batch":
        """The first samples."""
        return self.mapped(lambda x: x[:count])

    def mapped(self, act: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with every input tensor replaced; targets as they are."""
        args, kwargs = pytree.tree_map(lambda x: act(x) if isinstance(x, Tensor) else x, (self.args, dict(self.kwargs)))
        return Batch(args, kwargs, self.targets)


def check_data(data: object) -> Iterable[Any]:
    """Data that can be read any number of times, batch by batch.

    Args:
        data: A DataLoader, a Dataset (batched here), or any re-iterable of batches: `(x, y)`, `x` or a dict.

    Raises:
        DataError: No data, or data that can be read only once.
    """
    if data is None:
        raise DataError("no data given: this needs data=, a re-iterable of (x, y) batches, a DataLoader or a Dataset")
    if isinstance(data, Tensor | str | bytes):
        raise DataError(f"data is a {type(data).__name__}: give an iterable of (x, y) batches, such as [(x, y)]")
    if isinstance(data, Dataset):
        return DataLoader(data, batch_size=DATASET_BATCH)
    if not isinstance(data, Iterable):
        raise DataError(f"data is a {type(data).__name__}, which cannot be iterated over: give (x, y) batches")
    if iter(data) is data:
        raise DataError("data can be read only once (a generator): give a list, a DataLoader or another re-iterable")
    return data


def read_batches(data: Data | None, *, like: State | None = None) -> Iterator[Batch]:
    """Every batch of `data`.

    Args:
        data: What `check_data` accepts.
        like: A network's tensors: batches come as copies in their precision and on their device, which the network may
            overwrite. Without it batches come as they are.

    Raises:
        DataError: No data, no batches, an empty batch, or batches of an unknown form.
    """
    found = False
    for item in check_data(data):
        batch = as_batch(item)
        if not batch.size:
            raise DataError("the data holds an empty batch: leave it out")
        found = True
        yield batch if like is None else batch.like(like).clone()
    if not found:
        raise DataError("the data is empty: give at least one batch")


def as_batch(item: Any) -> Batch:
    """One item of the data as a batch."""
    if isinstance(item, Batch):
        return item
    if isinstance(item, Tensor):
        return Batch((item,), {})
    if isinstance(item, Mapping):
        kwargs = dict(item)
        targets = next((kwargs.pop(key) for key in TARGET_KEYS if key in kwargs), None)
        return Batch((), kwargs, targets)
    if isinstance(item, list | tuple) and 1 <= len(item) <= 2:
        inputs, targets = (item[0], None) if len(item) == 1 else (item[0], item[1])
        if isinstance(inputs, Mapping):
            return Batch((), dict(inputs), targets)
        if isinstance(inputs, list | tuple):
            return Batch(tuple(inputs), {}, targets)
        if isinstance(inputs, Tensor):
            return Batch((inputs,), {}, targets)
    raise DataError(f"a batch is a {type(item).__name__} of unknown form: give (x, y), x or a dict of tensors")


def first_batch(data: Data | None) -> Batch:
    """The first batch of `data`."""
    return next(read_batches(data))


def is_labelled(data: Data | None) -> bool:
    """Whether batches have targets, judged by the first one."""
    return first_batch(data).targets is not None


def split_batches(data: Data | None, held_out: float) -> tuple[list[Batch], list[Batch]]:
    """The first batches for fitting and the last ones to hold out, read once: data that shuffles cannot mix them.

    Raises:
        DataError: Fewer than two batches.
    """
    batches = list(read_batches(data))
    if len(batches) < 2:
        raise DataError(
            "one batch cannot be split into a fitting and a held-out part: give two or more, or smaller ones"
        )
    held = min(len(batches) - 1, max(1, round(held_out * len(batches))))
    return batches[:-held], batches[-held:]
