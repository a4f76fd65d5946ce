"""Ways of averaging aligned weights by name. A way is one file with a frozen dataclass, and one line in `AVERAGES`."""

from isthmus.average.base import Average, Averaged, AveragingProblem
from isthmus.average.coefficients import Coefficients
from isthmus.average.dare import Dare
from isthmus.average.fisher import Fisher
from isthmus.average.greedy_soup import GreedySoup
from isthmus.average.mean import Mean
from isthmus.average.pleas import PLeaS
from isthmus.average.regmean import RegMean
from isthmus.average.slerp import Slerp
from isthmus.average.task_arithmetic import TaskArithmetic
from isthmus.average.ties import Ties

__all__ = [
    "AVERAGES",
    "Average",
    "Averaged",
    "AveragingProblem",
    "Coefficients",
    "Dare",
    "Fisher",
    "GreedySoup",
    "Mean",
    "PLeaS",
    "RegMean",
    "Slerp",
    "TaskArithmetic",
    "Ties",
]

AVERAGES: dict[str, type[Average]] = {
    "mean": Mean,
    "slerp": Slerp,
    "task_arithmetic": TaskArithmetic,
    "ties": Ties,
    "dare": Dare,
    "fisher": Fisher,
    "regmean": RegMean,
    "pleas": PLeaS,
    "greedy_soup": GreedySoup,
}
