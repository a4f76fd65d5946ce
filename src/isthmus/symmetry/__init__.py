"""What may move in a network, and how it moves."""

from isthmus.symmetry.alignment import Alignment, apply
from isthmus.symmetry.gauges import canonicalise
from isthmus.symmetry.groups import keeps_function
from isthmus.symmetry.spaces import Consumer, Frozen, Gain, Gauge, Group, Site, Space
from isthmus.symmetry.symmetry import Symmetry
from isthmus.symmetry.transform import LinearMap, Permutation

__all__ = [
    "Alignment",
    "Consumer",
    "Frozen",
    "Gain",
    "Gauge",
    "Group",
    "LinearMap",
    "Permutation",
    "Site",
    "Space",
    "Symmetry",
    "apply",
    "canonicalise",
    "keeps_function",
]
