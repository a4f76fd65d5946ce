"""Whether a state dict fits an architecture, and modules loaded from files."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from isthmus.checkpoint.names import FLOATS, _few, _line, _named, _quoted, _wrapping
from isthmus.checkpoint.reading import load_state
from isthmus.errors import ModelError
from isthmus.models.hugging_face import from_file_names, is_hugging_face


def load_weights(path: str | Path, model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a checkpoint under the names that a model has them by.

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
    """A copy of a model, in eval mode, with the weights of a checkpoint.

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


def check_state(state: Mapping[str, Any], model: nn.Module, where: str) -> dict[str, Tensor]:
    """A state dict's tensors under the model's names and in its order, after checking that they fit.

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
    check_finite({name: given[name] for name in expected}, where, "this training diverged, take an earlier checkpoint")


def check_finite(state: Mapping[str, Tensor], where: str, advice: str) -> None:
    """Refuses tensors that hold NaN or infinite numbers.

    Args:
        state: The tensors.
        where: Opens the message: a file, "model 1".
        advice: Ends it.

    Raises:
        ModelError: A number is NaN or infinite.
    """
    broken = {name: bad for name, tensor in state.items() if (bad := _not_finite(tensor))}
    if broken:
        name, bad = next(iter(broken.items()))
        rest = f" (and {len(broken) - 1} more tensors)" if len(broken) > 1 else ""
        raise ModelError(
            f"{where}: {bad} of {state[name].numel()} values of {name!r} are NaN or infinite{rest}; {advice}"
        )


def _kind(value: Tensor) -> str:
    """The part of a dtype that must agree: precision may differ, but float8 or int8 weights wait for their scales."""
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
