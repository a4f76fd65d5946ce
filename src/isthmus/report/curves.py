"""The picture of a path: loss and accuracy along λ, aligned and not, with the barrier shaded."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import escape

from isthmus.errors import InputError
from isthmus.report.colours import DARK, LIGHT, css_name, css_variables
from isthmus.report.figures import finite_number

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = ("loss", "accuracy")
KINDS = ("naive", "aligned")  # drawn in this order: the aligned curve lies on top
LABELS = {"naive": "without alignment", "aligned": "aligned"}
MARKERS = {"naive": "s", "aligned": "o"}  # so that the curves differ without colour, too
MOST_MARKERS = 25
# Raw losses may be many times the repaired ones. From FAR times on, they leave the picture at HEADROOM times.
FAR, HEADROOM = 4.0, 2.5
# A rise below this share of the axis is not written into the picture.
SMALLEST_RISE = 0.03
# From this share on, its figure fits between the curve and the straight line.
ROOM_FOR_TEXT = 0.13
SIZE = (4.2, 2.9)  # inches of one panel
POINTS = 72  # units of an SVG in an inch
# What stands for a colour in matplotlib's SVG until it is replaced by the page's variable.
STAND_INS = {name: f"#01{index:02x}ef" for index, name in enumerate(LIGHT)}


def draw_curve(report: Mapping[str, Any], kind: str = "svg", *, pair: int = 0, dark: bool = False) -> bytes:
    """The path between two models of a run as one picture: loss, and beside it accuracy where there is one.

    Solid lines have statistics repaired at every λ, dashed ones are raw, the dotted one is straight between the ends,
    and the barrier is shaded.

    Args:
        report: The content of a `report.json`.
        kind: `"svg"`, which follows the reader's light or dark setting, or `"png"`.
        pair: Which of the report's curves.
        dark: A PNG for dark pages.

    Raises:
        InputError: The report has no such curve, or an unknown kind.
    """
    curves = report.get("curves") or []
    if not 0 <= pair < len(curves):
        raise InputError(f"pair={pair}: the report has {len(curves)} curves; they need data to be measured on")
    if kind not in ("svg", "png"):
        raise InputError(f"kind={kind!r}: a picture is 'svg' or 'png'")
    if kind == "png":
        return _picture(curves[pair], DARK if dark else LIGHT, "png")
    text = _follow_page(_picture(curves[pair], STAND_INS, "svg").decode(), f"pair{pair}")
    words = " ".join(_describe(curves[pair], panel) for panel in panels_of(curves[pair]))
    light, night = css_variables(LIGHT), css_variables(DARK)
    style = f"<style>svg {{ {light} }} @media (prefers-color-scheme: dark) {{ svg {{ {night} }} }}</style>"
    start, end = text.index("<svg") + 4, text.index(">", text.index("<svg")) + 1
    return f'{text[:start]} role="img" aria-label="{escape(words)}"{text[start:end]}{style}{text[end:]}'.encode()


def panels_of(curves: Mapping[str, Any]) -> tuple[str, ...]:
    """The panels that were measured: accuracy only where the targets are classes."""
    return tuple(name for name in PANELS if any(series(curves, kind, name)[1] for kind in KINDS))


def draw_panel(curves: Mapping[str, Any], panel: str, key: str) -> str:
    """One panel as an `<svg>` element for the page, in the page's colours and font; `key` makes its ids unique."""
    figure = new_figure(*SIZE, STAND_INS)
    with style_of(STAND_INS):
        axes = figure.add_subplot()
        _fill_panel(axes, curves, panel, STAND_INS)
        text = save_figure(figure, "svg").decode()
    text = _follow_page(text[text.index("<svg") :], key)
    body = text[text.index(">") + 1 :]
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.DOTALL)
    width, height = (round(inches * POINTS) for inches in SIZE)
    return (
        f'<svg class="plot" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(_describe(curves, panel))}">'
        + body.replace("xlink:href", "href").strip()
    )


