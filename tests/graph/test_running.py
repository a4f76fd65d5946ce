"""The one runner against torch's own interpreter, the module itself and its hooks."""

import pytest
import torch
from torch import Tensor, fx, nn

from isthmus.data import read_batches
from isthmus.data.batches import Batch
from isthmus.graph import operations
from isthmus.graph.capture import Program, capture
from isthmus.graph.reader import needed_for, node_shapes, observe, run


class Net(nn.Module):
    """A residual block with operations in place, a constant, a keyword input, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.second = nn.Linear(8, 8)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, *, shift: Tensor, factor: Tensor) -> dict[str, Tensor]:
        x = x.mul_(factor)
        hidden = self.norm(self.first(x)).relu_()
        hidden = hidden + self.second(hidden) * torch.tensor([0.5, 2.0] * 4)
        left, right = hidden.split(4, dim=1)
        return {"scores": self.head(left + shift), "right": right}


def network(seed: int) -> Net:
    torch.manual_seed(seed)
    net = Net().eval()
    for tensor in net.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.1, 1.0)
    return net


def batch_of(samples: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x, shift, factor = (torch.randn(samples, width, generator=generator) for width in (6, 4, 1))
    return Batch((x,), {"factor": factor, "shift": shift})


def program_of(samples: int = 5) -> Program:
    batch = batch_of(samples)
    return capture(network(0), batch.args, dict(reversed(batch.kwargs.items())))


class Plain(fx.Interpreter):
    """Torch's interpreter; keeps a copy of every tensor as soon as it is computed."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.exported.graph_module)
        self.seen: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.seen[n.name] = value.clone()
        return value


