"""State dicts from files, which are only data: no code in them runs."""

import json
import os
import pickle
import re
import shlex
import struct
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from isthmus.checkpoint.names import INDEX, SINGLE, TIED, _line, _named, _plain, _quoted, _wrapping
from isthmus.checkpoint.writing import save_state
from isthmus.errors import CheckpointError

PICKLES = (".pt", ".pth", ".bin", ".ckpt")


CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights")


def load_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on the CPU, in the file's dtypes.

    Reads `.safetensors`; sharded safetensors, named by their `.index.json`; a folder that holds either; and
    `.pt`, `.pth`, `.bin`, `.ckpt`, where a state dict inside a training checkpoint is found and the prefix that
    DataParallel or torch.compile put before all names is removed. Names that `save_state` wrote once are restored.

    Raises:
        CheckpointError: nothing is there, it is damaged, would run code, or is no state dict.
    """
    source = _locate(Path(path))
    if source.name.endswith(".index.json"):
        return _read_sharded(source)
    if source.suffix == ".safetensors":
        return _read(source, _read_safetensors)
    if source.suffix in PICKLES:
        return _read(source, _read_pickle)
    known = ", ".join((".safetensors", ".safetensors.index.json", *PICKLES))
    raise CheckpointError(f"{_quoted(source)} is no checkpoint by its name; give a folder or a file ending in {known}")


def read_metadata(path: str | Path) -> dict[str, str]:
    """The text metadata of one safetensors file.

    Raises:
        CheckpointError: nothing is there, it is damaged or no safetensors file.
    """
    source = _locate(Path(path))
    if source.suffix != ".safetensors":
        raise CheckpointError(f"{_quoted(source)} has no metadata: give one .safetensors file")
    return _read(source, _read_metadata)["metadata"]


def convert_trusted(path: str | Path, out: str | Path) -> None:
    """Writes the state dict in a pickle as safetensors. RUNS ANY CODE IN THE FILE: only for files you trust.

    This is the command that the refusal of such a file names; nothing else calls it.

    Raises:
        CheckpointError: no state dict is in it, or `out` cannot be written.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch.load says that it hands a TorchScript archive on
        try:
            content = torch.load(path, weights_only=False, map_location="cpu")
        except RuntimeError:  # written by pickle.dump instead of torch.save
            with open(path, "rb") as file:
                content = pickle.load(file)
    save_state(_find_state(content, Path(path)), out)


def _locate(path: Path) -> Path:
    """The file to read first: the path itself, or the weights in a folder."""
    if os.path.isdir(path):
        found = next((path / name for name in (SINGLE, INDEX) if (path / name).is_file()), None)
        if found is None:
            raise CheckpointError(f"{_quoted(path)} holds neither {SINGLE} nor {INDEX}; name the checkpoint file")
        return found
    if not os.path.isfile(path):
        what = "is no regular file" if os.path.exists(path) else "does not exist"
        raise CheckpointError(f"{_quoted(path)} {what}; check the path of the checkpoint")
    return path


def _read(path: Path, reader: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """What a reader finds in one file; whatever a damaged file makes it raise becomes one line."""
    try:
        state = reader(path)
    except CheckpointError:
        raise
    except Exception as error:  # unpickling random bytes can raise anything
        advice = "is it complete, and a checkpoint? Fetch or save it again"
        raise CheckpointError(f"cannot read {_quoted(path)} ({_line(error)}): {advice}") from error
    if not state:
        raise CheckpointError(f"{_quoted(path)} holds no tensors; save model.state_dict() to it")
    return state


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict; Python would silently keep the last of two equal keys."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} stands there twice")
        result[key] = value
    return result


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        # The library has checked the header, but keeps one of two equal names.
        with open(path, "rb") as raw:
            (length,) = struct.unpack("<Q", raw.read(8))
            json.loads(raw.read(length), object_pairs_hook=_unique)
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not iterable itself)
        tied = json.loads((file.metadata() or {}).get(TIED, "{}"))
        return state | {name: state[kept] for name, kept in tied.items()}


