"""What the caller gave, checked once: models of one architecture, their symmetry and their alignment.

A public function such as `merge` checks what it was given and calls `merge_checked`, which takes what has been checked.
Other rooms call that too: weights are searched for NaN once a call, however often they are used in it.
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from isthmus.checkpoint.fitting import check_finite, check_state
from isthmus.data.batches import Data, first_batch
from isthmus.errors import InputError, SymmetryError, check_kind, kind_of
from isthmus.state import State
from isthmus.symmetry.alignment import Alignment
from isthmus.symmetry.symmetry import Symmetry
from isthmus.tracing.trace import trace

# A model as users give it, and example inputs to trace with: several in a tuple or list, or the only one as it is.
ModelLike = nn.Module | State
Inputs = Tensor | Sequence[Any]


def check_models(models: Sequence[ModelLike], name: str = "models") -> None:
    """Refuses what is no list of modules and state dicts.

    Args:
        models: What was given.
        name: The argument's name.

    Raises:
        InputError: It is something else, holds something else, or holds none.
    """
    listed = isinstance(models, Sequence | nn.ModuleList) and not isinstance(models, str | bytes)
    if not listed:
        raise InputError(f"{name} is {kind_of(models)}: give a list of models, such as [a, b]")
    for index, model in enumerate(models):
        advice = "give modules or state dicts; isthmus.checkpoint.load_module reads a file into a module"
        check_kind(model, (nn.Module, Mapping), f"{name}[{index}]", advice)
    if not models:
        raise InputError(f"no {name}: give at least one")


def check_alignment(alignment: Alignment, models: int, name: str = "models") -> None:
    """Refuses what is no alignment of so many models.

    Raises:
        InputError: It is something else, or holds another number of models.
    """
    check_kind(alignment, Alignment, "alignment", "give what isthmus.align returned for these models")
    if len(alignment) != models:
        raise InputError(
            f"{models} {name}, but the alignment holds {len(alignment)}: give the aligned models, in order"
        )


def check_mixed(model: nn.Module, names: Collection[str] | None = None) -> None:
    """Refuses a mix of checked models in which numbers are NaN or infinite, as where half precision overflows.

    Args:
        model: The mix.
        names: The tensors to look at; all by default.

    Raises:
        ModelError: A number is NaN or infinite.
    """
    state = {name: tensor for name, tensor in model.state_dict().items() if names is None or name in names}
    check_finite(state, "the merged model", "its numbers overflow where the models are mixed; use float32 models")


def as_modules(
    models: Sequence[ModelLike],
    module: nn.Module | None = None,
    *,
    names: Sequence[str] | None = None,
) -> list[nn.Module]:
    """All models as modules in `eval()`, sharing no state with one another that the caller does not share already.

    Modules are used as they are, but copied if they are in training mode; state dicts, and modules inside a wrapper
    that the first is not in, are loaded into copies of the first module, or of `module`.

    Args:
        models: Modules or state dicts.
        module: The architecture, where all models are state dicts.
        names: What to call the models in errors; "model 0", "model 1", … by default.

    Raises:
        InputError: No models, something else than models, or only state dicts and no module.
        ModelError: A model is of another architecture, or holds NaN or infinite weights.
    """
    check_models(models)
    if module is not None:
        check_kind(module, nn.Module, "module", "give a model of the state dicts' architecture")
    architecture = module if module is not None else next((m for m in models if isinstance(m, nn.Module)), None)
    if architecture is None:
        raise InputError("only state dicts were given: give module= too, a model of their architecture")
    modules: list[nn.Module] = []
    for index, model in enumerate(models):
        state = model.state_dict() if isinstance(model, nn.Module) else model
        checked = check_state(state, architecture, f"model {index}" if names is None else names[index])
        usable = isinstance(model, nn.Module) and state.keys() == checked.keys()  # not inside a wrapper
        if isinstance(model, nn.Module) and usable and not any(part.training for part in model.modules()):
            modules.append(model)
        else:
            loaded = copy.deepcopy(model if isinstance(model, nn.Module) and usable else architecture)
            loaded.load_state_dict(checked)
            modules.append(loaded.eval())
    return modules


def as_own_modules(models: Sequence[ModelLike]) -> list[nn.Module]:
    """All models as modules in `eval()`, each of an architecture of its own.

    Raises:
        InputError: No models, something else than models, or a state dict, whose architecture is not known.
        ModelError: A model holds NaN or infinite weights.
    """
    check_models(models)
    modules: list[nn.Module] = []
    for index, model in enumerate(models):
        if not isinstance(model, nn.Module):
            raise InputError(f"model {index} is a state dict: models of several widths must be modules")
        modules += as_modules([model], names=[f"model {index}"])
    return modules


def differ_in_width(models: Sequence[ModelLike]) -> bool:
    """Whether all models have tensors of the same names, but not all of the same shapes."""
    states = [model.state_dict() if isinstance(model, nn.Module) else model for model in models]
    alike = all(state.keys() == states[0].keys() for state in states)
    return alike and any(tensor.shape != states[0][name].shape for state in states for name, tensor in state.items())


def symmetry_of(model: nn.Module, symmetry: Symmetry | None, inputs: Inputs | None, data: Data | None) -> Symmetry:
    """The symmetry that was given, with its graph if one can be had, or the one found on `inputs` or the first batch.

    Raises:
        InputError: Neither a symmetry nor anything to trace with, or something else than a symmetry.
        SymmetryError: The symmetry that was given is not the model's.
    """
    if symmetry is not None:
        check_symmetry(symmetry, model)
    return find_symmetry(model, symmetry, inputs, data)


def find_symmetry(model: nn.Module, symmetry: Symmetry | None, inputs: Inputs | None, data: Data | None) -> Symmetry:
    """As `symmetry_of`, of a symmetry that has been checked.

    Raises:
        InputError: Neither a symmetry nor anything to trace with.
        SymmetryError: The symmetry is not that of the model's graph.
    """
    if symmetry is not None and symmetry.graph is not None:
        return symmetry
    found = None
    if inputs is not None:
        found = trace(model, *(inputs if isinstance(inputs, tuple | list) else (inputs,)))
    elif data is not None:
        batch = first_batch(data).head(2).like(model.state_dict())
        found = trace(model, *batch.args, kwargs=batch.kwargs)
    if symmetry is None:
        if found is None:
            raise InputError("no symmetry: give symmetry=isthmus.trace(model, inputs), or inputs=x to trace it here")
        return found
    if found is None:
        return symmetry
    if found.hash != symmetry.hash:
        raise SymmetryError(
            "the model's graph has another symmetry than the one given: trace it again, or leave it out"
        )
    return replace(symmetry, graph=found.graph)


def check_symmetry(symmetry: Symmetry, model: nn.Module) -> None:
    """Refuses a symmetry of another architecture.

    Raises:
        InputError: It is no symmetry.
        SymmetryError: The model's tensors have other names or shapes than the traced model's.
    """
    check_kind(symmetry, Symmetry, "symmetry", "give what isthmus.trace returned, or inputs=x to trace it here")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    traced = {name: tuple(shape) for name, shape in symmetry.shapes.items()}
    for name in [*traced, *shapes]:
        if shapes.get(name) != traced.get(name):
            raise SymmetryError(
                f"the symmetry is not this model's: {name} has shape {shapes.get(name)}, traced {traced.get(name)}; "
                "trace this model"
            )
