"""The proof accepts every symmetry that the tracer finds, and refuses every one that was broken on purpose."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import isthmus
from helpers.refusals import refuses
from helpers.zoo import ZOO, Net, built, double, traced
from isthmus.errors import InputError, ModelError, SymmetryError, TransformError
from isthmus.symmetry import Group, LinearMap, Permutation, Site, Space, Symmetry
from isthmus.symmetry.groups import random_element
from isthmus.symmetry.transform import move_state
from isthmus.tracing.proof import _moved_by, _rounding, _stirred
from isthmus.tracing.random_network import draw_network

STRUCTURES = pytest.mark.parametrize("name", ZOO)
# Networks of the zoo are at most forty operations deep and sum at most 150 terms: eps · √150 · 40 · 8, rounded up.
LARGEST_ERROR = 1e-12


def verify(name: str, symmetry: Symmetry | None = None, **options) -> isthmus.Proof:
    args, kwargs = built(name).inputs()
    return isthmus.verify(built(name), symmetry or traced(name), *args, kwargs=kwargs, **options)


def with_sites(symmetry: Symmetry, space: Space, sites) -> Symmetry:
    """The symmetry with other sites for one space."""
    spaces = tuple(replace(s, sites=tuple(sites)) if s is space else s for s in symmetry.spaces)
    return replace(symmetry, spaces=spaces, gauges=())  # a factor of its units would find it out as well


def mismatched(site: Site) -> Site:
    """The site with the first two units of its first copy in each other's places."""
    positions = site.positions.copy()
    positions[0, [0, 1]] = positions[0, [1, 0]]
    return replace(site, positions=positions)


# What the tracer finds


@STRUCTURES
def test_the_function_is_kept_and_every_tensor_matters(name):
    proof = verify(name, trials=4)
    assert proof.max_error <= min(proof.tolerance, LARGEST_ERROR)
    assert proof.trials == 4
    assert set(proof.controls) == set(traced(name).sites)
    assert bool(proof.controls) == bool(ZOO[name].spaces)
    assert proof.no_ops == ZOO[name].no_ops
    assert proof.weakest_control > 1e3 * proof.tolerance


@STRUCTURES
def test_other_weights_and_transforms_keep_it_too(name):
    assert verify(name, seed=1, controls=False).max_error <= LARGEST_ERROR


@STRUCTURES
def test_each_space_alone_keeps_the_function(name):
    """Joint moves could hide two mistakes that undo each other."""
    symmetry, rng = traced(name), np.random.default_rng(0)
    identity = {space.name: Permutation.identity(space) for space in symmetry}
    if not len(symmetry):
        assert not ZOO[name].spaces
        return
    sample = draw_network(double(built(name)), symmetry, built(name).inputs(), rng)
    for space in symmetry:
        moved = move_state(sample.state, {**identity, space.name: _stirred(space, rng)}, symmetry)
        assert sample.change(moved) <= LARGEST_ERROR, space.name


@pytest.mark.parametrize("name", [name for name, net in ZOO.items() if net.larger])
def test_each_larger_group_alone_keeps_the_function(name):
    symmetry, rng = traced(name), np.random.default_rng(0)
    sample = draw_network(double(built(name)), symmetry, built(name).inputs(), rng)
    for space in symmetry:
        alone: dict = {each.name: Permutation.identity(each) for each in symmetry}
        alone[space.name] = random_element(space, rng)
        assert isinstance(alone[space.name], LinearMap) == (space.group is not Group.PERMUTATION)
        # Maps of condition number two and their inverses magnify rounding by two each.
        assert sample.change(_moved_by(alone, sample.state, symmetry)) <= 4 * LARGEST_ERROR, space.name


LARGER = {Group.PERMUTATION: Group.ORTHOGONAL_FIXING_ONES, Group.ORTHOGONAL_FIXING_ONES: Group.ORTHOGONAL}


