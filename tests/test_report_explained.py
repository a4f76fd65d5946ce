"""The sections of a page on an explained merge: what stands there, that it is harmless, and that it works.

`example()` returns the report and the pictures of a run as `isthmus explain` leaves them; `write_example(folder)` makes
their page.
"""

import base64
import copy
import json
import math
import re
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.errors import CheckpointError
from isthmus.report import chart
from isthmus.report.colours import DARK, LIGHT
from isthmus.report.gallery import DATA_URI, _show
from isthmus.report.heatmap import BETWEEN, EDGE, ROOM, SCALE, cells_for, draw_heatmap, shorten
from isthmus.report.page import write_report
from test_report import CHROMIUM, HOSTILE, REPORT, check, contrast, poisoned

EXPLAINED = ["claims", "layers", "directions", "alike", "units"]
THRESHOLDS = [index / 10 for index in range(10)]
LAYERS = ("features.0", "features.4", "features.8", "features.11", "features.15", "features.18", "classifier.0", "neck")


def uri(pixels: np.ndarray, kind: str = "png") -> str:
    """An image of bytes, rows by columns by three, as a data URI."""
    rows, columns, _ = pixels.shape
    raw = b"".join(b"\0" + row.tobytes() for row in pixels.astype(np.uint8))

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b"")
    return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"


def texture(seed: int, noise: float, rows: int = 32, columns: int = 32) -> np.ndarray:
    """A coloured grating, so that pictures of matched units look alike and those of others do not."""
    rng = np.random.default_rng(seed)
    angle, wave, phase = rng.uniform(0, math.pi), rng.uniform(4, 12), rng.uniform(0, 6, 3)
    y, x = np.mgrid[:rows, :columns]
    turn = (x * math.cos(angle) + y * math.sin(angle)) * 2 * math.pi / wave
    waves = np.stack([np.sin(turn + each) for each in phase], -1)
    waves += noise * np.random.default_rng([seed, int(100 * noise), columns]).normal(size=waves.shape)
    return np.clip(128 + 90 * waves, 0, 255)


def label_of(r: list[float], models: list[str]) -> str:
    kept = [name for name, value in zip(models, r, strict=True) if value >= 0.5]
    if len(kept) == len(models):
        return "shared"
    return " and ".join(f"{name}'s" for name in kept) or "lost"


def counted(labels: list[str]) -> dict[str, int]:
    return {name: labels.count(name) for name in sorted(set(labels))}


