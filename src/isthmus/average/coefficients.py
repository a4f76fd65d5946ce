"""How much every model counts: alike everywhere, or otherwise in some layers."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from isthmus.errors import InputError, kind_of
from isthmus.registry import did_you_mean
from isthmus.wording.short import told_by_fields

# What users may give: one number a model, or such a list for every prefix of tensor names; "" is all other tensors.
CoefficientsLike = Sequence[float] | Mapping[str, Sequence[float]] | None


@dataclass(frozen=True)
class Coefficients:
    """One weight a model for every tensor, each list summing to one.

    Attributes:
        default: The weights where no prefix says otherwise.
        by_prefix: Weights by the path of a module, or the name of a tensor; the longest one that fits counts.
    """

    default: tuple[float, ...]
    by_prefix: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    __repr__ = told_by_fields

    def of(self, name: str) -> tuple[float, ...]:
        """One weight a model for the tensor of that name."""
        fitting = [prefix for prefix in self.by_prefix if lies_in(name, prefix)]
        return self.by_prefix[max(fitting, key=len)] if fitting else self.default

    @property
    def counting(self) -> list[int]:
        """Numbers of the models whose weight is not zero everywhere."""
        lists = [self.default, *self.by_prefix.values()]
        return [index for index in range(len(self.default)) if any(weights[index] for weights in lists)]


def lies_in(name: str, prefix: str) -> bool:
    """Whether a tensor has this name, or belongs to the module of this path."""
    return name == prefix or name.startswith(f"{prefix}.")


def check_coefficients(given: CoefficientsLike, models: int, names: Iterable[str] = ()) -> Coefficients:
    """The coefficients, every list scaled to sum to one.

    Args:
        given: One number a model; or lists of such numbers by module path or tensor name, with `""` for all tensors
            that no path names; None weighs all alike.
        models: How many models there are.
        names: The tensors' names, for checking paths.

    Raises:
        InputError: Something else than such a list, one of the wrong length, NaN or infinite numbers, a sum of zero, or
            a path where no tensor lies.
    """
    equal = (1 / models,) * models
    if given is None:
        return Coefficients(equal)
    if not isinstance(given, Mapping):
        return Coefficients(_scaled(given, models, ""))
    known = list(names)
    lists = {prefix: _scaled(weights, models, f" of {prefix!r}") for prefix, weights in given.items()}
    default = lists.pop("", equal)
    for prefix in lists:
        if not any(lies_in(name, prefix) for name in known):
            paths = {name.rpartition(".")[0] for name in known} | set(known)
            raise InputError(
                f"coefficients of {prefix!r}{did_you_mean(prefix, paths)}: no tensor lies there; give a module's path"
            )
    return Coefficients(default, lists)


def _scaled(weights: Sequence[float], models: int, where: str) -> tuple[float, ...]:
    """The weights, scaled to sum to one."""
    if isinstance(weights, str | bytes | Mapping | set | frozenset) or not isinstance(weights, Iterable):
        raise InputError(f"coefficients{where} are {kind_of(weights)}: give one number a model, such as [0.3, 0.7]")
    weights = list(weights)
    wrong = [weight for weight in weights if isinstance(weight, str | bytes) or not hasattr(weight, "__float__")]
    if wrong:
        raise InputError(f"coefficients{where} hold {kind_of(wrong[0])}: give one number a model, such as [0.3, 0.7]")
    if len(weights) != models:
        raise InputError(f"{len(weights)} coefficients{where} for {models} models: give one a model")
    total = sum(weights)
    if not all(map(math.isfinite, (*weights, total))) or total == 0:
        raise InputError(f"coefficients {list(weights)}{where}: they must be finite and not sum to zero")
    return tuple(value / total for value in weights)
