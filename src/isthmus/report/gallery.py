"""Pictures of units: what of `features.json` may stand on the page, and the facts of the gallery."""

import base64
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isthmus.errors import CheckpointError
from isthmus.report import chart, depth, figures
from isthmus.report.schema import RunReport

Report = Mapping[str, Any]

# The only form in which a picture reaches the page; anything else could be an address that a browser asks for.
DATA_URI = re.compile(r"data:image/(?:png|jpeg|webp);base64,[A-Za-z0-9+/=]+")
# Characters of data URIs, so that the page stays below 10 MB.
ROOM_FOR_MATCHES, ROOM_FOR_UNITS = 2_500_000, 6_000_000
MOST_UNITS = 2000
GROUPS = {"best": 0, "median": 1, "worst": 2}
PNG_START = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Picture:
    """A picture of the page.

    Attributes:
        uri: Its data URI, or None where there is none that may be shown.
        alt: What it shows, in words.
        width: In pixels, where its head tells.
        height: In pixels.
        given: Whether there was anything in its place.
    """

    uri: str | None
    alt: str
    width: int | None = None
    height: int | None = None
    given: bool = True


def read_features(path: Path) -> dict[str, Any] | None:
    """A `features.json` as it is, or None if there is none.

    Raises:
        CheckpointError: It is damaged, or no object.
    """
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        cause = figures.clean(f"{type(error).__name__}: {error}")
        raise CheckpointError(f"cannot read {str(path)!r} ({cause}); run `isthmus explain` again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{str(path)!r} holds no object of pictures; run `isthmus explain` again")
    return found


def _show(uri: Any, alt: str) -> Picture:
    """The picture of a data URI, empty unless it is one of an image."""
    if not isinstance(uri, str) or DATA_URI.fullmatch(uri) is None:
        return Picture(None, alt, given=uri is not None)
    width, height = _size(uri)
    return Picture(uri, alt, width, height)


def _size(uri: str) -> tuple[int | None, int | None]:
    """Width and height of a PNG, from its first 24 bytes, so that the page need not move when it is drawn."""
    encoded = uri.partition(",")[2][:32]
    if not uri.startswith("data:image/png") or len(encoded) < 32 or "=" in encoded:
        return None, None
    head = base64.b64decode(encoded)
    if head[:8] != PNG_START or head[12:16] != b"IHDR":
        return None, None
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def _admitted(pictures: Iterable[Picture], room: int) -> list[Picture]:
    """The pictures in order, those emptied that no longer fit into `room` characters."""
    kept = []
    for picture in pictures:
        fits = picture.uri is None or len(picture.uri) <= room
        room -= len(picture.uri or "") if fits else 0
        kept.append(picture if fits else Picture(None, picture.alt))
    return kept


def refused(pictures: Iterable[Picture]) -> int:
    """How many pictures were given and do not stand on the page."""
    return sum(picture.given and picture.uri is None for picture in pictures)


def _spaces(report: RunReport) -> dict[str, Report]:
    """The pictures by space, with names cleaned as those of the report are."""
    found = (report.features or {}).get("spaces") or {}
    return {figures.clean(name): each or {} for name, each in found.items()}


def pictures_of_match(report: RunReport) -> dict[str, tuple[Picture, Picture]]:
    """For each space with match matrices, those before and after matching; what does not fit is empty."""
    if not report.explain:
        return {}
    pairs = {}
    for name, each in _spaces(report).items():
        match = each.get("match") or {}
        before, after = (
            _show(match.get(key), f"correlation of the units of {name} in one model and in the other, {key} matching")
            for key in ("before", "after")
        )
        if before.given or after.given:
            pairs[name] = (before, after)
    kept = _admitted((picture for pair in pairs.values() for picture in pair), ROOM_FOR_MATCHES)
    return dict(zip(pairs, zip(kept[::2], kept[1::2], strict=True), strict=True))


def units(report: RunReport) -> dict[str, Any] | None:
    """The gallery: chosen units of every space, with their pictures and scores."""
    found = report.explain or {}
    models = [str(name) for name in found.get("models") or []]
    spaces = [space for space in found.get("spaces") or [] if space and space.get("gallery")]
    if not spaces:
        return None
    pictures = _spaces(report)
    mixed = {space.get("name") for space in report.symmetry.get("spaces") or [] if None in (space.get("moved") or [])}
    cards = [
        (
            str(space.get("name")),
            [
                _card(space, entry, models, pictures, space.get("name") in mixed)
                for entry in space["gallery"][:MOST_UNITS]
            ],
        )
        for space in spaces
    ]
    columns = [column for _, group in cards for card in group for column in card["columns"]]
    kept = _admitted((picture for column in columns for picture in (column["picture"], column["top"])), ROOM_FOR_UNITS)
    for column, picture, top in zip(columns, kept[::2], kept[1::2], strict=True):
        column.update(picture=picture, top=top)
    names = _score_names(models)
    known = [
        index
        for index in range(len(names))
        if any(card["scores"][index] is not None for _, group in cards for card in group)
    ]
    labels = {card["label"] for _, group in cards for card in group if card["label"] is not None}
    return {
        "spaces": cards,
        "scores": [(index, names[index]) for index in known],
        "labels": depth.label_names([{"labels": dict.fromkeys(labels, 1)}], models),
        "method": figures.clean((report.features or {}).get("method")),
        "seconds": (report.features or {}).get("seconds"),
        "has_pictures": any(picture.uri for picture in kept),
        "refused": refused(kept),
        # The deepest space says most: pictures of the first are mostly one colour or one edge.
        "deepest": len(cards) - 1,
    }


