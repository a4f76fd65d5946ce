"""Joins independently trained networks into one: trace, align, merge, repair, connect, explain."""

from isthmus import average, explain, match
from isthmus.average import AVERAGES
from isthmus.checkpoint import load_module, save_state
from isthmus.data import load_data
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
from isthmus.match import METHODS, align
from isthmus.measure.compare import Comparison, Row, compare
from isthmus.measure.connect import Curve, connect
from isthmus.measure.cycles import CycleError, cycle_error, pairwise_barriers
from isthmus.measure.simplex import Plane, Simplex, walk_plane, walk_simplex
from isthmus.merging.fold import fold_batch_norms, fold_norm_gains
from isthmus.merging.merge import merge
from isthmus.merging.repair import repair
from isthmus.models import load_model
from isthmus.observe.collect import collect
from isthmus.observe.moments import Moments
from isthmus.observe.score import Score, evaluate
from isthmus.partial_merging.module import PartialZip
from isthmus.partial_merging.zip import partial_zip
from isthmus.symmetry import (
    Alignment,
    Frozen,
    Gain,
    Gauge,
    Group,
    LinearMap,
    Permutation,
    Site,
    Space,
    Symmetry,
    apply,
    canonicalise,
    keeps_function,
)
from isthmus.tracing.proof import Proof, verify
from isthmus.tracing.trace import trace

__version__: str

__all__ = [
    "AVERAGES",
    "METHODS",
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
    "__version__",
    "align",
    "apply",
    "average",
    "canonicalise",
    "collect",
    "compare",
    "connect",
    "cycle_error",
    "evaluate",
    "explain",
    "fold_batch_norms",
    "fold_norm_gains",
    "keeps_function",
    "load_data",
    "load_model",
    "load_module",
    "match",
    "merge",
    "pairwise_barriers",
    "partial_zip",
    "repair",
    "save_state",
    "trace",
    "verify",
    "walk_plane",
    "walk_simplex",
]


def __getattr__(name: str) -> str:
    """`__version__`, read when it is asked for: the code also runs from a folder that no installer knows."""
    if name != "__version__":
        raise AttributeError(f"module 'isthmus' has no attribute {name!r}")
    from importlib.metadata import version

    return version("isthmus")
