"""From one line of text to a network: arguments, factories, and errors that say what was wrong with the line."""

import importlib
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from isthmus.errors import ModelError
from isthmus.registry import did_you_mean, parse_value


def parse_arguments(spec: str, query: str) -> dict[str, Any]:
    """The arguments in a text such as `width=2&bn=true`; each value is JSON, or else a string.

    Raises:
        ModelError: an argument without a value, or given twice.
    """
    arguments: dict[str, Any] = {}
    for item in query.split("&") if query else ():
        key, equals, value = item.partition("=")
        if not (key.isidentifier() and equals) or key in arguments:
            raise ModelError(f"model {spec!r}: {item!r} is not a new key=value; write NAME?key=value&other=value")
        arguments[key] = parse_value(value)
    return arguments


def find_factory(spec: str, module_name: str, name: str) -> Callable[..., object]:
    """A callable of a module; importing the module runs its code.

    Raises:
        ModelError: there is no such module or callable, or importing failed.
    """
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        # Missing itself, or missing something that it imports: only the first is a wrong name.
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
            near = did_you_mean(module_name, (info.name for info in pkgutil.iter_modules([os.getcwd()])))
            raise ModelError(
                f"model {spec!r}: no module {error.name!r} on the Python path or in {os.getcwd()}{near}"
            ) from error
        raise ModelError(f"model {spec!r}: importing {module_name} failed: {one_line(error)}") from error
    if not callable(factory := getattr(module, name, None)):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ModelError(f"model {spec!r}: {module_name} has no factory {name!r}{did_you_mean(name, known)}")
    return factory


def build_from_factory(spec: str, factory: Callable[..., object], arguments: Mapping[str, Any]) -> nn.Module:
    """What a factory makes of arguments that were checked against its signature first.

    Raises:
        ModelError: an argument that it does not take, or it fails, or returns no module.
    """
    try:
        signature = inspect.signature(factory)
    except ValueError:  # some C callables have none: the call itself then checks the arguments
        signature = None
    if signature is not None:
        try:
            signature.bind(**arguments)
        except TypeError as error:
            unknown = [key for key in arguments if key not in signature.parameters]
            near = did_you_mean(unknown[0], signature.parameters) if unknown else ""
            raise ModelError(f"model {spec!r}: {one_line(error)}{near}; it takes {signature}") from error
    try:
        model = factory(**arguments)
    except ModelError:
        raise
    except (Exception, SystemExit) as error:
        raise ModelError(f"model {spec!r}: the factory failed: {one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"model {spec!r}: the factory returned {type(model).__name__}, not a torch.nn.Module")
    return model


@contextmanager
def current_folder_importable() -> Iterator[None]:
    """The block can import modules of the current folder."""
    # At the end of the path, so that a file in the current folder never hides an installed package.
    folder = os.getcwd()
    sys.path.append(folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        # A module that prepended the same folder itself keeps its entry: ours is the last one.
        for position in reversed(range(len(sys.path))):
            if sys.path[position] == folder:
                del sys.path[position]
                break


def one_line(error: BaseException) -> str:
    """An error's kind and message on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def not_installed(spec: str, package: str, error: ImportError, extra: str) -> ModelError:
    """The error for a model of a library that is absent; anything else that its import raises is passed on.

    The command names the installed torch, so that pip takes the other packages' versions for it and leaves it alone.
    """
    if error.name != package:
        return ModelError(f"model {spec!r}: importing {package} failed: {one_line(error)}")
    torch_version = torch.__version__.partition("+")[0]
    return ModelError(
        f"model {spec!r}: {package} is not installed; run pip install 'isthmus[{extra}]' torch=={torch_version}"
    )
