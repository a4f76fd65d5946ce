"""Files written whole or not at all: a temporary file beside the target takes its place at the end."""

import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from isthmus.checkpoint.names import TIED, _dtype, _line, _named, _plain, _quoted, _sibling
from isthmus.errors import CheckpointError, InputError


def save_state(state: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors as one safetensors file: the same state gives the same bytes, whole or not at all.

    Of names that share one tensor the first is written, so that other tools find the embedding and not the tied head;
    the others are noted in the metadata.

    Raises:
        CheckpointError: a value cannot be stored, or the file cannot be written (the old one is then still there).
        InputError: the name does not end in .safetensors, or metadata is not text.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"{_quoted(path)} is to be safetensors; choose a name that ends in .safetensors")
    notes = {"format": "pt", **(metadata or {})}
    if odd := [key for key, value in notes.items() if not isinstance(key, str) or not isinstance(value, str)]:
        raise InputError(f"metadata {_named(map(str, odd))} is not text; the format keeps only text, use json.dumps")
    tensors: dict[str, Tensor] = {}
    kept: dict[tuple[object, ...], str] = {}
    tied: dict[str, str] = {}
    for name, value in _plain(state, f"cannot write {_quoted(path)}").items():
        same = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.data_ptr() and same in kept:  # empty tensors all lie at address 0
            tied[name] = kept[same]
        else:
            tensors[name] = value
            kept[same] = name
    if not tensors or "__metadata__" in tensors:
        raise CheckpointError(f"cannot write {_quoted(path)}: no tensors, or one named '__metadata__'; rename it")

    if tied:
        notes[TIED] = json.dumps(tied)
    # Widest first, as the format's own library does: every tensor then starts at a multiple of its item size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(sorted(notes.items()))}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        dtype, shape = _dtype(name, tensors[name]), list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with _replacing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            file.write(_bytes(tensors[name]))


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file in UTF-8, whole or not at all.

    Raises:
        CheckpointError: it cannot be written (the old one is then still there).
    """
    content = text.encode()
    with _replacing(Path(path)) as file:
        file.write(content)


def _bytes(value: Tensor) -> memoryview:
    """A tensor's bytes in row-major order, without a copy where it is contiguous on the CPU."""
    value = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return value.reshape(-1).view(torch.uint8).numpy().data


def _sync(folder: Path) -> None:
    """Makes a folder's list of names durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Yields a temporary file that takes the path's place when the block ends, and vanishes when it raises."""
    target = Path(os.path.realpath(path))  # a link stays a link: what it points to is replaced
    if os.path.lexists(target) and not os.path.isfile(target):
        raise CheckpointError(f"{_quoted(path)} is no regular file; choose another name to write to")
    temporary = _sibling(target, "tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, target)
            except BaseException:  # Ctrl-C too
                temporary.unlink(missing_ok=True)
                raise
        _sync(target.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {_quoted(path)} ({_line(error)}); make room or choose another") from error
