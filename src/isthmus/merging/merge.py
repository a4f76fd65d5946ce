"""Merging: models in a common frame become one."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from isthmus.average import AVERAGES
from isthmus.average.base import Average, AveragingProblem
from isthmus.average.coefficients import CoefficientsLike, check_coefficients
from isthmus.data.batches import Data, check_data
from isthmus.errors import DataError, InputError, check_kind, check_seed, kind_of
from isthmus.graph.capture import tied_names
from isthmus.merging.fold import fold_norm_gains
from isthmus.merging.outcome import note_outcome
from isthmus.observe.given import ModelLike, as_modules, as_own_modules, check_alignment, check_models, check_symmetry
from isthmus.observe.running_statistics import running_statistics
from isthmus.registry import configure
from isthmus.state import upcast
from isthmus.symmetry.alignment import Alignment
from isthmus.symmetry.gains import fold_state
from isthmus.symmetry.symmetry import Symmetry
from isthmus.symmetry.transform import LinearMap, Transforms, move_state


def merge(
    models: Sequence[ModelLike],
    alignment: Alignment | None = None,
    average: str | Average = "mean",
    coefficients: CoefficientsLike = None,
    data: Data | None = None,
    base: ModelLike | None = None,
    seed: int = 0,
    *,
    module: nn.Module | None = None,
) -> nn.Module:
    """A new module: the models moved into the common frame of the alignment and averaged there.

    Computed in float32 at least and cast to the first model's dtypes. Integer buffers are copied from the first model.
    Where a running variance met a linear map it is reset to one, and `merged.needs_repair` is True: the model must not
    be used before `repair`. `merged.needs_repair` is False otherwise. `merged.statistics_measured` says whether the
    average measured all running statistics on the merged network itself, as `pleas` does: a reset would only blur them.

    Args:
        models: Modules or state dicts of one architecture; modules of several widths where the alignment is of such,
            and then the result has the widths of the common frame.
        alignment: What `align` returned for them, in the same order; None averages them as they are.
        average: A name in `AVERAGES`, or a configured way of averaging.
        coefficients: One weight a model; they are scaled to sum to one. None weighs all alike. A mapping gives such
            lists by module path or tensor name, the longest path counting, and `""` for all other tensors.
        data: Re-iterable batches, for averages that need them.
        base: The common ancestor, for averages that need it; it must lie in the common frame.
        seed: Seeds averages that draw random numbers.
        module: The architecture, where all models are state dicts.

    Raises:
        DataError: The average needs data and got none.
        InputError: Unequal numbers of models, transforms and coefficients, coefficients of a path where no tensor
            lies, a missing base, an unknown average, or an argument of the wrong kind.
        ModelError: The models are not of one architecture, hold NaN or infinite weights, or have a norm whose gain
            cannot be folded as the alignment asks for.
        SymmetryError: The models are not those that were aligned.
        TransformError: The alignment does not fit the models.
    """
    check_models(models)
    if alignment is not None:
        check_alignment(alignment, len(models))
    configured = configured_average(average)
    check_seed(seed)
    if data is not None:
        check_data(data)
    if base is not None:
        check_kind(base, (nn.Module, Mapping), "base", "give the common ancestor, a module or a state dict")
    unequal = alignment is not None and bool(alignment.symmetries)
    modules = as_own_modules(models) if unequal else as_modules(models, module)
    if alignment is not None:
        for index, model in enumerate(modules if unequal else modules[:1]):  # alike ones need one look
            check_symmetry(alignment.own_symmetry(index), model)
    ancestor = None
    if base is not None:
        architecture = modules[alignment.frame_model if alignment is not None else 0]
        ancestor = as_modules([base], architecture, names=["base"])[0]
    return merge_checked(modules, alignment, configured, coefficients, data, ancestor, seed)


def merge_checked(
    models: Sequence[nn.Module],
    alignment: Alignment | None,
    average: Average,
    coefficients: CoefficientsLike = None,
    data: Data | None = None,
    base: nn.Module | None = None,
    seed: int = 0,
) -> nn.Module:
    """As `merge`, of checked modules in `eval()`, an alignment of theirs, and a checked base.

    Raises:
        DataError: The average needs data and got none.
        InputError: Coefficients that cannot be used, a missing base, or an average that cannot merge several widths.
        ModelError: A norm has a gain that cannot be folded as the alignment asks for.
        TransformError: The alignment does not fit the models.
    """
    if average.needs == "base" and base is None:
        raise InputError(f"{average.name} needs base=, the models' common ancestor: models of other seeds have none")
    if average.needs in ("data", "labels") and data is None:
        raise DataError(f"{average.name} needs data: give data=")
    if alignment is not None and alignment.symmetries and average.needs in ("data", "labels"):
        raise InputError(
            f"{average.name} runs the models side by side, and these are of several widths: use average='mean'"
        )
    architecture = models[alignment.frame_model if alignment is not None else 0]
    if alignment is not None and alignment.folded:
        models = [fold_norm_gains(model, alignment.own_symmetry(index)) for index, model in enumerate(models)]
    weights = check_coefficients(coefficients, len(models), models[0].state_dict())
    states = [upcast(model.state_dict()) for model in models]
    undefined: set[str] = set()
    if alignment is not None:
        undefined = {name for t in alignment.transforms for name in variances_met(t, alignment.symmetry)}
        states = [
            move_state(state, transforms, alignment.own_symmetry(index), reset_variances=True)
            for index, (state, transforms) in enumerate(zip(states, alignment.transforms, strict=True))
        ]
    base_state = None if base is None else upcast(base.state_dict())
    if base_state is not None and alignment is not None and alignment.folded:
        base_state = fold_state(base_state, alignment.symmetry)
    aligned = AveragingProblem(states, weights, architecture, data, base_state, seed, models, alignment)
    averaged = average(aligned)
    merged = dict(averaged.state)
    # A tied tensor has several names, and the averages answer for its first: loading them all, the last would count.
    merged |= {alias: merged[name] for alias, name in tied_names(architecture).items() if name in merged}
    undefined -= averaged.measured
    merged |= {name: torch.ones_like(merged[name]) for name in undefined}
    result = _finish(architecture, merged)
    measured = running_statistics(result) <= averaged.measured
    note_outcome(result, needs_repair=bool(undefined), statistics_measured=measured)
    return result


def configured_average(average: str | Average) -> Average:
    """The way of averaging that a name, or a configured object, stands for.

    Raises:
        InputError: An unknown name, or something else.
    """
    if isinstance(average, str):
        return configure("average", average, AVERAGES)
    if not isinstance(average, Average):
        raise InputError(f"average is {kind_of(average)}: give a name in AVERAGES or a configured one, such as Mean()")
    return average


def variances_met(transforms: Transforms, symmetry: Symmetry) -> list[str]:
    """The running variances that are to be moved by a linear map, under which they are undefined."""
    return [
        site.parameter
        for space in symmetry
        if isinstance(transforms[space.name], LinearMap)
        for site in space.sites
        if site.role == "variance"
    ]


def _finish(architecture: nn.Module, merged: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the architecture with the merged tensors, in its own dtypes, in `eval()`."""
    # Some networks keep what they made of their weights for the next run in `eval()`; `train()` makes them forget it.
    model = copy.deepcopy(architecture).train().eval()
    state = model.state_dict()
    model.load_state_dict({name: merged[name].to(old.dtype) if name in merged else old for name, old in state.items()})
    return model
