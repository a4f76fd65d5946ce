"""The table of matching methods: one line a method, in the order in which they are listed.

A line imports a method's class under its own name. That is all there is to enter: `CANDIDATES` is made of the classes
that stand here, by their `name`; `isthmus.match` takes its names from here; `auto` and the laws go through the table.
`auto` itself, which chooses among these, is added in `aligning.py`.
"""
# ruff: noqa: I001 (the order of the lines is the order of the table)

from isthmus.match.base import Match
from isthmus.registry import table_of

from isthmus.match.identity import Identity as Identity
from isthmus.match.weight_matching import WeightMatching as WeightMatching
from isthmus.match.activation_matching import ActivationMatching as ActivationMatching
from isthmus.match.cca import CCA as CCA
from isthmus.match.procrustes import Procrustes as Procrustes
from isthmus.match.orthogonal_matching import OrthogonalMatching as OrthogonalMatching
from isthmus.match.mudsc import MuDSC as MuDSC
from isthmus.match.subset_selection import SubsetSelection as SubsetSelection
from isthmus.match.c2m3 import C2M3 as C2M3
from isthmus.match.ste import STE as STE
from isthmus.match.sinkhorn import Sinkhorn as Sinkhorn
from isthmus.match.learned import Learned as Learned
from isthmus.match.ot_fusion import OTFusion as OTFusion
from isthmus.match.zipit import ZipIt as ZipIt

CANDIDATES: dict[str, type[Match]] = table_of(Match, globals())