def _describe(curves: Mapping[str, Any], panel: str) -> str:
    """The panel in words, for those who do not see it."""
    first, second = curves.get("models") or (0, 1)
    parts = [f"{panel.capitalize()} along the straight line from model {first} to model {second}."]
    for kind in reversed(KINDS):
        lambdas, values = series(curves, kind, panel)
        known = [(x, y) for x, y in zip(lambdas, values, strict=True) if y is not None]
        if not known:
            continue
        x, y = (max if panel == "loss" else min)(known, key=lambda item: item[1])
        extreme = "highest" if panel == "loss" else "lowest"
        parts.append(
            f"{LABELS[kind].capitalize()}: {_say(known[0][1], panel)} at λ = {known[0][0]:g}, "
            f"{_say(known[-1][1], panel)} at λ = {known[-1][0]:g}, {extreme} {_say(y, panel)} at λ = {x:.2g}."
        )
    return " ".join(parts)


def _say(value: float, panel: str) -> str:
    return f"{100 * value:.1f} %" if panel == "accuracy" else f"{value:.3g}"


def series(
    curves: Mapping[str, Any], kind: str, panel: str, raw: bool = False
) -> tuple[list[float], list[float | None]]:
    """The λ of one curve, and its values there (None where not measured); two empty lists if there is no curve."""
    curve = curves.get(kind) or {}
    name = ("raw_" if raw else "") + {"loss": "losses", "accuracy": "accuracies"}[panel]
    lambdas, values = curve.get("lambdas") or [], curve.get(name) or []
    if len(lambdas) != len(values) or all(finite_number(value) is None for value in values):
        return [], []
    return [float(x) for x in lambdas], [finite_number(value) for value in values]


def leaves_picture(curves: Mapping[str, Any]) -> float | None:
    """The end of the loss axis if a raw loss lies far above the repaired ones, else None."""
    raw, repaired = (
        [y for kind in KINDS for y in series(curves, kind, "loss", raw=raw)[1] if y is not None]
        for raw in (True, False)
    )
    top = max(repaired, default=0.0)
    return HEADROOM * top if max(raw, default=0.0) > FAR * top > 0 else None


def _picture(curves: Mapping[str, Any], colours: Mapping[str, str], kind: str) -> bytes:
    panels = panels_of(curves) or ("loss",)
    figure = new_figure(SIZE[0] * len(panels), SIZE[1] + 0.35, colours)
    with style_of(colours):
        grid = figure.subplots(1, len(panels), squeeze=False)
        for axes, panel in zip(grid[0], panels, strict=True):
            _fill_panel(axes, curves, panel, colours)
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=len(handles), handlelength=2.4)
        return save_figure(figure, kind)


def new_figure(width: float, height: float, colours: Mapping[str, str]) -> "Figure":
    """An empty figure in inches, in our style."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style_of(colours):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor=colours["paper"])
        FigureCanvasAgg(figure)  # draws without a screen; pyplot and its global state are never touched
    return figure


def style_of(colours: Mapping[str, str]) -> Any:
    """A context with matplotlib's defaults and our colours, whatever the user's own settings are."""
    from matplotlib import style

    ours = {
        "svg.fonttype": "none",
        "svg.hashsalt": "isthmus",
        "font.size": 9.5,
        "text.color": colours["text"],
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.edgecolor": colours["axis"],
        "axes.labelcolor": colours["muted"],
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": colours["rule"],
        "grid.linewidth": 0.7,
        "xtick.color": colours["axis"],
        "xtick.labelcolor": colours["muted"],
        "ytick.labelcolor": colours["muted"],
        "ytick.left": False,
        "legend.frameon": False,
        "figure.dpi": POINTS,
        "savefig.dpi": 200,
    }
    return style.context(["default", ours])


def save_figure(figure: "Figure", kind: str) -> bytes:
    """The figure as SVG or PNG; the same figure gives the same bytes."""
    file = io.BytesIO()
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None} if kind == "svg" else {"Software": None}
    figure.savefig(file, format=kind, metadata=metadata)
    return file.getvalue()


def _follow_page(svg: str, key: str) -> str:
    """The SVG with the page's colours and font, and only the ids that it refers to, made unique by `key`."""
    for name, colour in STAND_INS.items():
        svg = svg.replace(colour, f"var({css_name(name)}, {LIGHT[name]})")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda match: f' id="{key}-{match[1]}"' if match[1] in used else "", svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{key}-", svg)
    svg = re.sub(r"font: ([^;\"]*?px) [^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", svg)
    svg = re.sub(r"(\d\.\d\d)\d+", r"\1", svg)  # a hundredth of a point cannot be seen
    return re.sub(r"\s*\n\s*", " ", svg)


