"""Pieces of small SVG charts: scales, ticks, axes, lines and marks; the classes of the page's style colour them."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup, escape

Number = int | float

MODEL_COLOURS = 5  # so many colours for models are in the palette; further models begin again, told apart by marks
MARKS = ("up", "down", "diamond", "square", "circle")
LONGEST_NAME = 18  # letters of a name under a chart
MOST_POINTS = 256  # of a line; more lie closer than a pixel
LETTER = 5.4  # mean width of a letter, in the units of a chart, in its type of ten units


class Scale(NamedTuple):
    """A map from values to places on the picture.

    Attributes:
        low: Value at `start`.
        high: Value at `end`.
        start: Place of `low`.
        end: Place of `high`.
        logarithmic: Whether equal ratios take equal room.
    """

    low: Number
    high: Number
    start: Number
    end: Number
    logarithmic: bool = False

    def place(self, value: Number) -> float:
        """Where a value stands; values outside stand at the nearer end."""
        low, high, value = (math.log(v) if self.logarithmic else v for v in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)


class Series(NamedTuple):
    """A line of a chart: what it is called, its class in the page's style, its mark, and its values in order."""

    name: str
    css: str
    mark: str
    values: Sequence[float | None]


class Drawing(NamedTuple):
    """A picture for the page: its `<svg>`, its legend, and the width in pixels that gives letters of normal size."""

    svg: Markup
    legend: Markup
    width: int


def model_class(index: int) -> str:
    """The class with the colour of a model."""
    return f"model{index % MODEL_COLOURS}"


def mark_of(index: int) -> str:
    """The mark of a model."""
    return MARKS[index % len(MARKS)]


def ticks(low: Number, high: Number, about: int = 5) -> list[Number]:
    """Round numbers from `low` to `high`, steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [step * index for index in range(first, math.floor(high / step + 1e-9) + 1)]


def limits(low: Number, high: Number) -> tuple[float, float, list[float]]:
    """The ends of an axis around some values, and its ticks: the ends reach at most a fifth of a step beyond."""
    marks = ticks(low, high)
    step = marks[1] - marks[0] if len(marks) > 1 else 1.0
    start, end = math.floor(5 * low / step + 1e-9) * step / 5, math.ceil(5 * high / step - 1e-9) * step / 5
    if end <= start:
        end = start + step
    first, last = math.ceil(start / step - 1e-9), math.floor(end / step + 1e-9)
    return start, end, [step * index for index in range(first, last + 1)]


def log_ticks(low: Number, high: Number) -> list[Number]:
    """Powers of ten from `low` to `high`, with 2 and 5 times these where there are fewer than three."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    few = sum(low <= 10.0**power <= high for power in powers) < 3
    factors = (1, 2, 5) if few else (1,)
    return [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]


def number(value: Number) -> str:
    """A place on the picture, to a tenth of a unit."""
    text = f"{value:.1f}"
    return text[:-2] if text.endswith(".0") else text


def label(value: Number) -> str:
    """A number beside an axis."""
    text = f"{0.0 if abs(value) < 1e-12 else value:.6g}"
    return text.replace("-", "\N{MINUS SIGN}")


