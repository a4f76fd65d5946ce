"""On every structure of the zoo the tracer finds the spaces that a hand count gives, and says what it lost."""

import copy
from collections import Counter
from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import isthmus
from helpers.refusals import refuses
from helpers.zoo import ZOO, Net, built, traced
from isthmus.errors import InputError, ModelError, TraceError
from isthmus.symmetry import Group, Permutation
from isthmus.symmetry.transform import move_state

STRUCTURES = pytest.mark.parametrize("name", ZOO)


def counted(net: Net) -> Counter:
    """The known spaces as a multiset of (copies, size, whether nested)."""
    return Counter((1, entry, False) if isinstance(entry, int) else (*entry, True) for entry in net.spaces)


@STRUCTURES
def test_the_spaces_are_the_known_ones(name):
    found = Counter((space.copies, space.size, space.parent is not None) for space in traced(name))
    assert found == counted(built(name))


@STRUCTURES
def test_free_units_are_counted_with_their_copies(name):
    net = built(name)
    assert traced(name).free_units == sum(copies * size for copies, size, _ in counted(net).elements())
    assert (net.missed > 0) == bool(net.why)


@STRUCTURES
def test_lost_symmetry_is_listed_with_its_operation(name):
    lost = [item for item in traced(name).frozen if not item.expected]
    assert {item.operation for item in lost} == set(built(name).frozen_by)
    assert all(item.reason for item in traced(name).frozen)


@STRUCTURES
def test_tensors_that_nothing_reads_are_listed(name):
    symmetry = traced(name)
    assert symmetry.untouched == built(name).untouched
    assert not set(symmetry.untouched) & set(symmetry.sites)


@STRUCTURES
def test_groups_beyond_permutations_are_the_known_ones(name):
    larger = sorted(space.group.value for space in traced(name) if space.group is not Group.PERMUTATION)
    assert tuple(larger) == built(name).larger


@STRUCTURES
def test_every_unit_is_either_free_or_frozen(name):
    """Every index of every dimension that a float tensor has is moved by a space or listed with a reason."""
    symmetry = traced(name)
    state = built(name).state_dict()
    for tensor, shape in symmetry.shapes.items():
        if tensor in symmetry.untouched or tensor in symmetry.tied or not state[tensor].is_floating_point():
            continue
        for dim, size in enumerate(shape):
            moved = set()
            for _, site in symmetry.sites.get(tensor, []):
                if dim in site.dims:
                    at = np.unravel_index(site.positions.ravel(), [shape[d] for d in site.dims])
                    moved |= set(at[site.dims.index(dim)].tolist())
            frozen = [item for item in symmetry.frozen if item.parameter == tensor and str(dim) in item.dim.split(",")]
            assert size == 1 or len(moved) + sum(item.units for item in frozen) >= size, (tensor, dim)


@STRUCTURES
def test_spaces_fit_their_tensors(name):
    symmetry = traced(name)
    assert len({space.name for space in symmetry}) == len(symmetry)
    for space in symmetry:
        assert space.size > 1
        assert space.sites
        if space.parent is not None:
            assert space.copies == symmetry[space.parent].copies * symmetry[space.parent].size
        for site in space.sites:
            assert site.positions.shape[:2] == (space.copies, space.size)
            length = int(np.prod([symmetry.shapes[site.parameter][dim] for dim in site.dims]))
            places = site.positions.ravel()
            assert len(set(places.tolist())) == len(places)
            assert 0 <= places.min() <= places.max() < length


