"""Weights in and out of files: read from files nobody vouches for, written so that no crash leaves half a file.

Reading runs no code: safetensors, or pickles through `weights_only=True`. Tensors of a safetensors file stay mapped to
it until they are used (two models of 7 B do not fill the memory), so do not write into a file that is being merged.
Writing is streamed, one tensor at a time, into a temporary sibling that is synced and then renamed.
"""

import hashlib
import json
import os
import pickle
import re
import secrets
import shlex
import shutil
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from isthmus.errors import CheckpointError, InputError, ModelError
from isthmus.models.hugging_face import from_file_names, is_hugging_face

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights")
WRAPPERS = ("module.", "_orig_mod.")  # left in every name by DataParallel and by torch.compile
TIED = "isthmus.tied"  # metadata of a file: {name that was not written: name that holds its tensor}, as JSON
RUN_FILES = ("recipe.yaml", "report.json")  # what shows that a folder is one of our runs

# The names of the safetensors format.
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
}  # fmt: skip
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


# ---- messages


def _line(text: object) -> str:
    """Returns a text on one line and short: what other libraries raise spans paragraphs."""
    line = " ".join(str(text).split()) or type(text).__name__
    line = "".join(letter if letter.isprintable() else "?" for letter in line)  # they quote names raw
    return line if len(line) <= 200 else line[:200] + "…"


def _quoted(text: object) -> str:
    """Returns a name as a Python string: names come from files, and a newline in one must not reach the terminal."""
    return repr(str(text))


def _few(items: Iterable[str]) -> str:
    items = list(items)
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")


def _named(names: Iterable[object]) -> str:
    return _few(_quoted(name) for name in names)


# ---- reading


def load_state(path: str | Path) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint by name, on the CPU, in the file's dtypes.

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
    """Returns the text metadata of one safetensors file.

    Raises:
        CheckpointError: nothing is there, it is damaged or no safetensors file.
    """
    source = _locate(Path(path))
    if source.suffix != ".safetensors":
        raise CheckpointError(f"{_quoted(source)} has no metadata: give one .safetensors file")
    return _read(source, _read_metadata)["metadata"]


def load_weights(path: str | Path, model: nn.Module) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint under the names that a model has them by.

    These are the file's own names, but for Hugging Face models, whose files may hold other names, shapes and orders of
    rows than their modules do: a file for one is read as transformers reads it.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ModelError: a Hugging Face checkpoint does not fit the model.
    """
    state = load_state(path)
    if not is_hugging_face(model):
        return state
    wrapper = _wrapping(state)
    return from_file_names({name.removeprefix(wrapper): value for name, value in state.items()}, model, _quoted(path))


def load_module(path: str | Path, model: nn.Module) -> nn.Module:
    """Returns a copy of a model, in eval mode, with the weights of a checkpoint.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ModelError: it does not fit the model.
    """
    where = _quoted(path)
    state = check_state(load_weights(path, model), model, where)
    if empty := [name for name, value in model.state_dict().items() if value.is_meta]:
        raise ModelError(f"the model has no memory for {_named(empty)} (meta device); build it on the CPU")
    loaded = deepcopy(model)
    try:
        loaded.load_state_dict(state)
    except RuntimeError as error:  # a module's own loading hook may object to what fits by name and shape
        raise ModelError(f"{where} cannot be loaded into the model: {_line(error)}; check --model") from error
    return loaded.eval()


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
    """Returns the file to read first: the path itself, or the weights in a folder."""
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
    """Returns what a reader finds in one file; whatever a damaged file makes it raise becomes one line."""
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
    """Returns a JSON object as a dict; Python would silently keep the last of two equal keys."""
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
    """Returns the shards that an index names, in order, each with its tensors' names; all lie in the index's folder."""
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
    """Returns the state dict inside what a pickle held: a module, a state dict, or containers around either."""
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


def _plain(content: Mapping[Any, Any], where: str) -> dict[str, Tensor]:
    """Returns a mapping's tensors, detached, if it is nothing but dense tensors by name."""
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
    """Returns the prefix, of wrapping modules only, that all names carry."""
    names, prefix = list(names), ""
    while added := [part for part in WRAPPERS if names and all(name.startswith(prefix + part) for name in names)]:
        prefix += added[0]
    return prefix