def space_of(rng: np.random.Generator, name: str, depth: int, units: int, models: list[str], shown: int) -> dict:
    """One space of the example: the deeper, the worse is the match."""

    def some(middle: float, count: int = units) -> list[float]:
        return [round(float(value), 4) for value in np.clip(rng.normal(middle, 0.15, count), -0.3, 0.99)]

    matched = some(0.85 - 0.07 * depth)
    r_models = [[min(0.99, 0.5 + 0.5 * m + 0.1 * float(rng.normal())) for m in matched] for _ in models]
    r_naive = [some(0.5 - 0.03 * depth) for _ in models]
    labels = [label_of([row[unit] for row in r_models], models) for unit in range(units)]
    naive = [label_of([row[unit] for row in r_naive], models) for unit in range(units)]
    ranked = sorted(range(units), key=lambda unit: matched[unit])
    third = max(1, shown // 3)
    middle = (units - third) // 2
    chosen = {"best": ranked[-third:][::-1], "median": ranked[middle : middle + third], "worst": ranked[:third]}
    other = [rng.permutation(units).tolist() for _ in models[1:]]
    return {
        "name": name,
        "units": units,
        "correlation": {
            "before": 0.02,
            "matched": float(np.median(matched)),
            "merged": [float(np.median(row)) for row in r_models],
            "naive": [float(np.median(row)) for row in r_naive],
            "shuffled": 0.05 + 0.01 * depth,
        },
        "labels": counted(labels),
        "naive_labels": counted(naive),
        "top_overlap": {"merged": [0.4 for _ in models], "naive": [0.1 for _ in models], "shuffled": 0.01},
        "variance_ratio": {"naive": 0.45 / (1 + 0.3 * depth), "aligned": 0.9 / (1 + 0.1 * depth), "mended": 0.99},
        "cross_activation": {"merged": [0.93 for _ in models], "naive": [0.6 for _ in models]},
        "per_unit": {
            "sources": [list(range(units)), *other],
            "label": labels,
            "r_matched": matched,
            "r_models": r_models,
            "r_naive": r_naive,
            "norm_ratio": some(0.85),
            "top_overlap": [some(0.4) for _ in models],
        },
        "gallery": [
            {"unit": unit, "group": group, "cross_activation": some(0.9, len(models))}
            for group, members in chosen.items()
            for unit in members
        ],
    }


def layer_of(rng: np.random.Generator, name: str, depth: int, rank: int) -> dict:
    """One layer of the example: its large directions are matched, its small ones are not."""
    a = np.sort(rng.gamma(2.0, 1.0, rank))[::-1] * np.exp(-np.arange(rank) / rank)
    b = np.sort(rng.gamma(2.0, 1.0, rank))[::-1] * np.exp(-np.arange(rank) / rank)
    return {
        "name": name,
        "a": a.tolist(),
        "b": b.tolist(),
        "merged": (0.7 * (a + b) / 2).tolist(),
        "r_before": [*(0.001 + 0.01 * gamma for gamma in THRESHOLDS[:-1]), None],
        "r_after": [0.08 + (0.5 - 0.05 * depth) * gamma for gamma in THRESHOLDS],
        "alignment": np.clip(a / a[0] * 0.7 + 0.08 * rng.normal(size=rank), 0, 1).tolist(),
        "input_share": 0.59,
        "input_chance": 0.1,
        "distance_before": 9.1 + depth,
        "distance_after": 7.2 + depth,
    }


def match_of(rng: np.random.Generator, units: int, matched: bool) -> np.ndarray:
    correlation = 0.25 * rng.normal(size=(units, units))
    if matched:
        correlation += np.eye(units) * 0.8
    red, blue = np.clip(correlation, 0, 1), np.clip(-correlation, 0, 1)
    return 255 * np.stack([1 - blue, 1 - red - blue, 1 - red], -1).clip(0, 1)


def example(
    models: int = 2, spaces: int = 8, shown: int = 12, strip: int = 8, units: int = 32
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run's `report.json` and `features.json`, made up, the same each time."""
    rng = np.random.default_rng(7)
    letters = [chr(ord("A") + index) for index in range(models)]
    names = [
        LAYERS[index] if index < len(LAYERS) else f"stage{index // 6}.{index % 6}.conv2" for index in range(spaces)
    ]
    found = [space_of(rng, name, depth % 9, units, letters, shown) for depth, name in enumerate(names)]
    layers = [
        layer_of(rng, f"{name}.weight", depth % 9, min(27 * (depth + 1), 256)) for depth, name in enumerate(names)
    ]
    pairs = [(one, other) for i, one in enumerate(letters) for other in letters[i + 1 :]]
    steps = np.abs(np.subtract.outer(np.arange(spaces), np.arange(spaces)))
    report = copy.deepcopy(REPORT)
    report["models"] = [{"path": f"parents/{letter.lower()}.safetensors", "sha256": None} for letter in letters]
    report["symmetry"]["spaces"] = [
        {
            "name": name,
            "size": units,
            "copies": 1,
            "parent": None,
            "group": "permutation",
            "sites": [{"parameter": f"{name}.weight", "dims": [0], "role": "vector"}],
            "moved": [0.0] + [0.9] * (models - 1),
        }
        for name in names
    ]
    # The last two layers write the same space, as those of a residual stream do.
    if spaces > 2:
        site = {"parameter": f"{names[-1]}.weight", "dims": [0], "role": "vector"}
        report["symmetry"]["spaces"][-2]["sites"].append(site)
        report["symmetry"]["spaces"][-1]["sites"] = []
    report["explain"] = {
        "data": {"name": "digits", "split": "test", "images": 2000},
        "seconds": 93.1,
        "models": letters,
        "threshold": 0.5,
        "spaces": found,
        "spectra": {
            "thresholds": THRESHOLDS,
            "distance_before": 48.8,
            "distance_after": 40.8,
            "overlaps": [{"threshold": g, "before": 0.001 + 0.01 * g, "after": 0.073 + 0.5 * g} for g in THRESHOLDS],
            "layers": layers,
            "skipped": {"features.1.weight": "it is a vector, not a matrix"},
        },
        "taylor": {"estimate": 1.7, "real": 1.39},
        "claims": [
            {
                "text": "Distance between the weights does not explain the barrier: matching takes little off it.",
                "figure": "matching takes 16 % off the distance; the estimate is 22 % off the barrier",
                "verdict": "holds partly",
                "threshold": "at most 25 % off the distance, and an estimate that is wrong by over 50 %",
            },
            {
                "text": "Matching aligns the directions with large singular values.",
                "figure": "R = 0.22 at γ = 0.3, 0.07 at γ = 0",
                "verdict": "holds",
                "threshold": "R at γ = 0.3 above R at γ = 0 by 0.05",
            },
            {"text": "The spectra of both models are alike.", "figure": 0.31, "verdict": "does not", "threshold": 0.1},
            {
                "text": "Other methods align the same directions.",
                "figure": "activation matching was not measured",
                "verdict": None,
                "threshold": "a difference of R below 0.05",
            },
        ],
        "questions": [
            {
                "text": "Are the features of both parents in the merged network?",
                "figure": "62 % of its units are shared",
                "verdict": "holds",
                "threshold": "over half of all units",
            }
        ],
        "cka": [
            {
                "models": list(pair),
                "rows": names,
                "columns": names,
                "values": (np.exp(-steps / 2.5) * 0.95 - 0.01 * len(pair[0])).tolist(),
            }
            for pair in [*pairs, ("A", "merged")]
        ],
    }
    pictures = {}
    for depth, space in enumerate(found):
        drawn = {}
        for entry in space["gallery"]:
            unit, images, tops = entry["unit"], {}, {}
            for place, network in enumerate([*letters, "merged", "naive"]):
                noise = {"merged": 0.5, "naive": 1.6}.get(network, 0.05 + 0.2 * place)
                images[network] = uri(texture(1000 * depth + unit, noise))
                strips = [texture(1000 * depth + unit + 17 * each, noise, 16, 16) for each in range(strip)]
                tops[network] = uri(np.concatenate(strips, 1))
            drawn[str(unit)] = {"pictures": images, "top": tops}
        matches = {key: uri(match_of(rng, units, key == "after")) for key in ("before", "after")}
        pictures[space["name"]] = {"match": matches, "units": drawn}
    return report, {"method": "fourier", "seconds": 40.2, "spaces": pictures}


def write_example(folder: Path, **how: Any) -> Path:
    """Writes the example into a folder and makes its page."""
    report, features = example(**how)
    return write_run(folder, report, features)


def write_run(folder: Path, report: Any, features: Any = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "features.json").unlink(missing_ok=True)
    if features is not None:
        (folder / "features.json").write_text(json.dumps(features))
    return write_report(folder)


@pytest.fixture(scope="module")
def made() -> tuple[dict[str, Any], dict[str, Any]]:
    """A small example, read-only."""
    return example(spaces=3, shown=3, strip=2)


@pytest.fixture
def page(tmp_path):
    return lambda report, features=None: write_run(tmp_path, report, features).read_bytes().decode()


def with_explain(report: dict[str, Any], **parts: Any) -> dict[str, Any]:
    return {**report, "explain": {**copy.deepcopy(report["explain"]), **parts}}


# ---- what stands there


def test_sections_follow_the_path(made, page):
    read = check(page(*made))
    names = [section["id"] for section in read.all("section")]
    assert names[:7] == ["scores", "path", *EXPLAINED]
    for expected in (
        "Claims 1 holds, 1 holds partly, 1 does not, 1 not judged",
        "✓ holds",
        "◐ holds partly",
        "✕ does not",
        "Measured: R = 0.22 at γ = 0.3, 0.07 at γ = 0",
        "Decided by: 0.1",
        "Measured on 2,000 images of the test split of digits in 1 min 33 s.",
        "A is a.safetensors, B is b.safetensors.",
        "from a correlation of at least 0.5 with it on",
        "48.80 before matching, 40.80 after",
        "1.70 by the second-order Taylor estimate, 1.39 measured",
        "0.001 before matching, 0.073 after",
        "share of the input along its top directions 59 %, by chance 10 %: 5.9 times as much",
        "it is a vector, not a matrix",
        "between layers of the same name",
        "image made to exite it".replace("exite", "excite"),
    ):
        assert expected in read.text, expected
    # Every space has a row in the table of spaces, every layer one in that of layers.
    assert read.text.count("features.4.weight") >= 2


def test_every_picture_has_words_and_is_data(made, page):
    read = check(page(*made))
    images = read.all("img")
    # 3 spaces × (2 matches + 3 units × 4 networks × 2)
    assert len(images) == 3 * (2 + 3 * 4 * 2)
    assert all(DATA_URI.fullmatch(image["src"] or "") and image["alt"] for image in images)
    unit = made[0]["explain"]["spaces"][1]["gallery"][0]["unit"]
    words = {image["alt"] for image in images}
    assert {f"unit {unit} of features.4 in A", f"images that excite unit {unit} of features.4 in B most"} <= words
    assert {(image["width"], image["height"]) for image in images} == {("32", "32"), ("16", "32"), ("32", "16")} - {
        ("16", "32")
    }
    policy = next(meta["content"] or "" for meta in read.all("meta") if meta.get("http-equiv"))
    assert "img-src data:;" in policy


def test_charts_say_what_they_show(made, page):
    pictures = [svg["aria-label"] or "" for svg in check(page(*made)).all("svg") if svg.get("role") == "img"]
    first = made[0]["explain"]["spaces"]
    values = [space["correlation"]["matched"] for space in first]
    said = next(words for words in pictures if words.startswith("Correlation over depth"))
    least, most = (first[values.index(pick(values))]["name"] for pick in (min, max))
    assert f"Matched pairs: from {min(values):.2f} in {least} to {max(values):.2f} in {most}." in said
    said = next(words for words in pictures if words.startswith("What became"))
    assert f"features.0: {first[0]['labels']['shared']} shared" in said
    assert any(words.startswith("Singular values of features.0.weight. A: 27 values, largest") for words in pictures)
    assert any("over the half with the larger values" in words for words in pictures)


def test_table_holds_all_figures(made, page):
    text = page(*made)
    for space in made[0]["explain"]["spaces"]:
        figures = [
            space["correlation"]["before"],
            space["correlation"]["matched"],
            *space["correlation"]["merged"],
            *space["correlation"]["naive"],
            space["correlation"]["shuffled"],
            *space["top_overlap"]["merged"],
            *space["variance_ratio"].values(),
            *space["cross_activation"]["merged"],
        ]
        (row,) = re.findall(rf'<tr><th scope="row"><code>{re.escape(space["name"])}</code></th><td[^\n]*begins.*', text)
        for figure in (*figures, *map(float, space["labels"].values())):
            assert f'data-value="{figure}"' in row


def test_a_space_of_several_layers_shows_its_match_once(made, page):
    text = page(*made)
    read = check(text)
    assert text.count("Match of the units of") == 3
    # features.8 has no layer of its own: features.4 and features.8 both write the space features.4.
    assert "It writes the space features.4, whose match is shown with features.4.weight" in read.text
    assert "Match matrices of 1 other space" in read.text


# ---- parts that are absent


def test_nothing_explained_adds_nothing(made, page):
    report, features = made
    for found in (None, {}):
        text = page({**report, "explain": found}, features)
        names = [section["id"] for section in check(text).all("section")]
        assert not set(names) & set(EXPLAINED)
        assert ".chooser" not in text
    without = {key: part for key, part in report.items() if key != "explain"}
    assert page(without) == page({**report, "explain": None}, features)


@pytest.mark.parametrize("how", ["absent", "null"])
def test_each_part_may_be_missing(made, page, how):
    report, features = made

    def check_without(holder: dict[str, Any], key: str) -> None:
        kept = holder[key]
        if how == "absent":
            del holder[key]
        else:
            holder[key] = None
        check(page(report, features))
        holder[key] = kept

    report = {**copy.deepcopy(report), "curves": None}
    explain = report["explain"]
    for key in list(explain):
        check_without(explain, key)
    needed = {"name", "unit"}
    for part in (explain["spaces"][1], explain["spectra"], explain["spectra"]["layers"][1], explain["cka"][0]):
        for key in set(part) - needed - {"rows", "columns", "values"}:
            check_without(part, key)
    for key in list(explain["spaces"][1]["per_unit"]):
        check_without(explain["spaces"][1]["per_unit"], key)
    for key in ("figure", "verdict", "threshold"):
        check_without(explain["claims"][0], key)


def test_sections_without_facts_are_left_out(made, page):
    report, features = made
    bare = with_explain(report, spaces=None, spectra=None, taylor=None, cka=None, claims=None, questions=None)
    names = [section["id"] for section in check(page(bare)).all("section")]
    assert [name for name in names if name in EXPLAINED] == ["claims"]
    text = page(report)
    assert "<img" not in text
    assert "r with A" in text
    read = check(page(with_explain(report, spectra=None, taylor=None), features))
    assert "Match matrices of 3 spaces" in read.text


def test_numbers_that_are_none_are_no_figures(made, page):
    report = copy.deepcopy(made[0])
    space = report["explain"]["spaces"][1]
    for value in (None, math.nan, math.inf, -math.inf):
        space["correlation"].update(matched=value, merged=[value, value], naive=[value, 0.1])
        space["variance_ratio"]["naive"] = value
        space["per_unit"]["r_matched"] = [value] * 32
        report["explain"]["spectra"]["layers"][0]["a"][3] = value
        report["explain"]["spectra"]["layers"][0]["r_after"] = [value] * 10
        report["explain"]["cka"][0]["values"][0][1] = value
        text = page(report, made[1])
        check(text)
        assert 'class="crossed"' in text
        assert not re.search(r' d="[^"]*(nan|inf)', text)


def test_one_space_of_one_unit(page):
    report, features = example(spaces=1, shown=1, units=3)
    check(page(report, features))


def test_three_models(page):
    report, features = example(models=3, spaces=3, shown=3, strip=2)
    report["explain"]["spaces"][0]["labels"] = {"shared": 20, "A's and C's": 5, "B's": 4, "lost": 3}
    read = check(page(report, features))
    for expected in ("A's and C's", "merged–C", "merged with C", "A and merged", "B and C", "C is c.safetensors"):
        assert expected in read.text, expected
    assert len([image for image in read.all("img") if " in C" in (image["alt"] or "")]) == 3 * 3 * 2
    assert "its unit" in read.text


# ---- harm


def test_hostile_names_are_only_text(made, page):
    report, features = made
    harmless = check(page(report, features))
    poison = {**poisoned(report), "explain": poisoned(report["explain"])}
    text = page(poison, features)
    read = check(text)
    assert len(read.all("script")) == 1
    assert "<script>alert(1)</script>" in read.text
    assert not {tag for tag, _ in read.elements} - {tag for tag, _ in harmless.elements}
    assert not any(name.startswith("on") for _, attributes in read.elements for name in attributes)
    # Names of the file of pictures, too: those that fit the report's are shown, none as markup.
    twisted = {"spaces": {f"{name}{HOSTILE}": each for name, each in features["spaces"].items()}, "method": HOSTILE}
    poison["explain"]["models"] = report["explain"]["models"]
    text = page(poison, twisted)
    read = check(text)
    assert len(read.all("img")) == len(harmless.all("img"))
    assert all(image["src"].startswith("data:image/png;base64,") for image in read.all("img"))
    assert "\u202e" not in text


@pytest.mark.parametrize(
    "bad",
    [
        "https://example.org/a.png",
        "javascript:alert(1)",
        "data:image/svg+xml;base64,PHN2Zy8+",
        "data:text/html;base64,AAAA",
        "data:image/png;base64,AAAA\n",
        'data:image/png;base64,AAAA" onerror="alert(1)',
        "DATA:image/png;base64,AAAA",
        "data:image/png;base64,",
        7,
        ["data:image/png;base64,AAAA"],
    ],
)
def test_what_is_no_picture_is_left_out(made, page, bad):
    report, features = made
    changed = copy.deepcopy(features)
    name = report["explain"]["spaces"][0]["name"]
    unit = str(report["explain"]["spaces"][0]["gallery"][0]["unit"])
    changed["spaces"][name]["units"][unit]["pictures"]["A"] = bad
    changed["spaces"][name]["match"]["before"] = bad
    text = page(report, changed)
    read = check(text)
    assert len(read.all("img")) == 3 * (2 + 3 * 4 * 2) - 2
    assert "1 picture of features.json left out" in read.text
    assert "1 match matrix of features.json left out" in read.text
    assert _show(bad, "").uri is None


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_pictures_of_three_kinds_are_shown(kind):
    given = uri(texture(0, 0), kind)
    shown = _show(given, "words")
    assert shown.uri == given
    assert (shown.width, shown.height) == ((32, 32) if kind == "png" else (None, None))


@pytest.mark.parametrize("content", ["{", "[]", "3", "[" * 100_000])
def test_damaged_pictures_are_refused_in_one_line(made, tmp_path, content):
    write_run(tmp_path, made[0])
    before = (tmp_path / "report.html").read_bytes()
    (tmp_path / "features.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"features\.json") as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "report.html").read_bytes() == before


@pytest.mark.parametrize(
    "part",
    [{"spaces": 3}, {"cka": [{"rows": ["a"], "columns": ["b"], "values": []}]}, {"claims": "yes"}, {"spectra": [1]}],
)
def test_what_is_not_built_like_an_explanation_is_refused(made, tmp_path, part):
    with pytest.raises(CheckpointError, match="not built like a report"):
        write_run(tmp_path, with_explain(made[0], **part))


# ---- size


def test_page_stays_below_ten_megabytes(tmp_path):
    """8 spaces × 12 units × 8 pictures of 2 kB, and a run with ten times as much in its pictures."""
    report, features = example(strip=4)
    rng = np.random.default_rng(0)
    for times in (1, 10):
        # 24 × 28 random pixels of 3 bytes do not compress: 2 kB.
        big = uri(rng.integers(0, 256, (24, 28 * times, 3)))
        assert len(base64.b64decode(big.partition(",")[2])) > 2000 * times
        for space in features["spaces"].values():
            for each in space["units"].values():
                each.update({part: dict.fromkeys(("A", "B", "merged", "naive"), big) for part in ("pictures", "top")})
        text = write_run(tmp_path, report, features).read_text()
        assert len(text) < 10_000_000
        count = text.count("<img")
        if times == 1:
            assert count == 8 * (2 + 12 * 8)
            assert "left out" not in text
        else:
            assert 0 < count < 8 * (2 + 12 * 8)
            assert re.search(r"[\d,]+ pictures of <code>features.json</code> left out", text)


def test_same_run_same_bytes(made, page):
    assert page(*made) == page(*made)


def test_large_networks_stay_small(page):
    report, _ = example(spaces=3, shown=3)
    explain = report["explain"]
    explain["spaces"] = [{**explain["spaces"][0], "name": f"blocks.{i}", "gallery": None} for i in range(1100)]
    explain["spectra"]["layers"] = [{**explain["spectra"]["layers"][0], "name": f"blocks.{i}"} for i in range(220)]
    names = [f"blocks.{i}" for i in range(140)]
    table = {"models": ["A", "B"], "rows": names, "columns": names, "values": [[0.5] * 140] * 140}
    large = {**table, "rows": [*names, *names], "values": [[0.5] * 140] * 280}
    explain["cka"] = [table, large]
    text = page({**report, "curves": None})
    assert len(text) < 10_000_000
    assert "900 further spaces at the end of the network are not drawn" in text
    assert "100 further spaces in <code>report.json</code>" in text
    assert "20 further layers are not drawn" in text
    assert "1 further comparison in <code>report.json</code>" in text


# ---- pieces of pictures


def test_scales_place_ends_and_middle():
    scale = chart.Scale(1.0, 100.0, 10.0, 30.0, logarithmic=True)
    assert [round(scale.place(value), 9) for value in (1, 10, 100, 1e9, 0.5)] == [10, 20, 30, 30, 10]
    assert chart.Scale(0.0, 4.0, 100.0, 0.0).place(1.0) == 75
    assert chart.Scale(2.0, 2.0, 0.0, 10.0).place(2.0) == 5


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.2, 0.71), (0, 48.8), (1e-9, 3e-9), (0.0, 12345.0)])
def test_ticks_are_round_and_within(low, high):
    found = chart.ticks(low, high)
    steps = np.diff(found)
    assert 3 <= len(found) <= 11
    # Ticks are integers times the step: the rounding is of the last place of the largest.
    assert np.allclose(steps, steps[0], rtol=1e-9, atol=0)
    assert low - 1e-9 * steps[0] <= found[0]
    assert found[-1] <= high + 1e-9 * steps[0]
    mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0] * (1 + 1e-9)))
    assert min(abs(mantissa - each) for each in (1, 2, 5, 10)) < 1e-6


