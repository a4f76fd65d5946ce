"""What each operation does to units: freed, tied together or fixed, and never a claim that the network refutes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import isthmus


class Between(nn.Module):
    """Six units with some positions, an operation on them [batch, units, positions], and a layer that reads it all."""

    def __init__(self, function, positions):
        super().__init__()
        self.function, self.stem = function, nn.Conv1d(3, 6, 1)
        with torch.no_grad():
            self.head = nn.Linear(self.body(torch.randn(2, 3, positions)).shape[1], 2)

    def body(self, x):
        return self.function(self.stem(x)).flatten(1)

    def forward(self, x):
        return self.head(self.body(x))


def found(function, positions=1) -> tuple[list[tuple[int, int]], set[str]]:
    """Spaces as (copies, size), and operations that lost symmetry; whatever is found is proved first."""
    torch.manual_seed(0)
    net, x = Between(function, positions), torch.randn(2, 3, positions)
    symmetry = isthmus.trace(net, x)
    isthmus.verify(net, symmetry, x, controls=False)
    lost = {item.operation for item in symmetry.frozen if not item.expected}
    return sorted((space.copies, space.size) for space in symmetry), lost


FREE = [(1, 6)]
ACTIVATIONS = sorted(set(nn.modules.activation.__all__) - {"GLU", "MultiheadAttention", "RReLU", "Softmax2d"})


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_of_torch_keeps_units_apart(name):
    options = {
        "Softmax": {"dim": 1},
        "Softmin": {"dim": 1},
        "LogSoftmax": {"dim": 1},
        "Threshold": {"threshold": 0.1, "value": 0.2},
    }
    layer = getattr(nn, name)(**options.get(name, {}))
    assert found(layer, positions=4) == (FREE, set())


@pytest.mark.parametrize("name", ["relu_", "tanh_", "sigmoid_", "hardtanh_", "leaky_relu_", "elu_", "selu_", "celu_"])
def test_every_activation_works_in_place(name):
    function = getattr(F, name, None) or getattr(torch, name)
    assert found(function) == (FREE, set())


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: F.max_pool1d(x, 2),
        lambda x: F.avg_pool1d(x, 3, stride=1, padding=1),
        lambda x: F.adaptive_avg_pool1d(x, 2),
        lambda x: F.adaptive_max_pool1d(x, 2),
        lambda x: F.max_pool2d(x.view(len(x), 6, 2, 2), 2),
        lambda x: F.adaptive_max_pool2d(x.view(len(x), 6, 2, 2), 1),
        lambda x: F.avg_pool3d(x.view(len(x), 6, 1, 2, 2), (1, 2, 1)),
        lambda x: F.interpolate(x, scale_factor=2),
        lambda x: F.interpolate(x.view(len(x), 6, 2, 2), scale_factor=2, mode="bilinear"),
        lambda x: F.interpolate(x.view(len(x), 6, 2, 2), size=(3, 3), mode="bicubic"),
        lambda x: F.pad(x, (1, 2)),
        lambda x: F.pad(x, (2, 1), mode="reflect"),
        lambda x: F.pad(x, (1, 1), value=3.0),
        lambda x: F.instance_norm(x),
        lambda x: F.layer_norm(x, (6, 4)),
        lambda x: F.group_norm(x, 1),
        lambda x: F.softmax(x, 2),
    ],
)
def test_positions_stay_and_units_move(pool):
    """Every unit brings four positions along, which keep their places."""
    assert found(pool, positions=4) == (FREE, set())


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.mean((1, 2), keepdim=True),
        lambda x: x.sum(1),
        lambda x: x.amax(1),
        lambda x: x.amin(1, keepdim=True),
        lambda x: x.prod(1),
        lambda x: x.var(1),
        lambda x: x.std(1, keepdim=True),
        lambda x: x.logsumexp(1),
        lambda x: x.norm(dim=1),
        lambda x: torch.linalg.vector_norm(x, dim=1),
        lambda x: x.max(1).values,
        lambda x: x.min(1, keepdim=True)[0],
        lambda x: (x > 0).any(1).float(),
        lambda x: (x > 0).all(1).float(),
        lambda x: x.std((1, 2), keepdim=True) + x,
        lambda x: x / x.norm(dim=1, keepdim=True),
        lambda x: x - x.mean(1, keepdim=True),
        lambda x: torch.maximum(x, x.mean(1, keepdim=True)),
        lambda x: torch.max(x, x.amin(1, keepdim=True)),
        lambda x: x.clamp(min=-0.5),
        lambda x: torch.where(x > 0, x, 0.1 * x),
        lambda x: x.masked_fill(x < 0, 0.3),
        lambda x: torch.lerp(x, x.tanh(), 0.3),
        lambda x: torch.addcmul(x, x, x, value=0.5),
        lambda x: x.float_power(2).float(),
        lambda x: x * torch.full_like(x, 2.0) + torch.ones_like(x) + x.new_zeros(6, 1),
        lambda x: x.unsqueeze(1).expand(-1, 2, -1, -1).squeeze(-1)[:, 0],
        lambda x: x.movedim(1, 2).swapaxes(1, 2).contiguous().clone().detach(),
        lambda x: x.view(-1, 3, 2, 1).flatten(1, 2),
        lambda x: torch.roll(x, 2, 1).flip(1),
        lambda x: x[:, torch.tensor([3, 1, 0, 2, 5, 4])],
        lambda x: x.index_select(1, torch.tensor([3, 1, 0, 2, 5, 4])),
        lambda x: torch.cat([part.tanh() for part in (x,)], 1),
        lambda x: torch.stack(x.unbind(2), 2),
        lambda x: torch.einsum("nuv->nvu", x),
        lambda x: x.topk(3, 1).values,
        lambda x: torch.einsum("nuv,nuv->nu", x, x),
        lambda x: x.to(torch.float64).to(torch.float32).type_as(x),
        lambda x: F.dropout(x, 0.5, training=False),
    ],
)
def test_six_units_stay_exchangeable(function):
    spaces, lost = found(function, positions=1)
    assert spaces == FREE
    assert lost == set()


@pytest.mark.parametrize(
    ("function", "spaces"),
    [
        (lambda x: x[:, :4], [(1, 4)]),  # what is cut off here might be read on inputs of another shape
        (lambda x: x[:, ::2], [(1, 3)]),
        (lambda x: torch.cat([x[:, :2].relu(), x[:, 2:].tanh()], 1), [(1, 2), (1, 4)]),
        (lambda x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1].sigmoid(), [(1, 3)]),
        (lambda x: F.glu(x, 1), [(1, 3)]),
        (lambda x: x.view(-1, 3, 2).amax(2), [(1, 3), (3, 2)]),
        (lambda x: x.view(-1, 3, 2).amax(1), [(1, 2), (2, 3)]),
        (lambda x: x.view(-1, 2, 3).softmax(2), [(1, 2), (2, 3)]),
        (lambda x: F.group_norm(x, 3), [(1, 3), (3, 2)]),
        (lambda x: F.pad(x, (0, 0, 1, 1)), [(1, 2), (1, 6)]),  # both borders are zero: their readers may be swapped
        (lambda x: F.pad(x, (0, 0, 1, 1), value=2.0), [(1, 2), (1, 6)]),
        (lambda x: x.repeat(1, 2, 1), [(1, 6), (6, 2)]),
        (lambda x: torch.cat([x, x.tanh()], 1), FREE),
        (lambda x: x @ torch.ones(1, 3), [(1, 6), (6, 3)]),
        (lambda x: x[:, :3] + x[:, 3:], [(1, 3)]),
        (lambda x: F.channel_shuffle(x.unsqueeze(-1), 3).chunk(2, 1)[0], [(1, 3), (1, 3)]),
    ],
)
def test_units_that_are_told_apart_fall_into_spaces(function, spaces):
    assert found(function) == (spaces, set())


@pytest.mark.parametrize(
    ("function", "operation"),
    [
        (lambda x: x.sort(1).values, "aten.sort"),
        (lambda x: torch.fft.fft(x, dim=1).abs(), "aten.fft_fft"),
        (lambda x: x.median(1).values, "aten.median"),
        (lambda x: torch.einsum("nup,nvp,nwp->nuvw", x, x, x), "aten.einsum"),
        (lambda x: F.unfold(x.unsqueeze(1), (2, 1)), "aten.im2col"),
        (lambda x: torch.cdist(x, x), "aten.cdist"),
    ],
)
def test_what_has_no_rule_freezes_its_units_and_is_named(function, operation):
    assert found(function) == ([], {operation})


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * torch.arange(6.0).view(6, 1),
        lambda x: x.argmax(1).float(),
        lambda x: x.max(1).indices.float(),
        lambda x: x + 2 * x.roll(1, 1),
        lambda x: x[:, 1:] - x[:, :-1],
        lambda x: torch.tril(torch.ones(6, 6)) @ x,
        lambda x: x.index_select(1, torch.arange(6)) * torch.linspace(0, 1, 6).view(6, 1),
        lambda x: F.avg_pool1d(x.transpose(1, 2), 2),
        lambda x: F.local_response_norm(x, 3),
        lambda x: x.cumsum(1),
        lambda x: F.conv1d(x.transpose(1, 2), torch.ones(1, 1, 3)),
    ],
)
def test_units_that_have_their_own_place_are_fixed(function):
    spaces, _ = found(function)
    assert spaces == []


def test_units_that_count_twice_at_one_place_and_once_at_another_are_fixed():
    """Of two sums one holds the first unit twice and the other the second; four units are read nowhere."""
    function = lambda x: x[:, torch.tensor([0, 0, 1, 1, 1, 0])].view(-1, 2, 3).sum(2)  # noqa: E731
    assert found(function) == ([], {"aten.sum"})


def test_a_random_mask_fixes_what_it_touches():
    spaces, lost = found(lambda x: F.dropout(x, 0.5, training=True) * 0 + 1)
    assert (spaces, lost) == ([], {"aten.dropout"})


# Random programs: whatever the tracer claims about them, the proof must not refute it.


class Program(nn.Module):
    """A chain of operations on [batch, channels, positions], each on one of the latest values; one head reads two."""

    def __init__(self, steps):
        super().__init__()
        self.steps, self.made = steps, nn.ParameterList()
        self.building = True
        with torch.no_grad():
            self(torch.randn(2, 2, 3))
        self.building = False

    def new(self, *shape: int) -> Tensor:
        if self.building:
            self.made.append(nn.Parameter(torch.randn(*shape)))
        self.read += 1
        return self.made[self.read - 1]

    def forward(self, x):
        self.read = 0
        pool = [F.conv1d(x, self.new(4, 2, 1))]
        for name, pick, option in self.steps:
            value, other = pool[-1 - pick % min(3, len(pool))], pool[-1]
            result = OPERATIONS[name](self, value, other, option)
            if result is not None and result.shape[1] * result.shape[2] <= 36:
                pool.append(result)
        heads = [value.flatten(1) for value in (pool[-1], pool[len(pool) // 2])]
        return sum(head @ self.new(head.shape[1], 2) for head in heads)


def groups_of(channels: int, option: int) -> int:
    return next(groups for groups in (2 + option % 2, 2, 3, 1) if channels % groups == 0)


def convolved(p, x, other, k):
    groups = groups_of(x.shape[1], k) if k % 4 == 3 else 1
    return F.conv1d(x, p.new(groups * (2 + k % 2), x.shape[1] // groups, 1), p.new(groups * (2 + k % 2)), groups=groups)


def shuffled(p, x, other, k):
    n, channels, length = x.shape
    groups = groups_of(channels, k)
    return x.view(n, groups, channels // groups, length).transpose(1, 2).reshape(n, channels, length)


def attended(p, x, other, k):
    if x.shape[1] % 2 or x.shape[2] == 1:
        return None
    heads = x.view(len(x), 2, x.shape[1] // 2, x.shape[2])
    return (heads @ F.softmax(heads.transpose(2, 3) @ heads, -1)).reshape(x.shape)


def overwritten(p, x, other, k):
    if x.shape[1] < 2:
        return None
    y = x.clone()
    if k % 2:
        y[:, : x.shape[1] // 2].mul_(2).tanh_()
    else:
        y[:, :1] = x[:, 1:2]
    return y


def alike(f):
    """An operation on two values of one shape."""
    return lambda p, x, other, k: f(x, other) if x.shape == other.shape else None


def even(f):
    """An operation on an even number of channels."""
    return lambda p, x, other, k: None if x.shape[1] % 2 else f(x, k)


OPERATIONS = {
    "relu": lambda p, x, other, k: F.relu(x),
    "affine": lambda p, x, other, k: 2 * x + k % 2,
    "convolution": convolved,
    "linear": lambda p, x, other, k: (x.transpose(1, 2) @ p.new(x.shape[1], 3)).transpose(1, 2),
    "along positions": lambda p, x, other, k: F.linear(x, p.new(2, x.shape[2]), p.new(2)),
    "scale": lambda p, x, other, k: x * p.new(x.shape[1], 1),
    "bias": lambda p, x, other, k: x + p.new(x.shape[1], x.shape[2]),
    "norm": lambda p, x, other, k: F.group_norm(x, groups_of(x.shape[1], k)),
    "softmax": lambda p, x, other, k: F.softmax(x, 1 + k % 2),
    "add": alike(torch.add),
    "multiply": alike(lambda x, y: x * torch.tanh(y)),
    "concatenate": lambda p, x, other, k: torch.cat([x, other], 1) if x.shape[2] == other.shape[2] else None,
    "slice": lambda p, x, other, k: x[:, k % 2 :: 1 + k % 3] if x.shape[1] > 1 else None,
    "roll": lambda p, x, other, k: x.roll(1, 1),
    "flip and add": lambda p, x, other, k: x + x.flip(1),
    "gate": even(lambda x, k: x.chunk(2, 1)[0] * torch.sigmoid(x.chunk(2, 1)[1])),
    "maxout": even(lambda x, k: x.unflatten(1, (2, -1) if k % 2 else (-1, 2)).amax(1 if k % 2 else 2)),
    "repeat": lambda p, x, other, k: x.repeat(1, 2, 1) if k % 2 else x.repeat_interleave(2, 1),
    "pad": lambda p, x, other, k: F.pad(x, (0, 0, k % 2, 1), value=float(k % 3)),
    "gather": lambda p, x, other, k: x[:, torch.tensor([0, k % x.shape[1], x.shape[1] - 1])],
    "mean": lambda p, x, other, k: x.mean(1 + k % 2, keepdim=True),
    "flatten": lambda p, x, other, k: (x if k % 2 else x.transpose(1, 2)).reshape(len(x), -1, 1),
    "outer": lambda p, x, other, k: (
        (x[:, :, None] - other[:, None]).flatten(1, 2) if x.shape[2] == other.shape[2] else None
    ),
    "shuffle": shuffled,
    "attend": attended,
    "overwrite": overwritten,
    "gram": lambda p, x, other, k: x @ x.transpose(1, 2),
    "reuse": lambda p, x, other, k: (
        x.transpose(1, 2).matmul(p.made[0][: x.shape[1], :, 0]).transpose(1, 2) if x.shape[1] <= 4 else None
    ),
}
STEPS = st.lists(st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 2), st.integers(0, 11)), max_size=8)


@settings(max_examples=30)
@given(STEPS)
@example([("pad", 0, 1), ("convolution", 0, 3)])  # a border stands first in one group and last in another
@example([("repeat", 0, 1), ("overwrite", 0, 1), ("flatten", 0, 1)])  # written over one of two equal halves
@example([("outer", 0, 0), ("flatten", 0, 1)])  # the same two units, one way and the other
@example([("concatenate", 0, 0), ("concatenate", 1, 0), ("flip and add", 0, 0)])  # three copies, in two orders
@example([("flip and add", 0, 0), ("roll", 1, 0), ("linear", 0, 0)])
def test_no_claim_about_a_random_program_is_refuted(steps):
    torch.manual_seed(0)
    program, x = Program(steps).eval(), torch.randn(2, 2, 3)
    weights = copy.deepcopy(program.state_dict())
    isthmus.verify(program, isthmus.trace(program, x), x, controls=False, trials=4)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in program.state_dict().items())