@pytest.mark.parametrize("name", ["BatchNorm", "Dropout", "LSTM", "ResidualInPlace", "TiedEmbedding", "WeightNorm"])
def test_the_model_is_left_as_it_was(name):
    net = copy.deepcopy(built(name))
    modules = dict(net.named_modules())
    tensors = {
        key: (id(tensor), tensor.clone(), tensor.requires_grad)
        for key, tensor in net.state_dict(keep_vars=True).items()
    }
    args, kwargs = net.inputs()
    kept = [x.clone() for x in args]
    for training in (True, False):
        net.train(training)
        isthmus.trace(net, *args, kwargs=kwargs)
        assert dict(net.named_modules()) == modules
        assert all(module.training == training for module in net.modules())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
        for key, tensor in net.state_dict(keep_vars=True).items():
            identity, value, requires_grad = tensors[key]
            assert id(tensor) == identity
            assert torch.equal(tensor, value)
            assert tensor.requires_grad == requires_grad
            assert tensor.grad is None
        assert all(torch.equal(x, y) for x, y in zip(args, kept, strict=True))


@STRUCTURES
def test_the_batch_does_not_matter(name):
    net = built(name)
    args, kwargs = net.inputs(samples=3, seed=1)
    assert isthmus.trace(net, *args, kwargs=kwargs).hash == traced(name).hash


@pytest.mark.parametrize("name", ["Attention", "BatchNorm", "TiedEmbedding", "SqueezeExcite", "TwoInputs"])
def test_an_exported_program_gives_the_same_spaces(name):
    net = copy.deepcopy(built(name)).eval()
    args, kwargs = net.inputs()
    program = torch.export.export(net, args, kwargs, strict=False)
    assert isthmus.trace(program, *args, kwargs=kwargs).hash == traced(name).hash


@pytest.mark.parametrize("name", ["PlainMLP", "BatchNorm", "Attention"])
def test_weights_need_no_memory(name):
    with torch.device("meta"):
        net = ZOO[name]()
        x = torch.empty(2, *net.sample_shape)
    assert isthmus.trace(net, x).hash == traced(name).hash


def test_a_tied_tensor_appears_once():
    symmetry = traced("TiedEmbedding")
    assert symmetry.tied == {"head.weight": "embed.weight"}
    assert "head.weight" not in symmetry.sites
    assert len(symmetry.sites["embed.weight"]) == 1


def test_running_statistics_are_sites_of_their_space():
    roles = {site.parameter: site.role for site in traced("BatchNorm").spaces[0].sites}
    assert roles == {
        "layers.0.weight": "vector",
        "layers.0.bias": "vector",
        "layers.1.weight": "vector",
        "layers.1.bias": "vector",
        "layers.1.running_mean": "vector",
        "layers.1.running_var": "variance",
        "layers.4.weight": "covector",
    }


def test_producers_are_vectors_and_consumers_covectors():
    for space in traced("DeepLinear"):
        assert [site.role for site in space.sites] == ["vector", "vector", "covector"]


def test_a_space_is_named_after_what_produces_it():
    assert [space.name for space in traced("PlainMLP")] == ["layers.0", "layers.2"]
    names = [space.name for space in traced("GroupNorm")]
    assert names == ["layers.0", "layers.0/units"]


def test_an_operation_without_a_rule_is_named_with_its_module():
    (item,) = {(f.operation, f.module) for f in traced("Sort").frozen if not f.expected}
    assert item == ("aten.sort", "layers.1")
    frozen = {(f.parameter, f.dim, f.units) for f in traced("Sort").frozen if not f.expected}
    assert ("layers.0.weight", "0", 5) in frozen


def test_the_same_model_gives_the_same_bytes():
    net = built("ShuffleUnits")
    args, kwargs = net.inputs()
    assert isthmus.trace(net, *args, kwargs=kwargs).to_json() == traced("ShuffleUnits").to_json()


def test_a_model_without_inputs_is_refused():
    with refuses(InputError, "no example input"):
        isthmus.trace(built("PlainMLP"))


def test_a_model_with_tensors_that_torch_cannot_copy_is_refused():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).eval()
    prune.l1_unstructured(net[0], "weight", 0.5)
    with refuses(ModelError, r"0.weight is computed from other tensors before each run, .* \(prune.remove, "):
        isthmus.trace(net, torch.randn(2, 3))
    prune.remove(net[0], "weight")
    assert isthmus.trace(net, torch.randn(2, 3)).free_units == 4


