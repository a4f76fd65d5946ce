"""What merging and repairing found out about a model beside its tensors: public attributes of the module, kept here."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Outcome:
    """What is known of a merged model.

    Each is also an attribute of the module, of the same name, where it is known: `merged.needs_repair`.

    Attributes:
        needs_repair: Whether a running variance met a linear map, so that the model must not be used before `repair`.
        statistics_measured: Whether the average measured all running statistics on the merged network itself, as
            `pleas` does: a reset would only blur them.
        gained_biases: Names of the biases that a repair gave to layers without one.
    """

    needs_repair: bool = False
    statistics_measured: bool = False
    gained_biases: tuple[str, ...] = ()


def outcome_of(model: nn.Module) -> Outcome:
    """What is known of a model; of one that was neither merged nor repaired, that there is nothing to repair."""
    return Outcome(
        needs_repair=getattr(model, "needs_repair", False),
        statistics_measured=getattr(model, "statistics_measured", False),
        gained_biases=tuple(getattr(model, "gained_biases", ())),
    )


def note_outcome(
    model: nn.Module,
    *,
    needs_repair: bool | None = None,
    statistics_measured: bool | None = None,
    gained_biases: Sequence[str] | None = None,
) -> None:
    """Writes what was found out about a model, in place; what is left out stays as it is noted."""
    found = {
        "needs_repair": needs_repair,
        "statistics_measured": statistics_measured,
        "gained_biases": None if gained_biases is None else list(gained_biases),
    }
    for name, value in found.items():
        if value is not None:
            setattr(model, name, value)
