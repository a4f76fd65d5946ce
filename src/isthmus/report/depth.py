"""Charts over depth: one place for every space of the network, in its order."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from isthmus.report import chart
from isthmus.report.chart import Drawing, Scale, Series
from isthmus.report.figures import finite_number

MOST_DRAWN = 200  # spaces of a chart
HEIGHT, TOP, RIGHT, LEFT = 150, 10, 12, 48  # of the field, in pixels at normal size, and the room around it
NARROWEST = 264.0  # pixels of a whole chart; three of them stand in a row
TURN = 55  # degrees by which the names under a chart are turned

Space = Mapping[str, Any]


def draw_correlations(spaces: Sequence[Space], models: Sequence[str]) -> Drawing | None:
    """Correlation of matched pairs and of merged units with their models, beside what chance and no matching give."""

    def of(key: str, index: int | None = None) -> list[float | None]:
        return [known(part(space, "correlation").get(key), index) for space in spaces]

    series = [
        *(
            Series(f"merged with {name}", chart.model_class(index), chart.mark_of(index), of("merged", index))
            for index, name in enumerate(models)
        ),
        Series("matched pairs", "aligned", "circle", of("matched")),
        *(
            Series(f"averaged without alignment, with {name}", "naive", chart.mark_of(index), of("naive", index))
            for index, name in enumerate(models)
        ),
        Series("pairs before matching", "raw", "none", of("before")),
        Series("shuffled", "straight", "none", of("shuffled")),
    ]
    return _lines(spaces, series, "correlation", "Correlation over depth, median over the units of each space", None)


def draw_variances(spaces: Sequence[Space], *, repaired: bool = True) -> Drawing | None:
    """Variance of merged units over their parents' variance; at 1 nothing collapsed.

    What was neither repaired nor averaged in another way than the aligned average is not drawn a second time.
    """

    def of(key: str) -> list[float | None]:
        return [finite_number(part(space, "variance_ratio").get(key)) for space in spaces]

    series = [
        Series("averaged without alignment", "naive", "square", of("naive")),
        Series("aligned", "aligned", "circle", of("aligned")),
    ]
    aligned, merged = of("aligned"), of("mended")
    pairs = zip(aligned, merged, strict=True)
    if repaired or not all(a is not None and b is not None and math.isclose(a, b, rel_tol=1e-4) for a, b in pairs):
        series.append(Series("aligned and repaired" if repaired else "merged", "mended", "diamond", merged))
    return _lines(spaces, series, "variance ratio", "Variance of merged units over their parents' variance", 1.0)


def draw_labels(spaces: Sequence[Space], models: Sequence[str]) -> Drawing | None:
    """What became of the units of each space, as shares; a narrow bar beside for the average without alignment."""
    names = label_names(spaces, models)
    if not names:
        return None
    place, width, x, y, bottom = _frame(spaces, 0.0, 1.0)
    pitch = (x.end - x.start) / len(spaces)
    parts = [chart.axes(x, y, [], [], ("", ""))]
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        css = "grid base" if value == 0 else "grid"
        parts.append(f'<path class="{css}" d="M{chart.number(x.start)} {chart.number(y.place(value))}H{x.end:g}"/>')
        parts.append(chart.text(x.start - 6, y.place(value) + 3.4, f"{100 * value:.0f}\u202f%", anchor="end"))
    said = []
    for index, space in enumerate(spaces):
        bars = (("labels", -0.34, 0.42, ""), ("naive_labels", 0.12, 0.2, " pale"))
        for key, offset, share, pale in bars:
            counts = [finite_number(part(space, key).get(name)) or 0.0 for name in names]
            total, low = sum(counts), 0.0
            if total <= 0:
                continue
            if key == "labels":
                found = ", ".join(f"{count:g} {name}" for name, count in zip(names, counts, strict=True) if count)
                said.append(f"{space.get('name')}: {found}.")
            for name, count in zip(names, counts, strict=True):
                if count <= 0:
                    continue
                upper, lower = y.place((low + count) / total), y.place(low / total)
                low += count
                parts.append(
                    f'<rect class="field {label_class(name, names, models)}{pale}" '
                    f'x="{chart.number(place(index) + offset * pitch)}" y="{chart.number(upper)}" '
                    f'width="{chart.number(share * pitch)}" height="{chart.number(lower - upper)}"/>'
                )
    parts += _names(spaces, place, y.start)
    items = [(name, label_class(name, names, models), "field") for name in names]
    if any(part(space, "naive_labels") for space in spaces):
        items.append(("narrow and pale: averaged without alignment", "paler", "field"))
    words = "What became of the units of each space. " + " ".join(said)
    return Drawing(chart.svg(width, bottom, words, parts), chart.legend(items), round(width))


def label_names(spaces: Sequence[Space], models: Sequence[str]) -> list[str]:
    """All labels that occur, in the order of a stack: shared, of several models, of one, lost."""
    found = {str(name) for space in spaces for key in ("labels", "naive_labels") for name in part(space, key)}
    single = [f"{model}'s" for model in models]

    def rank(name: str) -> tuple[int, str | int]:
        if name in single:
            return 2, f"{single.index(name):04}"
        return {"shared": 0, "lost": 3}.get(name, 1), name

    return sorted(found, key=rank)


def label_class(name: str, names: Sequence[str], models: Sequence[str]) -> str:
    """The class with the colour of a label."""
    single = [f"{model}'s" for model in models]
    if name in single:
        return chart.model_class(single.index(name))
    if name in ("shared", "lost"):
        return name
    others = [other for other in names if other not in (*single, "shared", "lost")]
    return f"some{others.index(name) % 3}" if name in others else "some0"


def part(space: Space, key: str) -> Mapping[str, Any]:
    """A group of a space's figures, empty where there is none."""
    return space.get(key) or {}


