"""Plain tables, as text and as HTML."""

import html
from collections.abc import Sequence


def plain_table(head: Sequence[str], rows: Sequence[Sequence[str | int]]) -> str:
    """A table of aligned columns: numbers to the right, words to the left."""
    texts = [list(head), *([f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in texts) for column in range(len(head))]
    right = [bool(rows) and isinstance(rows[0][column], int) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in texts
    )


def html_table(head: Sequence[str], rows: Sequence[Sequence[str | int]], foot: str = "") -> str:
    """The same table in HTML, with a line below it."""
    heads = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td style="text-align: right">{cell:,}</td>'
            if isinstance(cell, int)
            else f'<td style="text-align: left">{html.escape(cell)}</td>'
            for cell in row
        )
        + "</tr>"
        for row in rows
    )
    below = f"<p>{html.escape(foot)}</p>" if foot else ""
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>{below}"