def _fill_panel(axes: "Axes", curves: Mapping[str, Any], panel: str, colours: Mapping[str, str]) -> None:
    import numpy as np
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    first, second = curves.get("models") or (0, 1)
    axes.set_title("Loss" if panel == "loss" else "Accuracy", color=colours["text"], pad=8)
    axes.set_xlabel(f"λ from model {first} to model {second}")
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "¼", "½", "¾", "1"])
    axes.set_xlim(-0.02, 1.02)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if panel == "accuracy":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))
    straight_drawn = False
    rises = []
    for kind in KINDS:
        lambdas, values = series(curves, kind, panel)
        if not lambdas:
            continue
        colour = colours[kind]
        x, y = np.array(lambdas), np.array([np.nan if value is None else value for value in values])
        straight = (1 - x) * y[0] + x * y[-1]
        rise = y - straight if panel == "loss" else straight - y
        if np.isfinite(rise).any():
            # Each barrier covers the one behind it before it is tinted, so that two tints do not mix.
            for fill, alpha in ((colours["paper"], 0.9), (colour, 0.15)):
                axes.fill_between(
                    x, straight, y, where=rise > 0, interpolate=True, color=fill, alpha=alpha, linewidth=0
                )
            rises.append((kind, x, y, rise))
        if not straight_drawn and np.isfinite(straight).all():
            axes.plot(x, straight, color=colours["muted"], linestyle=":", linewidth=1.3, label="straight line")
            straight_drawn = True
        raw_x, raw = series(curves, kind, panel, raw=True)
        if raw and curves[kind].get("repair"):
            raw_y = [np.nan if value is None else value for value in raw]
            axes.plot(raw_x, raw_y, color=colour, linestyle=(0, (4, 2.5)), linewidth=1.2, label=f"{LABELS[kind]}, raw")
        marker = MARKERS[kind] if len(x) <= MOST_MARKERS else ""
        axes.plot(x, y, color=colour, linewidth=2, marker=marker, markersize=3.6, label=LABELS[kind])
    _limit(axes, curves, panel)
    _write_rises(axes, rises, panel, colours)


def _write_rises(
    axes: "Axes",
    rises: "Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray]]",
    panel: str,
    colours: Mapping[str, str],
) -> None:
    """Writes every curve's largest rise above its straight line, as it is known: kind, places, values and rises."""
    import numpy as np

    low, high = axes.get_ylim()
    for kind, x, y, rise in rises:
        top = int(np.nanargmax(rise))
        if rise[top] < SMALLEST_RISE * (high - low):
            continue
        sign, digits = ("+", f"{rise[top]:.2f}") if panel == "loss" else ("−", f"{100 * rise[top]:.1f}")
        # The lower curve's figure stands in its own shade if it fits there: outside, the other curve may cross it.
        inside = kind == "aligned" and rise[top] > ROOM_FOR_TEXT * (high - low)
        below = inside == (panel == "loss")
        box = {"facecolor": colours["paper"], "edgecolor": "none", "alpha": 0.75, "boxstyle": "round,pad=0.1"}
        axes.annotate(
            sign + digits,
            (x[top], y[top]),
            xytext=(0, -7 if below else 6),
            textcoords="offset points",
            ha="center",
            va="top" if below else "bottom",
            color=colours[kind],
            fontsize=9,
            fontweight="bold",
            bbox=None if inside else box,
        )


def _limit(axes: "Axes", curves: Mapping[str, Any], panel: str) -> None:
    """Sets the vertical axis: losses from zero to not much above the repaired ones, accuracies to 100 % at most."""
    low, high = axes.get_ylim()
    if panel == "accuracy":
        span = max(high - low, 0.02)
        axes.set_ylim(max(low - 0.1 * span, -0.02), min(high + 0.04 * span, 1.02))
        return
    end = leaves_picture(curves) or high + 0.08 * (high - low)
    start = min(low, 0.0) if low < -0.05 * high else 0.0
    axes.set_ylim(start, end if end > start else start + 1.0)
