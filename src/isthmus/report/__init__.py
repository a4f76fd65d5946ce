"""One self-contained HTML page from a run folder, and pictures of paths and comparisons for other documents."""

from isthmus.report.bars import draw_comparison
from isthmus.report.curves import draw_curve
from isthmus.report.page import write_report

__all__ = ["draw_comparison", "draw_curve", "write_report"]