@pytest.mark.parametrize(("low", "high"), [(-0.07, 0.95), (0.0, 1.55), (0.0, 1.0), (-0.3, 0.0), (0.0, 0.0), (3.1, 3.2)])
def test_axes_reach_at_most_a_fifth_of_a_step_beyond_their_values(low, high):
    start, end, marks = chart.limits(low, high)
    step = marks[1] - marks[0] if len(marks) > 1 else 1.0
    slack = 1e-9 * max(abs(low), abs(high), 1.0)  # products of steps are rounded
    assert start <= low + slack
    assert end >= high - slack
    assert end > start
    assert low - start <= step / 5 + slack
    assert high == low or end - high <= step / 5 + slack
    assert all(start - slack <= mark <= end + slack for mark in marks)


@pytest.mark.parametrize(
    ("names", "short", "start", "end"),
    [
        (
            ["features.0.weight", "features.4.weight", "head.weight"],
            ["features.0", "features.4", "head"],
            "",
            ".weight",
        ),
        (["hidden.0.weight", "hidden.1.weight"], ["0", "1"], "hidden.", ".weight"),
        (["a", "b.c"], ["a", "b.c"], "", ""),
        (["a.a.a", "a.a"], ["a.a", "a"], "", ".a"),
        (["one.weight"], ["one.weight"], "", ""),
        ([], [], "", ""),
    ],
)
def test_names_lose_only_what_all_share(names, short, start, end):
    assert shorten(names) == (short, start, end)
    assert [f"{start}{name}{end}" for name in short] == names


