"""Matching methods by name, and `align`, which runs one.

A method is one file with a frozen dataclass, and one line in `methods.py`.
"""

from isthmus.match.activation_matching import ActivationMatching
from isthmus.match.aligning import METHODS, align
from isthmus.match.auto import Auto
from isthmus.match.base import Match, MatchingProblem
from isthmus.match.c2m3 import C2M3
from isthmus.match.cca import CCA
from isthmus.match.identity import Identity
from isthmus.match.learned import Learned
from isthmus.match.mudsc import MuDSC
from isthmus.match.orthogonal_matching import OrthogonalMatching
from isthmus.match.ot_fusion import OTFusion
from isthmus.match.procrustes import Procrustes
from isthmus.match.sinkhorn import Sinkhorn
from isthmus.match.straight_through import StraightThrough
from isthmus.match.subset_selection import SubsetSelection
from isthmus.match.weight_matching import WeightMatching
from isthmus.match.zipit import ZipIt

__all__ = [
    "C2M3",
    "CCA",
    "METHODS",
    "ActivationMatching",
    "Auto",
    "Identity",
    "Learned",
    "Match",
    "MatchingProblem",
    "MuDSC",
    "OTFusion",
    "OrthogonalMatching",
    "Procrustes",
    "Sinkhorn",
    "StraightThrough",
    "SubsetSelection",
    "WeightMatching",
    "ZipIt",
    "align",
]
