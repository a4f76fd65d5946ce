"""OT Fusion: plans against linear programs, networks against plain matrices, and models of several widths."""

import copy
import re
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import isthmus
from helpers.pairs import (
    CNN,
    MLP,
    NETWORKS,
    RESNET20,
    VGG_BN,
    data_of,
    inputs_of,
    learnt,
    lively,
    planted,
    stir,
    symmetry,
    trained,
)
from helpers.refusals import refuses
from helpers.zoo import ZOO as STRUCTURES
from isthmus.errors import DataError, InputError, ModelError, SymmetryError, TransformError
from isthmus.match import METHODS
from isthmus.match.ot_fusion import OTFusion, _entropic_plan, _exact_plan, _transform_of
from isthmus.models import load_model
from isthmus.symmetry import Alignment, LinearMap, Permutation
from isthmus.symmetry.symmetry import check_counterpart
from oracles import ot_fusion as oracle

WIDE = {
    MLP: MLP.replace("width=24", "width=37"),
    CNN: "cnn?width=0.75",
    VGG_BN: VGG_BN.replace("width=0.0625", "width=0.09375"),
    RESNET20: RESNET20.replace("width=0.25", "width=0.5"),
}
WAYS = [OTFusion(by=by, coupling=coupling) for by in ("activations", "weights") for coupling in ("hard", "soft")]