@pytest.mark.parametrize("side", [1, 4, 9, 16, 30, 150])
def test_three_maps_fit_into_a_row_or_stand_alone(side):
    names = [f"stage.{index}" for index in range(side)]
    cells = cells_for(names, side)
    left = 24 + chart.LETTER * max(map(len, names))
    three = SCALE * (left + 3 * EDGE + 3 * side * cells.size) + 2 * BETWEEN
    assert cells.together == (side <= 16)
    assert three <= ROOM + 1e-6 or not cells.together
    assert side == 150 or SCALE * (left + EDGE + side * cells.size) <= ROOM


def test_maps_of_other_rows_keep_their_names(made, page):
    report, features = made
    assert 'class="maps together"' in page(report, features)
    other = [*copy.deepcopy(report["explain"]["cka"]), {**report["explain"]["cka"][0], "rows": ["x", "y", "z"]}]
    assert 'class="maps"' in page(with_explain(report, cka=other), features)


# ---- what was measured stands there


def test_the_page_opens_on_the_deepest_drawn_space(made, page):
    text = page(*made)
    (select,) = re.findall(r'<label>Space <select class="choice"[^>]*>(.*?)</select>', text)
    names = [space["name"] for space in made[0]["explain"]["spaces"]]
    assert re.findall(r"<option( selected)?>([^<]+)", select) == [
        ("", names[0]),
        ("", names[1]),
        (" selected", names[2]),
    ]


