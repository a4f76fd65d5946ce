"""Finds a network's symmetry by executing its graph on labels, and proves it on the network itself."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from isthmus.errors import InputError, check_kind, kind_of
from isthmus.graph.capture import capture, state_tensors, tied_names
from isthmus.symmetry.symmetry import Symmetry
from isthmus.tracing.absorption import absorb_gains
from isthmus.tracing.description import describe_frozen, describe_graph, describe_spaces
from isthmus.tracing.execute import execute
from isthmus.tracing.rotary import find_rotations
from isthmus.tracing.rules import RULES
from isthmus.tracing.spaces import find_spaces


def trace(model: nn.Module | ExportedProgram, *inputs: Any, kwargs: Mapping[str, Any] | None = None) -> Symmetry:
    """The model's symmetry: every space whose units can be re-labelled without changing the function.

    The graph is captured in `eval()`; the model is left as it was. Operations without a rule freeze the axes that reach
    them and are listed in `Symmetry.frozen`: what is found may be less than what exists, and `verify` proves it right.

    Args:
        model: A module, or a program exported from one in `eval()`.
        inputs: Example inputs, as the model's `forward` takes them; a batch of two is best.
        kwargs: Example keyword inputs.

    Raises:
        InputError: No example input was given, or one that holds no tensor; or an argument of the wrong kind.
        ModelError: The model holds quantised or sparse tensors.
        TraceError: The model cannot be captured on these inputs.
    """
    advice = "give a module first, trace(model, x); isthmus.load_module reads a file into one"
    check_kind(model, (nn.Module, ExportedProgram), "model", advice)
    if kwargs is not None:
        check_kind(kwargs, Mapping, "kwargs", "give a mapping of names to inputs")
    given = pytree.tree_leaves((inputs, dict(kwargs or {})))
    if given and not any(isinstance(leaf, Tensor) for leaf in given):
        raise InputError(f"the example inputs hold no tensor, but {kind_of(given[0])}: give trace(model, x), x a batch")
    state = state_tensors(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    program = capture(model, inputs, kwargs)
    tracing = execute(program, RULES)
    gains = absorb_gains(tracing, program)
    places = find_spaces(tracing)
    spaces, gauges, names = describe_spaces(tracing, places, list(shapes), gains)
    tied = tied_names(model)
    read = set(tracing.parameters) | {alias for alias, name in tied.items() if name in tracing.parameters}
    return Symmetry(
        spaces=tuple(spaces),
        frozen=tuple(describe_frozen(tracing, places)),
        shapes=shapes,
        tied=tied,
        untouched=tuple(name for name in shapes if name not in read and state[name].is_floating_point()),
        gains=tuple(gains),
        gauges=(*gauges, *find_rotations(tracing, program)),
        graph=describe_graph(tracing, places, program, names),
    )
