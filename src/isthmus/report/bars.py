"""The picture of a comparison: every way of merging as a dot between chance and the ensemble."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from isthmus.report.colours import DARK, LIGHT
from isthmus.report.curves import new_figure, save_figure, style_of

MARKERS = {"raw": "o", "reset": "s", "repair": "D"}
ROW_HEIGHT, WIDTH = 0.26, 7.6


def draw_comparison(comparison: Mapping[str, Any], kind: str = "svg", *, dark: bool = False) -> bytes:
    """One line a method and average, one mark a repair: accuracy, or loss where there is none; best above.

    Args:
        comparison: What `Comparison.to_dict` returned.
        kind: `"svg"` or `"png"`.
        dark: For dark pages.
    """
    colours = DARK if dark else LIGHT
    key = "accuracy" if comparison["ensemble"]["accuracy"] is not None else "loss"
    factor = 100.0 if key == "accuracy" else 1.0
    lines = _grouped(comparison["rows"], key, factor)
    figure = new_figure(WIDTH, 1.3 + ROW_HEIGHT * len(lines), colours)
    with style_of(colours):
        axes = figure.subplots()
        axes.grid(axis="x", color=colours["rule"], linewidth=0.7)
        parents = [factor * score[key] for score in comparison["parents"]]
        axes.axvspan(min(parents), max(parents), color=colours["shadow"], alpha=0.6, label="parents", linewidth=0)
        axes.axvline(sum(parents) / len(parents), color=colours["axis"], linewidth=1)
        axes.axvline(
            factor * comparison["ensemble"][key], color=colours["axis"], linewidth=1.2, dashes=(4, 2), label="ensemble"
        )
        averages = list(dict.fromkeys(average for (_, average), _ in lines))
        shades = [colours["aligned"], colours["naive"], colours["alarm_edge"], colours["notice_edge"], colours["muted"]]
        labelled: set[str] = set()
        for height, ((_, average), marks) in enumerate(reversed(lines)):
            colour = shades[averages.index(average) % len(shades)]
            values = list(marks.values())
            axes.plot([min(values), max(values)], [height, height], color=colour, linewidth=1.2, alpha=0.5)
            for repair, value in marks.items():
                name = f"{average}, {repair}"
                label = name if name not in labelled else None
                labelled.add(name)
                axes.plot(value, height, MARKERS.get(repair, "o"), color=colour, markersize=5, label=label)
        names = [f"{method.replace('_', ' ')} · {average}" for (method, average), _ in reversed(lines)]
        axes.set_yticks(range(len(lines)), names)
        axes.set_ylim(-0.7, len(lines) - 0.3)
        axes.set_xlabel("accuracy in percent" if key == "accuracy" else "loss")
        figure.legend(loc="outside lower center", ncols=4, handlelength=1.4)
        return save_figure(figure, kind)


def _grouped(
    rows: Sequence[Mapping[str, Any]], key: str, factor: float
) -> list[tuple[tuple[str, str], dict[str, float]]]:
    """For each method and average the figures by repair, best first; ways without figures are left out."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if row[key] is not None and math.isfinite(row[key]):
            found.setdefault((row["method"], row["average"]), {})[row["repair"]] = factor * row[key]
    sign = -1 if key == "accuracy" else 1
    return sorted(found.items(), key=lambda item: min(sign * value for value in item[1].values()))