def test_barriers_orders_options_and_skipped_spaces_are_told(made, page):
    more = {
        "taylor": {"estimate": 1.7, "first_order": 0.2, "second_order": 1.5, "real": 1.39, "inputs": 1000},
        "barriers": {"naive": 2.5, "weight_matching": 0.25},
        "skipped": {"attention.rope": "no activations stand for it"},
        "options": {"images": 2000, "units": 2, "method": "maco", "steps": None, "claims": True},
    }
    report = with_explain(made[0], **more)
    report["explain"]["spectra"]["layers"][1]["unchanged"] = 3e-15
    text = check(page(report, made[1])).text
    for expected in (
        "on 1,000 training inputs; the estimate’s orders: 0.20 and 1.50",
        "naive 2.50, weight matching 0.25",
        "1 space without figures",
        "no activations stand for it",
        "Explained with images 2000, units 2, method maco, claims yes.",
        "changed by matching by at most 3.0 × 10",
    ):
        assert expected in text, expected


def test_missing_claims_are_explained(made, page):
    report = with_explain(made[0], claims=[], options={"claims": False})
    assert "were left out (--no-claims)" in check(page(report)).text
    report, _ = example(models=3, spaces=2, shown=3)
    assert "are about two models; these are 3" in check(page(with_explain(report, claims=[]))).text


