"""Joins independently trained networks into one: trace, align, merge, repair, connect, explain."""

from isthmus import average, match
from isthmus.compare import Comparison, Row, compare
from isthmus.connect import Curve, connect
from isthmus.cycles import CycleError, cycle_error, pairwise_barriers
from isthmus.errors import (
    CheckpointError,
    DataError,
    InputError,
    IsthmusError,
    ModelError,
    SymmetryError,
    TraceError,
    TransformError,
)
from isthmus.fold import fold_batch_norms, fold_norm_gains
from isthmus.gauges import canonicalise
from isthmus.groups import keeps_function
from isthmus.match import align
from isthmus.merge import merge
from isthmus.moments import Moments, collect
from isthmus.partial_zip import PartialZip, partial_zip
from isthmus.repair import repair
from isthmus.score import Score, evaluate
from isthmus.simplex import Plane, Simplex, walk_plane, walk_simplex
from isthmus.symmetry import Frozen, Gain, Gauge, Group, Site, Space, Symmetry
from isthmus.trace import Proof, trace, verify
from isthmus.transform import Alignment, LinearMap, Permutation, apply

__all__ = [
    "Alignment",
    "CheckpointError",
    "Comparison",
    "Curve",
    "CycleError",
    "DataError",
    "Frozen",
    "Gain",
    "Gauge",
    "Group",
    "InputError",
    "IsthmusError",
    "LinearMap",
    "ModelError",
    "Moments",
    "PartialZip",
    "Permutation",
    "Plane",
    "Proof",
    "Row",
    "Score",
    "Simplex",
    "Site",
    "Space",
    "Symmetry",
    "SymmetryError",
    "TraceError",
    "TransformError",
    "align",
    "apply",
    "average",
    "canonicalise",
    "collect",
    "compare",
    "connect",
    "cycle_error",
    "evaluate",
    "fold_batch_norms",
    "fold_norm_gains",
    "keeps_function",
    "match",
    "merge",
    "pairwise_barriers",
    "partial_zip",
    "repair",
    "trace",
    "verify",
    "walk_plane",
    "walk_simplex",
]
