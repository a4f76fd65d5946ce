"""The page of a run: one self-contained HTML file, from `report.json` and, where there is one, `features.json`."""

import base64
import hashlib
import json
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined, UndefinedError
from markupsafe import Markup

from isthmus.checkpoint.writing import write_text
from isthmus.errors import CheckpointError
from isthmus.report import figures
from isthmus.report.colours import DARK, LIGHT, css_variables
from isthmus.report.gallery import read_features
from isthmus.report.schema import NEEDED, RunReport
from isthmus.report.sections import SECTIONS, opening

# What reading a value of another kind raises.
BUILT_OTHERWISE = (AttributeError, IndexError, KeyError, TypeError, ValueError, UndefinedError)


def write_report(folder: Path) -> Path:
    """Writes `report.html` from the `report.json` of a run folder, and its `features.json` if any; returns its path.

    The page needs no other file and no network. The same report gives the same bytes.

    Raises:
        CheckpointError: `report.json` is missing, damaged or no report, `features.json` is damaged, or the page cannot
            be written.
    """
    path = Path(folder) / "report.html"
    source = path.with_suffix(".json")
    report = read_report(source)
    if report.explain:
        report = replace(report, features=read_features(source.with_name("features.json")))
    try:
        page = _render(report)
    except BUILT_OTHERWISE as error:
        raise _built_otherwise(source, error) from error
    write_text(path, page)
    return path


def _built_otherwise(path: Path, error: Exception) -> CheckpointError:
    """What is raised where a report is not built as this version reads it."""
    cause = figures.clean(f"{type(error).__name__}: {error}")
    return CheckpointError(f"{str(path)!r} is not built like a report of this version ({cause}); run the merge again")


def read_report(path: Path) -> RunReport:
    """A `report.json`, with names made harmless to show.

    Raises:
        CheckpointError: It is missing, damaged or no report.
    """
    try:
        content = figures.clean(json.loads(path.read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        cause = figures.clean(f"{type(error).__name__}: {error}")
        raise CheckpointError(f"cannot read {str(path)!r} ({cause}); name the folder of a finished run") from error
    missing = [name for name in NEEDED if not isinstance(content, dict) or content.get(name) is None]
    if missing:
        raise CheckpointError(
            f"{str(path)!r} is no report of a run: it lacks {', '.join(missing)}; run the merge again"
        )
    try:
        return RunReport.from_json(content)
    except BUILT_OTHERWISE as error:
        raise _built_otherwise(path, error) from error


def _render(report: RunReport) -> str:
    """The page of a report."""
    environment = _environment()
    sections = []
    for section in SECTIONS:
        facts = section.facts(report)
        if facts is not None:
            template = environment.get_template(f"{section.name}.html.jinja")
            sections.append((section.name, section.title, Markup(template.render(facts))))
    # What only explained runs need is left out of all other pages.
    parts = ("page", "explained") if report.explain else ("page",)
    script, style = ("".join(_source(f"{part}.{kind}") for part in parts) for kind in ("js", "css"))
    digest = base64.b64encode(hashlib.sha256(f"\n{script}".encode()).digest()).decode()
    return environment.get_template("report.html.jinja").render(
        {
            **opening(report),
            "sections": sections,
            "style": Markup(style),
            "script": Markup(script),
            "script_hash": digest,
            "light": Markup(css_variables(LIGHT)),
            "dark": Markup(css_variables(DARK)),
        }
    )


def _source(name: str) -> str:
    return (files("isthmus.report") / "templates" / name).read_text("utf-8")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_source), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    filters = (
        figures.decimal,
        figures.duration,
        figures.moment,
        figures.percent,
        figures.plural,
        figures.points,
        figures.power,
        figures.whole,
    )
    environment.filters |= {each.__name__: each for each in filters}
    environment.globals["ABSENT"] = figures.ABSENT
    return environment
