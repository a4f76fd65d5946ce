"""Configured objects from a table of names: one error message for every misspelling."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from isthmus.errors import InputError

T = TypeVar("T")


def configure(kind: str, name: str, table: Mapping[str, type[T]], options: Mapping[str, Any] | None = None) -> T:
    """The object of that name, with its options set.

    Args:
        kind: What the table holds, for the message.
        name: A key of the table.
        table: Frozen dataclasses by name.
        options: Values of the dataclass's fields.

    Raises:
        InputError: No such name, or no such option.
    """
    if name not in table:
        raise InputError(f"no {kind} {name!r}{did_you_mean(name, table)}: choose from {', '.join(table)}")
    chosen: Any = table[name]
    known = [field.name for field in dataclasses.fields(chosen)]
    for option in options or {}:
        if option not in known:
            raise InputError(
                f"{name} has no option {option!r}{did_you_mean(option, known)}: it has {', '.join(known) or 'none'}"
            )
    return chosen(**(options or {}))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint at the nearest known name, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
