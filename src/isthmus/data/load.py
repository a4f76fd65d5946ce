"""Data sets by name or file: archives, arrays and text, read and checked."""

import difflib
import gzip
import math
import os
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from isthmus.data.sets import KEYS, DataSet, stratified_order
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


# The files of the official binary CIFAR archives: (train, test), and how many label bytes come before each image.
CIFAR_FILES = {
    "cifar10": ([f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"], 1),
    "cifar100": (["train.bin"], ["test.bin"], 2),
}


DIGITS_TEST = 360  # of 1,797


BLOCK = 128  # characters in a window of text


def load_data(name: str | Path, folder: str | Path | None = None, *, block: int = BLOCK) -> DataSet:
    """A data set by name, or from a FILE.npz with x_train, y_train, x_test and y_test.

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
