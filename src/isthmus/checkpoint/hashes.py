"""Hashes of files and states."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from isthmus.checkpoint.names import _dtype, _line, _plain, _quoted
from isthmus.checkpoint.reading import _locate, _shards
from isthmus.checkpoint.writing import _bytes
from isthmus.errors import CheckpointError


def hash_file(path: str | Path) -> str:
    """The SHA-256, in hex, of a file, or of the weights in a folder: an index and its shards, sorted by name.

    Raises:
        CheckpointError: nothing is there, or it cannot be read.
    """
    source = _locate(Path(path))
    files = [source, *_shards(source)] if source.name.endswith(".index.json") else [source]
    hashes: dict[str, str] = {}
    for file in files:
        try:
            with open(file, "rb") as content:
                hashes[str(file.relative_to(source.parent))] = hashlib.file_digest(content, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"cannot read {_quoted(file)} ({_line(error)}); check its permissions") from error
    if len(hashes) == 1:
        return hashes.popitem()[1]
    return hashlib.sha256(json.dumps(sorted(hashes.items())).encode()).hexdigest()


def hash_state(state: Mapping[str, Tensor]) -> str:
    """The SHA-256, in hex, of names, dtypes, shapes and values; not of their order, device or strides.

    Raises:
        CheckpointError: a value is no dense tensor of a dtype that can be stored.
    """
    digest = hashlib.sha256()
    for name, value in sorted(_plain(state, "cannot hash the state").items()):
        digest.update(json.dumps([name, _dtype(name, value), list(value.shape)]).encode())
        digest.update(_bytes(value))
    return digest.hexdigest()
