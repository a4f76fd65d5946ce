"""What each operation does to labels: one file an operation family, one literal table of them all."""

import torch
from torch._ops import OpOverload

from isthmus.trace.choices import spread
from isthmus.trace.execute import Rule, Rules
from isthmus.trace.rules.attention import ATTENTION
from isthmus.trace.rules.constant import CONSTANTS
from isthmus.trace.rules.contraction import CONTRACTIONS
from isthmus.trace.rules.lookup import LOOKUPS, index
from isthmus.trace.rules.normalisation import NORMALISATIONS
from isthmus.trace.rules.pointwise import POINTWISE, unchanged
from isthmus.trace.rules.recurrent import RECURRENT
from isthmus.trace.rules.reduction import REDUCTIONS
from isthmus.trace.rules.spatial import SPATIAL
from isthmus.trace.rules.view import VIEWS, run
from isthmus.trace.writes import mutate

TABLE: dict[str, Rule] = {
    **ATTENTION,
    **CONSTANTS,
    **CONTRACTIONS,
    **NORMALISATIONS,
    **POINTWISE,
    **RECURRENT,
    **REDUCTIONS,
    **SPATIAL,
    **VIEWS,
    **LOOKUPS,
}


# Of indices that `topk` found, only these may be made without reading what they are.
KEEPING_INDICES = frozenset({run, unchanged, index})


def is_pointwise(op: OpOverload) -> bool:
    """Whether torch itself declares that an operation works element by element."""
    return torch.Tag.pointwise in op.tags


RULES = Rules(TABLE, is_pointwise, mutate, spread, KEEPING_INDICES)
