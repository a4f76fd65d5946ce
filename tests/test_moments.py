import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import isthmus
from helpers.pairs import (
    MLP,
    NETWORKS,
    TRAINED,
    VGG_BN,
    data_of,
    fresh,
    inputs_of,
    lively,
    seen_by_hooks,
    symmetry,
    trained,
)
from helpers.refusals import refuses
from helpers.zoo import ZOO as STRUCTURES
from isthmus.data.batches import as_batch
from isthmus.errors import DataError, InputError, ModelError, SymmetryError
from isthmus.graph.reader import run
from isthmus.observe.collect import collect_joint
from isthmus.observe.moments import CHUNK, Accumulator, SpaceMoments, _require_samples
from oracles import git_rebasin as oracle

# Products are summed in float32 over 4,096 rows at most; their rounding adds up like a random walk.
ROUNDING = float(torch.finfo(torch.float32).eps) * CHUNK**0.5  # 7.6e-6


def naive(*models: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means [models, units] and the joint covariance [models · units]² of stacked samples, in float64."""
    rows = np.concatenate(models, axis=1)
    mean = rows.mean(axis=0)
    return mean.reshape(len(models), -1), (rows - mean).T @ (rows - mean) / len(rows)


def flat(moments: SpaceMoments) -> np.ndarray:
    size = moments.mean.numel()
    return moments.covariance.reshape(size, size).numpy()


def assert_close(found: SpaceMoments, mean: np.ndarray, covariance: np.ndarray, tolerance: float) -> None:
    """Means to a share of the standard deviation, covariances to a share of the product of two of them."""
    deviation = np.sqrt(covariance.diagonal())
    assert (np.abs(found.mean.numpy().ravel() - mean.ravel()) <= tolerance * deviation + 1e-12).all()
    scale = np.outer(deviation, deviation)
    assert (np.abs(flat(found) - covariance) <= tolerance * scale + 1e-12).all()


@pytest.mark.parametrize("at", ["post", "pre"])
@pytest.mark.parametrize("name", TRAINED)
def test_they_are_those_of_stacked_hooks(name, at):
    read = isthmus.collect([trained(name, 0), trained(name, 1)], symmetry(name), data_of(name), at=at)
    assert read.samples == 400
    assert read.at == at
    for space in symmetry(name):
        seen = [seen_by_hooks(name, at, seed)[space.name] for seed in (0, 1)]
        assert_close(read[space.name], *naive(*seen), tolerance=ROUNDING)
        assert read[space.name].count == len(seen[0])


def test_a_flattened_picture_counts_every_position():
    model = lively("cnn?width=0.25", 0)  # the last feature map has 2 × 2 pixels, which are flattened into the head
    x = inputs_of(model, 50)
    read = isthmus.collect([model], symmetry("cnn?width=0.25"), [x])
    sizes = {space.name: space.size for space in symmetry("cnn?width=0.25")}
    seen = oracle.activations(model, [x], {"features.8": ([("head",)], True)}, sizes)["features.8"]
    assert read["features.8"].count == 50 * 4 == len(seen)
    assert_close(read["features.8"], *naive(seen), tolerance=ROUNDING)


@pytest.mark.parametrize("name", [MLP, VGG_BN])
def test_batch_size_does_not_matter(name):
    models = [trained(name, 0), trained(name, 1)]
    x = torch.cat([x for x, _ in data_of(name)])[:100]
    one, many = (isthmus.collect(models, symmetry(name), x.split(size)) for size in (100, 37))
    for space in symmetry(name):
        assert one[space.name].count == many[space.name].count
        # Activations themselves may differ in their last bits, since kernels depend on the batch: a few float32 eps.
        assert_close(many[space.name], one[space.name].mean.numpy(), flat(one[space.name]), tolerance=2 * ROUNDING)


def test_covariances_keep_their_digits_far_from_zero():
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(3000, 4, generator=generator) @ torch.randn(4, 4, generator=generator)
    x = mixed + 1e3 * torch.arange(1.0, 5.0) + torch.linspace(0, 3, 3000)[:, None]  # drifts away from the first batch
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))
        model[0].bias.zero_()
    read = isthmus.collect([model], isthmus.trace(model, x[:2]), x.split(500))
    # Raw float32 sums would lose (mean / deviation)² · eps = 1e6 · 1e-7: every digit but one.
    assert_close(read["0"], *naive(x.double().numpy()), tolerance=ROUNDING)


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4])
def test_sums_in_pieces_are_sums_of_all(offset):
    values = torch.randn(9001, 6, generator=torch.Generator().manual_seed(1)) + offset
    sums = Accumulator([3, 3], torch.device("cpu"))
    for piece in values.split(1234):
        sums.add(piece.split(3, dim=1))
    assert sums.count == 9001
    read = sums.finish().of_one_size()
    assert_close(read, *naive(values[:, :3].double().numpy(), values[:, 3:].double().numpy()), tolerance=ROUNDING)


def test_float64_models_are_read_in_float64():
    values = torch.randn(5000, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sums = Accumulator([4], torch.device("cpu"))
    sums.add([values])
    assert_close(sums.finish().of_one_size(), *naive(values.numpy()), tolerance=1e-13)


@pytest.mark.parametrize("name", [MLP, VGG_BN])
def test_covariances_are_positive_semi_definite_and_symmetric(name):
    read = isthmus.collect([trained(name, 0), trained(name, 1)], symmetry(name), data_of(name))
    for space in symmetry(name):
        joint = flat(read[space.name])
        assert np.array_equal(joint, joint.T)
        assert np.linalg.eigvalsh(joint).min() >= -1e-6 * joint.diagonal().max()  # the tolerance of the entries above
        assert torch.equal(read[space.name].between(0, 1), read[space.name].between(1, 0).T)


def test_a_unit_correlates_fully_with_itself_or_never_varies():
    model = lively(VGG_BN, 0)
    with torch.no_grad():
        model.features[1].bias[:2] = -100.0  # these two units are dead behind the ReLU
    read = isthmus.collect([model, trained(VGG_BN, 1)], symmetry(VGG_BN), data_of(VGG_BN))["features.0"]
    own = read.correlation(0, 0).diagonal()
    assert own[:2].tolist() == [0, 0]
    torch.testing.assert_close(own[2:], torch.ones(len(own) - 2, dtype=torch.float64), rtol=1e-12, atol=0)
    assert read.correlation(0, 1)[:2].abs().max() == 0
    assert read.correlation(0, 1).abs().max() <= 1 + 1e-6
    assert read.deviation[0, :2].tolist() == [0, 0]


@pytest.mark.parametrize("name", [MLP, VGG_BN])
def test_what_is_read_of_two_models_does_not_depend_on_the_others(name):
    """Bit for bit, since every pair is summed on its own; even where one of the others is in another precision."""
    models = [lively(name, 0), lively(name, 1), copy.deepcopy(lively(name, 2)).double(), lively(name, 3)]
    together = isthmus.collect(models, symmetry(name), data_of(name))
    for places in ([1], [0, 2], [1, 3], [0, 1, 3]):
        alone = isthmus.collect([models[place] for place in places], symmetry(name), data_of(name))
        for space in symmetry(name):
            found, expected = together[space.name], alone[space.name]
            for i, first in enumerate(places):
                assert torch.equal(found.mean[first], expected.mean[i])
                for j, second in enumerate(places):
                    assert torch.equal(found.between(first, second), expected.between(i, j))
                    assert found.between(first, second).stride() == expected.between(i, j).stride()
                    assert torch.equal(found.correlation(first, second), expected.correlation(i, j))


# What a network may be like


@pytest.mark.parametrize("name", NETWORKS[:4])
def test_the_graph_gives_the_models_outputs(name):
    model, sym = lively(name, 0), symmetry(name)
    x = inputs_of(model, 3)
    batch = as_batch(x)
    program = sym.traced.program.for_inputs(batch.args, batch.kwargs)
    with torch.no_grad():
        found = run(program, model.state_dict(), batch)
        torch.testing.assert_close(found, model(x), rtol=1e-6, atol=1e-6)


class Difference(nn.Module):
    """Two inputs of one shape that must not be confused."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(3, 4), nn.Linear(3, 4, bias=False), nn.Linear(4, 1)

    def forward(self, left, right, scale=1.0):
        return self.head(torch.relu(self.left(left) - 10 * scale * self.right(right)))


def test_named_inputs_are_known_by_name_not_by_order():
    torch.manual_seed(0)
    model = Difference().eval()
    left, right = torch.randn(20, 3), torch.randn(20, 3)
    sym = isthmus.trace(model, kwargs={"left": left[:2], "right": right[:2]})
    there, back, traced = (
        isthmus.collect([model], s, [d])
        for s, d in (
            (sym, {"left": left, "right": right}),
            (sym, {"right": right, "left": left}),
            (None, {"right": right, "left": left, "labels": torch.zeros(20)}),
        )
    )
    (space,) = sym
    with torch.no_grad():
        seen = torch.relu(model.left(left) - 10 * model.right(right)).double().numpy()
    for read in (there, back, traced):
        assert_close(read[space.name], *naive(seen), tolerance=ROUNDING)


class Overwrites(nn.Module):
    """Works in place, on its input too."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x):
        x -= 1
        return self.head(self.body(x).relu_())


def test_models_and_data_are_left_as_they_were():
    torch.manual_seed(0)
    models = [Overwrites().train(), Overwrites()]
    x = torch.randn(10, 3)
    before, weights = x.clone(), [copy.deepcopy(model.state_dict()) for model in models]
    first = isthmus.collect(models, None, [x, x])
    second = isthmus.collect(models, None, [x, x])
    assert torch.equal(x, before)
    assert all(model.training for model in models)
    for model, old in zip(models, weights, strict=True):
        assert all(torch.equal(tensor, old[key]) for key, tensor in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(first["body"].covariance, second["body"].covariance)
    with torch.no_grad():
        seen = models[0].body(before - 1).relu().double().numpy()
    assert_close(isthmus.collect(models[:1], None, [x])["body"], *naive(seen), tolerance=ROUNDING)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("traced", [torch.float32, torch.bfloat16])
def test_models_are_read_in_any_precision_whatever_was_traced(dtype, traced):
    x = data_of(MLP)[0][0][:2]
    sym = isthmus.trace(copy.deepcopy(trained(MLP, 0)).to(traced), x.to(traced))
    read = isthmus.collect([copy.deepcopy(trained(MLP, 0)).to(dtype), trained(MLP, 0)], sym, data_of(MLP))
    for space in sym:
        alive = read[space.name].deviation[1] > 0.1
        same = read[space.name].correlation(0, 1).diagonal()
        assert (same[alive] > 0.999).all()  # three decimal digits of precision


def test_a_traced_model_may_change_its_precision():
    model = copy.deepcopy(trained(MLP, 0))
    sym = isthmus.trace(model, data_of(MLP)[0][0][:2])
    read = isthmus.collect([model.double()], sym, data_of(MLP))
    expected = isthmus.collect([trained(MLP, 0)], symmetry(MLP), data_of(MLP))
    for space in sym:
        torch.testing.assert_close(read[space.name].mean, expected[space.name].mean, rtol=1e-5, atol=1e-6)


def test_where_no_consumer_is_seen_the_other_side_is_read():
    torch.manual_seed(0)
    model = STRUCTURES["WeightNorm"]().eval()
    (x,), _ = model.inputs(samples=10)
    sym = isthmus.trace(model, x)
    assert isthmus.collect([model], sym, [x]).spaces.keys() == {space.name for space in sym}


def test_positions_that_other_spaces_move_are_averaged():
    torch.manual_seed(0)
    model = STRUCTURES["OuterProduct"]().eval()
    (x,), _ = model.inputs(samples=50)
    sym = isthmus.trace(model, x)
    read = isthmus.collect([model], sym, [x])
    with torch.no_grad():
        left, right = torch.relu(model.left(x)).double(), torch.relu(model.right(x)).double()
    assert_close(read["left"], *naive((left * right.mean(1, keepdim=True)).numpy()), tolerance=ROUNDING)
    assert_close(read["right"], *naive((right * left.mean(1, keepdim=True)).numpy()), tolerance=ROUNDING)


# Symmetries and refusals


def test_a_symmetry_from_json_gets_its_graph_back():
    stored = isthmus.Symmetry.from_json(symmetry(MLP).to_json())
    assert stored.graph is None
    for given in ({"data": data_of(MLP)}, {"data": data_of(MLP), "inputs": (data_of(MLP)[0][0][:2],)}):
        read = isthmus.collect([trained(MLP, 0)], stored, **given)
        assert torch.equal(
            read["hidden.0"].covariance,
            isthmus.collect([trained(MLP, 0)], symmetry(MLP), data_of(MLP))["hidden.0"].covariance,
        )


def test_a_symmetry_with_other_spaces_is_not_replaced_silently():
    sym = symmetry(MLP)
    fewer = isthmus.Symmetry(sym.spaces[:2], sym.frozen, sym.shapes)
    with refuses(SymmetryError, "another symmetry"):
        isthmus.collect([trained(MLP, 0)], fewer, data_of(MLP))


GOOD = {"models": [fresh(MLP, 0)], "data": [torch.zeros(2, 64)]}


@pytest.mark.parametrize(
    ("changed", "kind", "told"),
    [
        ({"at": "mid"}, InputError, "'post' or 'pre'"),
        ({"models": []}, InputError, "no models"),
        ({"data": None}, DataError, "no data"),
        ({"data": []}, DataError, "data is empty"),
        ({"data": (x for x in [torch.zeros(2, 64)])}, DataError, "only once"),
        ({"models": [fresh(MLP, 0), fresh(VGG_BN, 0)]}, ModelError, "lacks 6 tensors"),
        ({"symmetry": symmetry(VGG_BN)}, SymmetryError, "is not this model's"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_it_refuses(changed, kind, told):
    with refuses(kind, told):
        isthmus.collect(**{**GOOD, "symmetry": symmetry(MLP), **changed})


def test_nan_weights_are_refused():
    broken = fresh(MLP, 0)
    with torch.no_grad():
        broken.head.bias[0] = torch.nan
    with refuses(ModelError, "NaN or infinite"):
        isthmus.collect([broken], symmetry(MLP), data_of(MLP))


def test_an_unread_space_is_named():
    read = isthmus.collect([trained(MLP, 0)], symmetry(MLP), data_of(MLP))
    with refuses(SymmetryError, "no activations stand for space hidden.9"):
        read["hidden.9"]


def test_too_few_samples_can_be_refused():
    read = isthmus.collect([trained(MLP, 0)], symmetry(MLP), data_of(MLP))
    _require_samples(read, 400, "this")
    with refuses(DataError, "400 samples, this needs at least 401"):
        _require_samples(read, 401, "this")


def test_models_of_several_widths_are_read_together():
    specs = (MLP, MLP.replace("24", "31"))
    models = [lively(spec, seed) for seed, spec in enumerate(specs)]
    found, samples = collect_joint(models, [symmetry(spec) for spec in specs], data_of(MLP), at="pre")
    alone = [
        isthmus.collect([model], symmetry(spec), data_of(MLP), at="pre")
        for model, spec in zip(models, specs, strict=True)
    ]
    assert samples == 400
    for space in symmetry(MLP):
        joint = found[space.name]
        assert joint.between(0, 1).shape == (24, 31)
        assert torch.equal(joint.between(0, 1), joint.between(1, 0).T)
        for index in range(2):
            assert torch.equal(joint.mean[index], alone[index][space.name].mean[0])
            assert torch.equal(joint.between(index, index), alone[index][space.name].between(0, 0))


def test_networks_that_are_read_at_other_places_are_refused():
    sym = symmetry(MLP)
    twice = replace(sym.graph, post={name: nodes * 2 for name, nodes in sym.traced.post.items()})
    models = [lively(MLP, seed) for seed in range(2)]
    with refuses(SymmetryError, "read at other places"):
        collect_joint(models, [sym, replace(sym, graph=twice)], data_of(MLP))


def test_two_halves_joined_are_the_whole():
    models = [trained(MLP, seed) for seed in range(2)]
    (x, y), *_ = data_of(MLP)
    whole, first, second = (
        isthmus.collect(models, symmetry(MLP), [part]) for part in ((x, y), (x[:30], y[:30]), (x[30:] + 0, y[30:]))
    )
    joined = first.joined(second)
    assert joined.samples == whole.samples
    for space in symmetry(MLP):
        assert joined[space.name].count == whole[space.name].count
        # float32 products in other chunks, of values up to 10
        torch.testing.assert_close(joined[space.name].mean, whole[space.name].mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(joined[space.name].covariance, whole[space.name].covariance, rtol=1e-5, atol=1e-4)