# ---- fitting


def check_state(state: Mapping[str, Any], model: nn.Module, where: str) -> dict[str, Tensor]:
    """Returns a state dict's tensors under the model's names and in its order, after checking that they fit.

    Dtypes stay as they are (float16 weights fit a float32 model). Names tied in the model may be given once; a
    wrapper's prefix (`module.`, `_orig_mod.`) may be on either side. `where` opens the messages: a file, "model 1".

    Raises:
        ModelError: names are missing or unknown, shapes or kinds of number differ, values are NaN or infinite, or
            names that the model ties hold different values.
    """
    where = " ".join(where.split())
    expected = model.state_dict(keep_vars=True)  # the objects themselves: equal identity is what tying means
    if odd := [name for name, value in expected.items() if not isinstance(value, Tensor) or is_lazy(value)]:
        raise ModelError(f"the model keeps in {_named(odd)} no tensor of known shape; run it once, or drop extra state")
    if odd := [str(name) for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ModelError(f"{where}: {_named(odd)} holds no tensor; give a plain state dict")
    have, want = _wrapping(state), _wrapping(expected)
    given: dict[str, Tensor] = {want + name.removeprefix(have): value for name, value in state.items()}

    objects: dict[int, list[str]] = {}
    for name, value in expected.items():
        objects.setdefault(id(value), []).append(name)
    tied = [names for names in objects.values() if len(names) > 1]
    for names in tied:
        for present in [name for name in names if name in given][:1]:
            given |= {name: given[present] for name in names if name not in given}

    _check_names(given, expected, where)
    _check_kinds(given, expected, where)
    for first, *others in tied:
        for name in others:
            if given[name] is not given[first] and not torch.equal(given[name], given[first]):
                raise ModelError(f"{where}: {first!r} and {name!r} differ, but the model ties them; untie the model")
    return {name: given[name] for name in expected}


def _check_names(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    missing, unknown = (
        [name for name in expected if name not in given],
        [name for name in given if name not in expected],
    )
    common = len(given) - len(unknown)
    if (missing or unknown) and 10 * common <= min(len(given), len(expected)):
        raise ModelError(
            f"{where} is of another architecture: {common} of the model's {len(expected)} names are in it "
            f"(the model has {_named(missing)}; it has {_named(unknown)}); give the model it was trained as"
        )
    wrong = [f"lacks {len(missing)} tensors of the model: {_named(missing)}"] if missing else []
    wrong += [f"holds {len(unknown)} that the model does not know: {_named(unknown)}"] if unknown else []
    if wrong:
        raise ModelError(f"{where} {' and '.join(wrong)}; give the model it was trained as")


def _check_kinds(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    shapes = {name: (list(given[name].shape), list(value.shape)) for name, value in expected.items()}
    if wrong := [f"{name!r} is {got} for the model's {want}" for name, (got, want) in shapes.items() if got != want]:
        raise ModelError(f"{where}: wrong shapes: {_few(wrong)}; give the model it was trained as")
    for name, value in expected.items():
        if _kind(given[name]) != _kind(value):
            raise ModelError(
                f"{where}: {name!r} is {_kind(given[name])} where the model has {_kind(value)}; "
                "dequantise or convert the checkpoint first"
            )
    broken = {name: bad for name in expected if (bad := _not_finite(given[name]))}
    if broken:
        name, bad = next(iter(broken.items()))
        rest = f" (and {len(broken) - 1} more tensors)" if len(broken) > 1 else ""
        raise ModelError(
            f"{where}: {bad} of {given[name].numel()} values of {name!r} are NaN or infinite{rest}; "
            "this training diverged, take an earlier checkpoint"
        )


def _kind(value: Tensor) -> str:
    """Returns what of a dtype must agree: precision may differ, but float8 or int8 weights wait for their scales."""
    if value.dtype in FLOATS:
        return "float"
    if value.dtype.is_complex:
        return "complex"
    if value.is_quantized or value.dtype.is_floating_point:
        return f"quantised ({value.dtype})"
    return "integer"


def _not_finite(value: Tensor) -> int:
    if value.dtype not in FLOATS and not value.dtype.is_complex:
        return 0
    return value.numel() - int(torch.isfinite(value).sum())


# ---- writing


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


def _dtype(name: str, value: Tensor) -> str:
    if value.dtype not in DTYPES:
        raise CheckpointError(f"{_quoted(name)} is {value.dtype}, which safetensors cannot hold; convert it first")
    return DTYPES[value.dtype]


def _bytes(value: Tensor) -> memoryview:
    """Returns a tensor's bytes in row-major order, without a copy where it is contiguous on the CPU."""
    value = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return value.reshape(-1).view(torch.uint8).numpy().data


def _sibling(target: Path, end: str) -> Path:
    """Returns a name, free by chance, in the same folder: a rename across file systems would be a copy."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.{end}")


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


# ---- hashes


def hash_file(path: str | Path) -> str:
    """Returns the SHA-256, in hex, of a file, or of the weights in a folder: an index and its shards, sorted by name.

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
    """Returns the SHA-256, in hex, of names, dtypes, shapes and values; not of their order, device or strides.

    Raises:
        CheckpointError: a value is no dense tensor of a dtype that can be stored.
    """
    digest = hashlib.sha256()
    for name, value in sorted(_plain(state, "cannot hash the state").items()):
        digest.update(json.dumps([name, _dtype(name, value), list(value.shape)]).encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


# ---- run folders


@contextmanager
def new_folder(path: str | Path, force: bool = False) -> Iterator[Path]:
    """Yields an empty temporary folder that becomes `path` as a whole when the block ends, and vanishes if it raises.

    With `force` it replaces a file or one of our run folders. kill -9 leaves at most a hidden sibling `.NAME.*.tmp`
    (the unfinished run) or `.NAME.*.old` (the run that was being replaced).

    Raises:
        CheckpointError: at once, if `path` exists and may not be replaced or nothing can be created beside it; at the
            end, if it could not be moved into place (what stood there is then still there).
    """
    target = Path(os.path.realpath(path))
    try:
        _check_target(target, force)
        temporary = _sibling(target, "tmp")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise CheckpointError(f"cannot create {_quoted(target)} ({_line(error)}); choose another -o") from error
    try:
        yield temporary
        _move(temporary, target, force)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # the error that brought us here matters more than a left-over
        raise


def _check_target(target: Path, force: bool) -> None:
    """Raises unless a run may be put at `target`; decided by what stands there, before any work."""
    here = Path.cwd().resolve()
    if target in (here, *here.parents, Path(os.path.realpath(os.path.expanduser("~")))) or os.path.ismount(target):
        raise CheckpointError(f"{_quoted(target)} cannot be replaced as a whole; choose a folder inside it as -o")
    if not os.path.lexists(target) or (target.is_dir() and not os.listdir(target)):
        return
    if not force:
        raise CheckpointError(f"{_quoted(target)} exists; choose another -o or pass --force")
    if not target.is_file() and not any((target / name).is_file() for name in RUN_FILES):
        raise CheckpointError(
            f"{_quoted(target)} is no run folder (no {' or '.join(RUN_FILES)}), so --force does not replace it; "
            "choose another -o"
        )


def _move(temporary: Path, target: Path, force: bool) -> None:
    """Puts a finished folder in place of whatever stands there, or puts that back."""
    backup = _sibling(target, "old")
    try:
        for folder, _, names in os.walk(temporary):
            for name in names:
                with open(Path(folder, name), "rb") as file:
                    os.fsync(file.fileno())
            _sync(Path(folder))
        _check_target(target, force)  # again: someone may have put something there meanwhile
        try:
            if os.path.lexists(target):
                os.rename(target, backup)
            os.rename(temporary, target)
        finally:  # by what is there, not by what was done: Ctrl-C may have come between any two lines
            if os.path.lexists(backup) and os.path.lexists(target):
                (shutil.rmtree if backup.is_dir() else os.unlink)(backup)
            elif os.path.lexists(backup):
                os.rename(backup, target)
        _sync(target.parent)
    except OSError as error:
        raise CheckpointError(
            f"cannot put the finished folder at {_quoted(target)} ({_line(error)}); make room or choose another -o"
        ) from error
