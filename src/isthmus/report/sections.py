"""The sections of the page: each a function that picks its facts from a report for the template of the same name.

To add one, write `templates/NAME.html.jinja` and a function that returns what the template shows (None leaves the
section out), and add one line to `SECTIONS`.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from isthmus.report import curves, explained, figures, gallery, triangle
from isthmus.report.schema import AverageFacts, RunReport, RunScores, score_rows

Report = Mapping[str, Any]

# So that no network makes a page that a browser cannot hold; what is left out is said, and is in report.json.
MOST_ROWS = 1000
MOST_SITES = 20_000
MOST_PICTURES = 12
OPEN_PICTURES = 3
MOVED_COLUMNS = 4

GROUPS = {
    "permutation": "units may be reordered",
    "orthogonal fixing ones": "units may be rotated around the vector of ones",
    "orthogonal": "units may be rotated and reflected",
    "invertible": "units may be mixed by any invertible matrix",
}


def opening(report: RunReport) -> dict[str, Any]:
    """The head of the page: what was merged, the verdict, and the four figures behind it."""
    models, method = len(report.provenance.models), report.method.name
    network = f"× {report.provenance.model}" if report.provenance.model else "networks"
    tiles = [_merged_tile(report), _naive_tile(report), _barrier_tile(report), _proof_tile(report)]
    return {
        "title": f"{models} {network}, {method}",
        "heading": f"{models} {network}",
        "deed": "aligned" if _only_aligned(report) else "merged",
        "method": method,
        "created": report.provenance.created,
        "version": report.provenance.isthmus,
        "verdict": report.verdict.replace(" %", f"{figures.NARROW}%"),
        "tiles": [tile for tile in tiles if tile],
        "unproved": report.proof is None,
    }


class Tile(NamedTuple):
    """One key figure: what it is, the figure, and a line to compare it with."""

    name: str
    figure: str
    note: str
    alarming: bool = False


def _merged_tile(report: RunReport) -> Tile | None:
    found = report.scores
    if found is None or found.merged is None:
        return None
    quantity, say = _headline(found)
    known = sorted(
        value for parent in found.parents if (value := figures.finite_number(getattr(parent, quantity))) is not None
    )
    texts = [say(value) for value in (known[:1] + known[-1:])]
    note = Markup("parents {}").format(Markup(" to ").join(dict.fromkeys(texts))) if texts else ""
    return Tile(f"Merged {quantity}", say(getattr(found.merged, quantity)), note)


def _naive_tile(report: RunReport) -> Tile | None:
    found = report.scores
    if found is None:
        return None
    quantity, say = _headline(found)
    score = found.naive_mended if report.has_repaired else found.naive
    if score is None:
        return None
    return Tile(
        "Without alignment",
        say(getattr(score, quantity)),
        "averaged as they are, same repair" if report.has_repaired else "averaged as they are",
    )


def _barrier_tile(report: RunReport) -> Tile | None:
    pairs = report.curves or []
    aligned = [value for pair in pairs if (value := _figure(pair, "aligned", "barrier")) is not None]
    naive = [value for pair in pairs if (value := _figure(pair, "naive", "barrier")) is not None]
    if not aligned:
        return None
    note = f"without alignment {figures.decimal(max(naive), 2)}" if naive else ""
    name = "Loss barrier" if len(pairs) == 1 else f"Largest loss barrier of {len(pairs)}"
    return Tile(name, figures.decimal(max(aligned), 2), note)


def _proof_tile(report: RunReport) -> Tile:
    units = _free_units(report)
    noun = "free unit" if units == 1 else "free units"
    if report.proof is None:
        return Tile("Symmetry", "not proved", f"{figures.whole(units)} {noun} taken on trust", alarming=True)
    error = figures.power(report.proof.max_error)
    return Tile("Symmetry", "proved", Markup("{} {}, error {}").format(figures.whole(units), noun, error))


def _headline(found: RunScores) -> tuple[str, Callable[[Any], str]]:
    """Accuracy where the merged network has one, else loss; and how it is written."""
    merged = found.merged
    if merged is None or figures.finite_number(merged.accuracy) is None:
        return "loss", figures.decimal
    digits = _digits(merged.count)
    return "accuracy", lambda value: figures.percent(value, digits)


def _digits(count: Any) -> int:
    """Decimals of a percentage of `count` samples: no more than one sample can move."""
    return 2 if (figures.finite_number(count) or 0) >= 2000 else 1


def _scores(report: RunReport) -> dict[str, Any] | None:
    """Loss and accuracy of parents, references and the merged network."""
    if _only_aligned(report):
        return None
    rows = score_rows(report)
    return {
        "rows": rows,
        "mended": (report.spoken_repair or report.repair) if report.has_repaired else "",
        "has_accuracy": any(figures.finite_number(row.score.accuracy) is not None for row in rows),
        "digits": _digits(rows[0].score.count) if rows else 1,
        "data": report.provenance.data,
    }


def _path(report: RunReport) -> dict[str, Any] | None:
    """Loss and accuracy along the lines between the parents, drawn and as barriers."""
    pairs = report.curves or []
    if _only_aligned(report) and not pairs:
        return None
    drawn = []
    for index, pair in enumerate(pairs[:MOST_PICTURES]):
        pictures = [Markup(curves.draw_panel(pair, panel, f"pair{index}{panel}")) for panel in curves.panels_of(pair)]
        drawn.append({"name": _pair_name(pair), "pictures": pictures, "rows": _measured(pair)})
    measures = ("barrier", "midpoint_barrier", "error_barrier", "midpoint_error_barrier")
    barriers = [
        (
            _pair_name(pair),
            [
                (kind, curves.LABELS[kind], [_figure(pair, kind, name) for name in measures])
                for kind in ("aligned", "naive")
            ],
        )
        for pair in pairs
    ]
    return {
        "pairs": drawn,
        "open_pictures": OPEN_PICTURES,
        "left_out": len(pairs) - len(drawn),
        "many": len(pairs) > 1,
        "barriers": [
            (name, [row for row in rows if pair.get(row[0])])
            for pair, (name, rows) in zip(pairs, barriers, strict=True)
        ],
        "has_error": any(row[2][2] is not None for _, rows in barriers for row in rows),
        "has_raw": any((pair.get(kind) or {}).get("repair") for pair in pairs for kind in curves.KINDS),
        "leaves": any(curves.leaves_picture(pair) is not None for pair in pairs[:MOST_PICTURES]),
        "has_data": report.provenance.data is not None,
        "models": len(report.provenance.models),
        "data": report.provenance.data,
    }


def _measured(pair: Report) -> list[tuple[float, list[tuple[float | None, float | None]]]]:
    """The points behind a picture: λ, and loss and accuracy of the aligned and of the naive curve."""
    table: dict[float, list[tuple[float | None, float | None]]] = {}
    for column, kind in enumerate(("aligned", "naive")):
        for place, panel in enumerate(curves.PANELS):
            for x, value in zip(*curves.series(pair, kind, panel), strict=True):
                row = table.setdefault(x, [(None, None), (None, None)])
                loss, accuracy = row[column]
                row[column] = (value, accuracy) if place == 0 else (loss, value)
    return sorted(table.items())


def _symmetry(report: RunReport) -> dict[str, Any]:
    """What was proved, and every space."""
    found = report.symmetry
    spaces = found.get("spaces") or []
    models = len(report.provenance.models)
    return {
        "proof": report.proof,
        "free_units": _free_units(report),
        "moved_units": _moved_units(spaces),
        "touched_share": figures.finite_number(found.get("moved_share")),
        "spaces": spaces[:MOST_ROWS],
        "left_out": max(0, len(spaces) - MOST_ROWS),
        "most_sites": max(10, MOST_SITES // max(1, min(len(spaces), MOST_ROWS))),
        "columns": _moved_columns(spaces, models),
        "groups": [(name, GROUPS[name]) for name in GROUPS if any(space.get("group") == name for space in spaces)],
        "models": models,
    }


class Column(NamedTuple):
    """Shares of moved units: a heading, the share of a space, and whether a linear map mixes its units."""

    name: str
    share: Callable[[Report], float | None]
    mixed: Callable[[Report], bool]


def _moved_columns(spaces: Sequence[Report], models: int) -> list[Column]:
    """A column for every model that moved, or the mean over them where they are many."""

    def share(space: Report, index: int) -> float | None:
        moved = space.get("moved") or []
        return figures.finite_number(moved[index]) if index < len(moved) else None

    def mixed(space: Report, indices: Sequence[int]) -> bool:
        moved = space.get("moved") or []
        return any(index < len(moved) and moved[index] is None for index in indices)

    moving = [index for index in range(models) if any(share(space, index) or mixed(space, [index]) for space in spaces)]
    if len(moving) <= MOVED_COLUMNS:
        shown = moving or list(range(min(models, 2)))[-1:]
        return [
            Column(
                "Moved" if models == 2 and len(shown) == 1 else f"Model {index} moved",
                lambda space, i=index: share(space, i),
                lambda space, i=index: mixed(space, [i]),
            )
            for index in shown
        ]

    def mean(space: Report) -> float | None:
        shares = [value for index in moving if (value := share(space, index)) is not None]
        return sum(shares) / len(shares) if shares else None

    return [Column(f"Moved, mean of {len(moving)} models", mean, lambda space: mixed(space, moving))]


def _frozen(report: RunReport) -> dict[str, Any] | None:
    """What cannot move, by reason; what was lost to a missing rule comes first."""
    axes = report.symmetry.get("frozen") or []
    untouched = report.symmetry.get("untouched") or []
    if not axes and not untouched:
        return None
    reasons: dict[tuple[bool, str], list[Report]] = {}
    for axis in axes:
        reasons.setdefault(
            (axis.get("expected") is not False, str(axis.get("reason") or "no reason recorded")), []
        ).append(axis)
    groups, room = [], MOST_ROWS
    for (expected, reason), members in sorted(
        reasons.items(), key=lambda item: (item[0][0], -len(item[1]), item[0][1])
    ):
        groups.append(
            {
                "reason": reason,
                "expected": expected,
                "axes": len(members),
                "units": sum(int(figures.finite_number(axis.get("units")) or 0) for axis in members),
                "members": members[:room],
                "left_out": len(members) - len(members[:room]),
            }
        )
        room -= len(members[:room])
    unexpected = [axis for axis in axes if axis.get("expected") is False]
    return {
        "groups": groups,
        "unexpected": len(unexpected),
        "operations": Counter(axis["operation"] for axis in unexpected if axis["operation"]).most_common(5),
        "untouched": untouched[:MOST_ROWS],
        "untouched_left_out": max(0, len(untouched) - MOST_ROWS),
    }


def _matching(report: RunReport) -> dict[str, Any]:
    """How the models were matched and averaged."""
    method, average = report.method, report.average or AverageFacts()
    objective, bound = figures.finite_number(method.objective), figures.finite_number(method.upper_bound)
    return {
        "method": method,
        "options": _options(method.options),
        "details": _options(method.details),
        "ratio": objective / bound if objective is not None and bound else None,
        "average": report.average,
        "average_options": _options(average.options),
        "coefficients": average.coefficients or [],
        "coefficients_by_path": average.coefficients_by_path or {},
        "repair": report.repair,
        "mended": report.spoken_repair,
        "gained_biases": report.gained_biases or [],
    }


def _provenance(report: RunReport) -> dict[str, Any]:
    """What is needed to run it again."""
    told = report.provenance
    return {
        "run": told,
        "seconds": report.seconds,
        "models": told.models,
        "aligned": report.aligned or [],
        "data": told.data,
        "versions": [("isthmus", told.isthmus), *(told.versions or {}).items()],
    }


# ---- helpers


def _figure(pair: Report, kind: str, name: str) -> float | None:
    """A barrier of one of a pair's curves."""
    return figures.finite_number((pair.get(kind) or {}).get(name))


