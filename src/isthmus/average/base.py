"""What every way of averaging is: a configured object that turns aligned states into one state."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from isthmus.average.coefficients import Coefficients
from isthmus.data.batches import Data
from isthmus.state import State, first_float
from isthmus.symmetry.alignment import Alignment
from isthmus.symmetry.groups import keeps_function
from isthmus.wording.short import counted, told, told_by_fields


@dataclass(eq=False)
class AveragingProblem:
    """Models in one common frame, and what a way of averaging may use.

    Attributes:
        states: Every model's state dict in the common frame; floating-point tensors are at least float32.
        coefficients: One weight a model for every tensor, summing to one.
        module: The architecture.
        data: Re-iterable batches, or None.
        base: The state of the models' common ancestor in the common frame, or None.
        seed: Seeds everything random.
        models: The models as they were given, not moved; averages that run them use these.
        alignment: What moved them into the common frame; None if they were not moved.
    """

    states: Sequence[State]
    coefficients: Coefficients
    module: nn.Module
    data: Data | None = None
    base: State | None = None
    seed: int = 0
    models: Sequence[nn.Module] = ()
    alignment: Alignment | None = None

    __repr__ = told_by_fields

    @property
    def is_exact(self) -> bool:
        """Whether the moved models compute what they did: they were permuted, or each space moved within its group."""
        return self.alignment is None or keeps_function(self.alignment)

    def weights(self, name: str) -> Sequence[float]:
        """One weight a model for the tensor of that name."""
        return self.coefficients.of(name)

    def network(self, state: State) -> nn.Module:
        """A copy of the architecture in the precision of a state, with its tensors, in `eval()`."""
        model = copy.deepcopy(self.module).to(first_float(state).dtype).eval()
        model.load_state_dict(dict(state))
        return model


@dataclass(frozen=True, eq=False)
class Averaged:
    """What an average returns.

    Attributes:
        state: The averaged floating-point tensors, by name.
        measured: Names of the running statistics that were measured on the merged network itself; all others are as
            the average left them, and `repair` puts them right.
    """

    state: dict[str, Tensor]
    measured: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        measured = f"{len(self.measured)} of them measured" if self.measured else None
        return told(self, counted(len(self.state), "tensor"), measured)


class Average(ABC):
    """A way of averaging: a frozen dataclass whose fields are its options.

    It should be the case that:

    - the average of one model, and of several of which one alone counts, is that model;
    - the average of copies of a model is that model;
    - the order of the models does not matter, where their coefficients go with them;
    - only the ratio of coefficients matters;
    - the same models, data and seed give the same bytes, whatever else has drawn random numbers;
    - nothing that it was given changes, and the result shares no memory with it;
    - every tensor keeps the precision that it has in the first state.

    `tests/laws/test_averaging.py` states these as tests, and runs them for every average of the table.

    Attributes:
        name: Its name in `AVERAGES`.
        fits: Whether it fits weights to data: of copies it then makes a network that computes the same on that data,
            of other weights.
        joins_two: Whether it is defined for two models only.
    """

    name: ClassVar[str]
    fits: ClassVar[bool] = False
    joins_two: ClassVar[bool] = False

    @property
    def needs(self) -> str:
        """What it needs beside the states: `""`, `"data"`, `"labels"` or `"base"`."""
        return ""

    @classmethod
    def whole(cls) -> "Average":
        """The average with options under which it throws nothing away by chance or by size: for the laws."""
        return cls()

    @abstractmethod
    def __call__(self, aligned: AveragingProblem) -> Averaged:
        """The averaged floating-point tensors, and which running statistics were measured anew."""
