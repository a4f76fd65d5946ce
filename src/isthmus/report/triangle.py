"""The triangle between three models: its picture, in bands of the loss, and the figures under it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from markupsafe import Markup

from isthmus.report import chart
from isthmus.report.colours import LIGHT, css_name
from isthmus.report.curves import LABELS
from isthmus.report.figures import finite_number, percent, signed
from isthmus.report.schema import RunReport

KINDS = ("aligned", "naive")
NAMES = ("A", "B", "C")
BANDS = 8  # about so many steps of colour
# A rise below this share of the scale is not written into the picture.
SMALLEST_RISE = 0.03

# viridis at eleven even steps, from the lowest loss to the highest: equal steps look equally far apart, also to the
# colour-blind and in grey (Smith and van der Walt, matplotlib, 2015).
VIRIDIS = (
    "#440154", "#482475", "#414487", "#355f8d", "#2a788e", "#21918c", "#22a884", "#44bf70", "#7ad151", "#bddf26",
    "#fde725",
)  # fmt: skip
FRACTIONS = {
    Fraction(1, 2): "½", Fraction(1, 3): "⅓", Fraction(2, 3): "⅔", Fraction(1, 4): "¼", Fraction(3, 4): "¾",
    Fraction(1, 5): "⅕", Fraction(2, 5): "⅖", Fraction(3, 5): "⅗", Fraction(4, 5): "⅘", Fraction(1, 6): "⅙",
    Fraction(5, 6): "⅚", Fraction(1, 8): "⅛", Fraction(3, 8): "⅜", Fraction(5, 8): "⅝", Fraction(7, 8): "⅞",
}  # fmt: skip

WIDTH, HEIGHT = 302.0, 252.0
SIDE, LEFT, BASE = 204.0, 22.0, 214.0
CORNERS = ((LEFT, BASE), (LEFT + SIDE, BASE), (LEFT + SIDE / 2, BASE - SIDE * math.sqrt(3) / 2))
BAR = (258.0, 46.0, 11.0, BASE - 46.0)  # left, top, width and height of the scale
TEXT = "font: {size}px system-ui, sans-serif; fill: {colour}"

Point = tuple[float, float]
# A corner of a cell: where it stands on the picture, and its loss.
Corner = tuple[float, float, float]


class TrianglePlaces(NamedTuple):
    """What a triangle's picture shows: every place's weights, loss and accuracy (None where there is none)."""

    coefficients: list[tuple[float, ...]]
    losses: list[float | None]
    accuracies: list[float | None]


def triangle(report: RunReport) -> dict[str, Any] | None:
    """The section of the page: both triangles in one scale, their barriers, and every measured place."""
    simplex = report.simplex or {}
    shown = {kind: simplex[kind] for kind in KINDS if simplex.get(kind) and _is_triangle(simplex[kind])}
    if not shown:
        return None
    places = {kind: _places_of(shown[kind]) for kind in shown}
    bands = _bands_of([loss for each in places.values() for loss in each.losses])
    barriers = ("barrier", "centre_barrier", "error_barrier", "centre_error_barrier")
    rows: dict[tuple[float, ...], dict[str, tuple[float | None, float | None]]] = {}
    for kind, (coefficients, losses, accuracies) in places.items():
        for place, loss, accuracy in zip(coefficients, losses, accuracies, strict=True):
            rows.setdefault(place, {})[kind] = (loss, accuracy)
    return {
        "pictures": [_draw_simplex(shown[kind], kind, bands=bands) for kind in shown],
        "kinds": [(kind, LABELS[kind].capitalize()) for kind in shown],
        "barriers": [
            (kind, LABELS[kind].capitalize(), [finite_number(shown[kind].get(name)) for name in barriers])
            for kind in shown
        ],
        "rows": [
            (_spell(place), [measured.get(kind, (None, None)) for kind in shown]) for place, measured in rows.items()
        ],
        "has_error": any(value is not None for each in places.values() for value in each.accuracies),
        "mended": any(shown[kind].get("repair") for kind in shown),
        "data": report.provenance.data,
    }


def _draw_simplex(
    simplex: Mapping[str, Any], kind: str, *, bands: Sequence[float] | None = None, title: str | None = None
) -> Markup:
    """The loss over the triangle between three models, as an `<svg>` element.

    Bands of colour, interpolated linearly between the measured places, which are dotted; the vertices with their
    accuracies, the centre, the largest rise above the vertices' own losses, and the scale. Its colours follow the page
    where it stands in one, and are those of the light page elsewhere.

    Args:
        simplex: A `Simplex.to_dict()` of three models; losses that are None or not finite leave their cells empty.
        kind: `"naive"` or `"aligned"`.
        bands: Where the colours change, from below the lowest loss to above the highest, for pictures that are to share
            a scale; round numbers around this simplex's losses by default.
        title: What stands above; what the kind is called by default.

    Raises:
        KeyError: An unknown kind.
        ValueError: It is not of three models, or has not as many losses as places.
    """
    if not _is_triangle(simplex):
        raise ValueError("a triangle is drawn of a simplex of three models, with a loss for every place")
    heading = title if title is not None else LABELS[kind].capitalize()
    places = _places_of(simplex)
    edges = list(bands) if bands is not None else _bands_of(places.losses)
    points = [_locate(place) for place in places.coefficients]
    parts = [_write(6.0, 16.0, heading, 10.5, anchor="start", bold=True)]
    outline = "L".join(f"{chart.number(x)} {chart.number(y)}" for x, y in CORNERS)
    parts.append(f'<path style="fill: {_colour_of("surface")}" d="M{outline}Z"/>')
    parts += _fill_bands(_cells(places), edges)
    edge = f"fill: none; stroke: {_colour_of('axis')}; stroke-width: 1; stroke-linejoin: round"
    parts.append(f'<path style="{edge}" d="M{outline}Z"/>')
    parts += [_dot(*point, 1.7) for point in points]
    parts += _name_corners(places)
    parts += _mark_centre_and_rise(places, points, edges)
    parts += _draw_scale(edges)
    return chart.svg(WIDTH, HEIGHT, _describe(places, heading), parts, "plot")


def _describe(places: TrianglePlaces, heading: str) -> str:
    """The picture in words, for those who do not see it."""
    said = [f"Loss over the triangle between models A, B and C. {heading}:"]
    corners = [
        f"{_value_of(places, i)} at {NAMES[place.index(1.0)]}"
        for i, place in enumerate(places.coefficients)
        if 1.0 in place
    ]
    said.append(", ".join(corners) + ",")
    centre = _centre_of(places)
    said.append(f"{_value_of(places, centre)} at the centre," if centre is not None else "no centre,")
    known = [(loss, i) for i, loss in enumerate(places.losses) if loss is not None]
    if known:
        said.append(f"highest {_value_of(places, max(known)[1])} at {_spell(places.coefficients[max(known)[1]])}.")
    else:
        said.append("no loss is a number.")
    return " ".join(said)


def _value_of(places: TrianglePlaces, index: int) -> str:
    """The loss of a place, and its accuracy where there is one, in words."""
    loss, accuracy = places.losses[index], places.accuracies[index]
    told = "no number" if loss is None else f"{loss:.3g}"
    return told if accuracy is None else f"{told} ({percent(accuracy)})"


def _is_triangle(simplex: Mapping[str, Any]) -> bool:
    """Whether it is of three models, with a loss for every place and all vertices among them."""
    places = simplex.get("coefficients") or []
    losses = simplex.get("losses") or []
    vertices = {tuple(float(m == n) for m in range(3)) for n in range(3)}
    return (
        len(places) == len(losses) and vertices <= {tuple(place) for place in places} and set(map(len, places)) == {3}
    )


def _places_of(simplex: Mapping[str, Any]) -> TrianglePlaces:
    """The places of a simplex, read from its JSON."""
    coefficients = [tuple(float(c) for c in place) for place in simplex["coefficients"]]
    accuracies = [finite_number(value) for value in simplex.get("accuracies") or []] or [None] * len(coefficients)
    if len(accuracies) != len(coefficients):
        raise ValueError(f"{len(accuracies)} accuracies for {len(coefficients)} places of a triangle")
    return TrianglePlaces(coefficients, [finite_number(value) for value in simplex["losses"]], accuracies)


def _locate(place: Sequence[float]) -> Point:
    """Where a place stands on the picture."""
    x, y = (sum(c * corner[axis] for c, corner in zip(place, CORNERS, strict=True)) for axis in (0, 1))
    return x, y


def _centre_of(places: TrianglePlaces) -> int | None:
    """The number of the place where all models count alike, if it was measured."""
    found = [i for i, place in enumerate(places.coefficients) if max(place) - min(place) < 1e-9]
    return found[0] if found else None


def _spell(place: Sequence[float]) -> str:
    """The weights of a place as a sum of models: ½ A + ½ B."""
    terms = []
    for weight, name in zip(place, NAMES, strict=True):
        fraction = Fraction(weight).limit_denominator(60)
        if weight == 1:
            terms.append(name)
        elif weight:
            exact = abs(fraction - Fraction(weight)) < 1e-9
            number = FRACTIONS.get(fraction) or (f"{fraction}" if exact else f"{weight:.3f}")
            terms.append(f"{number}\N{NO-BREAK SPACE}{name}")
    return " + ".join(terms)


# ---- the bands


def _bands_of(losses: Iterable[float | None]) -> list[float]:
    """Round numbers from below the lowest loss to above the highest; one band where all are alike or none is known."""
    known = [loss for loss in losses if loss is not None]
    low, high = min(known, default=0.0), max(known, default=1.0)
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        return [low, low]
    inner = chart.ticks(low, high, BANDS)
    step = inner[1] - inner[0]
    below = [inner[0] - step] if inner[0] > low else []
    above = [inner[-1] + step] if inner[-1] < high else []
    return [*below, *inner, *above]


def _cells(places: TrianglePlaces) -> list[tuple[Corner, Corner, Corner]]:
    """The small triangles between neighbouring places; those with a corner of unknown loss are left out.

    The places are a barycentric grid of any fineness, and the centre, which divides the cell that it lies in.
    """
    by_place = {tuple(round(c, 9) for c in place): i for i, place in enumerate(places.coefficients)}
    on_edge = sum(place[2] == 0 for place in places.coefficients)
    steps = max(on_edge - 1, 1)

    def number(i: int, j: int, k: int) -> int | None:
        return by_place.get((round(i / steps, 9), round(j / steps, 9), round(k / steps, 9)))

    corners = []
    for i in range(steps):
        for j in range(steps - i):
            k = steps - 1 - i - j
            corners.append((number(i + 1, j, k), number(i, j + 1, k), number(i, j, k + 1)))
            if k:
                corners.append((number(i + 1, j + 1, k - 1), number(i + 1, j, k), number(i, j + 1, k)))
    centre = _centre_of(places)
    found = []
    for cell in corners:
        if None in cell:
            raise ValueError("the places of a triangle are no barycentric grid: walk it with walk_simplex")
        known = [index for index in cell if index is not None]
        middle = [sum(places.coefficients[index][m] for index in known) / 3 for m in range(3)]
        if centre is not None and max(abs(c - 1 / 3) for c in middle) < 1e-9 and centre not in known:
            found += [(known[m], known[(m + 1) % 3], centre) for m in range(3)]
        else:
            found.append((known[0], known[1], known[2]))

    def corner(index: int, loss: float) -> Corner:
        return *_locate(places.coefficients[index]), loss

    filled = []
    for cell in found:
        values = [places.losses[index] for index in cell]
        first, second, third = (corner(i, v) if v is not None else None for i, v in zip(cell, values, strict=True))
        if first and second and third:
            filled.append((first, second, third))
    return filled


def _fill_bands(cells: Sequence[tuple[Corner, Corner, Corner]], edges: Sequence[float]) -> list[str]:
    """One path a band, from the lowest: each holds all that lies above its lower edge, and the next covers the rest."""
    paths = []
    for band in range(len(edges) - 1):
        level = edges[band] if band else -math.inf
        shapes = [shape for cell in cells if len(shape := _above(cell, level)) > 2]
        path = "".join("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in shape) + "Z" for shape in shapes)
        if path:
            colour = _band_colour(band, len(edges) - 1)
            # A hairline of the same colour closes the seams that smoothing leaves between neighbouring cells.
            style = f"fill: {colour}; stroke: {colour}; stroke-width: 0.6; stroke-linejoin: round"
            paths.append(f'<path style="{style}" d="{path}"/>')
    return paths


def _above(cell: Sequence[Corner], level: float) -> list[Point]:
    """The part of a triangle where its loss, interpolated linearly, is `level` at least, as a polygon."""
    shape: list[Point] = []
    for (x, y, value), (next_x, next_y, next_value) in zip(cell, [*cell[1:], cell[0]], strict=True):
        if value >= level:
            shape.append((x, y))
        if (value >= level) != (next_value >= level):
            share = (level - value) / (next_value - value)
            shape.append((x + share * (next_x - x), y + share * (next_y - y)))
    return shape


def _band_colour(band: int, bands: int) -> str:
    """The colour of a band: the scale's ends are those of viridis."""
    place = (len(VIRIDIS) - 1) * (band / (bands - 1) if bands > 1 else 0.5)
    first = min(int(place), len(VIRIDIS) - 2)
    ends = [[int(VIRIDIS[i][at : at + 2], 16) for at in (1, 3, 5)] for i in (first, first + 1)]
    return "#" + "".join(f"{round(a + (place - first) * (b - a)):02x}" for a, b in zip(*ends, strict=True))