def _only_aligned(report: RunReport) -> bool:
    """Whether the run wrote its models moved into one frame, and merged nothing."""
    return report.aligned is not None


def _moved_units(spaces: Sequence[Report]) -> float | None:
    """The share of all units that moved, on average over the models that moved at all."""
    sizes = [int(space["size"]) * int(space["copies"] or 1) for space in spaces]
    columns = list(zip(*(space.get("moved") or [] for space in spaces), strict=False))
    known = [[share for share in map(figures.finite_number, column) if share is not None] for column in columns]
    moving = [shares for shares in known if len(shares) == len(sizes) and any(shares)]
    if not moving:
        return 0.0 if known and all(len(shares) == len(sizes) for shares in known) else None
    total = sum(size * share for shares in moving for size, share in zip(sizes, shares, strict=True))
    return total / sum(sizes) / len(moving)


def _free_units(report: RunReport) -> int:
    """Units that can move, as recorded or else counted over the spaces."""
    known = figures.finite_number(report.symmetry.get("free_units"))
    spaces = report.symmetry.get("spaces") or []
    return (
        round(known) if known is not None else sum(int(space["size"]) * int(space["copies"] or 1) for space in spaces)
    )


def _pair_name(pair: Report) -> str:
    first, second = pair.get("models") or (0, 1)
    return f"Models {first} and {second}"