def test_a_model_that_cannot_be_captured_is_refused():
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with refuses(TraceError, "cannot be captured"):
        isthmus.trace(Branch(), torch.ones(2, 3))


def test_sparse_weights_are_refused():
    net = nn.Linear(3, 2)
    net.weight = nn.Parameter(net.weight.detach().to_sparse())
    with refuses(ModelError, "weight is no dense tensor"):
        isthmus.trace(net, torch.ones(2, 3))


def test_half_precision_models_have_the_same_spaces():
    net = copy.deepcopy(built("BatchNorm")).bfloat16()
    (x,), _ = net.inputs()
    assert isthmus.trace(net, x.bfloat16()).hash == traced("BatchNorm").hash


def test_a_loaded_symmetry_has_no_graph():
    assert traced("PlainMLP").graph is not None
    assert replace(traced("PlainMLP"), graph=None).hash == traced("PlainMLP").hash


# Tiny networks, on which every permutation of every axis of every tensor can be tried


class Plain(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))


class Deep(nn.Sequential):
    def __init__(self):
        layers = (nn.Linear(2, 2, bias=False) for _ in range(3))
        super().__init__(next(layers), nn.Tanh(), next(layers), nn.Tanh(), next(layers))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.skip, self.head = nn.Linear(2, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(3, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.tanh(x + self.skip(torch.tanh(x))))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(2, 4, bias=False), nn.Linear(2, 2, bias=False)

    def forward(self, x):
        value, gate = self.up(x).chunk(2, 1)
        return self.down(value * torch.sigmoid(gate))


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(2, 4, bias=False), nn.Linear(4, 1, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(nn.functional.group_norm(self.up(x), 2)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(3, 3))

    def forward(self, x):
        return torch.tanh(torch.tanh(x @ self.weight.T) @ self.inner) @ self.weight


class Flipped(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(2, 4, bias=False), nn.Linear(4, 1, bias=False)

    def forward(self, x):
        x = torch.tanh(self.up(x))
        return self.down(torch.tanh(x + x.flip(1)))


def moves_of(symmetry):
    """Every element of the group that a symmetry claims."""
    choices = [
        [np.array(rows) for rows in product(permutations(range(space.size)), repeat=space.copies)] for space in symmetry
    ]
    for chosen in product(*choices):
        yield {space.name: Permutation(indices) for space, indices in zip(symmetry, chosen, strict=True)}


@pytest.mark.parametrize(
    ("make", "complete"),
    [(Plain, True), (Deep, True), (Residual, True), (Gated, True), (Grouped, True), (Tied, True), (Flipped, False)],
)
def test_trying_everything_finds_no_less_than_is_claimed(make, complete):
    torch.manual_seed(0)
    net, x = make().double().eval(), torch.randn(3, 2, dtype=torch.float64)
    state = net.state_dict()
    coded = {name: torch.arange(tensor.numel()).reshape(tensor.shape).double() for name, tensor in state.items()}
    symmetry = isthmus.trace(net, x)

    def key(tensors) -> bytes:
        return b"".join(tensor.numpy().tobytes() for tensor in tensors.values())

    claimed = [key(move_state(coded, transforms, symmetry)) for transforms in moves_of(symmetry)]
    axes = [(name, dim, size) for name, tensor in state.items() for dim, size in enumerate(tensor.shape)]
    with torch.no_grad():
        expected = net(x)
        found = set()
        for orders in product(*(permutations(range(size)) for _, _, size in axes)):
            moved, codes = dict(state), dict(coded)
            for (name, dim, _), order in zip(axes, orders, strict=True):
                index = torch.tensor(order)
                moved[name], codes[name] = (t[name].index_select(dim, index) for t in (moved, codes))
            # Sums of four terms at most, in another order; weights drawn at random differ by far more.
            if (torch.func.functional_call(net, moved, (x,)) - expected).abs().max() < 1e-12:
                found.add(key(codes))
    assert len(set(claimed)) == len(claimed)
    assert set(claimed) <= found
    assert (set(claimed) == found) == complete
