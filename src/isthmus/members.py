"""The models that are to be joined: modules or state dicts of one architecture, checked once."""

import copy
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from isthmus.checkpoint import check_state
from isthmus.errors import InputError


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
