"""The table of ways of averaging aligned weights: one line a way, in the order in which they are listed.

A way is one file with a frozen dataclass, and one line here that imports its class under its own name. That is all
there is to enter: `AVERAGES` is made of the classes that stand here, by their `name`, and the laws go through it.
"""
# ruff: noqa: I001 (the order of the lines is the order of the table)

from isthmus.average.base import Average, Averaged, AveragingProblem
from isthmus.average.coefficients import Coefficients
from isthmus.registry import table_of

from isthmus.average.mean import Mean as Mean
from isthmus.average.slerp import Slerp as Slerp
from isthmus.average.task_arithmetic import TaskArithmetic as TaskArithmetic
from isthmus.average.ties import Ties as Ties
from isthmus.average.dare import Dare as Dare
from isthmus.average.fisher import Fisher as Fisher
from isthmus.average.regmean import RegMean as RegMean
from isthmus.average.pleas import PLeaS as PLeaS
from isthmus.average.greedy_soup import GreedySoup as GreedySoup

AVERAGES: dict[str, type[Average]] = table_of(Average, globals())

__all__ = ["AVERAGES", "Average", "Averaged", "AveragingProblem", "Coefficients"]
__all__ += [average.__name__ for average in AVERAGES.values()]  # pyright: ignore[reportUnsupportedDunderAll]