@STRUCTURES
def test_a_group_that_is_claimed_too_large_is_refused(name):
    """No tiny network hides more than it claims: nonlinearities, gains and norms of centred values see to that."""
    symmetry = traced(name)
    held = {space.parent for space in symmetry}
    for index, space in enumerate(symmetry):
        # Two units can only be exchanged by a rotation that keeps their sum.
        if space.name in held or space.group not in LARGER or space.size == 2:
            continue
        spaces = [*symmetry.spaces]
        spaces[index] = replace(space, group=LARGER[space.group])
        with pytest.raises((SymmetryError, TransformError), match=r"changes the outputs|undefined under a linear map"):
            verify(name, replace(symmetry, spaces=tuple(spaces)), controls=False)


def test_no_space_is_refused_for_rounding_that_the_network_magnifies():
    """A sum of many terms in another order, times a million, inside a sine."""

    class Magnifier(nn.Sequential):
        def forward(self, x):
            return torch.sin(1e6 * super().forward(x))

    net = Magnifier(nn.Linear(3, 300), nn.ReLU(), nn.Linear(300, 2))
    symmetry = isthmus.trace(net, torch.randn(2, 3))
    proof = isthmus.verify(net, symmetry, torch.randn(2, 3))
    assert proof.tolerance < proof.max_error < 1e6 * LARGEST_ERROR
    (space,) = symmetry
    with refuses(SymmetryError, "changes the outputs"):
        isthmus.verify(net, with_sites(symmetry, space, space.sites[1:]), torch.randn(2, 3))


# What was broken on purpose

BREAKABLE = ["PlainMLP", "ConvChannelsFirst", "BatchNorm", "ZeroPadded", "DenseBlock", "TiedEmbedding", "GroupNorm"]
BREAKABLE += ["GroupedConv", "Attention", "GatedLinear", "PatchMerging"]


@pytest.mark.parametrize("name", BREAKABLE)
def test_a_missing_site_is_refused_by_the_spaces_name(name):
    symmetry = traced(name)
    for space in symmetry:
        for site in space.sites:
            if site.parameter not in ZOO[name].no_ops:
                broken = with_sites(symmetry, space, [s for s in space.sites if s is not site])
                with refuses(SymmetryError, f"a transform of space {space.name} changes the outputs .* wrong"):
                    verify(name, broken, controls=False)


@pytest.mark.parametrize("name", BREAKABLE)
def test_shuffled_positions_are_refused_by_the_spaces_name(name):
    symmetry = traced(name)
    for space in symmetry:
        if space.size == 2:
            continue  # the swap of two units is the same from either side
        for site in space.sites:
            if site.parameter not in ZOO[name].no_ops:
                sites = [mismatched(s) if s is site else s for s in space.sites]
                # Children move with their parent's units and are blamed where they come first.
                with refuses(SymmetryError, r"a transform of (space \S+|several spaces together) changes the outputs"):
                    verify(name, with_sites(symmetry, space, sites), controls=False, trials=12)


@pytest.mark.parametrize(
    ("name", "parameter", "dim"),
    [
        ("PlainMLP", "layers.4.weight", 0),
        ("PlainMLP", "layers.0.weight", 1),
        ("ConvChannelsFirst", "layers.0.weight", 2),
        ("TiedEmbedding", "embed.weight", 0),
        ("RollAddedToItself", "stem.weight", 0),
        ("ArgmaxOverChannels", "layer.weight", 0),
    ],
)
def test_a_space_on_an_axis_that_is_fixed_is_refused_by_its_name(name, parameter, dim):
    symmetry = traced(name)
    size = symmetry.shapes[parameter][dim]
    site = Site(parameter, (dim,), np.arange(size).reshape(1, size, 1), "vector")
    extra = Space("invented", size, Group.PERMUTATION, (site,))
    with refuses(SymmetryError, "a transform of space invented changes the outputs"):
        verify(name, replace(symmetry, spaces=(*symmetry.spaces, extra)))


