"""What each operation does to labels: one file an operation family, one literal table of them all."""

import torch
from torch._ops import OpOverload

from isthmus.trace.execute import Rule
from isthmus.trace.rules.attention import ATTENTION
from isthmus.trace.rules.constant import CONSTANTS
from isthmus.trace.rules.contraction import CONTRACTIONS
from isthmus.trace.rules.lookup import LOOKUPS
from isthmus.trace.rules.normalisation import NORMALISATIONS
from isthmus.trace.rules.pointwise import POINTWISE
from isthmus.trace.rules.reduction import REDUCTIONS
from isthmus.trace.rules.spatial import SPATIAL
from isthmus.trace.rules.view import VIEWS

RULES: dict[str, Rule] = {
    **ATTENTION,
    **CONSTANTS,
    **CONTRACTIONS,
    **NORMALISATIONS,
    **POINTWISE,
    **REDUCTIONS,
    **SPATIAL,
    **VIEWS,
    **LOOKUPS,
}


def is_pointwise(op: OpOverload) -> bool:
    """Whether torch itself declares that an operation works element by element."""
    return torch.Tag.pointwise in op.tags
