"""Heat maps of a table of shares, layers by layers, and their scale."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from isthmus.report import chart

LEVELS = 20  # steps of colour from 0 to 1
LARGEST = 150  # layers on a side
SCALE = 1.1  # pixels for a unit of the drawing, so that letters are as large as beside other charts
ROOM = 944.0  # pixels of a row of the page
BETWEEN = 32.0  # pixels between two maps
WIDEST, LEAST, FINEST = 40.0, 11.0, 6.0  # units of a cell: at most, with a name beside each, and in large tables
EDGE = 8.0  # units to the right of a map, for the last name


class HeatMap(NamedTuple):
    """A heat map in two pieces of one height, so that maps of the same rows can share their names.

    Attributes:
        names: The `<svg>` with the names of the rows.
        field: The `<svg>` with the cells and the names of the columns.
    """

    names: Markup
    field: Markup


class Cells(NamedTuple):
    """How several maps are laid out: the size of a cell, and whether three stand in a row with their names once."""

    size: float
    together: bool


def cells_for(names: Sequence[str], side: int) -> Cells:
    """The cells of maps with `side` layers on a side and rows of these names."""
    left = _left(names)
    three = ((ROOM - 2 * BETWEEN) / SCALE - left - 3 * EDGE) / (3 * side)
    if three >= LEAST:
        return Cells(min(three, WIDEST), True)
    two = ((ROOM - BETWEEN) / SCALE / 2 - left - EDGE) / side
    return Cells(min(max(two, FINEST), WIDEST), False)


def draw_heatmap(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    models: tuple[str, str],
    words: str,
    cell: float = 15.0,
) -> HeatMap:
    """A table of shares as fields that grow more saturated from 0 to 1; what was not measured is crossed out.

    Args:
        rows: Names beside the rows, from above.
        columns: Names under the columns.
        values: One list a row. What lies below 0 is drawn as 0, above 1 as 1.
        models: What rows and columns are.
        words: What the picture says, for those who do not see it.
        cell: The side of a field; where it is below `LEAST`, not every field has a name.

    Raises:
        ValueError: The table is not of the size of its names.
    """
    if len(values) != len(rows) or any(len(row) != len(columns) for row in values):
        raise ValueError(f"a heat map of {len(rows)} × {len(columns)} layers with a table of another size")
    every = math.ceil(LEAST / cell)
    left, below = _left(rows), 12 + chart.LETTER * max((len(chart.short(name)) for name in columns), default=0)
    width, height = cell * len(columns), cell * len(rows)
    levels: dict[int, list[str]] = {}
    crossed = []
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            x, y = 1 + cell * j, 2 + cell * i
            if value is None:
                crossed.append(f"M{x:g} {y:g}l{cell:g} {cell:g}m0 {-cell:g}l{-cell:g} {cell:g}")
            else:
                level = round(LEVELS * min(max(value, 0.0), 1.0))
                levels.setdefault(level, []).append(f"M{x:g} {y:g}h{cell:g}v{cell:g}h{-cell:g}z")
    parts = [
        f'<path class="heat" fill-opacity="{level / LEVELS:g}" d="{"".join(paths)}"/>'
        for level, paths in sorted(levels.items())
    ]
    if crossed:
        parts.append(f'<path class="crossed" d="{"".join(crossed)}"/>')
    parts.append(f'<rect class="edge" x="1" y="2" width="{width:g}" height="{height:g}"/>')
    parts += [
        chart.text(1 + cell * (j + 0.5) + 3.4, height + 8, chart.short(columns[j]), anchor="end", turn=-90)
        for j in range(0, len(columns), every)
    ]
    parts.append(chart.text(1 + width / 2, height + below + 12, models[1], "axis"))
    beside = [
        chart.text(left - 6, 2 + cell * (i + 0.5) + 3.4, chart.short(rows[i]), anchor="end")
        for i in range(0, len(rows), every)
    ]
    beside.append(chart.text(10, 2 + height / 2, models[0], "axis", turn=-90))
    total = height + below + 18
    return HeatMap(
        _sized(left, total, beside, "chart row-names", ""), _sized(width + EDGE, total, parts, "chart heatmap", words)
    )


def shorten(names: Sequence[str]) -> tuple[list[str], str, str]:
    """The names without what all begin and all end with, in whole parts between dots; and that beginning and ending."""
    split = [name.split(".") for name in names]
    room = min((len(parts) for parts in split), default=1) - 1
    if len(split) < 2 or room < 1:
        return list(names), "", ""
    first = split[0]
    after = 0
    while after < room and all(parts[-1 - after] == first[-1 - after] for parts in split):
        after += 1
    before = 0
    while before < room - after and all(parts[before] == first[before] for parts in split):
        before += 1
    kept = [".".join(parts[before : len(parts) - after]) for parts in split]
    head = ".".join(first[:before]) + "." if before else ""
    return kept, head, "." + ".".join(first[len(first) - after :]) if after else ""


def draw_scale() -> Markup:
    """The colours from 0 to 1 with their numbers."""
    parts = [
        f'<rect class="heat" fill-opacity="{level / LEVELS:g}" x="{4 + 8 * level}" y="2" width="8" height="12"/>'
        for level in range(LEVELS + 1)
    ]
    end = 4 + 8 * (LEVELS + 1)
    parts.append(f'<rect class="edge" x="4" y="2" width="{end - 4}" height="12"/>')
    parts += [chart.text(8 + 8 * LEVELS * share, 27, f"{share:g}") for share in (0, 0.5, 1)]
    return chart.svg(end + 6, 32, "Scale of colours: pale is 0, full is 1", parts, "chart scale")


def _left(names: Sequence[str]) -> float:
    """The room that names of rows take, with the name of what they are."""
    return 24 + chart.LETTER * max((len(chart.short(name)) for name in names), default=0)


def _sized(width: float, height: float, parts: Sequence[str], css: str, words: str) -> Markup:
    """An `<svg>` of a fixed size in pixels; without words it is hidden from those who do not see it."""
    said = f'role="img" aria-label="{Markup.escape(words)}"' if words else 'aria-hidden="true"'
    view = f'viewBox="0 0 {chart.number(width)} {chart.number(height)}"'
    return Markup(
        f'<svg class="{css}" style="width: {chart.number(width * SCALE)}px" {view} {said}>{"".join(parts)}</svg>'
    )
