"""Configured objects from a table of names: one error message for every misspelling."""

import dataclasses
import difflib
import inspect
import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from isthmus.errors import InputError, kind_of

T = TypeVar("T")


def table_of(base: type[T], names: Mapping[str, object]) -> dict[str, type[T]]:
    """All finished classes of a kind among a module's names, by the `name` that each bears, in order.

    Args:
        base: What they have in common; it is none of them, nor is any other class with abstract methods.
        names: The module's `globals()`.
    """
    found: dict[str, type[T]] = {}
    for each in names.values():
        if inspect.isclass(each) and issubclass(each, base) and not inspect.isabstract(each):
            found[getattr(each, "name")] = each  # noqa: B009 (that it has one is a law of the base)
    return found


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
    check_choice(kind, name, table)
    chosen: Any = table[name]
    known = [field.name for field in dataclasses.fields(chosen)]
    for option in options or {}:
        if option not in known:
            raise InputError(
                f"{name} has no option {option!r}{did_you_mean(option, known)}: it has {', '.join(known) or 'none'}"
            )
    return chosen(**(options or {}))


def configure_text(kind: str, text: str, table: Mapping[str, type[T]]) -> T:
    """The object of a text such as `cca` or `orthogonal_matching?start=activations&restarts=1`.

    Each value is JSON, or else a string.

    Raises:
        InputError: No such name, no such option, or one without a value.
    """
    name, _, query = text.partition("?")
    options: dict[str, Any] = {}
    for item in query.split("&") if query else ():
        key, equals, value = item.partition("=")
        if not equals or key in options:
            raise InputError(f"{kind} {text!r}: {item!r} is not a new key=value; write NAME?key=value&other=value")
        options[key.strip().replace("-", "_")] = parse_value(value)
    return configure(kind, name, table, options)


def parse_value(text: str) -> Any:
    """JSON, or else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def spell(configured: Any) -> str:
    """The text that `configure_text` reads: a configured object's name, and its options that are not the usual ones."""
    fields = dataclasses.fields(configured) if dataclasses.is_dataclass(configured) else ()
    changed = [
        f"{field.name}={value if isinstance(value, str) else json.dumps(value, default=repr)}"
        for field in fields
        if field.init and (value := getattr(configured, field.name)) != _usual_value(field)
    ]
    name: str = getattr(configured, "name")  # noqa: B009 (narrowed to a dataclass, which need not have one)
    return name + ("?" + "&".join(changed) if changed else "")


def _usual_value(field: dataclasses.Field[Any]) -> Any:
    """An option's default."""
    return field.default_factory() if callable(field.default_factory) else field.default


def check_choice(kind: str, name: object, known: Iterable[str]) -> None:
    """Refuses a name that is not among the known ones.

    Args:
        kind: What is chosen, for the message.
        name: What was given.
        known: The names to choose from.

    Raises:
        InputError: It is no text, or an unknown name.
    """
    names = list(known)
    if not isinstance(name, str):
        raise InputError(f"the {kind} is {kind_of(name)}: choose from {', '.join(names)}")
    if name not in names:
        raise InputError(f"no {kind} {name!r}{did_you_mean(name, names)}: choose from {', '.join(names)}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint at the nearest known name, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
