"""Pictures of a layer's singular directions: values, agreement over the threshold, alignment of each direction."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from isthmus.report import chart
from isthmus.report.chart import Drawing, Scale
from isthmus.report.figures import finite_number

WIDTH, HEIGHT = 330, 208
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 38
DEEPEST = 1e-4  # smallest value of the logarithmic axis, as a share of the largest


def draw_values(layer: Mapping[str, Any], models: Sequence[str]) -> Drawing | None:
    """Singular values of both models and of the merged one, falling, on a logarithmic axis."""
    names = [*(models[:2] if len(models) > 1 else ("A", "B")), "merged"]
    styles = [(chart.model_class(0), "none"), (chart.model_class(1), "none"), ("mended dashed", "none")]
    spectra = [
        (name, css, mark, [finite_number(value) for value in layer.get(key) or []])
        for (name, key, (css, mark)) in zip(names, ("a", "b", "merged"), styles, strict=True)
    ]
    spectra = [each for each in spectra if any(value is not None and value > 0 for value in each[3])]
    if not spectra:
        return None
    largest = max(value for *_, values in spectra for value in values if value is not None)
    least = min(value for *_, values in spectra for value in values if value is not None and value > 0)
    low, high = max(least, DEEPEST * largest) * 0.9, largest * 1.1
    count = max(len(values) for *_, values in spectra)
    x, y = _scales(1.0, float(max(count, 2)), low, high, logarithmic=True)
    across = [value for value in chart.ticks(0, count) if value == int(value) and value > 0]
    parts = [chart.axes(x, y, across, chart.log_ticks(low, high), ("index of the singular value", "singular value"))]
    said = []
    for name, css, _, values in spectra:
        # What lies below the picture, zeros above all, is not drawn along its lower edge as if it were a value.
        shown = [value if value is not None and value >= low else None for value in values]
        points = [
            (x.place(index + 1.0), None if (value := shown[index]) is None else y.place(value))
            for index in chart.thinned(len(shown))
        ]
        parts.append(chart.line(points, css))
        numbers = [value for value in values if value is not None]
        middle = sorted(numbers)[len(numbers) // 2]
        said.append(
            f"{name}: {len(numbers)} values, largest {max(numbers):.3g}, middle {middle:.3g}, "
            f"smallest {min(numbers):.3g}."
        )
    words = f"Singular values of {layer.get('name')}. {' '.join(said)}"
    return _drawing(words, parts, [(name, css, mark) for name, css, mark, _ in spectra])


def draw_agreement(
    thresholds: Sequence[Any], before: Sequence[Any] | None, after: Sequence[Any] | None, name: str
) -> Drawing | None:
    """R of the directions whose value is at least γ times the largest, before and after matching."""
    gammas = [finite_number(value) for value in thresholds]
    series = [
        (kind, css, mark, [finite_number(value) for value in numbers or []])
        for kind, css, mark, numbers in (
            ("before matching", "naive", "square", before),
            ("after matching", "aligned", "circle", after),
        )
    ]
    series = [each for each in series if any(value is not None for value in each[3])]
    if not series or not gammas or any(value is None for value in gammas):
        return None
    values = [value for *_, numbers in series for value in numbers if value is not None]
    low, high, up = chart.limits(min(0.0, *values), max(0.1, *values))
    x, y = _scales(0.0, max([0.1, *(value for value in gammas if value is not None)]), low, high)
    parts = [chart.axes(x, y, chart.ticks(x.low, x.high), up, ("threshold γ", "R"))]
    said = []
    for kind, css, mark, numbers in series:
        points = [
            (x.place(gamma or 0.0), None if value is None else y.place(value))
            for gamma, value in zip(gammas, numbers, strict=True)
        ]
        parts.append(chart.line(points, css))
        parts += [chart.mark(px, py, mark, css) for px, py in points if py is not None]
        pairs = [(gamma, value) for gamma, value in zip(gammas, numbers, strict=True) if value is not None]
        said.append(f"{kind}: {pairs[0][1]:.3f} at γ = {pairs[0][0]:g}, {pairs[-1][1]:.3f} at γ = {pairs[-1][0]:g}.")
    words = f"R over the threshold γ, {name}. {' '.join(said)}"
    return _drawing(words, parts, [(kind, css, mark) for kind, css, mark, _ in series[::-1]])


def draw_alignment(layer: Mapping[str, Any], models: Sequence[str]) -> Drawing | None:
    """How far each singular direction of A has a counterpart in B, against its value."""
    values = [finite_number(value) for value in layer.get("a") or []]
    alignment = [finite_number(value) for value in layer.get("alignment") or []]
    pairs = [
        (value, along)
        for value, along in zip(values, alignment, strict=False)
        if value is not None and value > 0 and along is not None
    ]
    if not pairs:
        return None
    high = max(value for value, _ in pairs)
    low = max(min(value for value, _ in pairs), DEEPEST * high)
    lowest, highest = min(0.0, *(along for _, along in pairs)), max(along for _, along in pairs)
    bottom, top, up = chart.limits(lowest, max(highest, lowest + 0.05))
    x, y = _scales(low * 0.9, high * 1.1, bottom, top, logarithmic_x=True)
    first = models[0] if models else "A"
    across = chart.log_ticks(x.low, x.high)
    if len(across) > 6:
        across = across[:: math.ceil(len(across) / 6)]
    parts = [
        chart.axes(x, y, across, up, (f"singular value of {first}", "alignment")),
        chart.dots(((x.place(value), y.place(along)) for value, along in pairs), "aligned"),
    ]
    half = max(1, len(pairs) // 2)
    ranked = [along for _, along in sorted(pairs, reverse=True)]
    words = (
        f"Alignment of the {len(pairs)} singular directions of {layer.get('name')} in {first}: mean "
        f"{sum(ranked[:half]) / half:.3f} over the half with the larger values, "
        f"{sum(ranked[-half:]) / half:.3f} over the other."
    )
    return _drawing(words, parts, [])


def _scales(
    left: chart.Number,
    right: chart.Number,
    low: chart.Number,
    high: chart.Number,
    *,
    logarithmic: bool = False,
    logarithmic_x: bool = False,
) -> tuple[Scale, Scale]:
    """Both scales of a panel."""
    return (
        Scale(left, right, LEFT, WIDTH - RIGHT, logarithmic_x),
        Scale(low, high, HEIGHT - BOTTOM, TOP, logarithmic),
    )


def _drawing(words: str, parts: Sequence[str], items: Sequence[tuple[str, str, str]]) -> Drawing:
    legend = chart.legend(items) if items else chart.Markup("")
    return Drawing(chart.svg(WIDTH, HEIGHT, words, parts), legend, WIDTH)
