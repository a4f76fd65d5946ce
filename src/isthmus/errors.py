"""Every deliberate exception, and checks of arguments. A message is one line: what is wrong, where, what to do."""

from collections.abc import Mapping

from torch import Tensor, nn

LONGEST_SHOWN = 40  # characters of a text that a message repeats


class IsthmusError(Exception):
    """Base of all deliberate errors; the command line prints its message and exits with code 2."""


class InputError(IsthmusError, ValueError):
    """An argument or option cannot be used as given."""


class SymmetryError(IsthmusError):
    """A symmetry does not fit the model, or a transform built from it changes the model's function."""


class TraceError(IsthmusError):
    """The model could not be captured as a graph."""


class TransformError(IsthmusError):
    """A transform does not fit its space, or cannot act exactly where it was asked to."""


class ModelError(IsthmusError):
    """A model or its state dict cannot be used: unknown name, other architecture, wrong shape, NaN weight."""


class DataError(IsthmusError):
    """A data set is missing, empty, of the wrong shape, or can be read only once."""


class CheckpointError(IsthmusError):
    """A file or run folder cannot be read or written safely."""


def check_kind(value: object, kind: type | tuple[type, ...], name: str, advice: str) -> None:
    """Refuses an argument that is of another kind.

    Args:
        value: What was given.
        kind: What it must be an instance of.
        name: The argument's name.
        advice: What to give.

    Raises:
        InputError: It is of another kind.
    """
    if not isinstance(value, kind):
        raise InputError(f"{name} is {kind_of(value)}: {advice}")


def check_whole(value: object, name: str) -> None:
    """Refuses a number that is not whole, and what is no number.

    Raises:
        InputError: It is.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InputError(f"{name}={value!r}: give a whole number")


def check_seed(seed: object) -> None:
    """Refuses what seeds no generator.

    Raises:
        InputError: It is not a whole number, or is below 0.
    """
    check_whole(seed, "seed")
    if isinstance(seed, int) and seed < 0:
        raise InputError(f"seed={seed}: give 0 or more")


def kind_of(value: object) -> str:
    """What a value is, in words: `a Tensor of shape (2, 3)`, `a list of 2`, `the text 'x'`, `the class CCA`."""
    if value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, str):
        return f"the text {value if len(value) <= LONGEST_SHOWN else value[:LONGEST_SHOWN] + '…'!r}"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, Tensor):
        return f"a Tensor of shape {tuple(value.shape)}"
    name = type(value).__name__
    if isinstance(value, nn.Module):
        return f"a model ({name})"
    length = f" of {len(value)}" if isinstance(value, list | tuple | set | frozenset | Mapping) else ""
    return f"{'an' if name[:1] in 'AEIOUaeiou' else 'a'} {name}{length}"
