"""The page of a run: what stands on it, that it is well-formed, harmless and self-contained, and its pictures."""

import base64
import copy
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import CheckpointError, InputError
from isthmus.report import figures
from isthmus.report.colours import DARK, LIGHT
from isthmus.report.curves import draw_curve
from isthmus.report.gallery import DATA_URI
from isthmus.report.page import write_report
from isthmus.report.sections import SECTIONS

LAMBDAS = [0.0, 0.25, 0.5, 0.75, 1.0]


def curve(losses: list[Any], accuracies: list[Any], repair: str | None = "reset") -> dict[str, Any]:
    return {
        "lambdas": LAMBDAS,
        "losses": losses,
        "accuracies": accuracies,
        "raw_losses": [losses[0], *(3 * loss if loss is not None else None for loss in losses[1:-1]), losses[-1]],
        "raw_accuracies": [a / 2 if a is not None else None for a in accuracies],
        "repair": repair,
        "barrier": 0.389,
        "midpoint_barrier": 0.381,
        "error_barrier": 0.09,
        "midpoint_error_barrier": 0.085,
    }


PAIR = {
    "models": [0, 1],
    "naive": curve([0.02, 0.6, 1.35, 0.7, 0.04], [0.99, 0.8, 0.65, 0.75, 0.98]),
    "aligned": curve([0.02, 0.2, 0.42, 0.25, 0.04], [0.99, 0.95, 0.9, 0.94, 0.98]),
}
REPORT: dict[str, Any] = {
    "isthmus": "0.1.0",
    "created": "2026-11-20T12:00:00+00:00",
    "command": "isthmus merge a.safetensors b.safetensors --model zoo:cnn --data digits -o runs/digits",
    "seconds": 252.0,
    "seed": 7,
    "versions": {"python": "3.11.7", "torch": "2.13.0", "numpy": "2.4.6"},
    "model": "zoo:cnn",
    "models": [{"path": "parents/a.safetensors", "sha256": "ab" * 32}, {"path": "b.safetensors", "sha256": "cd" * 32}],
    "data": {
        "name": "digits",
        "score_split": "test",
        "score_samples": 360,
        "calibration_split": "train",
        "calibration_samples": 1000,
    },
    "method": {
        "name": "weight_matching",
        "options": {"restarts": 3},
        "objective": 102.84,
        "upper_bound": 126.07,
        "converged": True,
        "seconds": 0.28,
        "details": {"restarts": [[102.7, 102.84, 102.6]]},
    },
    "average": {"name": "mean", "options": {}, "coefficients": [0.5, 0.5]},
    "repair": "reset",
    "proof": {
        "max_error": 2.9e-16,
        "tolerance": 3.9e-13,
        "trials": 2,
        "weakest_control": 0.023,
        "no_ops": ["attention.key.bias"],
        "dtype": "float64",
    },
    "symmetry": {
        "free_units": 48,
        "moved_share": 0.9731,
        "spaces": [
            {
                "name": "features.0",
                "size": 16,
                "copies": 1,
                "parent": None,
                "group": "permutation",
                "sites": [
                    {"parameter": "features.0.weight", "dims": [0], "role": "vector"},
                    {"parameter": "features.4.weight", "dims": [1], "role": "covector"},
                ],
                "moved": [0.0, 0.75],
            },
            {
                "name": "attention.heads",
                "size": 8,
                "copies": 4,
                "parent": "attention",
                "group": "invertible",
                "sites": [{"parameter": "attention.value.weight", "dims": [0, 1], "role": "vector"}],
                "moved": [0.0, 1.0],
            },
        ],
        "frozen": [
            {
                "parameter": "head.bias",
                "dim": "0",
                "units": 10,
                "operation": "output",
                "module": "",
                "reason": "output of the model",
                "expected": True,
            },
            {
                "parameter": "mixer.weight",
                "dim": "0",
                "units": 64,
                "operation": "aten.fft_rfft",
                "module": "mixer",
                "reason": "no rule for aten.fft_rfft",
                "expected": False,
            },
        ],
        "untouched": ["auxiliary.weight"],
    },
    "scores": {
        "parents": [
            {"loss": 0.0233, "accuracy": 0.9972, "count": 360},
            {"loss": 0.0393, "accuracy": 0.9889, "count": 360},
        ],
        "ensemble": {"loss": 0.0254, "accuracy": 0.9917, "count": 360},
        "naive": {"loss": 2.0898, "accuracy": 0.1944, "count": 360},
        "naive_mended": {"loss": 1.353, "accuracy": 0.65, "count": 360},
        "aligned": {"loss": 1.1409, "accuracy": 0.6583, "count": 360},
        "merged": {"loss": 0.4212, "accuracy": 0.9028, "count": 360},
    },
    "curves": [PAIR],
    "verdict": "2 models became one with 90.3 % on digits (test).",
}
NEEDED = {"isthmus", "models", "method", "symmetry", "verdict"}
BARE = {
    "isthmus": "0.1.0",
    "models": [{"path": None}, {}],
    "method": {"name": "weight_matching"},
    "symmetry": {},
    "verdict": "2 models became one.",
}


