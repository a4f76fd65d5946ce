"""Data sets by name, held-out parts, batches that can be read again, and splits that give each model its own data."""

import difflib
import gzip
import math
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, Integer, Shaped
from torch import Tensor

from isthmus.errors import DataError, InputError

# Published mean and standard deviation of the training pixels, scaled to [0, 1].
STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "mnist": ((0.1307,), (0.3081,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
CLASSES = {"digits": 10, "mnist": 10, "fashion_mnist": 10, "cifar10": 10, "cifar100": 100}
NAMES = (*CLASSES, "tinyshakespeare")
KEYS = ("x_train", "y_train", "x_test", "y_test")
# The files of the official binary CIFAR archives: (train, test), and how many label bytes come before each image.
CIFAR_FILES = {
    "cifar10": ([f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"], 1),
    "cifar100": (["train.bin"], ["test.bin"], 2),
}
DIGITS_TEST = 360  # of 1,797
BLOCK = 128  # characters in a window of text


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

    def __len__(self) -> int:
        return math.ceil(len(self.indices) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for indices in self.indices.split(self.batch_size):
            yield normalise(self.x[indices], self.mean, self.std), self.y[indices].long()

    def take(self, samples: int) -> "Batches":
        """Returns the same batches stopped after the first `samples` samples (or all, if there are fewer)."""
        indices = self.indices[: max(samples, 0)]
        return Batches(self.x, self.y, self.batch_size, mean=self.mean, std=self.std, indices=indices)

    def halved(self) -> "Batches":
        """Returns the same samples in two batches."""
        return self.in_batches(math.ceil(len(self.indices) / 2))

    def in_batches(self, batch_size: int) -> "Batches":
        """Returns the same samples in batches of another size.

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
        """Returns batches of the training part without the `holdout` samples that `validation` has.

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
        """Returns batches of `holdout` samples of the training part, the same at every call.

        Images are spread over the classes in their proportions; of a text it is the end. A smaller part lies inside
        every larger one.

        Raises:
            DataError: holdout is 0.
            InputError: holdout is not between 0 and the size of the training part.
        """
        return self._batches(self._parts(holdout)[1], batch_size, None)

    def test(self, batch_size: int = 500, *, seed: int | None = None) -> Batches:
        """Returns batches of the test part: for the final number, never for a choice.

        Args:
            batch_size: samples a batch.
            seed: shuffles once, for those who take only a part.
        """
        return Batches(self.x_test, self.y_test, batch_size, mean=self.mean, std=self.std, seed=seed)

    def train_indices(self, holdout: int = 0, indices: Int64[Tensor, " chosen"] | None = None) -> Int64[Tensor, " _"]:
        """Returns the training samples that are not held out, ascending; or those among `indices`, in their order.

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


def load_data(name: str | Path, folder: str | Path | None = None, *, block: int = BLOCK) -> DataSet:
    """Returns a data set by name, or from a FILE.npz with x_train, y_train, x_test and y_test.

    Names: digits (embedded in scikit-learn; 1,437 for training and 360 for test, fixed), mnist, fashion_mnist,
    cifar10, cifar100 and tinyshakespeare (the first 90 % is for training). All but digits are read from a folder that
    has NAME.npz or the official archives: FOLDER/mnist/*-ubyte.gz, FOLDER/fashion_mnist/*-ubyte.gz,
    FOLDER/cifar-10-binary.tar.gz, FOLDER/cifar-100-binary.tar.gz, FOLDER/tinyshakespeare.txt. Pickles are never read.

    Args:
        name: one of the names, or the path of a .npz file: images [n, height, width] or [n, height, width, channels] as
            uint8 or floats, or features [n, features]; integer labels [n].
        folder: where the files lie; the environment variable ISTHMUS_DATA if None.
        block: characters in a window of text.

    Raises:
        DataError: unknown name, missing file, a file that cannot be read or whose arrays do not fit together.
        InputError: block is not positive.
    """
    name = str(name)
    if name.endswith(".npz"):
        return _from_arrays(name, _read_npz(Path(name)))
    if name == "digits":
        return _digits()
    if name not in NAMES:
        near = difflib.get_close_matches(name.lower(), NAMES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise DataError(f"no data set {name!r}{hint}; name one of {', '.join(NAMES)}, or a FILE.npz")
    folder = folder if folder is not None else os.environ.get("ISTHMUS_DATA")
    if folder is None:
        raise DataError(f"{name}: no folder to look in; give one (--data-dir) or set ISTHMUS_DATA")
    if name == "tinyshakespeare":
        return _tinyshakespeare(Path(folder) / "tinyshakespeare.txt", block)
    return _from_arrays(name, _find_images(name, Path(folder)), CLASSES[name], STATISTICS[name])


def normalise(
    x: Shaped[Tensor, "batch *sample"], mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> Shaped[Tensor, "batch *sample"]:
    """Returns (x - mean) / std per channel in float32, uint8 pixels scaled to [0, 1] first; x itself without a mean."""
    if mean is None or std is None:
        return x
    shape = (-1,) + (1,) * (x.ndim - 2)
    scale = 255.0 if x.dtype == torch.uint8 else 1.0
    shift = torch.tensor(mean, dtype=torch.float64, device=x.device).view(shape) * scale
    factor = 1.0 / (torch.tensor(std, dtype=torch.float64, device=x.device).view(shape) * scale)
    return (x.float() - shift.float()) * factor.float()


def stratified_order(y: Integer[Tensor, " samples"]) -> Int64[Tensor, " samples"]:
    """Returns a fixed order of the samples in which every stretch has the classes nearly in their proportions."""
    shuffled = torch.from_numpy(np.random.default_rng(0).permutation(len(y)))
    place = torch.empty(len(y), dtype=torch.float64)
    for label in y.unique():
        members = shuffled[y[shuffled] == label]
        place[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    return shuffled[place[shuffled].argsort(stable=True)]


def split_for_models(
    y: Integer[Tensor, " samples"],
    kind: str,
    *,
    models: int = 2,
    seed: int = 0,
) -> list[Int64[Tensor, " _"]]:
    """Returns the samples of every model, ascending.

    - `none`: every model gets all samples.
    - `80-20`: two models only. Model 0 gets 20 % of every class in the first half of the classes and 80 % of every
      other class; model 1 gets the rest.
    - `dirichlet`: every class is cut in proportions drawn from a symmetric Dirichlet(0.5) over the models.
    - `classes`: the classes, in an order drawn from the seed, are cut into groups of nearly equal number, one a model.

    Raises:
        DataError: no samples, or a model would get none.
        InputError: unknown kind, fewer than one model, or `80-20` with a number of models other than two.

    Source: Horoi et al. 2024 (arXiv 2407.05385).
    """
    if len(y) == 0:
        raise DataError("there are no samples to split between the models")
    if models < 1:
        raise InputError(f"models is {models}; it must be 1 or more")
    labels, rng = y.unique(), np.random.default_rng(seed)
    if kind == "none":
        return [torch.arange(len(y)) for _ in range(models)]
    if kind == "classes":
        groups = np.array_split(rng.permutation(labels.numpy()), models)
        parts = [[torch.isin(y, torch.from_numpy(group)).nonzero()[:, 0]] for group in groups]
    elif kind == "80-20" or kind == "dirichlet":
        if kind == "80-20" and models != 2:
            raise InputError(f"the split 80-20 is for 2 models, not {models}; use 'dirichlet' or 'classes'")
        parts = [[] for _ in range(models)]
        for rank, label in enumerate(labels):
            members = rng.permutation((y == label).nonzero()[:, 0].numpy())
            first = 0.2 if rank < len(labels) / 2 else 0.8
            shares = [first, 1 - first] if kind == "80-20" else rng.dirichlet([0.5] * models)
            cuts = np.rint(np.cumsum(shares)[:-1] * len(members)).astype(int)
            for part, chosen in zip(parts, np.split(members, cuts), strict=True):
                part.append(torch.from_numpy(chosen))
    else:
        raise InputError(f"no split {kind!r}; take one of none, 80-20, dirichlet, classes")
    indices = [torch.cat(part).sort().values for part in parts]
    for model, chosen in enumerate(indices):
        if len(chosen) == 0:
            raise DataError(f"the split {kind} of {len(y)} samples with seed {seed} leaves model {model} without any")
    return indices


def _find_images(name: str, folder: Path) -> dict[str, np.ndarray]:
    plain = folder / f"{name}.npz"
    if plain.exists():
        return _read_npz(plain)
    if name not in CIFAR_FILES:
        stems = {"x_train": "train-images-idx3", "y_train": "train-labels-idx1"}
        stems |= {"x_test": "t10k-images-idx3", "y_test": "t10k-labels-idx1"}
        files = {key: folder / name / f"{stem}-ubyte.gz" for key, stem in stems.items()}
        missing = [str(file) for file in files.values() if not file.exists()]
        if missing:
            raise DataError(f"{name}: neither {plain} nor {missing[0]} exists; put one of them there")
        return {key: _read_idx(file) for key, file in files.items()}
    hyphenated = name.replace("cifar", "cifar-")
    archive, pickled = folder / f"{hyphenated}-binary.tar.gz", folder / f"{hyphenated}-python.tar.gz"
    if archive.exists():
        return _read_cifar(name, archive)
    if pickled.exists():
        raise DataError(
            f"{name}: {pickled} holds pickles, which are never read; put {archive.name} or {plain.name} there"
        )
    raise DataError(f"{name}: neither {plain} nor {archive} exists; put one of them there")


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        raise DataError(f"no file {path}; write one with numpy.savez and the arrays {', '.join(KEYS)}")
    try:
        with path.open("rb") as file:  # opened here: np.load leaves a damaged archive open
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{path} is a single array; write it with numpy.savez and the arrays {', '.join(KEYS)}")
            if missing := [key for key in KEYS if key not in archive.files]:
                raise DataError(
                    f"{path} holds {', '.join(map(repr, archive.files[:5]))} but not {missing[0]}; it needs "
                    f"{', '.join(KEYS)}. If it is packed and came with a load_data.py, "
                    "run its load_data.py FOLDER to write plain files"
                )
            return {key: archive[key] for key in KEYS}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read as plain numpy arrays: {' '.join(str(error).split())}") from error


def _read_idx(path: Path) -> np.ndarray:
    try:
        with gzip.open(path) as file:
            header = file.read(4)
            if len(header) < 4 or header[:3] != b"\0\0\x08":
                raise DataError(f"{path} is not an idx file of bytes; get the official archive again")
            shape = np.frombuffer(file.read(4 * header[3]), ">u4").astype(int)
            size = math.prod(shape.tolist())
            content = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}; get the official archive again") from error
    if len(content) != size:
        raise DataError(f"{path} does not hold the {size} bytes that its header states; get the official archive again")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _read_cifar(name: str, path: Path) -> dict[str, np.ndarray]:
    train, test, label_bytes = CIFAR_FILES[name]
    row = label_bytes + 3 * 32 * 32
    found: dict[str, np.ndarray] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                file = archive.extractfile(member)
                if file is not None and (base := Path(member.name).name) in train + test:
                    content = file.read()
                    if len(content) % row or len(content) != member.size:
                        raise DataError(f"{path}: {base} is not whole; get the official archive again")
                    found[base] = np.frombuffer(content, np.uint8).reshape(-1, row)
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}; get the official archive again") from error
    if missing := [file for file in train + test if file not in found]:
        raise DataError(f"{path} has no {missing[0]}; get the official archive again")
    arrays: dict[str, np.ndarray] = {}
    for part, files in (("train", train), ("test", test)):
        rows = np.concatenate([found[file] for file in files])
        arrays[f"x_{part}"] = rows[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        arrays[f"y_{part}"] = rows[:, label_bytes - 1]  # CIFAR-100 has the coarse label first, then the fine one
    return arrays


def _digits() -> DataSet:
    from sklearn.datasets import load_digits  # a second to import: only where it is used

    pixels, labels = load_digits(return_X_y=True)
    images = (pixels * (255 / 16)).round().astype(np.uint8).reshape(-1, 8, 8)
    order = stratified_order(torch.from_numpy(labels)).numpy()
    train, test = np.sort(order[DIGITS_TEST:]), np.sort(order[:DIGITS_TEST])
    arrays = (images[train], labels[train], images[test], labels[test])
    return _from_arrays("digits", dict(zip(KEYS, arrays, strict=True)), CLASSES["digits"])


def _tinyshakespeare(path: Path, block: int) -> DataSet:
    if block < 1:
        raise InputError(f"block is {block}; it must be 1 or more characters")
    if not path.exists():
        raise DataError(f"tinyshakespeare: {path} does not exist; put the text there")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error
    vocabulary = "".join(sorted(set(text)))
    numbers = {character: number for number, character in enumerate(vocabulary)}
    tokens = torch.tensor([numbers[character] for character in text], dtype=torch.int64)
    cut = len(tokens) * 9 // 10
    parts: list[Tensor] = []
    for part in (tokens[:cut], tokens[cut:]):
        if len(part) <= block:
            raise DataError(f"{path}: {len(text)} characters give no window of {block} + 1 in both parts; lower block")
        windows = part.unfold(0, block + 1, block)
        parts += [windows[:, :-1], windows[:, 1:]]
    return DataSet("tinyshakespeare", *parts, classes=len(vocabulary), vocabulary=vocabulary)


def _from_arrays(
    name: str,
    arrays: dict[str, np.ndarray],
    classes: int | None = None,
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
) -> DataSet:
    x_train, x_test = (_samples(name, key, arrays[key]) for key in ("x_train", "x_test"))
    y_train, y_test = (_labels(name, key, arrays[key], classes) for key in ("y_train", "y_test"))
    for part, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        if len(x) != len(y):
            raise DataError(f"{name}: x_{part} has {len(x)} samples and y_{part} has {len(y)} labels; they must agree")
    if x_train.shape[1:] != x_test.shape[1:] or x_train.dtype != x_test.dtype:
        raise DataError(
            f"{name}: x_train is {x_train.dtype} {list(x_train.shape)} and x_test {x_test.dtype} {list(x_test.shape)}; "
            "samples must have one type and shape"
        )
    if classes is None:
        classes = 1 + max(int(y_train.max()), int(y_test.max()))
    mean, std = statistics if statistics is not None else _measure(x_train)
    return DataSet(name, x_train, y_train, x_test, y_test, classes, mean, std)


def _samples(name: str, key: str, x: np.ndarray) -> Shaped[Tensor, "samples *sample"]:
    if x.ndim not in (2, 3, 4) or x.size == 0:
        raise DataError(
            f"{name}: {key} has the shape {list(x.shape)}; it must be [n, height, width], [n, height, width, channels] "
            "or [n, features], and not empty"
        )
    if x.ndim == 4 and x.shape[3] > 4 and x.shape[1] <= 4:
        raise DataError(f"{name}: {key} has the shape {list(x.shape)}; its channels must come last")
    if x.dtype != np.uint8 and not np.issubdtype(x.dtype, np.floating):
        raise DataError(f"{name}: {key} is {x.dtype}; it must be uint8 pixels or floats")
    if x.dtype != np.uint8 and not np.isfinite(x).all():
        raise DataError(f"{name}: {key} has NaN or infinite values; clean it first")
    x = x if x.dtype == np.uint8 else x.astype(np.float32)
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4:
        x = x.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.array(x, order="C"))  # a copy: arrays read from bytes are read-only


def _labels(name: str, key: str, y: np.ndarray, classes: int | None) -> Int64[Tensor, " samples"]:
    if y.ndim != 1 or y.size == 0 or not np.issubdtype(y.dtype, np.integer):
        raise DataError(f"{name}: {key} is {y.dtype} {list(y.shape)}; it must be integer labels [n], and not empty")
    highest = np.iinfo(np.int64).max if classes is None else classes - 1
    if wrong := [int(label) for label in (y.min(), y.max()) if not 0 <= label <= highest]:
        limit = "0 up" if classes is None else f"0 to {highest}"
        raise DataError(f"{name}: {key} has the label {wrong[0]}; labels run from {limit}")
    return torch.from_numpy(y.astype(np.int64))


def _measure(x: Shaped[Tensor, "samples *sample"]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    dims = (0, *range(2, x.ndim))
    values = x.double() / (255.0 if x.dtype == torch.uint8 else 1.0)
    std = values.std(dims, correction=0)
    std = torch.where(std > 0, std, 1.0)  # a feature that is the same in every sample
    return tuple(values.mean(dims).tolist()), tuple(std.tolist())
