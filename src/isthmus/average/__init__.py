"""Ways of averaging aligned weights by name. A way is one file with a frozen dataclass, and one line in `AVERAGES`."""

from isthmus.average.base import Aligned, Average
from isthmus.average.mean import Mean
from isthmus.average.pleas import PLeaS

__all__ = ["AVERAGES", "Aligned", "Average", "Mean", "PLeaS"]

AVERAGES: dict[str, type[Average]] = {
    "mean": Mean,
    "pleas": PLeaS,
}
