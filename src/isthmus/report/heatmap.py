"""Heat maps of a table of shares, layers by layers, and their scale."""

from collections.abc import Sequence

from markupsafe import Markup

from isthmus.report import chart

LEVELS = 20  # steps of colour from 0 to 1
CELL, GAP = 15.0, 6.0
LARGEST = 150  # layers on a side


def draw_heatmap(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    names: tuple[str, str],
    words: str,
) -> Markup:
    """A table of shares as fields that grow more saturated from 0 to 1; what was not measured is crossed out.

    Args:
        rows: Names beside the rows, from above.
        columns: Names under the columns.
        values: One list a row. What lies below 0 is drawn as 0, above 1 as 1.
        names: What rows and columns are.
        words: What the picture says, for those who do not see it.

    Raises:
        ValueError: The table is not of the size of its names.
    """
    if len(values) != len(rows) or any(len(row) != len(columns) for row in values):
        raise ValueError(f"a heat map of {len(rows)} × {len(columns)} layers with a table of another size")
    cell = CELL if max(len(rows), len(columns)) <= 40 else CELL / 2
    every = 1 if cell == CELL else 2  # names take the height of a whole cell
    left = 20 + chart.LETTER * max((len(chart.short(name)) for name in rows), default=0)
    below = 12 + chart.LETTER * max((len(chart.short(name)) for name in columns), default=0)
    width, height = left + GAP + cell * len(columns), cell * len(rows)
    levels: dict[int, list[str]] = {}
    crossed = []
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            x, y = left + GAP + cell * j, 2 + cell * i
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
    parts.append(
        f'<rect class="edge" x="{left + GAP:g}" y="2" width="{cell * len(columns):g}" height="{cell * len(rows):g}"/>'
    )
    for i, name in enumerate(rows):
        if i % every == 0:
            parts.append(chart.text(left, 2 + cell * i + CELL / 2 + 3.4, chart.short(name), anchor="end"))
    for j, name in enumerate(columns):
        if j % every == 0:
            x, y = left + GAP + cell * j + CELL / 2 + 3.4, height + 8
            parts.append(chart.text(x, y, chart.short(name), anchor="end", turn=-90))
    parts.append(chart.text(10, 2 + height / 2, names[0], "axis", turn=-90))
    parts.append(chart.text(left + GAP + cell * len(columns) / 2, height + below + 12, names[1], "axis"))
    return chart.svg(width + 8, height + below + 18, words, parts, "chart heatmap")


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