def test_without_layers_the_matches_stand_with_the_spaces(made, page):
    report = with_explain(made[0], spectra=None, taylor=None)
    read = check(page(report, made[1]))
    assert "directions" not in [section["id"] for section in read.all("section")]
    assert read.text.count("Match of the units of") == 3


def test_units_that_a_linear_map_mixed_are_told_so(made, page):
    report = copy.deepcopy(made[0])
    assert "mostly" not in check(page(report)).text
    for space in report["symmetry"]["spaces"]:
        space["moved"] = [None, None]
    assert "mostly its unit" in check(page(report)).text


def test_what_was_not_repaired_is_not_called_repaired(made, page):
    report = copy.deepcopy(made[0])
    assert "aligned and repaired" in check(page(report)).text
    report["repair"] = None
    assert "aligned and repaired" not in check(page(report)).text
    for space in report["explain"]["spaces"]:
        space["variance_ratio"]["mended"] = space["variance_ratio"]["aligned"]
    (words,) = (
        svg["aria-label"] for svg in check(page(report)).all("svg") if "Variance of" in (svg.get("aria-label") or "")
    )
    assert "Aligned:" in words
    assert "Merged:" not in words


def test_thinned_lines_keep_their_ends():
    assert chart.thinned(5) == [0, 1, 2, 3, 4]
    kept = chart.thinned(10_000, 256)
    assert (kept[0], kept[-1], len(kept)) == (0, 9999, 256)
    assert kept == sorted(set(kept))


