"""What a network's symmetry is: its spaces, and every place where a tensor touches one."""

import dataclasses
import enum
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int

from isthmus.errors import SymmetryError


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


@dataclass(frozen=True, eq=False)
class Gauge:
    """A freedom of single units, or of pairs, that is no permutation.

    What writes a unit may be multiplied by a factor, and what reads it divided by it. Pairs of units of queries that
    rotary positions turn may be turned and scaled; those of keys are then turned alike, and divided by the scale.

    Attributes:
        space: Name of the space whose units these are; of pairs, which are in no space, a name of their own.
        kind: `"sign"`, factors of 1 and −1, `"scale"`, positive ones, or `"rotation"`, of pairs.
        sites: Of pairs: where tensors hold them, [heads, pairs, 2 · members]; queries have the role "vector" and keys
            "covector".
    """

    space: str
    kind: str
    sites: tuple[Site, ...] = ()


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


@dataclass(frozen=True, eq=False)
class Symmetry:
    """All spaces of a model, parents before their children.

    Attributes:
        spaces: Only what can move; inputs, outputs and frozen axes are absent.
        frozen: What cannot move, with reasons.
        shapes: Shape of every tensor of the state dict.
        tied: Names that are a second name of another tensor, mapped to that tensor's first name.
        untouched: Floating-point tensors that no traced operation reads.
        gains: The gains of norms, and whether their consumers can take them in.
        gauges: Signs and scales that single units are free to take, and turns of pairs of units.
        program: The captured graph, from which activations are read; None after loading from JSON.
    """

    spaces: tuple[Space, ...]
    frozen: tuple[Frozen, ...]
    shapes: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str] = field(default_factory=dict)
    untouched: tuple[str, ...] = ()
    gains: tuple[Gain, ...] = ()
    gauges: tuple[Gauge, ...] = ()
    program: Any = field(default=None, repr=False)

    def __getitem__(self, name: str) -> Space:
        for space in self.spaces:
            if space.name == name:
                return space
        raise SymmetryError(f"no space {name!r}: the spaces are {', '.join(s.name for s in self.spaces) or 'none'}")

    def __iter__(self) -> Iterator[Space]:
        return iter(self.spaces)

    def __len__(self) -> int:
        return len(self.spaces)

    def children(self, space: Space) -> tuple[Space, ...]:
        """The spaces nested directly inside `space`."""
        return tuple(child for child in self.spaces if child.parent == space.name)

    def tie(self, state: dict[str, Any]) -> None:
        """Gives every second name in a state the tensor of the first name, in place."""
        for alias, name in self.tied.items():
            if alias in state:
                state[alias] = state[name]

    @property
    def free_units(self) -> int:
        """Number of units that can move, all copies counted."""
        return sum(space.copies * space.size for space in self.spaces)

    @property
    def sites(self) -> dict[str, list[tuple[Space, Site]]]:
        """Every touched tensor's sites, parents before children."""
        found: dict[str, list[tuple[Space, Site]]] = {}
        for space in self.spaces:
            for site in space.sites:
                found.setdefault(site.parameter, []).append((space, site))
        return found

    def to_json(self) -> str:
        """The symmetry without its graph, as JSON text; the same symmetry gives the same text."""
        return json.dumps(
            {
                "spaces": [
                    {
                        "name": space.name,
                        "size": space.size,
                        "copies": space.copies,
                        "parent": space.parent,
                        "group": space.group.value,
                        "sites": [encode_site(site) for site in space.sites],
                    }
                    for space in self.spaces
                ],
                "frozen": [vars(item) for item in self.frozen],
                "shapes": {name: list(shape) for name, shape in self.shapes.items()},
                "tied": dict(self.tied),
                "untouched": list(self.untouched),
                "gains": [dataclasses.asdict(gain) for gain in self.gains],
                "gauges": [
                    {**vars(gauge), "sites": [encode_site(site) for site in gauge.sites]} for gauge in self.gauges
                ],
            },
            sort_keys=True,
        )

    @staticmethod
    def from_json(text: str) -> "Symmetry":
        """The symmetry written by `to_json`.

        Raises:
            SymmetryError: The text is not a symmetry.
        """
        try:
            data = json.loads(text)
            spaces = tuple(
                Space(
                    name=space["name"],
                    size=space["size"],
                    copies=space["copies"],
                    parent=space["parent"],
                    group=Group(space["group"]),
                    sites=tuple(decode_site(site) for site in space["sites"]),
                )
                for space in data["spaces"]
            )
            return Symmetry(
                spaces=spaces,
                frozen=tuple(Frozen(**item) for item in data["frozen"]),
                shapes={name: tuple(shape) for name, shape in data["shapes"].items()},
                tied=data["tied"],
                untouched=tuple(data["untouched"]),
                gains=tuple(
                    Gain(**{**gain, "consumers": tuple(Consumer(**each) for each in gain["consumers"])})
                    for gain in data.get("gains", ())
                ),
                gauges=tuple(
                    Gauge(gauge["space"], gauge["kind"], tuple(decode_site(site) for site in gauge.get("sites", ())))
                    for gauge in data.get("gauges", ())
                ),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SymmetryError(
                f"this JSON is not a symmetry ({error}): write it again with Symmetry.to_json"
            ) from error

    @property
    def hash(self) -> str:
        """SHA-256 of what a transform depends on: the spaces and their sites, in whatever order they are listed."""
        spaces = json.loads(self.to_json())["spaces"]
        for space in spaces:
            space["sites"].sort(key=lambda site: (site["parameter"], site["dims"]))
        spaces.sort(key=lambda space: space["name"])
        return hashlib.sha256(json.dumps(spaces, sort_keys=True).encode()).hexdigest()


def check_counterpart(frame: Symmetry, own: Symmetry, who: str) -> None:
    """Refuses a model whose spaces are not those of the common frame but for the sizes of spaces that stand alone.

    Args:
        frame: The common frame's spaces.
        own: The model's.
        who: What to call the model in errors.

    Raises:
        SymmetryError: Other tensors or spaces, other places of one, or another size where no resizable space lies.
    """
    if set(frame.shapes) != set(own.shapes):
        name = sorted(set(frame.shapes) ^ set(own.shapes))[0]
        raise SymmetryError(f"{who} has other tensors ({name}): only the widths of its spaces may differ")
    found = {space.name: space for space in own}
    if list(found) != [space.name for space in frame]:
        raise SymmetryError(
            f"{who} has spaces {', '.join(found) or 'none'}, not {', '.join(s.name for s in frame) or 'none'}: "
            "only models whose spaces correspond can be aligned"
        )
    free: dict[str, set[int]] = {}
    for space in frame:
        other = found[space.name]
        alone = space.parent is None and space.copies == 1 and not frame.children(space)
        if (space.parent, space.copies) != (other.parent, other.copies) or (space.size != other.size and not alone):
            raise SymmetryError(
                f"{who}, space {space.name}: nested spaces must be of one size in all models, here "
                f"{space.copies} × {space.size} and {other.copies} × {other.size}"
            )
    for space in frame:
        other = found[space.name]
        places, others = (
            [(s.parameter, s.dims, s.role, s.positions.shape[2]) for s in each.sites] for each in (space, other)
        )
        if places != others:
            raise SymmetryError(
                f"{who}, space {space.name}: it lies at other places of the tensors than in the first model"
            )
        if space.size != other.size:
            for site in space.sites:
                free.setdefault(site.parameter, set()).update(site.dims)
    for name, shape in frame.shapes.items():
        other_shape = own.shapes[name]
        fixed = [d for d in range(len(shape)) if d not in free.get(name, ())]
        if len(shape) != len(other_shape) or any(shape[d] != other_shape[d] for d in fixed):
            raise SymmetryError(
                f"{who}: {name} is {list(other_shape)} for {list(shape)}, and no space that could be resized lies there"
            )


def encode_site(site: Site) -> dict[str, Any]:
    """A site as a small JSON value."""
    return {
        "parameter": site.parameter,
        "dims": list(site.dims),
        "role": site.role,
        "positions": encode_positions(site.positions),
    }


def decode_site(data: Mapping[str, Any]) -> Site:
    """The site that `encode_site` wrote."""
    return Site(data["parameter"], tuple(data["dims"]), decode_positions(data["positions"]), data["role"])


def encode_positions(positions: Int[np.ndarray, "copies size repeat"]) -> dict[str, Any]:
    """Positions as a small JSON value: a start and three strides where they are regular, else the whole list."""
    shape = positions.shape
    start = int(positions[0, 0, 0]) if positions.size else 0
    strides = [
        int(np.take(positions, 1, axis)[(0, 0)] - start) if length > 1 and positions.size else 0
        for axis, length in enumerate(shape)
    ]
    if np.array_equal(positions, regular_positions(shape, start, strides)):
        return {"shape": list(shape), "start": start, "strides": strides}
    return {"shape": list(shape), "values": positions.ravel().tolist()}


def decode_positions(data: Mapping[str, Any]) -> Int[np.ndarray, "copies size repeat"]:
    """The positions that `encode_positions` wrote."""
    shape = tuple(data["shape"])
    if "values" in data:
        return np.asarray(data["values"], dtype=np.int64).reshape(shape)
    return regular_positions(shape, data["start"], data["strides"])


def regular_positions(shape: tuple[int, ...], start: int, strides: list[int]) -> Int[np.ndarray, "copies size repeat"]:
    """Positions that advance by one fixed stride along each of the three axes."""
    grids = np.indices(shape, dtype=np.int64)
    return start + np.tensordot(np.asarray(strides, dtype=np.int64), grids, axes=1)
