"""Matching methods by name, and `align`, which runs one.

A method is one file with a frozen dataclass, and one line in `methods.py`, whose names are all taken over here.
"""

from isthmus.match.aligning import METHODS, align
from isthmus.match.auto import Auto as Auto
from isthmus.match.base import Match, MatchingProblem
from isthmus.match.methods import *  # noqa: F403 (one line a method)

__all__ = ["METHODS", "Match", "MatchingProblem", "align"]
__all__ += [method.__name__ for method in METHODS.values()]  # pyright: ignore[reportUnsupportedDunderAll]
