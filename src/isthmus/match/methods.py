"""All matching methods by name but `auto`, which chooses among them."""

from isthmus.match.activation_matching import ActivationMatching
from isthmus.match.base import Match
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

CANDIDATES: dict[str, type[Match]] = {
    "identity": Identity,
    "weight_matching": WeightMatching,
    "activation_matching": ActivationMatching,
    "cca": CCA,
    "procrustes": Procrustes,
    "orthogonal_matching": OrthogonalMatching,
    "mudsc": MuDSC,
    "subset_selection": SubsetSelection,
    "c2m3": C2M3,
    "ste": StraightThrough,
    "sinkhorn": Sinkhorn,
    "learned": Learned,
    "ot_fusion": OTFusion,
    "zipit": ZipIt,
}