@pytest.mark.parametrize("seed", range(5))
def test_two_spaces_that_are_one_are_refused(seed):
    """The claim holds for half of its transforms: it passes one trial in two, and all 14 one time in 16,384."""

    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.skip, self.head = nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            x = torch.tanh(self.stem(x))
            return self.head(torch.tanh(x + self.skip(x)))

    net, x = Narrow(), torch.randn(2, 3)
    symmetry = isthmus.trace(net, x)
    (space,) = symmetry
    before = {"stem.weight", "stem.bias"}
    halves = [[s for s in space.sites if (s.parameter in before) == first] for first in (True, False)]
    spaces = tuple(replace(space, name=f"half {k}", sites=tuple(half)) for k, half in enumerate(halves))
    with refuses(SymmetryError, "a transform of .* changes the outputs"):
        isthmus.verify(net, replace(symmetry, spaces=spaces, gauges=()), x, seed=seed, trials=14)


# What the proof says of single tensors


def test_a_tensor_without_effect_is_reported():
    proof = verify("Attention")
    assert proof.no_ops == ("key.bias",)
    assert proof.controls["key.bias"] <= proof.tolerance
    assert proof.controls["query.bias"] > 1e3 * proof.tolerance


def test_units_that_are_off_by_chance_do_not_silence_a_tensor():
    """With one unit behind a rectifier, many samples of two inputs say nothing about the weights before it."""
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 2))
    x = torch.randn(2, 3)
    symmetry = isthmus.trace(net, x)
    for seed in range(10):
        assert isthmus.verify(net, symmetry, x, seed=seed).no_ops == ()


def test_one_gradient_tells_of_all_tensors():
    """Leaving tensors out one by one would take a run for each of the fourteen."""
    runs = []

    class Counted(nn.Sequential):
        def forward(self, x):
            runs.append(1)
            return super().forward(x)

    blocks = [(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Tanh()) for _ in range(2)]
    net, x = Counted(*(layer for block in blocks for layer in block), nn.Conv2d(2, 2, 1)), torch.randn(2, 2, 3, 3)
    symmetry = isthmus.trace(net, x)
    runs.clear()
    proof = isthmus.verify(net, symmetry, x, trials=1)
    assert len(proof.controls) == 13  # all but the head's bias
    assert proof.no_ops == ()
    assert len(runs) == 4  # two for the trial, two for the gradient: drawing a sample runs it once


def test_tensors_without_a_gradient_are_left_out_one_by_one():
    class Cut(nn.Sequential):
        def forward(self, x):
            return super().forward(x).detach()

    net, x = Cut(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(2, 3)
    proof = isthmus.verify(net, isthmus.trace(net, x), x)
    assert proof.no_ops == ()
    assert proof.weakest_control > 1e3 * proof.tolerance


def test_what_a_network_keeps_of_its_weights_does_not_stay():
    """Some keep a table that they looked up in `eval()` for the next run, and forget it in `train()` (LeViT)."""

    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Linear(3, 5), nn.Linear(5, 2)
            self.table, self.kept = nn.Parameter(torch.randn(5, 2)), {}

        def train(self, mode=True):
            if mode:
                self.kept = {}
            return super().train(mode)

        def forward(self, x):
            if self.training or "table" not in self.kept:
                self.kept["table"] = self.table[:, 0]
            return self.head(torch.tanh(self.stem(x)) * self.kept["table"])

    net, x = Keeping().eval(), torch.randn(2, 3)
    with torch.no_grad():
        net(x)
    symmetry = isthmus.trace(net, x)
    assert symmetry.free_units == 5
    assert isthmus.verify(net, symmetry, x).no_ops == ()
    assert net.kept


def test_controls_can_be_left_out():
    proof = verify("PlainMLP", controls=False)
    assert proof.controls == {}
    assert proof.no_ops == ()
    assert proof.weakest_control == float("inf")


def test_a_model_with_nothing_to_move_has_nothing_to_prove():
    proof = verify("NothingToMove")
    assert (proof.max_error, proof.controls) == (0.0, {})


# How the proof runs


@pytest.mark.parametrize("name", ["BatchNorm", "Dropout", "LSTM", "ResidualInPlace", "TiedEmbedding", "TwoInputs"])
def test_the_model_is_left_as_it_was(name):
    net = copy.deepcopy(built(name))
    before = {key: (id(x), x.clone()) for key, x in net.state_dict(keep_vars=True).items()}
    args, kwargs = net.inputs()
    kept = [x.clone() for x in args]
    isthmus.verify(net, traced(name), *args, kwargs=kwargs)
    assert net.training
    for key, tensor in net.state_dict(keep_vars=True).items():
        assert id(tensor) == before[key][0]
        assert torch.equal(tensor, before[key][1])
        assert tensor.grad is None
    assert all(torch.equal(x, y) for x, y in zip(args, kept, strict=True))
    assert torch.get_default_dtype() == torch.float32


def test_the_same_seed_gives_the_same_proof():
    first, second, other = verify("BatchNorm", seed=1), verify("BatchNorm", seed=1), verify("BatchNorm", seed=2)
    assert first == second
    assert first.controls != other.controls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_model_of_any_precision_is_proved_in_float64(dtype):
    net = copy.deepcopy(built("BatchNorm")).to(dtype)
    (x,), _ = net.inputs()
    proof = isthmus.verify(net, isthmus.trace(net, x.to(dtype)), x.to(dtype))
    assert proof.dtype == "float64"
    assert proof.max_error <= LARGEST_ERROR


def test_casts_inside_the_network_do_not_cost_precision():
    class Caster(Net):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x):
            x = self.stem(x).float()
            x = x.to(torch.float16).to(dtype=torch.bfloat16).type(torch.float32)
            x = x + torch.tensor([0.1]) + torch.ones(5, dtype=torch.float32)
            return self.head(F.softmax(x, -1, dtype=torch.float32).to(self.head.weight.dtype))

    (x,), _ = Caster().inputs()
    net = Caster()
    proof = isthmus.verify(net, isthmus.trace(net, x), x)
    assert proof.max_error <= LARGEST_ERROR
    assert proof.no_ops == ()


