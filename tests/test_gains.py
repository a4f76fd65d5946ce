"""Gains of norms: folding keeps the function, and what is folded allows the rotations that the symmetry claims."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import isthmus
from helpers.pairs import VGG_BN, lively, symmetry
from helpers.prenorm import CENTRED, CONFIGS, REFUSED, Config, Transformer, symmetry_of, tokens, transformer
from helpers.refusals import refuses
from helpers.zoo import double
from isthmus.errors import ModelError, SymmetryError, TransformError
from isthmus.symmetry import Group, LinearMap, Permutation, Space, Symmetry, keeps_function
from isthmus.symmetry.gains import fold_state, foldable
from isthmus.symmetry.groups import _belongs, _complement_of_ones, nearest_element, random_element
from isthmus.symmetry.transform import compose, invert, move_state
from isthmus.tracing.random_network import _outputs

EVERY = pytest.mark.parametrize("name", CONFIGS)
# float64 through at most 60 operations with sums of 14 terms: 60 · √14 · 2⁻⁵² · 8, rounded up.
ROUNDING = 1e-12


def compute(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The outputs in float64, also where a norm casts to float32."""
    (found,) = _outputs(double(model), double(model).state_dict(), (x,), {})
    return found


def assert_computes_the_same(model: nn.Module, other: nn.Module) -> None:
    found, expected = compute(model, tokens(6, 1)), compute(other, tokens(6, 1))
    assert float((found - expected).abs().max()) <= ROUNDING * float(expected.abs().max())


def stream(sym: Symmetry) -> Space:
    return next(space for space in sym if space.size == 8)


@EVERY
def test_folding_keeps_the_function(name):
    model = transformer(name).double()
    folded = isthmus.fold_norm_gains(model, symmetry_of(name))
    assert_computes_the_same(folded, model)
    assert type(folded) is type(model)
    assert [type(m) for m in folded.modules()] == [type(m) for m in model.modules()]
    state = folded.state_dict()
    for gain in symmetry_of(name).gains:
        assert gain.obstacle == ""
        assert bool((state[gain.parameter] + gain.offset == 1).all())
        if gain.bias is not None and all(consumer.bias for consumer in gain.consumers):
            assert not state[gain.bias].any()


@EVERY
def test_folding_twice_is_folding_once_and_changes_no_argument(name):
    model = transformer(name)
    before = copy.deepcopy(model.state_dict())
    once = isthmus.fold_norm_gains(model, symmetry_of(name))
    twice = isthmus.fold_norm_gains(once, symmetry_of(name))
    assert all(torch.equal(tensor, twice.state_dict()[key]) for key, tensor in once.state_dict().items())
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in before.items())


@EVERY
def test_the_stream_allows_what_its_norm_keeps(name):
    sym = symmetry_of(name)
    expected = Group.ORTHOGONAL_FIXING_ONES if CONFIGS[name].norm in CENTRED else Group.ORTHOGONAL
    assert stream(sym).group is expected
    roles = {site.role for site in stream(sym).sites if site.parameter in {gain.parameter for gain in sym.gains}}
    assert roles == ({"diagonal"} if sym.gains else set())
    held = [space for space in sym if space.parent is not None]
    assert {space.group for space in held if space.copies == CONFIGS[name].kv_heads and space.size == 2} == {
        Group.ORTHOGONAL,
        Group.INVERTIBLE,
        *([Group.PERMUTATION] if CONFIGS[name].kv_heads < 4 else []),
    }


@EVERY
def test_random_elements_of_every_group_keep_the_function(name):
    proof = isthmus.verify(transformer(name), symmetry_of(name), tokens(2), trials=3, controls=False)
    assert proof.max_error <= ROUNDING


