"""Programs that `torch.export.save` wrote: a graph of operations with its weights."""

import copyreg
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from isthmus.errors import ModelError
from isthmus.models.factory import one_line
from isthmus.models.source import Source

# Where a graph module keeps the inputs that it was exported with; copies of the module keep it too.
EXAMPLE = "isthmus_example"


def _build_from_program(spec: str, name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """An exported program as a module with the state dict of what it was exported from.

    Such a file is code: its expressions are evaluated while it is read. Load only files that you trust.

    Raises:
        ModelError: no file or no program is there, it was exported in training mode, or arguments were given.
    """
    if arguments:
        raise ModelError(f"model {spec!r}: an exported program takes no arguments; leave out {next(iter(arguments))}=")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on how to export, too late
            program = torch.export.load(name)
            module = program.module()
    except FileNotFoundError as error:
        raise ModelError(f"model {spec!r}: there is no file {name!r}; give one that torch.export.save wrote") from error
    except Exception as error:  # a damaged archive can raise anything
        told = one_line(error)[:200]
        raise ModelError(f"model {spec!r}: {name!r} cannot be read as an exported program ({told})") from error
    if trains := next((node for node in module.graph.nodes if _is_training(node)), None):
        raise ModelError(
            f"model {spec!r}: {trains.name} runs in training mode; export the model again after model.eval()"
        )
    _tie_shared(module)
    _copy_leaves_quietly()
    for method in ("train", "eval"):  # these only refuse; no operation of the graph depends on the mode
        vars(module).pop(method, None)
    if program.example_inputs is not None:
        module.meta[EXAMPLE] = program.example_inputs
    return module.eval()


def _tie_shared(module: nn.Module) -> None:
    """Makes one tensor again of those that share all their memory: files keep what was tied as several views of it."""
    first: dict[tuple[object, ...], torch.Tensor] = {}
    for part in module.modules():
        for own in (part._parameters, part._buffers):
            for name, tensor in own.items():
                if tensor is None or not tensor.numel():
                    continue
                key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), type(tensor))
                own[name] = first.setdefault(key, tensor)  # pyright: ignore[reportArgumentType]


def _copy_leaves_quietly() -> None:
    """Makes copies of a graph module share the objects that stand for leaves of its inputs.

    They are all alike, and copying one in the usual way warns of a deprecated class of torch's own.
    """
    leaf = type(pytree.tree_structure(0))
    if leaf is not pytree.TreeSpec:
        copyreg.pickle(leaf, lambda _: (pytree.tree_structure, (0,)))  # pyright: ignore[reportArgumentType]


def _is_training(node: fx.Node) -> bool:
    """Whether a node runs an operation, such as dropout or a norm, in its training mode."""
    if not isinstance(node.target, OpOverload):
        return False
    for index, parameter in enumerate(node.target._schema.arguments):
        if parameter.name in ("train", "training"):
            value = node.args[index] if index < len(node.args) else node.kwargs.get(parameter.name)
            return bool(value)
    return False


def example_in_program(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The positional and keyword inputs that a program was exported with; None for any other module."""
    return model.meta.get(EXAMPLE) if isinstance(model, fx.GraphModule) else None


SOURCE = Source(
    prefix="pt2",
    example="FILE.pt2",
    build=_build_from_program,
    is_path=True,
    suffix=".pt2",
)
