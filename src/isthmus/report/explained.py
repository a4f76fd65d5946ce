"""The facts of the sections on an explained merge: claims, layers, singular directions, similarity."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from isthmus.report import depth, figures, heatmap, spectra
from isthmus.report.gallery import Picture, pictures_of_match, refused
from isthmus.report.schema import RunReport

Report = Mapping[str, Any]

SYMBOLS = {"holds": "✓", "holds partly": "◐", "does not": "✕"}
CLASSES = {"holds": "yes", "holds partly": "partly", "does not": "no"}
MOST_SPACES = 1000  # rows of the table
MOST_LAYERS = 200  # layers whose directions are drawn
MOST_MAPS = 12
IN_A_ROW = 300  # pixels of a chart, three of which stand in a row
LARGE = 0.3  # the threshold that the table of layers names beside 0


def _explained(report: RunReport) -> Report | None:
    """What `isthmus explain` found, or None."""
    return report.explain or None


def _letters(report: RunReport) -> list[str]:
    """The models' letters, as explained, else in order."""
    found = (_explained(report) or {}).get("models") or []
    return [str(name) for name in found] or [
        chr(ord("A") + index) for index in range(min(26, len(report.provenance.models)))
    ]


def _sample_noun(found: Report) -> str:
    """What one sample of the data is: an image, unless the report says otherwise."""
    return str((found.get("data") or {}).get("noun") or "image")


# ---- verdicts


def claims(report: RunReport) -> dict[str, Any] | None:
    """The claims and questions with their verdicts, and what was measured on."""
    found = _explained(report)
    if found is None:
        return None
    groups = [(title, _judged(found.get(key))) for title, key in (("Claims", "claims"), ("Questions", "questions"))]
    files = [model.file for model in report.provenance.models]
    return {
        "groups": [(title, items, _counted(items)) for title, items in groups if items],
        "models": [(name, files[index] if index < len(files) else "") for index, name in enumerate(_letters(report))],
        "data": found.get("data"),
        "noun": _sample_noun(found),
        "seconds": found.get("seconds"),
        "no_claims": _no_claims(found, len(report.provenance.models)),
        "options": [
            (f"{_sample_noun(found)}s" if name == "images" else str(name), value)
            for name, value in (found.get("options") or {}).items()
            if value is not None
        ],
    }


def _no_claims(found: Report, models: int) -> str | None:
    """Why the claims on weight matching were not judged; None if they were."""
    if found.get("claims"):
        return None
    if models != 2:
        return f"The claims on weight matching are about two models; these are {models}."
    if (found.get("options") or {}).get("claims") is False:
        return "The claims on weight matching were left out (--no-claims)."
    return "The claims on weight matching were not judged."


def _judged(claims: Sequence[Report] | None) -> list[dict[str, Any]]:
    return [
        {
            "text": claim.get("text"),
            "figure": _said(claim.get("figure")),
            "threshold": _said(claim.get("threshold")),
            "verdict": claim.get("verdict") or "not judged",
            "symbol": SYMBOLS.get(claim.get("verdict") or "", "?"),
            "css": CLASSES.get(claim.get("verdict") or "", "open"),
        }
        for claim in claims or []
    ]


def _said(value: Any) -> str | None:
    """A figure as it stands, a bare number to four digits."""
    number = figures.finite_number(value)
    return f"{number:.4g}".replace("-", "\N{MINUS SIGN}") if number is not None else value


def _counted(items: Sequence[Report]) -> str:
    """How many hold: "2 hold, 1 holds partly, 1 does not"."""
    counts = Counter(item["verdict"] for item in items)
    plurals = {"holds": "hold", "holds partly": "hold partly", "does not": "do not"}
    order = [*SYMBOLS, *(name for name in counts if name not in SYMBOLS)]
    return ", ".join(
        f"{counts[name]} {name if counts[name] == 1 else plurals.get(name, name)}" for name in order if counts[name]
    )


# ---- layers


class ExplainedColumn(NamedTuple):
    """A column of a table of figures: its heading and the figure of a row, None where not measured."""

    name: str
    figure: Callable[[Report], float | None]
    digits: int = 2


class LayerGroup(NamedTuple):
    """Columns under a common heading."""

    name: str
    columns: list[ExplainedColumn]


