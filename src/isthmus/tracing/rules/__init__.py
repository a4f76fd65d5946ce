"""What each operation does to labels: one file an operation family, one literal table of them all."""

import torch
from torch._ops import OpOverload

from isthmus.tracing.choices import apply_to_alternatives
from isthmus.tracing.execute import Rule, Rules
from isthmus.tracing.rules.attention import ATTENTION
from isthmus.tracing.rules.constant import CONSTANTS
from isthmus.tracing.rules.contraction import CONTRACTIONS
from isthmus.tracing.rules.lookup import LOOKUPS, index
from isthmus.tracing.rules.normalisation import NORMALISATIONS
from isthmus.tracing.rules.pointwise import POINTWISE, unchanged
from isthmus.tracing.rules.recurrent import RECURRENT
from isthmus.tracing.rules.reduction import REDUCTIONS
from isthmus.tracing.rules.spatial import SPATIAL
from isthmus.tracing.rules.view import VIEWS, run_on_labels
from isthmus.tracing.writes import mutate

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
KEEPING_INDICES = frozenset({run_on_labels, unchanged, index})


def _is_pointwise(op: OpOverload) -> bool:
    """Whether torch itself declares that an operation works element by element."""
    return torch.Tag.pointwise in op.tags


RULES = Rules(TABLE, _is_pointwise, mutate, apply_to_alternatives, KEEPING_INDICES)
