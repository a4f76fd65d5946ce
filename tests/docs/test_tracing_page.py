"""The page on tracing: its code runs as it stands, prints what the page says, and its links lead to files."""

import contextlib
import io
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:```text\n(?P<printed>.*?)^```\n)?", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def test_every_block_prints_what_the_page_says():
    names: dict[str, object] = {"__name__": "page"}
    blocks = list(BLOCK.finditer((DOCS / "tracing.md").read_text()))
    assert len(blocks) > 10
    for block in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block["code"], "docs/tracing.md", "exec"), names)
        assert printed.getvalue() == (block["printed"] or ""), block["code"]


@pytest.mark.parametrize("page", ["tracing.md", "glossary.md", "../README.md"])
def test_links_lead_to_files(page):
    path = DOCS / page
    missing = [link for link in LINK.findall(path.read_text()) if not (path.parent / link).exists()]
    assert not missing


def test_the_reading_order_names_what_is_there():
    """Each item names files of the package or of a folder that the item names."""
    source = DOCS.parent / "src" / "isthmus"
    section = (DOCS.parent / "README.md").read_text().partition("## Reading the code")[2].partition("\n## ")[0]
    items = re.split(r"^\d+\. ", section, flags=re.MULTILINE)[1:]
    missing = []
    for item in (item.partition("\n\n")[0] for item in items):
        names = re.findall(r"`([\w/]+(?:\.py|/))`", item)
        folders = [source, *(source / name for name in names if name.endswith("/"))]
        missing += [name for name in names if not any((folder / name).exists() for folder in folders)]
    assert len(items) > 10
    assert not missing