def changed(**parts: Any) -> dict[str, Any]:
    return {**copy.deepcopy(REPORT), **parts}


def many(models: int) -> dict[str, Any]:
    """A report of several models with a curve for each pair."""
    report = changed(
        models=[{"path": f"{i}.safetensors", "sha256": None} for i in range(models)],
        curves=[{**PAIR, "models": [i, j]} for i in range(models) for j in range(i + 1, models)],
    )
    for space in report["symmetry"]["spaces"]:
        space["moved"] = [0.0] + [0.9] * (models - 1)
    return report


@pytest.fixture
def page(tmp_path):
    def write(report: Any) -> str:
        text = report if isinstance(report, str) else json.dumps(report)
        (tmp_path / "report.json").write_text(text)
        assert write_report(tmp_path) == tmp_path / "report.html"
        return (tmp_path / "report.html").read_bytes().decode()

    return write


class Page(HTMLParser):
    """Reads a page strictly: every element is closed where its parent allows, and ids are unique."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})
    BLOCKS = frozenset({"div", "p", "dl", "ul", "table", "section", "figure", "details", "h1", "h2", "h3", "nav"})
    CHILDREN = {  # noqa: RUF012
        "table": {"caption", "thead", "tbody"},
        "thead": {"tr"},
        "tbody": {"tr"},
        "tr": {"th", "td"},
        "ul": {"li"},
        "dl": {"div"},
        "html": {"head", "body"},
    }
    PARENTS = {  # noqa: RUF012
        "summary": {"details"},
        "caption": {"table"},
        "dt": {"div"},
        "dd": {"div"},
        "li": {"ul"},
        "tr": {"thead", "tbody"},
    }

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.ids: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open, f"<{tag}/> closes nothing in HTML"
        self.elements.append((tag, dict(attrs)))
        self.note(attrs)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        parent = self.open[-1] if self.open else ""
        assert len(dict(attrs)) == len(attrs), f"<{tag}> has an attribute twice"
        if "svg" not in self.open:
            assert not (tag in self.BLOCKS and {"p", "span", "code", "dt", "button"} & set(self.open)), (tag, self.open)
            assert parent not in self.CHILDREN or tag in self.CHILDREN[parent], f"<{tag}> in <{parent}>"
            assert tag not in self.PARENTS or parent in self.PARENTS[tag], f"<{tag}> in <{parent}>"
            assert not (tag in ("a", "button", "summary") and {"a", "button", "summary"} & set(self.open))
        self.elements.append((tag, dict(attrs)))
        self.note(attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def note(self, attrs: list[tuple[str, str | None]]) -> None:
        if identity := dict(attrs).get("id"):
            assert identity not in self.ids, f"id {identity} stands there twice"
            self.ids.append(identity)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        """What a reader sees, spaces folded."""
        return " ".join("".join(text for tag, text in self.texts if tag not in ("script", "style")).split())


def check(text: str) -> Page:
    """The page, after checking everything that must hold for every page."""
    read = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert read.all("html")[0]["lang"] == "en"
    for tag, attributes in read.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(name) is None or attributes[name] in read.ids
        for name in ("href", "xlink:href", "src"):
            target = attributes.get(name)
            image = tag == "img" and DATA_URI.fullmatch(target or "")
            assert target is None or image or target == "data:," or target[0] == "#", target
            assert not (target or "").startswith("#") or (target or "")[1:] in read.ids
    # Nothing is fetched: no link but to an id, no import, no url() but to an id.
    style = "".join(text for tag, text in read.texts if tag == "style")
    assert "@import" not in style
    assert "url(" not in style
    assert all(target in read.ids for target in re.findall(r"url\(#([^)]*)\)", text))
    assert len(re.findall(r"url\(", text)) == len(re.findall(r"url\(#", text))
    (script,) = (text for tag, text in read.texts if tag == "script")
    policy = next(meta["content"] for meta in read.all("meta") if meta.get("http-equiv"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in (policy or "")
    assert "default-src 'none'" in (policy or "")
    # Headings do not skip a level; every table is named, every header cell has a scope, every picture has words.
    levels = [int(tag[1]) for tag, _ in read.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(levels))
    assert len(read.all("caption")) == len(read.all("table"))
    assert all(head.get("scope") in ("col", "row", "colgroup", "rowgroup") for head in read.all("th"))
    assert all(
        svg.get("aria-hidden") == "true" or (svg["role"], bool(svg["aria-label"])) == ("img", True)
        for svg in read.all("svg")
    )
    assert all(region.get("tabindex") == "0" for region in read.all("div") if region.get("role") == "region")
    assert "None" not in read.text
    assert not re.search(r"\bnan\b", read.text, re.IGNORECASE)
    return read


def test_page_shows_what_the_run_found(page):
    read = check(page(REPORT))
    # Only of three models, and of runs that `isthmus explain` looked at.
    absent = {"triangle", "claims", "layers", "directions", "alike", "units"}
    names = [section.name for section in SECTIONS if section.name not in absent]
    assert [section["id"] for section in read.all("section")] == names
    for expected in (
        "2 models became one with 90.3 % on digits (test).",
        "20 November 2026, 12:00 UTC",
        "on the test split of digits, 360 samples",
        "1,000 samples of the train split",
        "Parent 0 a.safetensors99.7 %0.0233",
        "Naive, repaired averaged as they are, then repaired65.0 %1.3530",
        "Merged aligned, averaged, repaired: what this run wrote90.3 %0.4212",
        "Aligned0.3890.3819.08.5",
        "48 hidden units in 2 spaces",
        "Matching moved 92 % of them",
        "2.9 × 10−16",
        "rounding explains up to 3.9 × 10−13",
        "attention.key.bias",
        "features.4.weight dimension 1, covector",
        "attention.value.weight dimensions 0, 1, vector",
        "Invertible: units may be mixed by any invertible matrix",
        "1 axis lost symmetry unexpectedly.",
        "aten.fft_rfft (1)",
        "auxiliary.weight",
        "81.6 % of its upper bound",
        "restarts = 3",
        "[[102.7, 102.84, 102.6]]",
        "4 min 12 s",
        "cd" * 32,
        "torch 2.13.0",
    ):
        assert expected in read.text, expected
    assert "Nothing was proved" not in read.text


def test_tables_sort_by_buttons_and_pictures_have_words(page):
    read = check(page(REPORT))
    assert [th["aria-sort"] for th in read.all("th") if "aria-sort" in th] == ["none"] * len(read.all("button"))
    assert len(read.all("button")) == 7
    pictures = [svg["aria-label"] or "" for svg in read.all("svg") if svg.get("role") == "img"]
    assert [words.split()[0] for words in pictures] == ["Loss", "Accuracy"]
    assert "Aligned: 0.02 at λ = 0, 0.04 at λ = 1, highest 0.42 at λ = 0.5." in pictures[0]
    assert "Without alignment: 99.0 % at λ = 0, 98.0 % at λ = 1, lowest 65.0 % at λ = 0.5." in pictures[1]


def test_unexpected_axes_come_first_and_open(page):
    text = page(REPORT)
    assert text.index("no rule for aten.fft_rfft") < text.index("output of the model")
    assert '<details class="reason unexpected" open>' in text
    calm = copy.deepcopy(REPORT)
    calm["symmetry"]["frozen"].pop()
    text = page(calm)
    assert "Nothing was lost" in text
    assert "unexpected</strong>" not in text


@pytest.mark.parametrize("how", ["absent", "null"])
@pytest.mark.parametrize("key", sorted(set(REPORT) - NEEDED))
def test_each_part_may_be_missing(page, key, how):
    report = {name: part for name, part in REPORT.items() if name != key} if how == "absent" else changed(**{key: None})
    check(page(report))


@pytest.mark.parametrize("part", ["data", "method", "average", "proof", "symmetry", "scores"])
def test_each_fact_may_be_missing(page, part):
    for key in REPORT[part]:
        for facts in ({**REPORT[part], key: None}, {name: fact for name, fact in REPORT[part].items() if name != key}):
            if (part, key) != ("method", "name"):
                check(page(changed(**{part: facts, "curves": None})))


def test_bare_report_reads_well(page):
    read = check(page(BARE))
    assert "2 networks merged by weight_matching" in read.text
    assert "This run had no data, so no network was scored." in read.text
    assert "Without data there is nothing to measure the path on." in read.text
    assert "No space was found" in read.text


def test_missing_proof_is_said_loudly(page):
    read = check(page(changed(proof=None)))
    assert "Nothing was proved." in read.text
    assert "Symmetrynot proved" in read.text.replace(" not", "not")
    assert "--no-verify" in read.text
    assert "This was proved" not in read.text
    assert sum("alarm" in (p.get("class") or "") for p in read.all("p")) == 2


def test_proof_without_controls_does_not_claim_them(page):
    assert "leaving any one tensor behind" in page(REPORT)
    assert "leaving any one tensor behind" not in page(changed(proof={**REPORT["proof"], "weakest_control": None}))


def test_many_models(page):
    read = check(page(many(3)))
    assert "Models 1 and 2" in read.text
    assert "Largest loss barrier of 3" in read.text
    assert "Model 2 moved" in read.text
    assert sum(svg.get("role") == "img" for svg in read.all("svg")) == 6
    read = check(page(many(7)))
    assert "Moved, mean of 6 models" in read.text
    assert "The other 9 pairs are not drawn" in read.text
    assert sum(svg.get("role") == "img" for svg in read.all("svg")) == 24
    read = check(page({**many(3), "curves": None}))
    assert "No path was measured between these 3 networks." in read.text


def test_run_that_only_aligned(page):
    report = {key: part for key, part in REPORT.items() if key not in ("scores", "curves", "average", "repair")}
    read = check(page({**report, "aligned": ["a.safetensors", "b.safetensors"], "assumed": "one image of 8 × 8"}))
    assert [section["id"] for section in read.all("section")] == ["symmetry", "frozen", "matching", "provenance"]
    assert "aligned by weight_matching" in read.text
    assert "written as b.safetensors" in read.text
    assert "one image of 8 × 8" in read.text


def test_targets_that_are_no_classes(page):
    report = copy.deepcopy(REPORT)
    for kind in ("naive", "aligned"):
        absent = {"accuracies": [], "raw_accuracies": [], "error_barrier": None, "midpoint_error_barrier": math.nan}
        report["curves"][0][kind].update(absent)
    for score in (*report["scores"]["parents"], *(s for s in report["scores"].values() if isinstance(s, dict))):
        score["accuracy"] = None
    read = check(page(report))
    assert "Merged loss" in read.text
    assert "ccuracy" not in read.text.replace("cross-accuracy", "")
    assert sum(svg.get("role") == "img" for svg in read.all("svg")) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_numbers_that_are_none_become_dashes(page, value):
    report = copy.deepcopy(REPORT)
    report["scores"]["naive"]["loss"] = value
    report["curves"][0]["naive"]["losses"][2] = value
    report["curves"][0]["aligned"]["losses"][0] = value
    report["curves"][0]["naive"]["barrier"] = value
    report["method"]["objective"] = value
    report["symmetry"]["spaces"][0]["moved"][1] = value
    read = check(page(report))
    assert "19.4 %–not measured" in read.text
    report["curves"][0]["naive"]["losses"] = [value] * 5
    check(page(report))


HOSTILE = '</code></td></script><script>alert(1)</script><img src=x onerror="alert(2)">\'"&amp;\u202e\u0007\n\ud800'


def poisoned(value: Any) -> Any:
    """The report with every text made hostile, but for those that choose what is shown."""
    if isinstance(value, dict):
        return {f"{key}": poisoned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [poisoned(item) for item in value]
    return value + HOSTILE if isinstance(value, str) else value


def test_hostile_names_are_only_text(page):
    harmless = check(page(REPORT))
    report = poisoned(REPORT)
    report["versions"][HOSTILE] = HOSTILE
    report["method"]["options"][HOSTILE] = [HOSTILE]
    report["method"]["details"][HOSTILE] = {HOSTILE: HOSTILE}
    text = page(report)
    read = check(text)
    assert len(read.all("script")) == 1
    assert not read.all("img")
    assert "<script>alert(1)</script>" in read.text
    assert "\u202e" not in text
    assert "\u0007" not in text
    gained = {tag for tag, _ in read.elements} - {tag for tag, _ in harmless.elements}
    assert not gained


def test_same_report_same_bytes(page):
    import matplotlib

    first = page(REPORT)
    with matplotlib.rc_context({"lines.linewidth": 9, "svg.hashsalt": "else", "font.size": 30}):
        assert page(json.dumps(REPORT, indent=3)) == first


def test_page_stays_small(page):
    assert len(page(REPORT)) < 100_000
    report = copy.deepcopy(REPORT)
    sites = [
        {"parameter": f"model.layers.{i}.self_attn.q_proj.weight", "dims": [1], "role": "vector"} for i in range(30)
    ]
    space = {**report["symmetry"]["spaces"][0], "sites": sites}
    report["symmetry"]["spaces"] = [{**space, "name": f"layers.{i}.{'x' * 5000}"} for i in range(1200)]
    report["symmetry"]["frozen"] *= 600
    report["symmetry"]["untouched"] *= 1200
    text = page(report)
    assert len(text) < 10_000_000
    read = check(text)
    assert "200 further spaces" in read.text
    assert "and 10 more" in read.text
    assert "200 further axes" in read.text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot read"),
        ("{", "cannot read"),
        ("[" * 100_000, "cannot read"),
        ("[]", "lacks isthmus, models, method, symmetry, verdict"),
        (json.dumps({**BARE, "verdict": None}), "lacks verdict"),
        (json.dumps({**BARE, "models": [None, 3]}), "not built like a report"),
        (json.dumps({**BARE, "scores": {"merged": 3}}), "not built like a report"),
        (json.dumps({**BARE, "curves": [{"models": "xyz", "aligned": PAIR["aligned"]}]}), "not built like a report"),
    ],
)
def test_what_is_no_report_is_refused_in_one_line(tmp_path, content, said):
    (tmp_path / "report.html").write_text("the old page")
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(CheckpointError, match=said) as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "report.html").read_text() == "the old page"
    assert sorted(path.name for path in tmp_path.iterdir()) in (["report.html"], ["report.html", "report.json"])


# ---- pictures


def test_svg_follows_the_reader_and_says_what_it_shows():
    picture = draw_curve(REPORT)
    root = ElementTree.fromstring(picture)
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-label"].startswith("Loss along the straight line from model 0 to model 1.")
    text = picture.decode()
    assert "@media (prefers-color-scheme: dark)" in text
    assert "var(--aligned, " in text
    assert "#01" not in re.sub(r'(?:href="|id=")[^"]*', "", text), "a stand-in for a colour is left"
    assert picture == draw_curve(REPORT, "svg")
    shown = "".join(root.itertext())
    for words in ("Loss", "Accuracy", "aligned", "without alignment, raw", "straight line", "+0.39", "−33.5"):
        assert words in shown


def test_png_in_light_and_dark():
    light, dark = draw_curve(REPORT, "png"), draw_curve(REPORT, "png", dark=True)
    assert light[:8] == dark[:8] == b"\x89PNG\r\n\x1a\n"
    assert light != dark
    assert light == draw_curve(REPORT, "png")


def test_only_what_was_measured_is_drawn():
    pair = copy.deepcopy(PAIR)
    pair["naive"] = None
    pair["aligned"].update(repair=None, accuracies=[], raw_accuracies=[])
    shown = "".join(ElementTree.fromstring(draw_curve({"curves": [pair]})).itertext())
    assert "Accuracy" not in shown
    assert "raw" not in shown
    assert "without" not in shown


def test_raw_losses_far_above_leave_the_picture(page):
    report = copy.deepcopy(REPORT)
    assert "rises out of the picture" not in page(report)
    report["curves"][0]["naive"]["raw_losses"][2] = 1e6
    assert "rises out of the picture" in page(report)


@pytest.mark.parametrize("report", [{}, {"curves": None}, {"curves": []}])
def test_no_curve_is_an_error(report):
    with pytest.raises(InputError, match="has 0 curves"):
        draw_curve(report)


def test_unknown_picture_is_an_error():
    with pytest.raises(InputError, match="'svg' or 'png'"):
        draw_curve(REPORT, "pdf")
    with pytest.raises(InputError, match="pair=1"):
        draw_curve(REPORT, pair=1)


def test_matplotlib_is_left_alone(tmp_path):
    """It is imported late, needs no display, and keeps its settings; another process gives the same bytes."""
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    code = """
import sys
from pathlib import Path
from isthmus.report import write_report
assert "matplotlib" not in sys.modules
import matplotlib
before = dict(matplotlib.rcParams)
write_report(Path(sys.argv[1]))
assert dict(matplotlib.rcParams) == before
assert "matplotlib.pyplot" not in sys.modules
"""
    settings = {**os.environ, "PYTHONHASHSEED": "5", "MPLBACKEND": "svg"}
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code, str(tmp_path)], check=True, env=settings)
    first = (tmp_path / "report.html").read_bytes()
    write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == first


# ---- colours and figures


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours, after WCAG 2.2."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("palette", [LIGHT, DARK])
def test_contrast_suffices(palette):
    for text in ("text", "muted", "aligned", "naive", "alarm_text", "notice_text"):
        assert contrast(palette[text], palette["paper"]) >= 4.5
    for kind in ("alarm", "notice"):
        assert contrast(palette[f"{kind}_text"], palette[kind]) >= 4.5
    assert contrast(palette["axis"], palette["paper"]) >= 3
    assert set(LIGHT) == set(DARK)


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (figures.decimal, 0.02326, "0.0233"),
        (figures.decimal, -0.5, "−0.5000"),
        (figures.decimal, -0.00001, "0.0000"),
        (figures.decimal, 1234.5678, "1,234.6"),
        (figures.decimal, 3.2e9, "3.2\u202f×\u202f10<sup>9</sup>"),
        (figures.decimal, None, str(figures.ABSENT)),
        (figures.decimal, True, str(figures.ABSENT)),
        (figures.percent, 0.9972, "99.7\u202f%"),
        (figures.percent, 1, "100.0\u202f%"),
        (figures.percent, 0.99999, "99.9\u202f%"),
        (figures.percent, 0.00001, "0.1\u202f%"),
        (figures.percent, 0.0, "0.0\u202f%"),
        (figures.points, -0.0123, "−1.2"),
        (figures.whole, 11456, "11,456"),
        (figures.power, 2.94e-16, "2.9\u202f×\u202f10<sup>−16</sup>"),
        (figures.power, 0.0234, "0.023"),
        (figures.power, 0.0, "0"),
        (figures.power, 251.4, "251"),
        (figures.duration, 0.001, "under 0.01\u202fs"),
        (figures.duration, 0.28, "0.28\u202fs"),
        (figures.duration, 12.34, "12.3\u202fs"),
        (figures.duration, 59.99, "1\u202fmin 0\u202fs"),
        (figures.duration, 7500, "2\u202fh 5\u202fmin"),
        (figures.moment, "2026-11-20T12:00:00+00:00", "20 November 2026, 12:00 UTC"),
        (figures.moment, "2026-01-02T03:04:05", "2 January 2026, 03:04"),
        (figures.moment, "yesterday", "yesterday"),
    ],
)
def test_figures(function, value, text):
    assert str(function(value)) == text


@given(
    st.recursive(st.text() | st.floats() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
)
def test_cleaned_texts_can_be_written_and_shown(value):
    text = json.dumps(figures.clean(value), ensure_ascii=False)
    text.encode()
    assert all(letter.isprintable() for letter in text)


@given(st.floats(0, 1))
def test_a_percentage_reads_100_or_0_only_if_it_is(share):
    text = figures.percent(share)
    assert (text == "100.0\u202f%") == (share == 1)
    assert (text == "0.0\u202f%") == (share == 0)


# ---- in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FRAME = """<!DOCTYPE html><iframe id="page" style="border: 0; width: 375px; height: 800px" src="report.html"></iframe>
<pre id="found"></pre>
<script>
const frame = document.getElementById("page");
frame.addEventListener("load", () => {
  const page = frame.contentDocument;
  page.querySelectorAll("details").forEach((each) => { each.open = true; });
  const buttons = page.querySelectorAll("table.sortable button");
  const first = () => page.querySelector("table.sortable tbody th").textContent;
  const sort = (column) => { buttons[column].click(); return [first(), buttons[column].parentElement.ariaSort]; };
  document.getElementById("found").textContent = JSON.stringify({
    width: page.documentElement.scrollWidth,
    paper: frame.contentWindow.getComputedStyle(page.body).backgroundColor,
    line: frame.contentWindow.getComputedStyle(page.querySelector(".line.aligned")).stroke,
    sorts: [sort(0), sort(0), sort(0), sort(1), sort(1), sort(5)],
  });
});
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(page, tmp_path, scheme):
    page(poisoned(REPORT) if scheme == "dark" else REPORT)
    (tmp_path / "frame.html").write_text(FRAME)
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    flags += "--disable-component-update --disable-sync --allow-file-access-from-files --enable-logging=stderr "
    flags += f"--virtual-time-budget=5000 --blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    done = subprocess.run(
        [
            str(CHROMIUM),
            *flags.split(),
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            (tmp_path / "frame.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    (found,) = re.findall(r'<pre id="found">(.+?)</pre>', done.stdout)
    result = json.loads(found.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert result["width"] <= 375
    palette = DARK if scheme == "dark" else LIGHT
    for name, colour in (("paper", "paper"), ("line", "aligned")):
        channels = ", ".join(str(int(palette[colour][i : i + 2], 16)) for i in (1, 3, 5))
        assert result[name] == f"rgb({channels})"
    assert [(name[:9], order) for name, order in result["sorts"]] == [
        ("attention", "ascending"),
        ("features.", "descending"),
        ("features.", "none"),
        ("features.", "descending"),
        ("attention", "ascending"),
        ("attention", "descending"),
    ]