def known(value: Any, index: int | None = None) -> float | None:
    """A figure, or one model's where there is a list; None where it was not measured."""
    if index is None or not isinstance(value, list):
        return finite_number(value) if index in (None, 0) else None
    return finite_number(value[index]) if index < len(value) else None


def _lines(
    spaces: Sequence[Space], series: Sequence[Series], name: str, words: str, base: float | None
) -> Drawing | None:
    """A chart of lines over depth, with a line at `base`."""
    series = [each for each in series if any(value is not None for value in each.values)]
    if not series:
        return None
    values = [value for each in series for value in each.values if value is not None] + ([base] if base else [])
    low, high, up = chart.limits(min(0.0, *values), max(values))
    place, width, x, y, bottom = _frame(spaces, low, high)
    parts = [chart.axes(x, y, [], up, ("", name))]
    if base is not None:
        parts.append(f'<path class="line base" d="M{x.start:g} {chart.number(y.place(base))}H{x.end:g}"/>')
    said = []
    for each in reversed(series):
        points = [(place(i), None if v is None else y.place(v)) for i, v in enumerate(each.values)]
        parts.append(chart.line(points, each.css))
        parts += [chart.mark(px, py, each.mark, each.css) for px, py in points if py is not None]
    for each in series:
        ranked = sorted((value, index) for index, value in enumerate(each.values) if value is not None)
        (least, first), (most, last) = ranked[0], ranked[-1]
        said.append(
            f"{each.name.capitalize()}: from {least:.2f} in {spaces[first].get('name')} to {most:.2f} in "
            f"{spaces[last].get('name')}."
        )
    parts += _names(spaces, place, y.start)
    items = [(each.name, each.css, each.mark) for each in series]
    return Drawing(
        chart.svg(width, bottom, f"{words}. {' '.join(said)}", parts), Markup(chart.legend(items)), round(width)
    )


def _frame(
    spaces: Sequence[Space], low: chart.Number, high: chart.Number
) -> tuple[Callable[[int], chart.Number], chart.Number, Scale, Scale, chart.Number]:
    """Where a space stands, the width, both scales, and the height with the names under the chart."""
    count = len(spaces)
    pitch = min(36.0, max(17.0, (NARROWEST - LEFT - RIGHT) / count))
    names = [chart.short(str(space.get("name"))) for space in spaces]
    lean = math.cos(math.radians(TURN)) * chart.LETTER
    left = max([LEFT, *(lean * len(name) - pitch * (index + 0.5) + 4 for index, name in enumerate(names))])
    width = max(left + pitch * count + RIGHT, NARROWEST)
    drop = math.sin(math.radians(TURN)) * chart.LETTER * max(map(len, names)) + 18
    x = Scale(0.0, float(count), left, width - RIGHT)
    y = Scale(low, high, TOP + HEIGHT, TOP)
    return (lambda index: x.place(index + 0.5)), width, x, y, TOP + HEIGHT + drop


def _names(spaces: Sequence[Space], place: Callable[[int], chart.Number], bottom: chart.Number) -> list[str]:
    """The names of the spaces under a chart, each with its full name for the pointer."""
    texts = []
    for index, space in enumerate(spaces):
        name = str(space.get("name"))
        words = chart.text(place(index) + 3, bottom + 12, chart.short(name), anchor="end", turn=-TURN)
        texts.append(f"<g><title>{escape(name)}</title>{words}</g>")
    return texts