def _score_names(models: Sequence[str]) -> list[str]:
    """The scores of a unit, by which the gallery can be sorted."""
    return [
        "correlation of the matched pair",
        *(f"correlation of merged with {name}" for name in models),
        *(f"correlation of naive with {name}" for name in models),
        "spread of merged over its models’",
        *(f"overlap of top images with {name}" for name in models),
        *(f"cross-activation with {name}" for name in models),
    ]


def _card(
    space: Report, entry: Report, models: Sequence[str], pictures: Mapping[str, Report], mixed: bool
) -> dict[str, Any]:
    """One unit: a column of pictures for each model, the merged network and the naive one, and its scores.

    `mixed` says that a linear map has mixed the models' units.
    """
    unit, name = int(entry["unit"]), str(space.get("name"))
    found = space.get("per_unit") or {}
    sources = _own_units(found.get("sources"), unit, mixed)
    per_model = {key: [_at(row, unit) for row in found.get(key) or []] for key in ("r_models", "r_naive")}
    overlap = [_at(row, unit) for row in found.get("top_overlap") or []]
    across = entry.get("cross_activation") or []
    mine = (pictures.get(name, {}).get("units") or {}).get(str(unit)) or {}

    def of(values: Sequence[Any], index: int) -> float | None:
        return figures.finite_number(values[index]) if index < len(values) else None

    columns = _columns(unit, name, models, mine, sources, per_model)
    pair, ratio = (
        figures.finite_number(_at(found.get("r_matched"), unit)),
        figures.finite_number(_at(found.get("norm_ratio"), unit)),
    )
    scores = [
        pair,
        *(of(per_model["r_models"], index) for index in range(len(models))),
        *(of(per_model["r_naive"], index) for index in range(len(models))),
        ratio,
        *(of(overlap, index) for index in range(len(models))),
        *(of(across, index) for index in range(len(models))),
    ]
    rows = [
        ("matched pair, r", [("", pair)]),
        ("spread over its models’", [("", ratio)]),
        ("overlap of top images", [(model, of(overlap, index)) for index, model in enumerate(models)]),
        ("cross-activation", [(model, of(across, index)) for index, model in enumerate(models)]),
    ]
    label = _at(found.get("label"), unit)
    return {
        "unit": unit,
        "group": entry.get("group"),
        "rank": GROUPS.get(entry.get("group") or "", len(GROUPS)),
        "label": None if label is None else str(label),
        "label_css": depth.label_class(str(label), [str(label)], models),
        "columns": columns,
        "scores": scores,
        "rows": [
            (title, [(model, value) for model, value in values if value is not None])
            for title, values in rows
            if any(value is not None for _, value in values)
        ],
    }


def _columns(
    unit: int,
    name: str,
    models: Sequence[str],
    mine: Report,
    sources: Sequence[Any],
    per_model: Mapping[str, Sequence[Any]],
) -> list[dict[str, Any]]:
    """A column for each model, the merged network and the naive one, but those of which nothing is known.

    Args:
        unit: The merged network's unit.
        name: Its space.
        models: The models' letters.
        mine: What was drawn of the unit: `pictures` and `top`.
        sources: For each model, which of its units stands there.
        per_model: Correlations with each model's unit, of the merged network's and of the naive one's.
    """
    drawn, top = mine.get("pictures") or {}, mine.get("top") or {}
    columns = []
    for index, model in enumerate([*models, "merged", "naive"]):
        averaged = index >= len(models)
        whose = f"unit {unit} of {name} in {f'the {model} network' if averaged else model}"
        fits = per_model["r_models" if model == "merged" else "r_naive"] if averaged else []
        columns.append(
            {
                "title": model if index < len(models) else model.capitalize(),
                "css": chart.model_class(index) if index < len(models) else model,
                "own": sources[index] if index < min(len(sources), len(models)) else None,
                "picture": _show(drawn.get(model), whose),
                "top": _show(top.get(model), f"images that excite {whose} most"),
                "r": [
                    (other, value)
                    for other, value in zip(models, map(figures.finite_number, fits), strict=False)
                    if value is not None
                ],
            }
        )
    return [
        column for column in columns if column["picture"].given or column["top"].given or column["r"] or column["own"]
    ]


def _at(values: Any, unit: int) -> Any:
    """A unit's entry of a list, None where there is none."""
    return values[unit] if isinstance(values, list) and 0 <= unit < len(values) else None


def _own_units(sources: Any, unit: int, mixed: bool) -> list[str]:
    """Which unit of each model stands in a slot of the common frame, or, where units are mixed, counts most there."""
    numbers = [figures.finite_number(_at(row, unit)) for row in sources or []]
    return [
        "none of its units" if number is None else f"{'mostly ' if mixed else ''}its unit {number:.0f}"
        for number in numbers
    ]
