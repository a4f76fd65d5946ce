"""Capture: a module and its inputs become one graph of operations, with the names of its tensors."""

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import SymInt, Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from isthmus.data.batches import Batch
from isthmus.errors import InputError, ModelError, TraceError
from isthmus.graph.batch_size import first_mixing
from isthmus.wording.short import counted, told


@dataclass(eq=False)
class Program:
    """A captured graph.

    Attributes:
        exported: What `torch.export` returned.
        module: The module it was captured from, sharing its tensors, in `eval()`.
        args: The example's positional inputs.
        kwargs: The example's keyword inputs.
        parameters: Graph placeholders that are parameters or persistent buffers, with their state-dict names.
        constants: Graph placeholders that are constants, with their numbers.
        inputs: Names of the placeholders that are the model's inputs, in order.
        fixed_size: Whether the module is a program that was exported for one batch size, which is written into it.
    """

    exported: ExportedProgram
    module: nn.Module
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    parameters: dict[str, str] = field(default_factory=dict[str, str])
    constants: dict[str, object] = field(default_factory=dict[str, object])
    inputs: list[str] = field(default_factory=list[str])
    fixed_size: bool = False
    _recaptured: dict[tuple[tuple[int, ...], ...], "Program"] = field(
        default_factory=dict[tuple[tuple[int, ...], ...], "Program"]
    )

    def __repr__(self) -> str:
        nodes, inputs = counted(len(self.graph.nodes), "node"), counted(len(self.inputs), "input")
        return told(self, type(self.module).__name__, nodes, inputs)

    @property
    def graph(self) -> fx.Graph:
        """The graph of aten operations."""
        return self.exported.graph

    def in_order(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword inputs in the order of the example's, in which the graph takes them."""
        return {name: kwargs[name] for name in self.kwargs} if kwargs.keys() == self.kwargs.keys() else dict(kwargs)

    def for_inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "Program":
        """The same graph captured for inputs of another batch size; node names are the same.

        Raises:
            TraceError: The graph is another one at this size, so that what was traced does not hold for it.
        """
        kwargs = self.in_order(kwargs)
        shapes = _input_shapes(args, kwargs)
        if shapes == _input_shapes(self.args, self.kwargs):
            return self
        if shapes not in self._recaptured:
            self._recaptured[shapes] = self.resized(args, kwargs) if self.fixed_size else self.recaptured(args, kwargs)
        return self._recaptured[shapes]

    def recaptured(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "Program":
        """The module captured again.

        Raises:
            TraceError: The graph is another one at this size.
        """
        other = capture(self.module, args, kwargs)
        if not _same_operations(self.graph, other.graph):
            shapes, own = _input_shapes(args, kwargs), _input_shapes(self.args, self.kwargs)
            raise TraceError(
                f"on inputs of shape {shapes} the model runs other operations than on {own}: trace it on those"
            )
        return other

    def resized(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "Program":
        """The operations of a program that was exported for one batch size, at another.

        Raises:
            TraceError: They do not run at this size, or may mix samples there.
        """
        own = {node.name: node.meta.get("val") for node in self.graph.nodes}
        sizes = tuple(tuple(own[name].shape) for name in self.inputs if isinstance(own[name], Tensor))
        refusal = (
            f"the program was exported for inputs of shape {sizes} and cannot be used on {_input_shapes(args, kwargs)}"
        )
        advice = "export it with a dynamic batch size, or trace the module itself"
        try:
            other = _export(self.module, args, kwargs)
        except TraceError as error:
            raise TraceError(f"{refusal}: {error}; {advice}") from error
        where = "its operations change" if not _same_operations(self.graph, other.graph) else None
        where = where or first_mixing(self.graph, other.graph, self.inputs)
        if where is not None:
            raise TraceError(f"{refusal}, where samples might mix ({where}): {advice}")
        return replace(other, fixed_size=True)


def _same_operations(graph: fx.Graph, other: fx.Graph) -> bool:
    """Whether two graphs run operations of the same names in the same order."""
    return [(n.name, n.target) for n in graph.nodes] == [(n.name, n.target) for n in other.nodes]


def _input_shapes(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    """Shapes of all input tensors, in order."""
    return tuple(tuple(x.shape) for x in pytree.tree_leaves((args, dict(kwargs))) if isinstance(x, Tensor))


def share_structure(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares every tensor with the original, in `eval()` mode.

    What modules keep from earlier runs in `eval()`, and forget when they go back to training, is forgotten.

    Raises:
        ModelError: A module holds a tensor that it computes from its parameters before each run; torch copies no such
            module.
    """
    for path, module in model.named_modules():  # pyright: ignore[reportUnknownVariableType] - torch's own gap
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                raise ModelError(
                    f"{path + '.' if path else ''}{name} is computed from other tensors before each run, as by pruning "
                    "or the older weight_norm: make it permanent (prune.remove, remove_weight_norm), or use "
                    "torch.nn.utils.parametrizations"
                )
    tensors = [*model.parameters(), *model.buffers()]
    shared = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    return shared.train().eval()


def capture(
    model: nn.Module | ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> Program:
    """The model's graph on example inputs; the model is left as it was.

    Args:
        model: A module, or a program that was exported from one in `eval()`.
        args: Positional example inputs.
        kwargs: Keyword example inputs.

    Raises:
        InputError: No example input was given.
        TraceError: `torch.export` cannot capture the model on these inputs; the message names the line.
    """
    kwargs = dict(kwargs or {})
    if isinstance(model, ExportedProgram):
        return _capture_exported(model, args, kwargs)
    if not args and not kwargs:
        raise InputError("no example input: give trace one batch of inputs, as the model's forward takes them")
    shared = share_structure(model)
    if not any(parameter.is_meta for parameter in model.parameters()):
        return _export(shared, args, kwargs)
    # Everything on one device; buffers that have numbers, such as a table of indices, keep them as constants.
    numbers = {name: buffer for name, buffer in shared.named_buffers() if not buffer.is_meta}
    example = Batch(args, kwargs).mapped(lambda tensor: tensor.to("meta"))
    return _export(shared.to("meta"), example.args, example.kwargs, numbers)


def _capture_exported(program: ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Program:
    """The graph of a program that was exported before, on example inputs; on its own ones if none are given.

    Raises:
        TraceError: The program does not run at that size, or may mix samples there.
    """
    if not args and not kwargs and program.example_inputs is not None:
        args, kwargs = program.example_inputs
    inputs = [n for n in program.graph.nodes if n.name in program.graph_signature.user_inputs]
    shapes = [tuple(n.meta["val"].shape) for n in inputs if isinstance(n.meta.get("val"), Tensor)]
    if any(isinstance(size, SymInt) for shape in shapes for size in shape):
        return _export(program.module(), args, kwargs)
    own = _describe(program, _without_guards(program), args, kwargs, {})
    own.fixed_size = True
    return own if tuple(shapes) == _input_shapes(args, kwargs) else own.resized(args, kwargs)


def _without_guards(program: ExportedProgram) -> nn.Module:
    """A program's module that runs at every size at which its operations do."""
    module = program.module()
    vars(module)["_forward_pre_hooks"].clear()  # of these, some versions of torch check sizes
    for node in [n for n in module.graph.nodes if n.op == "call_module" and not n.users]:  # and others in the graph
        module.graph.erase_node(node)
    module.recompile()
    return module


def _export(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], numbers: Mapping[str, Tensor] | None = None
) -> Program:
    """A module's graph, in the mode in which the module is.

    Args:
        module: The module.
        args: Positional example inputs.
        kwargs: Keyword example inputs.
        numbers: Numbers of buffers that have none in the module, by name.

    Raises:
        TraceError: `torch.export` cannot capture the module on these inputs.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # else one opaque operation stands for a whole encoder layer
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on how to export, which nobody asked for
            exported = torch.export.export(module, args, dict(kwargs), strict=False)
    except Exception as error:  # torch.export raises many types; all of them mean that the graph cannot be had
        raise TraceError(f"the model cannot be captured: {_first_line(error)}") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    _inline_contexts(exported.graph_module)
    return _describe(exported, module, args, kwargs, numbers or {})


def _inline_contexts(module: fx.GraphModule) -> None:
    """Puts the operations of blocks that only switch gradients or automatic casts off in place of the blocks."""
    for node in [n for n in module.graph.nodes if n.op == "call_function"]:
        name = getattr(node.target, "__name__", "")
        if name == "wrap_with_set_grad_enabled":
            body, inputs = node.args[1], node.args[2:]
        elif name == "wrap_with_autocast" and node.args[2] is False:
            body, inputs = node.args[4], node.args[5:]
        else:
            continue
        inner = getattr(module, str(body.target))
        _inline_contexts(inner)
        placeholders = [n for n in inner.graph.nodes if n.op == "placeholder"]
        renamed: dict[fx.Node, Any] = dict(zip(placeholders, inputs, strict=True))
        with module.graph.inserting_before(node):
            results = module.graph.graph_copy(inner.graph, renamed)
        for user in list(node.users):  # each takes one of the results
            assert isinstance(results, tuple | list)
            user.replace_all_uses_with(results[user.args[1]])
            module.graph.erase_node(user)
        module.graph.erase_node(node)
        if not body.users:
            module.graph.erase_node(body)
    module.recompile()


def _describe(
    exported: ExportedProgram,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    numbers: Mapping[str, Tensor],
) -> Program:
    """The program with its placeholders sorted into parameters, constants and inputs."""
    program = Program(exported, module, args, kwargs)
    tied = tied_names(module)
    for spec in exported.graph_signature.input_specs:
        name = getattr(spec.arg, "name", "")
        if spec.kind == InputKind.PARAMETER:
            program.parameters[name] = tied.get(str(spec.target), str(spec.target))
        elif spec.kind == InputKind.BUFFER and spec.persistent:
            tensor = exported.state_dict[str(spec.target)]
            if tensor.is_floating_point():
                program.parameters[name] = tied.get(str(spec.target), str(spec.target))
            else:
                program.constants[name] = numbers.get(str(spec.target), tensor)
        elif spec.kind in (InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            target = str(spec.target)
            program.constants[name] = numbers.get(target, exported.constants[target])
        elif spec.kind == InputKind.USER_INPUT:
            program.inputs.append(name)
    return program


def _first_line(error: BaseException) -> str:
    """The first telling line of an error's message, with the line of the user's code where torch names one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = lines[0] if lines else type(error).__name__
    where = next((line for line in lines if line.startswith("File ") or "user code" in line.lower()), "")
    return f"{type(error).__name__}: {told}" + (f" ({where})" if where and where != told else "")


def module_path(node: fx.Node) -> str:
    """Path of the module in which a node runs."""
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def tied_names(model: nn.Module | ExportedProgram) -> dict[str, str]:
    """Names of the state dict that are a second name of another tensor, mapped to that tensor's first name."""
    if isinstance(model, ExportedProgram):
        model = model.module()
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        if id(tensor) in first:
            tied[name] = first[id(tensor)]
        first.setdefault(id(tensor), name)
    return tied


def state_tensors(model: nn.Module | ExportedProgram) -> dict[str, Tensor]:
    """Every tensor of the state dict.

    Raises:
        ModelError: A state-dict entry is no dense floating-point or integer tensor.
    """
    state = model.state_dict
    entries: dict[str, Any] = dict(state() if callable(state) else state)
    for name, tensor in entries.items():
        if not isinstance(tensor, Tensor) or tensor.is_quantized or tensor.layout != torch.strided:
            raise ModelError(
                f"{name} is no dense tensor (quantised or sparse): convert the model to plain floating point"
            )
    return entries
