"""What the caller gave, checked once: models of one architecture, and their symmetry."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from isthmus.checkpoint.fitting import check_state
from isthmus.data.batches import first_batch
from isthmus.errors import InputError, SymmetryError
from isthmus.symmetry.symmetry import Symmetry
from isthmus.tracing.trace import trace


def as_modules(
    models: Sequence[nn.Module | Mapping[str, Tensor]],
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
        InputError: No models, or only state dicts and no module.
        ModelError: A model is of another architecture, or holds NaN or infinite weights.
    """
    if not models:
        raise InputError("no models: give at least one")
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


def as_own_modules(models: Sequence[nn.Module | Mapping[str, Tensor]]) -> list[nn.Module]:
    """All models as modules in `eval()`, each of an architecture of its own.

    Raises:
        InputError: No models, or a state dict, whose architecture is not known.
        ModelError: A model holds NaN or infinite weights.
    """
    if not models:
        raise InputError("no models: give at least one")
    modules: list[nn.Module] = []
    for index, model in enumerate(models):
        if not isinstance(model, nn.Module):
            raise InputError(f"model {index} is a state dict: models of several widths must be modules")
        modules += as_modules([model], names=[f"model {index}"])
    return modules


def differ_in_width(models: Sequence[nn.Module | Mapping[str, Tensor]]) -> bool:
    """Whether all models have tensors of the same names, but not all of the same shapes."""
    states = [model.state_dict() if isinstance(model, nn.Module) else model for model in models]
    alike = all(state.keys() == states[0].keys() for state in states)
    return alike and any(tensor.shape != states[0][name].shape for state in states for name, tensor in state.items())


def symmetry_of(model: nn.Module, symmetry: Symmetry | None, inputs: tuple[Any, ...] | None, data: Any) -> Symmetry:
    """The symmetry that was given, with its graph if one can be had, or the one found on `inputs` or the first batch.

    Raises:
        InputError: Neither a symmetry nor anything to trace with.
        SymmetryError: The symmetry that was given is not the model's.
    """
    if symmetry is not None:
        check_symmetry(symmetry, model)
        if symmetry.graph is not None:
            return symmetry
    found = None
    if inputs is not None:
        found = trace(model, *inputs)
    elif data is not None:
        batch = first_batch(data).head(2).like(model.state_dict())
        found = trace(model, *batch.args, kwargs=batch.kwargs)
    if symmetry is None:
        if found is None:
            raise InputError("no symmetry: give symmetry=isthmus.trace(model, inputs), or inputs=(x,) to trace it here")
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
        SymmetryError: The model's tensors have other names or shapes than the traced model's.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    traced = {name: tuple(shape) for name, shape in symmetry.shapes.items()}
    for name in [*traced, *shapes]:
        if shapes.get(name) != traced.get(name):
            raise SymmetryError(
                f"the symmetry is not this model's: {name} has shape {shapes.get(name)}, traced {traced.get(name)}; "
                "trace this model"
            )