def _read_metadata(path: Path) -> dict[str, dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {"metadata": dict(file.metadata() or {})}


def _read_sharded(index: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for shard, promised in _shards(index).items():
        part = _read(shard, _read_safetensors)
        if lacking := sorted(promised - part.keys()):
            raise CheckpointError(
                f"{_quoted(shard)} lacks {_named(lacking)}, which {_quoted(index)} places there; "
                "fetch or save all shards again"
            )
        if twice := sorted(part.keys() & state.keys()):
            raise CheckpointError(
                f"{_quoted(shard)} holds {_named(twice)}, as another shard does; remove the stale shard "
                f"from {_quoted(index)}"
            )
        state |= part
    return state


def _shards(index: Path) -> dict[Path, set[str]]:
    """The shards that an index names, in order, each with its tensors' names; all lie in the index's folder."""
    try:
        content = json.loads(index.read_bytes(), object_pairs_hook=_unique)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {_quoted(index)} ({_line(error)}); fetch or save it again") from error
    table = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise CheckpointError(
            f'{_quoted(index)} has no object "weight_map" of tensor names and shard files; fetch or save it again'
        )
    # In Hugging Face's cache index and shards are links to neighbours in another folder: there the links' targets
    # must be neighbours. A link to anywhere else is refused.
    homes = (index.parent.resolve(), index.resolve().parent)
    shards: dict[Path, set[str]] = {}
    for tensor, name in sorted(table.items(), key=lambda item: (item[1], item[0])):
        shard = index.parent / name
        if shard not in shards:
            pure = PurePath(name)
            leaves = pure.is_absolute() or ".." in pure.parts or "\0" in name
            if leaves or not any(Path(os.path.realpath(shard)).is_relative_to(home) for home in homes):
                raise CheckpointError(
                    f"{_quoted(index)} names the shard {name!r} outside its folder; put the shard beside the index"
                )
            if not shard.is_file():
                raise CheckpointError(
                    f"the shard {_quoted(shard)} named by {_quoted(index)} is missing; fetch all shards"
                )
        shards.setdefault(shard, set()).add(tensor)
    return shards


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # its advice is in our message
            content = torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError) as error:
        with open(path, "rb") as file:
            start = file.read(2)
        if not re.search("weights_only|magic number", str(error)) or not (start == b"PK" or start[:1] == b"\x80"):
            raise  # damaged, or neither an archive nor a pickle
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it would run {culprit[1]!r}" if culprit else "it is TorchScript or another kind of pickle"
        paths = (json.dumps(str(name), ensure_ascii=False) for name in (path, path.with_suffix(".safetensors")))
        code = f"from isthmus.checkpoint import convert_trusted; convert_trusted({', '.join(paths)})"
        raise CheckpointError(
            f"{_quoted(path)} is more than a dict of tensors ({what}) and reading it can run code; "
            f"if you trust it, convert it: python -c {shlex.quote(code)}"
        ) from error
    return _find_state(content, path)


def _find_state(content: object, path: Path) -> dict[str, Tensor]:
    """The state dict inside what a pickle held: a module, a state dict, or containers around either."""
    seen: set[int] = set()  # a hostile pickle may contain itself
    while id(content) not in seen:
        seen.add(id(content))
        if isinstance(content, nn.Module):
            content = content.state_dict()
        if not isinstance(content, Mapping) or all(isinstance(value, Tensor) for value in content.values()):
            break
        inner = [name for name in CONTAINERS if isinstance(content.get(name), Mapping | nn.Module)]
        if len(inner) > 1:
            raise CheckpointError(
                f"{_quoted(path)} holds several state dicts ({_named(inner)}); save the one you mean alone"
            )
        if inner:
            content = content[inner[0]]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{_quoted(path)} holds a {type(content).__name__}, no dict; save model.state_dict()")
    state = _plain(content, _quoted(path))
    prefix = _wrapping(state)
    return {name.removeprefix(prefix): value for name, value in state.items()}
