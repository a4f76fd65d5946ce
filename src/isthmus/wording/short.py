"""How objects are told in short: one line of at most 200 characters that never holds whole arrays."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor, nn

# Characters of a whole line, of a name in it, and of a sentence in it.
LONGEST_LINE, LONGEST_NAME, LONGEST_TEXT = 200, 40, 60


def shortened(text: str, longest: int = LONGEST_NAME) -> str:
    """The text with its middle left out, where it is longer: both ends of a dotted path tell most."""
    if len(text) <= longest:
        return text
    front = (longest - 1) // 2
    return f"{text[:front]}…{text[len(text) - (longest - 1 - front) :]}"


def counted(count: int, noun: str, plural: str = "") -> str:
    """A number and what it counts: `1 space`, `2,880 units`."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def figure(value: float | None) -> str:
    """A number in four digits, or all before the point."""
    if value is None:
        return "None"
    return f"{value:,.1f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def told(item: object, *facts: str | None) -> str:
    """`Name(fact, fact)`, in at most 200 characters; facts that are None are left out.

    Args:
        item: The object, whose class gives the name.
        facts: What to say, the most telling first.
    """
    name = type(item).__name__
    text = f"{name}({', '.join(fact for fact in facts if fact is not None)})"
    return text if len(text) <= LONGEST_LINE else f"{text[: LONGEST_LINE - 2]}…)"


def told_by_fields(self: object) -> str:
    """`Name(field=value, …)` of a dataclass, in at most 200 characters: arrays by their shapes, lists by their lengths.

    Fields that are at their default are left out. For use as `__repr__`.
    """
    assert dataclasses.is_dataclass(self)
    shown: list[str] = []
    for field in dataclasses.fields(self):
        value: object = getattr(self, field.name)
        if field.repr and not _is_default(field, value):
            shown.append(f"{field.name}={_in_short(value)}")
    return told(self, *shown)


def _is_default(field: "dataclasses.Field[object]", value: object) -> bool:
    """Whether a plain value is the field's default; an array never is."""
    usual = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    if isinstance(value, Tensor | np.ndarray) or type(value) is not type(usual):
        return False
    return bool(value == usual)


def _in_short(value: object) -> str:
    """A value in a few characters."""
    if isinstance(value, Tensor | np.ndarray):
        return f"{type(value).__name__}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, str):
        return repr(shortened(value, LONGEST_TEXT))
    if isinstance(value, float):
        return figure(value)
    if isinstance(value, nn.Module):
        return type(value).__name__
    if isinstance(value, Mapping | Sequence | set | frozenset):
        return _list_in_short(value)
    return shortened(repr(value), LONGEST_TEXT)


def _list_in_short(value: "Mapping[object, object] | Sequence[object] | set[object] | frozenset[object]") -> str:
    """Three plain values or fewer as they are, more by their number."""
    plain = isinstance(value, tuple | list) and all(isinstance(each, str | float | int | None) for each in value)
    if plain and len(value) <= 3:
        inner = ", ".join(_in_short(each) for each in value)
        return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
    return f"<{counted(len(value), 'item')}>"
