"""A data set in memory, its standard splits, and its batches."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64, Integer, Shaped
from torch import Tensor

from isthmus.errors import DataError, InputError
from isthmus.wording.short import counted, shortened, told

KEYS = ("x_train", "y_train", "x_test", "y_test")


class Batches:
    """Batches `(x, y)` in an order fixed at construction, the same at every iteration.

    Images come out as float32, normalised; tokens as they are. Nothing is copied before it is asked for.

    Args:
        x: samples; uint8 pixels are scaled to [0, 1] before they are normalised.
        y: labels.
        batch_size: samples in every batch but perhaps the last.
        mean: per channel (dimension 1 of x); None leaves x as it is.
        std: per channel; None leaves x as it is.
        indices: which samples, in which order; None takes all.
        seed: shuffles the samples once; None keeps their order.

    Raises:
        DataError: no samples, or x and y differ in length.
        InputError: the batch size is not positive.
    """

    def __init__(
        self,
        x: Shaped[Tensor, "samples *sample"],
        y: Integer[Tensor, "labels *label"],
        batch_size: int,
        *,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        indices: Int64[Tensor, " chosen"] | None = None,
        seed: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; it must be 1 or more")
        if len(x) != len(y):
            raise DataError(f"x has {len(x)} samples and y has {len(y)} labels; they must agree")
        indices = torch.arange(len(x)) if indices is None else indices
        if len(indices) == 0:
            raise DataError("the data set is empty: there is no sample to make a batch of")
        if seed is not None:
            indices = indices[torch.from_numpy(np.random.default_rng(seed).permutation(len(indices)))]
        self.x, self.y, self.batch_size, self.mean, self.std, self.indices = x, y, batch_size, mean, std, indices

    def __repr__(self) -> str:
        samples, batches = counted(len(self.indices), "sample"), counted(len(self), "batch", "batches")
        return told(self, samples, f"{batches} of {self.batch_size}")

    def __len__(self) -> int:
        return math.ceil(len(self.indices) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for indices in self.indices.split(self.batch_size):
            yield normalise(self.x[indices], self.mean, self.std), self.y[indices].long()

    def take(self, samples: int) -> "Batches":
        """The same batches stopped after the first `samples` samples (or all, if there are fewer)."""
        indices = self.indices[: max(samples, 0)]
        return Batches(self.x, self.y, self.batch_size, mean=self.mean, std=self.std, indices=indices)

    def halved(self) -> "Batches":
        """The same samples in two batches."""
        return self.in_batches(math.ceil(len(self.indices) / 2))

    def in_batches(self, batch_size: int) -> "Batches":
        """The same samples in batches of another size.

        Raises:
            InputError: the size is not positive.
        """
        return Batches(self.x, self.y, batch_size, mean=self.mean, std=self.std, indices=self.indices)


@dataclass(frozen=True, eq=False)
class DataSet:
    """A train and a test part. Samples are never reordered; `train`, `validation` and `test` read them in batches.

    Hyper-parameters are chosen on `validation`, a part held out of train; only `test` reads the test part.

    Attributes:
        name: name of the set, or the path of its file.
        x_train: uint8 or float32 images [n, channels, height, width] or features [n, features], or
            int64 tokens [n, block].
        y_train: int64 labels [n], or next tokens [n, block].
        x_test: as x_train.
        y_test: as y_train.
        classes: number of labels, or of tokens.
        mean: of the training part per channel, with pixels in [0, 1]; None for tokens.
        std: as mean.
        vocabulary: the character of every token; None for images.
    """

    name: str
    x_train: Shaped[Tensor, "train *sample"]
    y_train: Int64[Tensor, "train *label"]
    x_test: Shaped[Tensor, "test *sample"]
    y_test: Int64[Tensor, "test *label"]
    classes: int
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    vocabulary: str | None = None

    def __repr__(self) -> str:
        shape = " × ".join(map(str, self.sample_shape))
        train, test = counted(len(self.x_train), self.sample_noun), counted(len(self.x_test), self.sample_noun)
        kinds = counted(self.classes, "class", "classes") if self.vocabulary is None else counted(self.classes, "token")
        return told(self, shortened(self.name), f"{train} for training", f"{test} for tests", f"each {shape}", kinds)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one input sample, without the batch."""
        return tuple(self.x_train.shape[1:])

    @property
    def sample_noun(self) -> str:
        """What one sample is, in a word: an image, a window of text, or a sample of features."""
        if self.vocabulary is not None:
            return "window"
        return "image" if self.x_train.ndim == 4 else "sample"

    def train(
        self,
        batch_size: int = 500,
        *,
        holdout: int = 0,
        indices: Int64[Tensor, " chosen"] | None = None,
        seed: int | None = None,
    ) -> Batches:
        """Batches of the training part without the `holdout` samples that `validation` has.

        Args:
            batch_size: samples a batch.
            holdout: how many samples are held out, the same number as for `validation`.
            indices: only these samples of the training part (still without those held out).
            seed: shuffles once.

        Raises:
            DataError: nothing is left.
            InputError: holdout is not between 0 and the size of the training part.
        """
        return self._batches(self.train_indices(holdout, indices), batch_size, seed)

    def validation(self, batch_size: int = 500, *, holdout: int) -> Batches:
        """Batches of `holdout` samples of the training part, the same at every call.

        Images are spread over the classes in their proportions; of a text it is the end. A smaller part lies inside
        every larger one.

        Raises:
            DataError: holdout is 0.
            InputError: holdout is not between 0 and the size of the training part.
        """
        return self._batches(self._parts(holdout)[1], batch_size, None)

    def test(self, batch_size: int = 500, *, seed: int | None = None) -> Batches:
        """Batches of the test part: for the final number, never for a choice.

        Args:
            batch_size: samples a batch.
            seed: shuffles once, for those who take only a part.
        """
        return Batches(self.x_test, self.y_test, batch_size, mean=self.mean, std=self.std, seed=seed)

    def train_indices(self, holdout: int = 0, indices: Int64[Tensor, " chosen"] | None = None) -> Int64[Tensor, " _"]:
        """The training samples that are not held out, ascending; or those among `indices`, in their order.

        Raises:
            DataError: an index lies outside of the training part.
            InputError: holdout is not between 0 and the size of the training part.
        """
        kept, _ = self._parts(holdout)
        if indices is None:
            return kept
        if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= len(self.x_train)):
            raise DataError(f"{self.name}: an index lies outside of the {len(self.x_train)} training samples")
        return indices[torch.isin(indices, kept)]

    def _batches(self, indices: Int64[Tensor, " chosen"], batch_size: int, seed: int | None) -> Batches:
        return Batches(self.x_train, self.y_train, batch_size, mean=self.mean, std=self.std, indices=indices, seed=seed)

    def _parts(self, holdout: int) -> tuple[Int64[Tensor, " kept"], Int64[Tensor, " held"]]:
        count = len(self.x_train)
        if not 0 <= holdout <= count:
            raise InputError(f"holdout is {holdout}; {self.name} has {count} training samples to hold out of")
        # Of a text the end is held out: windows next to each other share sentences.
        order = stratified_order(self.y_train) if self.y_train.ndim == 1 else torch.arange(count)
        return order[: count - holdout].sort().values, order[count - holdout :].sort().values


def normalise(
    x: Shaped[Tensor, "batch *sample"], mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> Shaped[Tensor, "batch *sample"]:
    """(x - mean) / std per channel in float32, uint8 pixels scaled to [0, 1] first; x itself without a mean."""
    if mean is None or std is None:
        return x
    shape = (-1,) + (1,) * (x.ndim - 2)
    scale = 255.0 if x.dtype == torch.uint8 else 1.0
    shift = torch.tensor(mean, dtype=torch.float64, device=x.device).view(shape) * scale
    factor = 1.0 / (torch.tensor(std, dtype=torch.float64, device=x.device).view(shape) * scale)
    return (x.float() - shift.float()) * factor.float()


def stratified_order(y: Integer[Tensor, " samples"]) -> Int64[Tensor, " samples"]:
    """A fixed order of the samples in which every stretch has the classes nearly in their proportions."""
    shuffled = torch.from_numpy(np.random.default_rng(0).permutation(len(y)))
    place = torch.empty(len(y), dtype=torch.float64)
    for label in y.unique():
        members = shuffled[y[shuffled] == label]
        place[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    return shuffled[place[shuffled].argsort(stable=True)]