def short(name: str, longest: int = LONGEST_NAME) -> str:
    """A name that fits under a chart: modules before the last shortened to a letter and their number, from the left.

    Where that is not enough, its end, which tells layers apart, and its first letters.
    """
    parts = name.split(".")
    for index, part in enumerate(parts[:-1]):
        if len(".".join(parts)) <= longest:
            break
        parts[index] = part if part.isdigit() else part[:1] + part[len(part.rstrip("0123456789")) :]
    name = ".".join(parts)
    if len(name) <= longest:
        return name
    head = max(1, longest // 3)
    return f"{name[:head]}…{name[len(name) - (longest - head - 1) :]}"


def text(x: Number, y: Number, words: Any, css: str = "", anchor: str = "middle", turn: int = 0) -> str:
    """A `<text>`, turned by degrees around its anchor."""
    turned = f' transform="rotate({turn} {number(x)} {number(y)})"' if turn else ""
    return (
        f'<text x="{number(x)}" y="{number(y)}" class="{css or "tick"}" text-anchor="{anchor}"{turned}>'
        f"{escape(words)}</text>"
    )


def line(points: Iterable[tuple[Number, Number | None]], css: str) -> str:
    """A line through points; where a height is None, it is broken."""
    path, pen = [], "M"
    for x, y in points:
        if y is None:
            pen = "M"
            continue
        path.append(f"{pen}{number(x)} {number(y)}")
        pen = "L"
    return f'<path class="line {css}" d="{"".join(path)}"/>' if path else ""


def mark(x: Number, y: Number, shape: str, css: str, size: Number = 3.2) -> str:
    """A mark around a point."""
    corners = {
        "up": ((0, -1.15), (1.1, 0.85), (-1.1, 0.85)),
        "down": ((0, 1.15), (1.1, -0.85), (-1.1, -0.85)),
        "diamond": ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
        "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    }.get(shape)
    if shape == "none":
        return ""
    if corners is None:
        return f'<circle class="dot {css}" cx="{number(x)}" cy="{number(y)}" r="{number(size)}"/>'
    places = "L".join(f"{number(x + size * dx)} {number(y + size * dy)}" for dx, dy in corners)
    return f'<path class="dot {css}" d="M{places}Z"/>'


def dots(points: Iterable[tuple[Number, Number]], css: str) -> str:
    """Many equal dots as one element."""
    path = "".join(f"M{number(x)} {number(y)}h0" for x, y in points)
    return f'<path class="dots {css}" d="{path}"/>' if path else ""


def axes(x: Scale, y: Scale, across: Sequence[Number], up: Sequence[Number], names: tuple[str, str]) -> str:
    """The grid, the numbers beside it, and what the axes mean; numbers across are left out where there are none."""
    parts = []
    if up and y.low not in up:
        parts.append(f'<path class="grid base" d="M{number(x.start)} {number(y.start)}H{number(x.end)}"/>')
    for value in up:
        place = y.place(value)
        css = "grid base" if value == y.low else "grid"
        parts.append(f'<path class="{css}" d="M{number(x.start)} {number(place)}H{number(x.end)}"/>')
        parts.append(text(x.start - 6, place + 3.4, label(value), anchor="end"))
    for value in across:
        place = x.place(value)
        parts.append(f'<path class="grid short" d="M{number(place)} {number(y.start)}v4"/>')
        parts.append(text(place, y.start + 15, label(value)))
    if names[0]:
        parts.append(text((x.start + x.end) / 2, y.start + 30, names[0], "axis"))
    if names[1]:
        parts.append(text(11, (y.start + y.end) / 2, names[1], "axis", turn=-90))
    return "".join(parts)


def svg(width: Number, height: Number, words: str, parts: Iterable[str], css: str = "chart") -> Markup:
    """An `<svg>` with a description for those who do not see it; `parts` are elements, escaped already."""
    return Markup(
        f'<svg class="{css}" viewBox="0 0 {number(width)} {number(height)}" role="img" aria-label="{escape(words)}">'
        f"{''.join(parts)}</svg>"
    )


def legend(items: Iterable[tuple[str, str, str]]) -> Markup:
    """The list of what lines and fields mean: name, class, and the mark, or `"field"` for a field of colour."""
    parts = []
    for name, css, shape in items:
        if shape == "field":
            sample = f'<rect class="field {css}" x="9" y="0.5" width="12" height="11"/>'
        else:
            sample = f'<path class="line {css}" d="M0 6H30"/>{mark(15, 6, shape, css)}'
        parts.append(f'<li><svg viewBox="0 0 30 12" aria-hidden="true">{sample}</svg>{escape(name)}</li>')
    return Markup(f'<ul class="legend" aria-label="Legend">{"".join(parts)}</ul>')


def thinned(count: int, most: int = MOST_POINTS) -> list[int]:
    """Indices of at most `most` of `count` points, evenly spread, with both ends."""
    if count <= most:
        return list(range(count))
    return [round(index * (count - 1) / (most - 1)) for index in range(most)]