def test_a_failing_network_leaves_the_default_type_alone():
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x):
            raise RuntimeError("broken")

    with refuses(ModelError, "broken"):
        isthmus.verify(Failing(), Symmetry((), (), {"weight": (2,)}), torch.ones(2))
    assert torch.get_default_dtype() == torch.float32


def test_a_network_that_cannot_run_in_float64_is_refused():
    class Narrow(Net):
        sample_shape = (3,)

        def __init__(self):
            super().__init__()
            self.hidden, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            if x.dtype == torch.float64:
                raise RuntimeError("expected Float32, got Double\nand more")
            return self.head(torch.tanh(self.hidden(x)))

    network, x = Narrow(), torch.randn(2, 3)
    with refuses(ModelError, r"cannot run in float64.*: expected Float32, got Double; if it can be told"):
        isthmus.verify(network, isthmus.trace(network, x), x)


def test_outputs_that_are_always_zero_prove_nothing():
    class Silent(nn.Sequential):
        def forward(self, x):
            return 0 * super().forward(x)

    net = Silent(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    symmetry = isthmus.trace(net, torch.ones(2, 3))
    with refuses(SymmetryError, "zero or not finite"):
        isthmus.verify(net, symmetry, torch.ones(2, 3))


def test_a_symmetry_from_a_file_can_be_verified():
    loaded = Symmetry.from_json(traced("Attention").to_json())
    assert verify("Attention", loaded).max_error <= LARGEST_ERROR


def test_the_tolerance_grows_with_depth_and_width():
    eps = float(np.finfo(np.float64).eps)
    # Five operations; the longest sum has five terms.
    assert _rounding(traced("PlainMLP"), eps) == pytest.approx(eps * 5**0.5 * 5 * 8)
    assert _rounding(traced("ConvChannelsFirst"), eps) == pytest.approx(eps * 18**0.5 * 6 * 8)


@pytest.mark.parametrize(
    ("inputs", "options", "told"), [((), {}, "no example input"), ((1,), {"trials": 0}, "trials=0")]
)
def test_a_proof_needs_inputs_and_trials(inputs, options, told):
    with refuses(InputError, told):
        isthmus.verify(built("PlainMLP"), traced("PlainMLP"), *inputs, **options)
