"""Names in files and messages: quoting, wrappers' prefixes, dtypes."""

import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isthmus.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


WRAPPERS = ("module.", "_orig_mod.")  # left in every name by DataParallel and by torch.compile


TIED = "isthmus.tied"  # metadata of a file: {name that was not written: name that holds its tensor}, as JSON


# The names of the safetensors format.
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
}  # fmt: skip


FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _line(text: object) -> str:
    """A text on one line and short: what other libraries raise spans paragraphs."""
    line = " ".join(str(text).split()) or type(text).__name__
    line = "".join(letter if letter.isprintable() else "?" for letter in line)  # they quote names raw
    return line if len(line) <= 200 else line[:200] + "…"


def _quoted(text: object) -> str:
    """A name as a Python string: names come from files, and a newline in one must not reach the terminal."""
    return repr(str(text))


def _few(items: Iterable[str]) -> str:
    items = list(items)
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")


def _named(names: Iterable[object]) -> str:
    return _few(_quoted(name) for name in names)


def _plain(content: Mapping[Any, Any], where: str) -> dict[str, Tensor]:
    """A mapping's tensors, detached, if it is nothing but dense tensors by name."""
    for name, value in content.items():
        what = type(value).__name__
        if isinstance(name, str) and isinstance(value, Tensor):
            if value.layout is torch.strided and not value.is_meta:
                continue
            what = "meta (no data)" if value.is_meta else str(value.layout)
        raise CheckpointError(
            f"{where}: {_quoted(name)} is of type {what}, no dense tensor by name; save model.state_dict()"
        )
    return {name: value.detach() for name, value in content.items()}


def _wrapping(names: Iterable[str]) -> str:
    """The prefix, of wrapping modules only, that all names have."""
    names, prefix = list(names), ""
    while added := [part for part in WRAPPERS if names and all(name.startswith(prefix + part) for name in names)]:
        prefix += added[0]
    return prefix


def _dtype(name: str, value: Tensor) -> str:
    if value.dtype not in DTYPES:
        raise CheckpointError(f"{_quoted(name)} is {value.dtype}, which safetensors cannot hold; convert it first")
    return DTYPES[value.dtype]


def _sibling(target: Path, end: str) -> Path:
    """A name, free by chance, in the same folder: a rename across file systems would be a copy."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.{end}")
