"""What may move: spaces, and every place where a tensor touches one."""

import enum
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from isthmus.errors import SymmetryError
from isthmus.wording.short import counted, shortened, told, told_by_fields


class Group(enum.Enum):
    """How much may be done to a space's units without changing the function, from least to most."""

    PERMUTATION = "permutation"
    ORTHOGONAL_FIXING_ONES = "orthogonal fixing ones"
    ORTHOGONAL = "orthogonal"
    INVERTIBLE = "invertible"


ROLES = ("vector", "covector", "variance", "diagonal")


@dataclass(frozen=True, eq=False)
class Site:
    """Where a tensor touches a space.

    Attributes:
        parameter: Name of the parameter or buffer in the state dict.
        dims: The tensor's dimensions that the space's units lie along; usually one.
        positions: Indices into the flattened `dims`: entry `[c, i, r]` is the r-th place of unit i of copy c.
        role: `"vector"` moves with T, `"covector"` with T⁻¹, `"variance"` is permuted and undefined under other maps;
            `"diagonal"` is a norm's gain, a diagonal matrix D that moves to T D T⁻¹: permuted, kept by a linear map if
            its entries are all equal, and else to be folded into its consumers first.
    """

    parameter: str
    dims: tuple[int, ...]
    positions: Int[np.ndarray, "copies size repeat"]
    role: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise SymmetryError(f"role {self.role!r} of {self.parameter}: use one of {', '.join(ROLES)}")

    def __repr__(self) -> str:
        copies, size, repeat = self.positions.shape
        dims = ", ".join(map(str, self.dims))
        places = f"{repeat} places each" if repeat > 1 else None
        return told(self, f"{shortened(self.parameter)} along {dims}", self.role, f"{copies} × {size} units", places)


@dataclass(frozen=True, eq=False)
class Space:
    """A hidden axis whose units may be re-labelled: every permutation of it keeps the network's function.

    Attributes:
        name: The module that produces the units, made unique.
        size: Units in one copy.
        group: The largest group known to keep the function.
        sites: Every place where a parameter or buffer touches the space.
        parent: Name of the space whose units are this space's copies (heads of head units), or None.
        copies: Independent copies, each with its own permutation; 1 unless the space is nested.
    """

    name: str
    size: int
    group: Group
    sites: tuple[Site, ...]
    parent: str | None = None
    copies: int = 1

    def __repr__(self) -> str:
        units = f"{self.copies} × {self.size} units" if self.copies > 1 else counted(self.size, "unit")
        parent = f"inside {shortened(self.parent)}" if self.parent is not None else None
        return told(self, shortened(self.name), units, self.group.value, parent, counted(len(self.sites), "site"))


@dataclass(frozen=True)
class Consumer:
    """A product with a parameter that reads a normalised value, so that it can take in the norm's gain.

    Attributes:
        weight: The parameter, which nothing else reads.
        dim: Its dimension that the product sums over.
        bias: The bias that is added to the product and can take in the norm's shift; None where there is none.
    """

    weight: str
    dim: int
    bias: str | None = None

    __repr__ = told_by_fields


@dataclass(frozen=True)
class Gain:
    """A norm's gain, one factor a unit: `offset + parameter`.

    Attributes:
        parameter: The tensor.
        offset: What is added to it before it multiplies: 0, or 1 where zero stands for no gain.
        bias: The shift that is added behind the gain, or None.
        consumers: All that reads the product, where the gain can be folded into it.
        obstacle: Why the gain cannot be folded; empty where it can.
    """

    parameter: str
    offset: float = 0.0
    bias: str | None = None
    consumers: tuple[Consumer, ...] = ()
    obstacle: str = ""

    def __repr__(self) -> str:
        readers = f"folds into {counted(len(self.consumers), 'consumer')}"
        fate = f"cannot be folded: {shortened(self.obstacle, 80)}" if self.obstacle else readers
        return told(self, shortened(self.parameter), fate)


@dataclass(frozen=True, eq=False)
class Gauge:
    """A freedom of single units, or of pairs, that is no permutation.

    What writes a unit may be multiplied by a factor, and what reads it divided by it. Pairs of units of queries that
    rotary positions turn may be turned and scaled; pairs of keys are then turned alike, and divided by the scale.

    Attributes:
        space: Name of the space whose units these are; of pairs, which are in no space, a name of their own.
        kind: `"sign"`, factors of 1 and −1, `"scale"`, positive ones, or `"rotation"`, of pairs.
        sites: Where tensors hold pairs, positions of shape [heads, pairs, 2 · members]; queries have the role "vector"
            and keys "covector". Empty for gauges of single units.
    """

    space: str
    kind: str
    sites: tuple[Site, ...] = ()

    def __repr__(self) -> str:
        return told(self, shortened(self.space), self.kind)


@dataclass(frozen=True)
class Frozen:
    """Units that cannot move, and why.

    Attributes:
        parameter: The tensor whose units these are.
        dim: Its dimension, or the dimensions joined by a comma.
        units: How many of its units are frozen.
        operation: The operation that froze them, or "" for an input, an output or a structural reason.
        module: Path of the module in which that operation runs.
        reason: One sentence.
        expected: False where an operation without a rule, or an irregular pattern, lost symmetry.
    """

    parameter: str
    dim: str
    units: int
    operation: str
    module: str
    reason: str
    expected: bool = True

    def __repr__(self) -> str:
        lost = None if self.expected else "lost to tracing"
        place = f"{shortened(self.parameter)} along {self.dim}"
        return told(self, place, counted(self.units, "unit"), lost, shortened(self.reason, 80))