@EVERY
def test_a_model_and_its_symmetry_loaded_from_a_file_can_be_moved(name):
    sym = Symmetry.from_json(symmetry_of(name).to_json())
    assert sym.gains == symmetry_of(name).gains
    rng = np.random.default_rng(1)
    alignment = isthmus.Alignment(sym, ({space.name: random_element(space, rng) for space in sym},), folded=True)
    assert keeps_function(alignment)
    model = transformer(name)
    assert_computes_the_same(isthmus.apply(alignment, model.double(), 0), model)


@pytest.mark.parametrize("name", ["layer", "written layer", "plain"])
def test_a_rotation_that_moves_the_ones_vector_is_no_symmetry_of_a_layer_norm(name):
    sym = symmetry_of(name)
    spaces = tuple(replace(s, group=Group.ORTHOGONAL) if s is stream(sym) else s for s in sym.spaces)
    with refuses(SymmetryError, "a transform of space positions changes the outputs"):
        isthmus.verify(transformer(name), replace(sym, spaces=spaces), tokens(2), trials=1, controls=False)


@pytest.mark.parametrize("name", ["rms", "written rms"])
def test_a_stretch_is_no_symmetry_of_a_norm(name):
    sym = symmetry_of(name)
    spaces = tuple(replace(s, group=Group.INVERTIBLE) if s is stream(sym) else s for s in sym.spaces)
    with refuses(SymmetryError, "a transform of space positions changes the outputs"):
        isthmus.verify(transformer(name), replace(sym, spaces=spaces), tokens(2), trials=1, controls=False)


# What stands in the way


@pytest.mark.parametrize("name", REFUSED)
def test_a_norm_behind_the_sum_is_refused(name):
    sym = symmetry_of(name)
    assert stream(sym).group is Group.PERMUTATION
    assert {gain.obstacle.partition(" ")[0] for gain in sym.gains} == {"aten.add", "aten.tanh"}
    model = transformer(name)
    with refuses(ModelError, "norms.0.weight cannot be folded: aten.add"):
        isthmus.fold_norm_gains(model, sym)


def test_a_tied_head_cannot_take_in_a_gain():
    sym, model = symmetry_of("tied"), transformer("tied")
    assert stream(sym).group is Group.PERMUTATION
    (left,) = [gain for gain in sym.gains if gain.obstacle]
    assert left.parameter == "last.weight"
    assert "tied" in left.obstacle
    folded = isthmus.fold_norm_gains(model.double(), sym)
    assert_computes_the_same(folded, model)
    assert torch.equal(folded.last.weight, model.last.weight)
    assert folded.head.weight is folded.tokens.weight
    assert isthmus.verify(model, sym, tokens(2), trials=2).max_error <= ROUNDING


class Exotic(nn.Module):
    """One norm before a head, with something between them."""

    def __init__(self, between):
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 2)
        self.other, self.between = nn.Linear(6, 4), between

    def forward(self, x):
        return self.between(self, self.norm(self.stem(x)))


