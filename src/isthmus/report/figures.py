"""Numbers and names as a reader wants to see them; what was not measured is a dash that is also read out."""

import math
from datetime import datetime
from typing import Any

from markupsafe import Markup

ABSENT = Markup('<span aria-hidden="true">–</span><span class="hidden">not measured</span>')
NARROW = "\N{NARROW NO-BREAK SPACE}"
LONGEST = 200  # letters of a name that are shown


class Facts(dict[str, Any]):
    """A JSON object in which a missing key reads as null: every part of a report may be absent."""

    def __missing__(self, key: str) -> None:
        """Nothing is known about the key."""
        return


def clean(value: Any, longest: int = LONGEST) -> Any:
    """A JSON value whose texts are short and hold no control, direction-changing or half characters.

    Names come from files that nobody vouches for; escaping is the template's task.
    """
    if isinstance(value, str):
        cut = value[:longest] + "…" if len(value) > longest else value
        if cut.isprintable():
            return cut
        return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in cut)
    if isinstance(value, dict):
        long = ("command", "verdict", "text", "figure", "threshold")
        return Facts({clean(key): clean(item, 10_000 if key in long else longest) for key, item in value.items()})
    return [clean(item, longest) for item in value] if isinstance(value, list) else value


def finite_number(value: Any) -> float | None:
    """The number, or None for null, NaN, infinity and what is no number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def signed(text: str) -> str:
    """The number with a minus sign instead of a hyphen; a negative zero loses its sign."""
    if text.startswith("-"):
        return "\N{MINUS SIGN}" + text[1:] if any(c in "123456789" for c in text) else text[1:]
    return text


def decimal(value: Any, digits: int = 4) -> str:
    """A number with `digits` decimals; with fewer from a thousand on."""
    number = finite_number(value)
    if number is None:
        return ABSENT
    if abs(number) >= 1e6:
        return power(number)
    return signed(f"{number:,.{digits}f}" if abs(number) < 1000 else f"{number:,.{min(digits, 1)}f}")


def percent(value: Any, digits: int = 1) -> str:
    """A share as a percentage; it reads 100 only if it is the whole."""
    number = finite_number(value)
    if number is None:
        return ABSENT
    return signed(f"{_shown(number * 100, digits)}{NARROW}%")


def _shown(number: float, digits: int) -> str:
    """The percentage with `digits` decimals, rounded towards 50 where it would read 0 or 100 and is not."""
    text = f"{number:.{digits}f}"
    step = 10**-digits
    if number < 100 and float(text) >= 100:
        return f"{100 - step:.{digits}f}"
    if number > 0 and float(text) == 0:
        return f"{step:.{digits}f}"
    return text


def points(value: Any, digits: int = 1) -> str:
    """A difference of shares in percentage points, without the unit."""
    number = finite_number(value)
    return ABSENT if number is None else signed(f"{number * 100:.{digits}f}")


def whole(value: Any) -> str:
    """A count with separators between the thousands."""
    number = finite_number(value)
    return ABSENT if number is None else signed(f"{number:,.0f}")


def power(value: Any) -> str:
    """A number as 2.9 × 10⁻¹⁶; between 0.001 and 1,000 as a plain decimal with two significant digits."""
    number = finite_number(value)
    if number is None:
        return "infinite" if isinstance(value, float) and math.isinf(value) else ABSENT
    if number == 0:
        return "0"
    if 1e-3 <= abs(number) < 1e3:
        return signed(f"{number:.2g}" if abs(number) < 10 else f"{number:.0f}")
    mantissa, exponent = f"{number:.1e}".split("e")
    return Markup("{}{}×{}10<sup>{}</sup>").format(signed(mantissa), NARROW, NARROW, signed(str(int(exponent))))


def duration(value: Any) -> str:
    """Seconds as a reader says them: 0.01 s, 12.3 s, 4 min 12 s, 2 h 5 min."""
    number = finite_number(value)
    if number is None:
        return ABSENT
    if number < 0.01:
        return f"under 0.01{NARROW}s"
    if number < 59.95:
        return f"{number:.2f}{NARROW}s" if number < 1 else f"{number:.1f}{NARROW}s"
    minutes, seconds = divmod(round(number), 60)
    if minutes < 60:
        return f"{minutes}{NARROW}min {seconds}{NARROW}s"
    return f"{minutes // 60}{NARROW}h {minutes % 60}{NARROW}min"


def moment(value: Any) -> str:
    """An ISO time as 20 November 2026, 12:00 UTC; anything else as it is."""
    if not isinstance(value, str):
        return ABSENT
    try:
        time = datetime.fromisoformat(value)
    except ValueError:
        return value
    zone = f" {time.tzname()}" if time.tzinfo else ""
    month = MONTHS[time.month - 1]  # not strftime's: it speaks the locale's language
    return f"{time.day} {month} {time.year}, {time.hour:02}:{time.minute:02}{zone}"


MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip


def plural(count: int, one: str, many: str | None = None) -> str:
    """A count and its noun: 1 axis, 3 axes."""
    return f"{whole(count)} {one if count == 1 else many or one + 's'}"