# ---- what stands on them


def _colour_of(name: str) -> str:
    """A colour of the page, or the light page's where the picture stands alone."""
    return f"var({css_name(name)}, {LIGHT[name]})"


def _write(
    x: float, y: float, words: str, size: float, *, anchor: str = "middle", bold: bool = False, over: bool = False
) -> str:
    """A `<text>`; `over` sets it off from the bands below it."""
    style = TEXT.format(size=f"{size:g}", colour=_colour_of("text")) + ("; font-weight: 600" if bold else "")
    if over:
        style += f"; stroke: {_colour_of('paper')}; stroke-width: 3; stroke-linejoin: round; paint-order: stroke"
    return (
        f'<text x="{chart.number(x)}" y="{chart.number(y)}" text-anchor="{anchor}" style="{style}">'
        f"{Markup.escape(words)}</text>"
    )


def _dot(x: float, y: float, radius: float) -> str:
    """A measured place."""
    style = f"fill: {_colour_of('paper')}; stroke: {_colour_of('text')}; stroke-width: 0.8"
    return f'<circle cx="{chart.number(x)}" cy="{chart.number(y)}" r="{radius:g}" style="{style}"/>'


def _short_value(places: TrianglePlaces, index: int) -> str:
    """The accuracy of a place, or its loss where targets are no classes."""
    accuracy, loss = places.accuracies[index], places.losses[index]
    if accuracy is not None:
        return str(percent(accuracy))
    return "–" if loss is None else signed(f"{loss:.3g}")