def layers(report: RunReport) -> dict[str, Any] | None:
    """Charts over depth, and all figures of every space."""
    found = _explained(report)
    spaces = [space for space in (found or {}).get("spaces") or [] if space]
    if found is None or not spaces:
        return None
    models, drawn = _letters(report), spaces[: depth.MOST_DRAWN]
    charts = [
        ("Correlation", "Median over the units of each space.", depth.draw_correlations(drawn, models)),
        ("What became of the units", _kept(found), depth.draw_labels(drawn, models)),
        (
            "Variance",
            "Merged units over their parents’: at 1 nothing collapsed.",
            depth.draw_variances(drawn, repaired=report.repair is not None),
        ),
    ]
    return {
        "charts": [each for each in charts if each[2] is not None],
        "narrow": all(each[2] is None or each[2].width <= IN_A_ROW for each in charts),
        "skipped": list((found.get("skipped") or {}).items())[:MOST_SPACES],
        **_matches_alone(report, found),
        "not_drawn": len(spaces) - len(drawn),
        "no_pictures": found.get("not_drawn"),
        "groups": _groups(spaces, models, _sample_noun(found)),
        "spaces": spaces[:MOST_SPACES],
        "left_out": max(0, len(spaces) - MOST_SPACES),
    }


def _matches_alone(report: RunReport, found: Report) -> dict[str, Any]:
    """The match matrices of all spaces, unless the section on singular directions shows each with its layer."""
    alone = {} if _has_directions(found) else pictures_of_match(report)
    return {
        "matches": list(alone.items()),
        "refused": refused(picture for pair in alone.values() for picture in pair),
    }


def _has_directions(found: Report) -> bool:
    """Whether anything was measured about singular directions or barriers."""
    return bool((found.get("spectra") or {}).get("layers") or found.get("taylor") or found.get("barriers"))


def _kept(found: Report) -> str:
    threshold = figures.finite_number(found.get("threshold"))
    least = "" if threshold is None else f" of at least {threshold:g}"
    return f"A merged unit counts as a model’s feature from a correlation{least} with it on. Shared: every model’s."


def _groups(spaces: Sequence[Report], models: Sequence[str], noun: str) -> list[LayerGroup]:
    """The columns of the table of spaces; those without a figure are left out. A sample of the data is a `noun`."""

    def one(part: str, key: str) -> Callable[[Report], float | None]:
        return lambda space: depth.known(depth.part(space, part).get(key))

    def each(part: str, key: str, prefix: str = "") -> list[ExplainedColumn]:
        def of(index: int) -> Callable[[Report], float | None]:
            return lambda space: depth.known(depth.part(space, part).get(key), index)

        return [ExplainedColumn(f"{prefix}{name}", of(index)) for index, name in enumerate(models)]

    names = depth.label_names(spaces, models)
    groups = [
        LayerGroup(
            "Correlation",
            [
                ExplainedColumn("before", one("correlation", "before")),
                ExplainedColumn("matched", one("correlation", "matched")),
                *each("correlation", "merged", "merged–"),
                *each("correlation", "naive", "naive–"),
                ExplainedColumn("shuffled", one("correlation", "shuffled")),
            ],
        ),
        LayerGroup("Units of the merged network", [ExplainedColumn(name, one("labels", name), 0) for name in names]),
        LayerGroup("Units without alignment", [ExplainedColumn(name, one("naive_labels", name), 0) for name in names]),
        LayerGroup(
            f"Overlap of top {noun}s",
            [
                *each("top_overlap", "merged", "merged–"),
                *each("top_overlap", "naive", "naive–"),
                ExplainedColumn("shuffled", one("top_overlap", "shuffled")),
            ],
        ),
        LayerGroup(
            "Variance ratio",
            [ExplainedColumn(key, one("variance_ratio", key)) for key in ("naive", "aligned", "mended")],
        ),
        LayerGroup(
            "Cross-activation, percentile",
            each("cross_activation", "merged", "merged–") + each("cross_activation", "naive", "naive–"),
        ),
    ]
    return _filled(groups, spaces)


def _filled(groups: Sequence[LayerGroup], rows: Sequence[Report]) -> list[LayerGroup]:
    """The groups without columns in which no row has a figure."""
    kept = [
        LayerGroup(
            group.name,
            [column for column in group.columns if any(column.figure(row) is not None for row in rows)],
        )
        for group in groups
    ]
    return [group for group in kept if group.columns]


# ---- singular directions