def costs(frame: int, moved: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((frame, moved))


@pytest.mark.parametrize(("frame", "moved"), [(7, 7), (5, 8), (8, 5), (6, 12), (1, 4), (4, 1)])
def test_exact_plans_are_the_linear_programs(frame, moved):
    for seed in range(3):
        cost = costs(frame, moved, seed)
        plan, expected = _exact_plan(cost), oracle.exact_plan(cost)
        np.testing.assert_allclose(plan.sum(axis=1), 1 / frame, rtol=1e-12)
        np.testing.assert_allclose(plan.sum(axis=0), 1 / moved, rtol=1e-12)
        assert (plan * cost).sum() == pytest.approx((expected * cost).sum(), rel=1e-9)


@pytest.mark.parametrize(("frame", "moved"), [(7, 7), (5, 8)])
@pytest.mark.parametrize("regularisation", [0.1, 1.0])
def test_entropic_plans_are_sinkhorns(frame, moved, regularisation):
    cost = costs(frame, moved)
    plan, converged = _entropic_plan(cost, regularisation)
    assert converged
    # the marginals are met to 1e-5 when it stops
    np.testing.assert_allclose(plan, oracle.entropic_plan(cost, regularisation), atol=1e-5)


def test_a_weaker_regularisation_tends_to_the_exact_plan():
    cost = costs(9, 9)
    exact = _exact_plan(cost)
    gaps = [np.abs(_entropic_plan(cost, share)[0] - exact).sum() for share in (1.0, 0.1, 0.01)]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 0.1


def test_maps_are_means():
    for plan in (_exact_plan(costs(5, 8)), _entropic_plan(costs(6, 6), 0.1)[0]):
        transform = _transform_of(plan)
        assert isinstance(transform, LinearMap)
        into, back = oracle.maps(plan)
        np.testing.assert_allclose(transform.into[0].numpy(), into, rtol=1e-12)
        np.testing.assert_allclose(transform.back[0].numpy(), back, rtol=1e-12)
        ones = torch.ones(1, dtype=torch.float64)
        torch.testing.assert_close(transform.into.sum(dim=2), ones.expand(1, len(into)))
        torch.testing.assert_close(transform.back.sum(dim=2), ones.expand(1, len(back)))


def test_equal_widths_and_hard_coupling_are_permutations():
    for way in WAYS:
        found = isthmus.align([lively(CNN, 0), lively(CNN, 1)], symmetry(CNN), way, data=data_of(CNN))
        assert found.is_exact == (way.coupling == "hard")


@pytest.mark.parametrize("coupling", ["hard", "soft"])
@pytest.mark.parametrize("wide", [False, True])
def test_a_fused_perceptron_is_the_papers(coupling, wide):
    spec = WIDE[MLP] if wide else MLP
    models = [copy.deepcopy(trained(MLP, 0)).double(), copy.deepcopy(trained(spec, 1)).double()]
    options = OTFusion(by="weights", coupling=coupling, regularisation=0.3, passes=1)
    found = isthmus.align(models, None, options, inputs=(torch.zeros(2, 64).double(),))
    own, other = (
        [
            (layer.weight.detach().numpy(), layer.bias.detach().numpy())
            for layer in m.modules()
            if isinstance(layer, nn.Linear)
        ]
        for m in models
    )
    plan = oracle.exact_plan if coupling == "hard" else partial(oracle.entropic_plan, regularisation=0.3)
    expected = oracle.fuse_mlp(own, other, plan)
    moved = isthmus.apply(found, models[1], 1, models[0])
    merged = isthmus.merge(models, found)
    tolerance = 1e-9 if coupling == "hard" else 1e-3  # marginals of 1e-5, times n = 37 for the maps, layer by layer
    layers = [[m for m in model.modules() if isinstance(m, nn.Linear)] for model in (moved, merged)]
    for there, mean, (W, b), (V, c) in zip(*layers, own, expected, strict=True):
        np.testing.assert_allclose(there.weight.detach().numpy(), V, atol=tolerance)
        np.testing.assert_allclose(there.bias.detach().numpy(), c, atol=tolerance)
        np.testing.assert_allclose(mean.weight.detach().numpy(), (W + V) / 2, atol=tolerance)
        np.testing.assert_allclose(mean.bias.detach().numpy(), (b + c) / 2, atol=tolerance)


@pytest.mark.parametrize("by", ["activations", "weights"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_planted_permutation_is_recovered(name, by):
    model, sym = lively(name, 0), symmetry(name)
    moved, _ = planted(model, sym, 1)
    found = isthmus.align([model, moved], sym, OTFusion(by=by, at="pre"), data=[inputs_of(model, 64)])
    back = isthmus.apply(found, moved, 1).state_dict()
    if by == "weights" and any(space.parent for space in sym):
        return  # weight matching of nested spaces finds a local optimum
    assert all(torch.equal(tensor, back[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["GroupNorm", "GroupedConv", "Attention", "GroupedQueries"])
def test_nested_spaces_are_permuted(name):
    torch.manual_seed(0)
    model = STRUCTURES[name]().eval()
    stir(model, 0)
    (x,), _ = model.inputs(samples=100)
    sym = isthmus.trace(model, x)
    moved, _ = planted(model, sym, 1)
    found = isthmus.align([model, moved], sym, OTFusion(at="pre"), data=[x])
    back = isthmus.apply(found, moved, 1).state_dict()
    assert all(torch.equal(tensor, back[key]) for key, tensor in model.state_dict().items())
    other = STRUCTURES[name]().eval()
    for coupling in ("hard", "soft"):
        found = isthmus.align([model, other], sym, OTFusion(by="weights", coupling=coupling))
        nested = [space.name for space in sym if space.copies > 1 or sym.children(space)]
        assert nested
        assert all(isinstance(found.transforms[1][each], Permutation) for each in nested)


def doubled(model: nn.Module, sym: isthmus.Symmetry, spec: str) -> nn.Module:
    """The model with every unit twice, and what reads them halved."""
    wide = load_model(spec).eval()
    state = model.state_dict()
    for space in sym:
        for site in space.sites:
            (dim,) = site.dims  # every unit's places side by side
            assert np.array_equal(site.positions.ravel(), np.arange(site.positions.size))
            tensor = state[site.parameter].index_select(dim, torch.from_numpy(site.positions[0].repeat(2, 0).ravel()))
            state[site.parameter] = tensor / 2 if site.role == "covector" else tensor
    wide.load_state_dict(state)
    return wide


@pytest.mark.parametrize("by", ["activations", "weights"])
@pytest.mark.parametrize(("spec", "twice"), [(MLP, MLP.replace("24", "48")), (CNN, "cnn?width=1")])
def test_a_network_is_recovered_from_one_whose_units_were_doubled(spec, twice, by):
    model = lively(spec, 0)
    wide = doubled(model, symmetry(spec), twice)
    x = inputs_of(model, 64)
    with torch.no_grad():
        torch.testing.assert_close(wide(x), model(x), rtol=1e-4, atol=1e-4)
        expected = isthmus.repair(model, [x])(x)
    for a, b in ((model, wide), (wide, model)):
        merged = isthmus.merge([a, b], isthmus.align([a, b], None, OTFusion(by=by, at="pre"), data=[x]))
        with (
            torch.no_grad()
        ):  # running statistics come back from the data; sums of up to 1,000 float32 terms in another order
            torch.testing.assert_close(isthmus.repair(merged, [x])(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "way"),
    [*((name, way) for name in (MLP, CNN) for way in WAYS), (VGG_BN, WAYS[0]), (RESNET20, WAYS[2])],
    ids=str,
)
def test_models_of_several_widths_become_one_of_the_firsts(name, way):
    parents = [lively(name, 0), lively(WIDE[name], 1), lively(name, 2)]
    found = isthmus.align(parents, None, way, data=data_of(name, samples=100))
    assert found.frame_model == 0
    assert [own.shapes for own in found.symmetries] == [symmetry(s).shapes for s in (name, WIDE[name], name)]
    for space in symmetry(name):
        wide = found.symmetries[1][space.name].size
        transform = found.transforms[1][space.name]
        assert isinstance(transform, LinearMap)
        assert transform.into.shape == (1, space.size, wide)
    merged = isthmus.merge(parents, found)
    assert {k: v.shape for k, v in merged.state_dict().items()} == {
        k: v.shape for k, v in parents[0].state_dict().items()
    }
    assert merged.needs_repair == any("running_var" in key for key in merged.state_dict())
    merged = isthmus.repair(merged, data_of(name, samples=100))
    assert torch.isfinite(merged(data_of(name)[0][0])).all()


def test_fusing_with_a_wider_model_beats_averaging_noise():
    a, b = learnt(MLP, 0), learnt(WIDE[MLP], 1)
    losses = {}
    for name, other in (("trained", b), ("fresh", lively(WIDE[MLP], 1))):
        found = isthmus.align([a, other], None, "ot_fusion", data=data_of(MLP))
        losses[name] = isthmus.evaluate(isthmus.merge([a, other], found), data_of(MLP)).loss
    assert losses["trained"] < losses["fresh"] - 0.3  # measured: 1.0 and 1.9


def several_widths() -> tuple[list[nn.Module], Alignment]:
    models = [lively(VGG_BN, 0), lively(WIDE[VGG_BN], 1)]
    return models, isthmus.align(models, None, "ot_fusion", data=data_of(VGG_BN, samples=100))


def test_an_alignment_of_several_widths_is_saved_and_loaded(tmp_path):
    models, found = several_widths()
    found.save(tmp_path / "alignment.safetensors")
    for loaded in (
        Alignment.load(tmp_path / "alignment.safetensors"),
        Alignment.load(tmp_path / "alignment.safetensors", symmetry(VGG_BN)),
    ):
        assert [own.hash for own in loaded.symmetries] == [own.hash for own in found.symmetries]
        again, merged = (isthmus.merge(models, each).state_dict() for each in (loaded, found))
        assert all(torch.equal(tensor, again[key]) for key, tensor in merged.items())


def test_the_frame_can_be_moved_to_the_wider_model():
    models, found = several_widths()
    rebased = found.rebased(1)
    assert rebased.frame_model == 1
    merged = isthmus.merge(models, rebased).state_dict()
    assert {k: v.shape for k, v in merged.items()} == {k: v.shape for k, v in models[1].state_dict().items()}


def test_what_several_widths_do_not_allow_is_refused():
    models, found = several_widths()
    data = data_of(VGG_BN, samples=100)
    with refuses(InputError, "give module="):
        isthmus.apply(found, models[1], 1)
    with refuses(TransformError, "running variance"):
        isthmus.apply(found, models[1], 1, models[0])
    with refuses(InputError, "several widths"):
        isthmus.merge(models, found, "pleas", data=data)
    with refuses(SymmetryError, "is not this model's"):
        isthmus.merge(models[::-1], found)
    with refuses(InputError, "model 1 is a state dict"):
        isthmus.align([models[0], models[1].state_dict()], None, "ot_fusion", data=data)
    with refuses(InputError, "moved to the first"):
        isthmus.align(models, None, OTFusion(reference="medoid"), data=data)
    with refuses(ModelError, "wrong shapes"):
        isthmus.repair(isthmus.merge(models, found), data, "repair", parents=models, alignment=found)
    stored = isthmus.Symmetry.from_json(symmetry(VGG_BN).to_json())
    with refuses(InputError, "traced one by one"):
        isthmus.align(models, stored, OTFusion(by="weights"))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "ot_fusion"])
def test_no_other_method_takes_models_of_several_widths(method):
    models = [lively(MLP, 0), lively(WIDE[MLP], 1)]
    with refuses(ModelError, "model 1: wrong shapes"):
        isthmus.align(models, None, method, data=data_of(MLP))


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (MLP.replace("depth=3", "depth=2"), "lacks 2 tensors"),
        (MLP.replace("in_features=64", "in_features=65"), "has 65"),
    ],
)
def test_other_architectures_are_refused(spec, told):
    models = [lively(MLP, 0), lively(spec, 1)]
    with pytest.raises((ModelError, SymmetryError, isthmus.errors.TraceError)):
        isthmus.align(models, None, "ot_fusion", data=data_of(MLP))


def test_counterparts_must_be_of_one_size_where_they_are_nested():
    small, large = (
        isthmus.trace(model, torch.randn(2, 3, 8, 8))
        for model in (
            nn.Sequential(nn.Conv2d(3, width, 3), nn.GroupNorm(2, width), nn.ReLU(), nn.Conv2d(width, 2, 3)).eval()
            for width in (4, 6)
        )
    )
    check_counterpart(small, small, "model 1")
    with refuses(SymmetryError, "nested spaces must be of one size"):
        check_counterpart(small, large, "model 1")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"by": "gradients"}, "by='gradients'"),
        ({"coupling": "firm"}, "coupling='firm'"),
        ({"regularisation": 0.0}, "regularisation=0.0"),
        ({"at": "middle"}, "'post' or 'pre'"),
        ({"passes": 0}, "passes=0"),
        ({"reference": "last"}, "reference='last'"),
    ],
)
def test_bad_options_are_refused(options, told):
    with refuses(InputError, re.escape(told)):
        OTFusion(**options)


def test_a_regularisation_below_the_numbers_is_refused():
    with refuses(InputError, "too small"):
        _entropic_plan(costs(6, 6), 1e-323)


def test_it_says_what_it_needs():
    assert (OTFusion().needs, OTFusion(by="weights").needs, OTFusion(reference="best").needs) == ("data", "", "labels")
    with refuses(DataError, "needs data"):
        isthmus.align([lively(MLP, 0), lively(MLP, 1)], symmetry(MLP), "ot_fusion")
