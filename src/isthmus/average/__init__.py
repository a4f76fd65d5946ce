"""Ways of averaging aligned weights by name. A way is one file with a frozen dataclass, and one line in `AVERAGES`."""

from isthmus.average.base import Aligned, Average
from isthmus.average.mean import Mean

__all__ = ["AVERAGES", "Aligned", "Average", "Mean"]

AVERAGES: dict[str, type[Average]] = {
    "mean": Mean,
}