def directions(report: RunReport) -> dict[str, Any] | None:
    """Spectra, agreement and alignment of every layer, and the match matrices of its space."""
    found = _explained(report)
    if found is None:
        return None
    spectrum, taylor = found.get("spectra") or {}, found.get("taylor") or {}
    matches = pictures_of_match(report)
    rows = [layer for layer in spectrum.get("layers") or [] if layer]
    if not _has_directions(found):
        return None
    models = _letters(report)
    thresholds = [value for value in map(figures.finite_number, spectrum.get("thresholds") or []) if value is not None]
    shown, elsewhere = _placed(report, rows[:MOST_LAYERS], matches)
    overlaps = [each for each in spectrum.get("overlaps") or [] if each]
    whole = spectra.draw_agreement(
        [each.get("threshold") for each in overlaps],
        [each.get("before") for each in overlaps],
        [each.get("after") for each in overlaps],
        "all layers together",
    )
    panels = [
        _layer(layer, thresholds, models) | {"matches": shown.get(index, []), "see": elsewhere.get(index)}
        for index, layer in enumerate(rows[:MOST_LAYERS])
    ]
    placed = {name for pairs in shown.values() for name, _ in pairs}
    return {
        "models": models,
        "distance": (spectrum.get("distance_before"), spectrum.get("distance_after")),
        "taylor": taylor,
        "unchanged": max(
            (v for v in (figures.finite_number(row.get("unchanged")) for row in rows) if v is not None), default=None
        ),
        "barriers": [(str(name).replace("_", " "), value) for name, value in (found.get("barriers") or {}).items()],
        "images": (found.get("data") or {}).get("images"),
        "noun": _sample_noun(found),
        "re_estimated": any((pair.get("aligned") or {}).get("repair") for pair in report.curves or []),
        "whole": whole,
        "overlaps": overlaps,
        "panels": panels,
        "left_out": len(rows) - len(panels),
        "rows": rows,
        "groups": _layer_groups(rows, thresholds),
        "others": [(name, pair) for name, pair in matches.items() if name not in placed],
        "skipped": list((spectrum.get("skipped") or {}).items())[:MOST_SPACES],
        "refused": refused(picture for pair in matches.values() for picture in pair),
    }


def _layer(layer: Report, thresholds: Sequence[float], models: Sequence[str]) -> dict[str, Any]:
    """One layer's pictures and figures."""
    before, after = layer.get("r_before") or [], layer.get("r_after") or []
    pictures = [
        ("Singular values", spectra.draw_values(layer, models)),
        (
            "Agreement of directions",
            spectra.draw_agreement(thresholds, before, after, f"layer {layer.get('name')}"),
        ),
        ("Alignment of each direction", spectra.draw_alignment(layer, models)),
    ]
    return {
        "name": layer.get("name"),
        "pictures": [each for each in pictures if each[1] is not None],
        "count": len(layer.get("a") or []) or None,
        "distance": (layer.get("distance_before"), layer.get("distance_after")),
        "input": (layer.get("input_share"), layer.get("input_chance"), _ratio(layer)),
        "r": [
            (gamma, before[index] if index < len(before) else None, after[index] if index < len(after) else None)
            for index, gamma in enumerate(thresholds)
        ]
        if before or after
        else [],
    }


def _ratio(layer: Report) -> float | None:
    """The share of a layer's input along its top directions over the share that chance gives."""
    share, chance = figures.finite_number(layer.get("input_share")), figures.finite_number(layer.get("input_chance"))
    return share / chance if share is not None and chance else None


def _layer_groups(rows: Sequence[Report], thresholds: Sequence[float]) -> list[LayerGroup]:
    """The columns of the table of layers."""

    def entry(key: str, index: int) -> Callable[[Report], float | None]:
        return lambda layer: depth.known(layer.get(key) or [], index)

    def field(key: str) -> Callable[[Report], float | None]:
        return lambda layer: figures.finite_number(layer.get(key))

    groups = [
        LayerGroup(
            "Matrix", [ExplainedColumn("directions", lambda layer: float(len(layer.get("a") or [])) or None, 0)]
        ),
        LayerGroup(
            "Distance",
            [ExplainedColumn("before", field("distance_before")), ExplainedColumn("after", field("distance_after"))],
        ),
    ]
    for wanted in (0.0, LARGE):
        index = next((i for i, gamma in enumerate(thresholds) if abs(gamma - wanted) < 1e-9), None)
        if index is not None:
            columns = [
                ExplainedColumn("before", entry("r_before", index), 3),
                ExplainedColumn("after", entry("r_after", index), 3),
            ]
            groups.append(LayerGroup(f"R at γ = {wanted:g}", columns))
    groups.append(LayerGroup("Alignment", [ExplainedColumn("Spearman", field("rank_correlation"))]))
    fed = [ExplainedColumn("found", field("input_share"), 3), ExplainedColumn("chance", field("input_chance"), 3)]
    groups.append(LayerGroup("Share of the input", [*fed, ExplainedColumn("times", _ratio, 1)]))
    return _filled(groups, rows)