def test_heatmap_draws_every_cell_once():
    values = [[0.0, 0.5, 1.0], [None, -0.2, 1.7]]
    picture = draw_heatmap(["a", "b"], ["x", "y", "z"], values, ("A", "B"), "words").field
    levels = {
        float(level): path.count("M") for level, path in re.findall(r'fill-opacity="([^"]+)" d="([^"]+)"', picture)
    }
    assert levels == {0.0: 2, 0.5: 1, 1.0: 2}
    (crossed,) = re.findall(r'class="crossed" d="([^"]+)"', picture)
    assert crossed.count("M") == 1
    with pytest.raises(ValueError, match="another size"):
        draw_heatmap(["a"], ["x"], [[0.1, 0.2]], ("A", "B"), "")


@pytest.mark.parametrize("palette", [LIGHT, DARK])
def test_contrast_of_models_suffices(palette):
    for index in range(chart.MODEL_COLOURS):
        assert contrast(palette[f"model_{index}"], palette["paper"]) >= 4.5
    for index in range(3):
        assert contrast(palette[f"some_{index}"], palette["paper"]) >= 3


# ---- in a browser

FRAME = """<!DOCTYPE html>
<iframe id="page" style="border: 0; width: WIDTHpx; height: 800px" src="report.html"></iframe>
<pre id="found"></pre>
<script>
const frame = document.getElementById("page");
frame.addEventListener("load", () => {
  const page = frame.contentDocument;
  const { Event, KeyboardEvent } = frame.contentWindow;
  const seen = (elements) => [...elements].filter((each) => each.checkVisibility());
  const shown = (panels) => seen(panels).map((each) => each.getAttribute("aria-label"));
  const change = (select, value) => { select.value = value; select.dispatchEvent(new Event("change")); };
  const press = (select, key) => select.dispatchEvent(new KeyboardEvent("keydown", { key, cancelable: true }));
  const [directions, gallery] = page.querySelectorAll(".chooser");
  const panels = [...directions.querySelectorAll(".panel")], choice = directions.querySelector(".choice");
  const found = { layers: [shown(panels)] };
  directions.querySelector('[data-step="1"]').click(); found.layers.push(shown(panels));
  press(choice, "ArrowRight"); found.layers.push(shown(panels));
  press(choice, "ArrowDown"); found.layers.push(shown(panels));
  press(choice, "ArrowLeft"); found.layers.push(shown(panels));
  change(choice, choice.options[2].value); found.layers.push(shown(panels));
  panels[2].querySelector('a[href^="#direction"]').click(); found.layers.push(shown(panels));
  const number = (card) => Number(card.querySelector("h4").textContent.match(/\\d+/)[0]);
  const units = () => seen(gallery.querySelectorAll(".unit")).map(number);
  const select = (name) => gallery.querySelector("select." + name);
  const [spaces, filter, sort, order] = ["choice", "filter", "sort", "order"].map(select);
  const spacesShown = () => shown(gallery.querySelectorAll(".panel"));
  found.spaces = [spacesShown()];
  change(spaces, "features.4"); found.spaces.push(spacesShown());
  found.plain = units();
  change(sort, "0"); found.highest = units();
  change(order, "1"); found.lowest = units();
  change(filter, "shared"); found.shared = units();
  found.status = gallery.querySelector("[role=status]").textContent;
  change(filter, ""); change(sort, ""); found.again = units();
  const table = page.querySelector("#layers table.sortable");
  const button = table.querySelectorAll("button")[2];
  const column = () => [...table.tBodies[0].rows].map((row) => Number(row.cells[2].dataset.value));
  button.focus(); button.click(); found.column = column(); found.sorted = button.closest("th").ariaSort;
  page.querySelectorAll("details").forEach((each) => { each.open = true; });
  found.width = page.documentElement.scrollWidth;
  const images = [...page.querySelectorAll("img")];
  Promise.all(images.map((each) => each.decode().catch(() => null))).then(() => {
    found.images = images.length;
    found.empty = images.filter((each) => !each.naturalWidth).map((each) => each.alt);
    document.getElementById("found").textContent = JSON.stringify(found);
  });
});
</script>"""