# What reads the norm, and a word of what stands in the way: nothing where the gain can be folded.
BETWEEN = {
    "a class token": (lambda net, x: net.head(x[:, 0]), ""),
    "a mean over positions": (lambda net, x: net.head(x.mean(1)), ""),
    "flat rows": (lambda net, x: net.head(x.reshape(-1, 6)), ""),
    "two heads": (lambda net, x: (net.head(x), net.other(x)), ""),
    "a transposed product": (lambda net, x: x @ net.head.weight.T, ""),
    "a convolution": (lambda net, x: nn.functional.conv1d(x.transpose(1, 2), net.head.weight[:, :, None]), "parameter"),
    "a sum over positions": (lambda net, x: net.head(x.sum(1)), "aten.sum"),
    "a nonlinearity": (lambda net, x: net.head(torch.tanh(x)), "aten.tanh"),
    "an output": (lambda net, x: (net.head(x), x), "output"),
    "one head twice": (lambda net, x: net.head(x) + net.head(x.flip(1)), "tied"),
    "a product with itself": (lambda net, x: net.head(x) * (x @ x.transpose(1, 2)).mean(2, keepdim=True), "matmul"),
    "a weight of its own square": (lambda net, x: net.head(x) + net.head.weight.square().sum(), "tied"),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_only_sums_with_parameters_take_in_a_gain(name):
    between, obstacle = BETWEEN[name]
    net, x = Exotic(between).double().eval(), torch.randn(2, 4, 3, dtype=torch.float64)
    sym = isthmus.trace(net, x)
    (gain,) = sym.gains
    assert bool(gain.obstacle) == bool(obstacle)
    assert obstacle in gain.obstacle
    groups = [space.group for space in sym if space.size == 6]
    # An output freezes the units.
    assert groups == ([] if name == "an output" else [Group.PERMUTATION if obstacle else Group.ORTHOGONAL_FIXING_ONES])
    assert isthmus.verify(net, sym, x, trials=2).max_error <= ROUNDING


def test_a_convolution_takes_in_a_gain_and_leaves_the_shift():
    class Channels(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 6, 1), nn.LayerNorm(6)
            self.head = nn.Conv2d(6, 2, 3, padding=1)

        def forward(self, x):
            return self.head(self.norm(self.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))

    net, x = Channels().double().eval(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    nn.init.uniform_(net.norm.weight, 0.5, 2)
    nn.init.normal_(net.norm.bias)
    sym = isthmus.trace(net, x)
    assert [space.group for space in sym] == [Group.ORTHOGONAL_FIXING_ONES]
    assert isthmus.verify(net, sym, x, trials=2).max_error <= ROUNDING
    folded = isthmus.fold_norm_gains(net, sym)
    assert bool((folded.norm.weight == 1).all())
    assert folded.norm.bias.any()
    torch.testing.assert_close(folded(x), net(x), rtol=1e-12, atol=1e-12)


def test_a_shift_without_gain_or_bias_to_go_to_is_refused():
    model, sym = transformer("layer, no biases"), symmetry_of("layer, no biases")
    with torch.no_grad():
        model.norms[0].weight[3] = 0
    with refuses(ModelError, "norms.0.bias: unit 3 has a shift and hardly a gain"):
        isthmus.fold_norm_gains(model, sym)
    with torch.no_grad():
        model.norms[0].bias[3] = 0
    assert_computes_the_same(isthmus.fold_norm_gains(model.double(), sym), model)


def test_a_shared_norm_is_folded_into_all_that_reads_it():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm = nn.Linear(3, 6), nn.RMSNorm(6, eps=1e-6)
            self.first, self.second, self.head = nn.Linear(6, 5), nn.Linear(5, 6), nn.Linear(6, 2)

        def forward(self, x):
            x = self.stem(x)
            x = x + self.second(torch.relu(self.first(self.norm(x))))
            return self.head(self.norm(x))

    net, x = Shared().double().eval(), torch.randn(4, 3, dtype=torch.float64)
    nn.init.uniform_(net.norm.weight, 0.5, 2)
    sym = isthmus.trace(net, x)
    assert [consumer.weight for consumer in sym.gains[0].consumers] == ["first.weight", "head.weight"] or [
        consumer.weight for consumer in sym.gains[0].consumers
    ] == ["head.weight", "first.weight"]
    folded = isthmus.fold_norm_gains(net, sym)
    torch.testing.assert_close(folded(x), net(x), rtol=1e-12, atol=1e-12)
    assert isthmus.verify(net, sym, x, trials=2).max_error <= ROUNDING


@pytest.mark.parametrize("name", [VGG_BN])
def test_a_batch_norm_is_no_gain_to_fold(name):
    model, sym = lively(name, 0), symmetry(name)
    assert sym.gains == ()
    assert all(space.group is Group.PERMUTATION for space in sym)
    folded = isthmus.fold_norm_gains(model, sym)
    assert all(torch.equal(tensor, folded.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_a_state_of_another_architecture_is_refused():
    state = dict(transformer("rms").state_dict())
    del state["norms.0.weight"]
    with refuses(ModelError, "missing key norms.0.weight"):
        fold_state(state, symmetry_of("rms"))


# Moving without folding


def test_a_rotation_of_a_model_with_gains_is_refused_with_a_hint():
    sym, rng = symmetry_of("rms"), np.random.default_rng(0)
    transforms = {space.name: random_element(space, rng) for space in sym}
    with refuses(TransformError, "fold_norm_gains"):
        isthmus.apply(isthmus.Alignment(sym, (transforms,)), transformer("rms"), 0)
    folded = isthmus.fold_norm_gains(transformer("rms"), sym)
    assert_computes_the_same(isthmus.apply(isthmus.Alignment(sym, (transforms,)), folded.double(), 0), folded)


@pytest.mark.parametrize("name", ["rms, grouped, gated", "layer"])
def test_maps_compose_and_invert_like_any_transform(name):
    sym, rng = symmetry_of(name), np.random.default_rng(0)
    state = fold_state(transformer(name).double().state_dict(), sym)
    first, second = ({space.name: random_element(space, rng) for space in sym} for _ in range(2))
    by_steps = move_state(move_state(state, first, sym), second, sym)
    at_once = move_state(state, compose(second, first, sym), sym)
    there_and_back = move_state(by_steps, invert(compose(second, first, sym), sym), sym)
    for key, tensor in state.items():
        torch.testing.assert_close(at_once[key], by_steps[key], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(there_and_back[key], tensor, rtol=1e-12, atol=1e-12)


# The groups themselves

LARGER = (Group.ORTHOGONAL_FIXING_ONES, Group.ORTHOGONAL, Group.INVERTIBLE)


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("group", LARGER)
def test_random_elements_belong_to_their_group_and_those_above(group, copies):
    space, rng = Space("s", 5, group, (), copies=copies), np.random.default_rng(0)
    first, second = (random_element(space, rng) for _ in range(2))
    assert isinstance(first, LinearMap)
    assert first.into.shape == (copies, 5, 5)
    assert not torch.equal(first.into, second.into)
    for other in LARGER:
        assert _belongs(first, other) == (LARGER.index(other) >= LARGER.index(group))
    assert not _belongs(first, Group.PERMUTATION)
    assert _belongs(Permutation.random(space, rng), group)


def test_the_complement_of_ones_is_orthonormal():
    basis = _complement_of_ones(6)
    np.testing.assert_allclose(basis.T @ basis, np.eye(5), atol=1e-15)
    np.testing.assert_allclose(basis.sum(axis=0), 0, atol=1e-15)


@pytest.mark.parametrize("rank", [0, 2, 5])
@pytest.mark.parametrize("group", LARGER)
def test_the_nearest_element_is_in_the_group_and_none_is_nearer(group, rank):
    rng = np.random.default_rng(rank)
    matrix = torch.from_numpy(rng.normal(size=(5, rank)) @ rng.normal(size=(rank, 5)))
    into, value = nearest_element(matrix, group)
    orthogonal = Group.ORTHOGONAL if group is Group.INVERTIBLE else group
    assert _belongs(LinearMap(into, into.T.contiguous()), orthogonal)
    assert float((into * matrix).sum()) == pytest.approx(float(value))
    for _ in range(200):
        other = random_element(Space("s", 5, orthogonal, ()), rng)
        assert isinstance(other, LinearMap)
        assert float((other.into[0] * matrix).sum()) <= float(value) + 1e-12


def test_every_foldable_gain_is_told_from_the_others():
    assert foldable(symmetry_of("tied")) == tuple(g for g in symmetry_of("tied").gains if not g.obstacle)
    assert len(foldable(symmetry_of("rms"))) == 3
    assert Transformer(Config("plain")).last.weight is None