Matches = Mapping[str, Sequence[Picture]]


def _placed(
    report: RunReport, rows: Sequence[Report], matches: Matches
) -> tuple[dict[int, list[tuple[str, Sequence[Picture]]]], dict[int, tuple[str, int]]]:
    """Which layer shows the match matrices of a space: the first that writes it; the later ones name that layer.

    A layer writes a space if a site of the space is the layer's weight at dimension 0.
    """
    writes: dict[str, list[str]] = {}
    for space in report.symmetry.get("spaces") or []:
        for site in space.get("sites") or []:
            if 0 in (site.get("dims") or []):
                writes.setdefault(str(site.get("parameter")), []).append(str(space.get("name")))
    shown: dict[int, list[tuple[str, Sequence[Picture]]]] = {}
    elsewhere: dict[int, tuple[str, int]] = {}
    first: dict[str, int] = {}
    for index, layer in enumerate(rows):
        for name in writes.get(str(layer.get("name")), []):
            if name not in matches:
                continue
            if name in first:
                elsewhere[index] = (name, first[name])
            else:
                first[name] = index
                shown.setdefault(index, []).append((name, matches[name]))
    return shown, elsewhere


# ---- similarity


def alike(report: RunReport) -> dict[str, Any] | None:
    """Heat maps of the similarity of every layer of one model to every layer of another."""
    found = [each for each in (_explained(report) or {}).get("cka") or [] if each]
    if not found:
        return None
    tables = []
    for each in found[:MOST_MAPS]:
        rows, columns = ([str(name) for name in each.get(key) or []] for key in ("rows", "columns"))
        if rows and columns and max(len(rows), len(columns)) <= heatmap.LARGEST:
            tables.append((each, rows, columns))
    everything = list(dict.fromkeys(name for _, rows, columns in tables for name in (*rows, *columns)))
    shortened, start, end = heatmap.shorten(everything)
    names = dict(zip(everything, shortened, strict=True))
    side = max((max(len(rows), len(columns)) for _, rows, columns in tables), default=1)
    cells = heatmap.cells_for(shortened, side)
    # Names of rows stand once for the maps beside one another, if they are those of all.
    together = cells.together and all(rows == tables[0][1] for _, rows, _ in tables)
    maps = []
    for each, rows, columns in tables:
        first, second = [*map(str, each.get("models") or []), "A", "B"][:2]
        values = [[figures.finite_number(value) for value in row] for row in each.get("values") or []]
        same, other = _diagonal(rows, columns, values)
        words = f"CKA of the layers of {first}, in rows, and of {second}, in columns."
        if same is not None and other is not None:
            words += f" Mean {same:.2f} between layers of the same name, {other:.2f} between others."
        short = [[names[name] for name in part] for part in (rows, columns)]
        maps.append(
            {
                "name": f"{first} and {second}",
                "first": first,
                "second": second,
                "picture": heatmap.draw_heatmap(short[0], short[1], values, (first, second), words, cells.size),
                "rows": list(zip(rows, values, strict=True)),
                "columns": columns,
                "same": same,
                "other": other,
            }
        )
    return {
        "noun": _sample_noun(_explained(report) or {}),
        "maps": maps,
        "together": together,
        "start": start,
        "end": end,
        "scale": heatmap.draw_scale(),
        "left_out": len(found) - len(maps),
    }


def _diagonal(
    rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]]
) -> tuple[float | None, float | None]:
    """Means over pairs of layers of the same name, and over all others."""
    cells = [
        (row == column, value)
        for row, line in zip(rows, values, strict=True)
        for column, value in zip(columns, line, strict=True)
        if value is not None
    ]
    means = []
    for kind in (True, False):
        numbers = [value for same, value in cells if same is kind]
        means.append(sum(numbers) / len(numbers) if numbers else None)
    return means[0], means[1]