def browse(folder: Path, width: int) -> dict[str, Any]:
    """What a browser finds on the page of a folder; an error on its console fails."""
    (folder / "frame.html").write_text(FRAME.replace("WIDTH", str(width)))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    flags += "--disable-component-update --disable-sync --allow-file-access-from-files --enable-logging=stderr "
    flags += f"--virtual-time-budget=8000 --user-data-dir={folder / 'profile'} --dump-dom"
    command = [str(CHROMIUM), *flags.split(), (folder / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    (found,) = re.findall(r'<pre id="found">(.+?)</pre>', done.stdout)
    return json.loads(found.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
def test_in_a_browser(tmp_path):
    report, features = example(spaces=3, shown=6, strip=2)
    for entry in report["explain"]["spaces"][1]["gallery"][1:3]:
        report["explain"]["spaces"][1]["per_unit"]["label"][entry["unit"]] = "lost"
    write_run(tmp_path, report, features)
    found = browse(tmp_path, 390)
    first, second, third = ([f"Layer {name}.weight"] for name in LAYERS[:3])
    assert found["layers"] == [first, second, third, third, second, third, second]
    assert found["spaces"] == [["Units of features.8"], ["Units of features.4"]]
    space = report["explain"]["spaces"][1]
    r, labels = space["per_unit"]["r_matched"], space["per_unit"]["label"]
    plain = [entry["unit"] for entry in space["gallery"]]
    assert found["plain"] == found["again"] == plain
    assert found["highest"] == sorted(plain, key=lambda unit: -r[unit])
    assert found["lowest"] == sorted(plain, key=lambda unit: r[unit])  # units of one score keep their order
    assert found["shared"] == [unit for unit in found["lowest"] if labels[unit] == "shared"]
    assert 0 < len(found["shared"]) < len(plain)
    assert found["status"] == f"{len(found['shared'])} of 6 chosen units shown"
    assert found["column"] == sorted(
        (each["correlation"]["matched"] for each in report["explain"]["spaces"]), reverse=True
    )
    assert found["sorted"] == "descending"
    assert found["width"] <= 390
    assert found["images"] == 3 * (2 + 6 * 4 * 2)
    assert found["empty"] == []


def test_names_under_a_chart_keep_what_tells_them_apart():
    assert chart.short("blocks.0.mlp.up") == "blocks.0.mlp.up"
    assert chart.short("blocks.0.attention.query") == "b.0.a.query"
    assert chart.short("layer1.0.conv1.weight.more") == "l1.0.c1.w.more"
    assert chart.short("blocks.12.attention.value/units") == "b.12.a.value/units"
    assert len(chart.short("x" * 40)) == chart.LONGEST_NAME
