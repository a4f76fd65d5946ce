"""A network's symmetry: its spaces, what is frozen, its gains and gauges, as one object."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from isthmus.errors import SymmetryError
from isthmus.symmetry.encoding import decode_site, encode_site
from isthmus.symmetry.spaces import Consumer, Frozen, Gain, Gauge, Group, Site, Space
from isthmus.symmetry.traced_graph import Graph
from isthmus.wording.short import counted, told
from isthmus.wording.tables import html_table, plain_table


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
        graph: The traced graph, from which activations are read; None after loading from JSON.
    """

    spaces: tuple[Space, ...]
    frozen: tuple[Frozen, ...]
    shapes: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str] = field(default_factory=dict[str, str])
    untouched: tuple[str, ...] = ()
    gains: tuple[Gain, ...] = ()
    gauges: tuple[Gauge, ...] = ()
    graph: Graph | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        return told(
            self,
            counted(len(self), "space"),
            counted(self.free_units, "free unit"),
            counted(len(self.frozen), "frozen axis", "frozen axes"),
        )

    def __str__(self) -> str:
        """A table of the spaces, and what else there is in a last line."""
        head, rows = self._table()
        return f"{plain_table(head, rows)}\n{self._rest()}"

    def _repr_html_(self) -> str:
        """The same table in notebooks."""
        return html_table(*self._table(), foot=self._rest())

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str | int, ...]]]:
        """The head and the rows of the table of spaces."""
        rows: list[tuple[str | int, ...]] = [
            (space.name, space.size, space.copies, space.group.value, space.parent or "–", len(space.sites))
            for space in self
        ]
        return ("space", "size", "copies", "group", "parent", "sites"), rows

    def _rest(self) -> str:
        """What moves in all, what is frozen, and what else may be done."""
        lost = sum(not item.expected for item in self.frozen)
        kinds = Counter(gauge.kind for gauge in self.gauges)
        told_gauges = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        facts = [
            counted(self.free_units, "free unit"),
            counted(len(self.frozen), "frozen axis", "frozen axes") + (f" ({lost} lost to tracing)" if lost else ""),
            counted(len(self.gains), "norm gain") if self.gains else "",
            f"gauges: {told_gauges}" if told_gauges else "",
        ]
        return "; ".join(fact for fact in facts if fact)

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
    def traced(self) -> Graph:
        """The traced graph.

        Raises:
            SymmetryError: There is none, as after loading from JSON.
        """
        if self.graph is None:
            raise SymmetryError("the symmetry was loaded without its graph: trace the model again")
        return self.graph

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
                gains=tuple(_decode_gain(gain) for gain in data.get("gains", ())),
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
        spaces: list[dict[str, Any]] = json.loads(self.to_json())["spaces"]
        for space in spaces:
            space["sites"].sort(key=itemgetter("parameter", "dims"))
        spaces.sort(key=itemgetter("name"))
        return hashlib.sha256(json.dumps(spaces, sort_keys=True).encode()).hexdigest()


def _decode_gain(data: Mapping[str, Any]) -> Gain:
    """The gain that `dataclasses.asdict` made plain."""
    fields: dict[str, Any] = {**data, "consumers": tuple(Consumer(**each) for each in data["consumers"])}
    return Gain(**fields)


def check_counterpart(frame: Symmetry, own: Symmetry, who: str) -> None:
    """Refuses a model whose spaces differ from the common frame's in more than the sizes of spaces that stand alone.

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
