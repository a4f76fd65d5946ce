"""Matching methods by name, and `align`, which runs one.

A method is one file with a frozen dataclass, and one line in `methods.py`, whose names are all taken over here.
"""

from isthmus.match.aligning import METHODS as METHODS
from isthmus.match.aligning import align as align
from isthmus.match.auto import Auto as Auto
from isthmus.match.base import Match as Match
from isthmus.match.base import MatchingProblem as MatchingProblem
from isthmus.match.methods import *  # noqa: F403 (one line a method)
from isthmus.match.pairwise import PairwiseMethod as PairwiseMethod