def plainly(program: Program, net: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Every node's value, by torch's interpreter."""
    signature, state, batch = program.exported.graph_signature, net.state_dict(), batch.clone()
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    values = {node: state[name] for node, name in named.items()}
    constants = signature.inputs_to_lifted_tensor_constants
    values |= {node: program.exported.constants[name] for node, name in constants.items()}
    order = (*batch.args, *(batch.kwargs[name] for name in program.kwargs))
    values |= dict(zip(signature.user_inputs, order, strict=True))
    plain = Plain(program)
    with torch.no_grad():
        plain.run(*(values[node.name] for node in program.graph.nodes if node.op == "placeholder"))
    return plain.seen


def kept(seen: dict[str, Tensor], name: str):
    return lambda value: seen.__setitem__(name, value.clone()) if isinstance(value, Tensor) else None


def test_it_answers_as_the_module_does_in_the_modules_own_form():
    program, net, batch = program_of(), network(1), batch_of(5)
    inputs = batch.clone()
    with torch.no_grad():
        found = run(program, net.state_dict(), batch)
        wanted = net(*inputs.clone().args, **inputs.kwargs)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert torch.equal(batch.args[0], inputs.args[0])  # although the graph writes into it


def test_observers_see_what_torchs_interpreter_computes():
    program, net, batch = program_of(), network(1), batch_of(5)
    wanted = plainly(program, net, batch)
    seen: dict[str, Tensor] = {}
    with torch.no_grad():
        run(program, net.state_dict(), batch, {name: kept(seen, name) for name in wanted})
    assert list(seen) == list(wanted)
    assert all(torch.equal(seen[name], wanted[name]) for name in wanted)


def test_until_gives_that_nodes_value_and_runs_nothing_behind_it():
    program, net, batch = program_of(), network(1), batch_of(5)
    wanted = plainly(program, net, batch)
    for name in wanted:
        seen: dict[str, Tensor] = {}
        with torch.no_grad():
            value = run(program, net.state_dict(), batch, {each: kept(seen, each) for each in wanted}, until=name)
        assert torch.equal(value, wanted[name])
        assert list(seen) == list(wanted)[: 1 + list(wanted).index(name)]


def test_what_a_node_needs_is_enough_and_gradients_pass():
    program, net = program_of(), network(1)
    values = [
        node.name for node in program.graph.nodes if node.op == "call_function" and node.name in node_shapes(program)
    ]
    for name in values:
        needed = {node.name for node in needed_for(program, name)}
        found: list[Tensor] = []
        for only in (None, needed):
            batch = batch_of(5)
            batch.args[0].requires_grad_()
            value = run(program, net.state_dict(), batch, until=name, only=only)
            found += [value, *(torch.autograd.grad(value.sum(), batch.args[0]) if value.requires_grad else ())]
        assert all(torch.equal(a, b) for a, b in zip(found[: len(found) // 2], found[len(found) // 2 :], strict=True))


def test_gradients_are_those_of_the_module():
    program, net = program_of(), network(1)
    found, wanted = batch_of(5), batch_of(5)
    found.args[0].requires_grad_()
    wanted.args[0].requires_grad_()
    inputs = wanted.clone()
    run(program, net.state_dict(), found)["scores"].sum().backward()
    net(*inputs.args, **inputs.kwargs)["scores"].sum().backward()
    assert torch.equal(found.args[0].grad, wanted.args[0].grad)


def test_a_returned_tensor_replaces_the_value_as_a_hook_does():
    program, net, batch = program_of(), network(1), batch_of(5)
    inputs = batch.clone()
    with torch.no_grad():
        found = run(program, net.state_dict(), batch, {"linear": lambda value: value * 3 - 1})
        net.first.register_forward_hook(lambda *parts: parts[2] * 3 - 1)
        wanted = net(*inputs.args, **inputs.kwargs)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_graph_cut_in_two_computes_the_same_and_reads_its_own_tensors_alone():
    program, net, batch = program_of(), network(1), batch_of(5)
    state = net.state_dict()
    order = [node.name for node in program.graph.nodes if node.op != "placeholder"]
    border = order.index("relu_")
    lower = {name: tensor for name, tensor in state.items() if name.startswith(("first", "norm"))}
    upper = {name: tensor for name, tensor in state.items() if name not in lower}
    with torch.no_grad():
        seen: dict[str, Tensor] = {}
        nothing = run(program, lower, batch, {"relu_": kept(seen, "relu_")}, only=set(order[: border + 1]))
        found = run(program, upper, batch, only=set(order[border + 1 :]), given=seen)
        wanted = run(program, state, batch)
    assert nothing is None
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_call_in_place_of_an_operation_gets_its_arguments():
    program, net, batch = program_of(), network(1), batch_of(5)
    state = net.state_dict()
    with torch.no_grad():
        found = run(program, state, batch, instead={"linear": lambda x, weight, bias: x @ weight.T * 2 + bias})
        wanted = run(program, state | {"first.weight": 2 * state["first.weight"]}, batch)
    assert all(torch.allclose(found[key], wanted[key], rtol=1e-5, atol=1e-5) for key in wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_data_is_shown_batch_by_batch_in_the_networks_precision(dtype):
    program, net = program_of(), network(1).to(dtype)
    data = [batch_of(5, 1), batch_of(2, 2), batch_of(5, 3)]
    before = [batch.clone() for batch in data]
    found: list[Tensor] = []
    observe(program, net.state_dict(), data, {"batch_norm": lambda value: found.append(value.clone())}, "reading")
    wanted: list[Tensor] = []
    net.norm.register_forward_hook(lambda *parts: wanted.append(parts[2].clone()))
    with torch.no_grad():
        for batch in read_batches(data, like=net.state_dict()):
            net(*batch.args, **batch.kwargs)
    assert [len(value) for value in found] == [5, 2, 5]
    assert all(value.dtype == dtype and not value.requires_grad for value in found)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert all(torch.equal(batch.args[0], old.args[0]) for batch, old in zip(data, before, strict=True))


FAMILIES = {name: family for name, family in vars(operations).items() if isinstance(family, frozenset)}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_family_names_operations_that_torch_has(name):
    for operation in FAMILIES[name]:
        _, packet, *overload = operation.split(".")
        assert hasattr(torch.ops.aten, packet)
        assert len(overload) == name.endswith("OVERLOADS")
        assert all(each in getattr(torch.ops.aten, packet).overloads() for each in overload)
