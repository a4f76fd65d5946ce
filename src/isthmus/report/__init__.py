"""One self-contained HTML page from a run folder, and the picture of a path for other documents."""

from isthmus.report.curves import draw_curve
from isthmus.report.page import write_report

__all__ = ["draw_curve", "write_report"]