def _name_corners(places: TrianglePlaces) -> list[str]:
    """The letters of the models, with their accuracies."""
    vertex = {place.index(1.0): i for i, place in enumerate(places.coefficients) if 1.0 in place}
    (ax, ay), (bx, by), (cx, cy) = CORNERS
    spots = ((ax, ay + 15, "middle"), (bx, by + 15, "middle"), (cx, cy - 9, "middle"))
    return [
        _write(max(x, 30.0), y, f"{name} {_short_value(places, vertex[m])}", 9.5, anchor=anchor, bold=True)
        for m, (name, (x, y, anchor)) in enumerate(zip(NAMES, spots, strict=True))
    ]


def _mark_centre_and_rise(places: TrianglePlaces, points: Sequence[Point], edges: Sequence[float]) -> list[str]:
    """The centre, ringed, with its accuracy, and the largest rise above the vertices' own losses where it stands."""
    parts = []
    centre = _centre_of(places)
    if centre is not None:
        x, y = points[centre]
        parts += [_dot(x, y, 3.4), _write(x, y - 8, _short_value(places, centre), 9.5, bold=True, over=True)]
    vertices = {place.index(1.0): places.losses[i] for i, place in enumerate(places.coefficients) if 1.0 in place}
    known = [vertices[m] for m in range(3)]
    first, second, third = known
    if first is None or second is None or third is None:
        return parts
    rises = [
        (loss - (place[0] * first + place[1] * second + place[2] * third), i)
        for i, (place, loss) in enumerate(zip(places.coefficients, places.losses, strict=True))
        if loss is not None
    ]
    rise, top = max(rises)
    if rise >= SMALLEST_RISE * (edges[-1] - edges[0]) and rise > 0:
        x, y = points[top]
        parts.append(_write(x, y + 14, f"+{rise:.2f}", 9.0, over=True))
    return parts


def _draw_scale(edges: Sequence[float]) -> list[str]:
    """The bands' colours beside the triangle, the highest loss above, with the losses where they change."""
    left, top, width, height = BAR
    bands = len(edges) - 1
    step = height / bands
    parts = [_write(left - 2, top - 9, "Loss", 9.5, anchor="start")]
    for band in range(bands):
        y = top + height - (band + 1) * step
        style = f"fill: {_band_colour(band, bands)}"
        parts.append(f'<rect x="{left:g}" y="{y:.1f}" width="{width:g}" height="{step:.1f}" style="{style}"/>')
    style = f"fill: none; stroke: {_colour_of('axis')}; stroke-width: 0.8"
    parts.append(f'<rect x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}" style="{style}"/>')
    if edges[0] == edges[-1]:
        return [
            *parts,
            _write(
                left + width + 5, top + height / 2 + 3.2, chart.label(float(f"{edges[0]:.4g}")), 9.0, anchor="start"
            ),
        ]
    for index, edge in enumerate(edges):
        y = top + height - index * step
        parts.append(_write(left + width + 5, y + 3.2, chart.label(edge), 9.0, anchor="start"))
    return parts
