"""Arguments of the wrong kind: one line that says what was given, and what to give."""

from isthmus.errors import InputError
from isthmus.wording import kind_of

__all__ = ["check_kind", "check_seed", "check_whole", "kind_of"]


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