def _options(options: Any) -> list[tuple[str, str]]:
    """Options or details as names and short texts."""
    items = options.items() if isinstance(options, dict) else []
    return [(str(name), _short(value)) for name, value in items]


def _short(value: Any) -> str:
    """A JSON value on one line, numbers to six digits, cut where it is long."""

    def rounded(item: Any) -> Any:
        if isinstance(item, float):
            return float(f"{item:.6g}")
        if isinstance(item, list):
            return [rounded(each) for each in item]
        return {key: rounded(each) for key, each in item.items()} if isinstance(item, dict) else item

    text = value if isinstance(value, str) else json.dumps(rounded(value), ensure_ascii=False)
    return figures.clean(text, 400)


# ---- the table


class Section(NamedTuple):
    """A section of the page: its id and template, its heading, and what picks its facts from the report."""

    name: str
    title: str
    facts: Callable[[RunReport], dict[str, Any] | None]


SECTIONS = (
    Section("scores", "Scores", _scores),
    Section("path", "The path between the parents", _path),
    Section("triangle", "The triangle between the parents", triangle.triangle),
    Section("claims", "Claims and questions", explained.claims),
    Section("layers", "Layer by layer", explained.layers),
    Section("directions", "Singular directions", explained.directions),
    Section("alike", "Alike?", explained.alike),
    Section("units", "Units", gallery.units),
    Section("symmetry", "Symmetry", _symmetry),
    Section("frozen", "What cannot move", _frozen),
    Section("matching", "Method", _matching),
    Section("provenance", "Provenance", _provenance),
)
