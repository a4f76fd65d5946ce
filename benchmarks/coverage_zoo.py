"""The tests' own networks, one structure each, for `coverage.py --source zoo`."""

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from coverage import Case


def cases() -> Iterator[Case]:
    """All of tests/zoo.py."""
    from zoo import ZOO, built

    for name in ZOO:
        args, kwargs = built(name).inputs()
        yield Case(name, lambda name=name: built(name), args, kwargs, family=name)
