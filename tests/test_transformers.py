"""Every room on two transformers: nested spaces, sequences, integer inputs, no BatchNorm, a tied or split tensor."""

import base64
import copy
import io
import json
from functools import cache

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from matplotlib.image import imread
from safetensors.torch import save_file
from torch import nn

import isthmus
from helpers.pairs import inputs_of, lively
from isthmus.average import AVERAGES, Average
from isthmus.average.fisher import Fisher
from isthmus.average.regmean import RegMean
from isthmus.cli.commands import main
from isthmus.data import load_data
from isthmus.data.batches import as_batch
from isthmus.explain.gallery import draw_matches
from isthmus.explain.layer_similarity import cka_matrix
from isthmus.explain.spectrum import measure_spectra
from isthmus.explain.taylor import taylor_barrier
from isthmus.explain.units import measure_units
from isthmus.match import METHODS
from isthmus.match.learned import Learned
from isthmus.match.orthogonal_matching import OrthogonalMatching
from isthmus.match.sinkhorn import Sinkhorn
from isthmus.match.ste import STE
from isthmus.measure.connect import connect
from isthmus.models import load_model, sample_tokens
from isthmus.observe.layers import layers_of
from isthmus.symmetry import Group
from isthmus.symmetry.groups import random_element

GPT = "gpt?width=8&depth=1&heads=2&vocabulary=7&block=6"
ROPE = f"{GPT}&positions=rope&norm=rms&mlp=gated"  # queries and keys are cut in two: a node with a list as its value
TIED = f"{GPT}&tied=true&bias=true"
VIT = "vit?width=8&depth=1&heads=2&in_channels=1&image_size=8"
EVERY_NETWORK = pytest.mark.parametrize("spec", [GPT, ROPE, TIED, VIT])
BRIEF = {
    "ste": STE(steps=5, learning_rate=0.03),
    "sinkhorn": Sinkhorn(steps=5, learning_rate=0.2),
    "learned": Learned(steps=5, learning_rate=0.05),
}
# Why a way of merging has no figures.
REASONS = ("linear maps", "needs base=", "exactly two")


@cache
def traced(spec: str) -> isthmus.Symmetry:
    model = lively(spec, 0)
    return isthmus.trace(model, inputs_of(model, 2))


@cache
def data(spec: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs with targets: the next token's place is taken by the token itself, an image's class is by chance."""
    batches = []
    for seed in range(2):
        x = inputs_of(lively(spec, 0), 20, seed=seed + 1)
        tokens = sample_tokens(lively(spec, 0)) is not None
        batches.append((x, x if tokens else torch.arange(20) % 10))
    return batches


def pair(spec: str) -> list[nn.Module]:
    return [lively(spec, seed) for seed in range(2)]


# Structure


@pytest.mark.parametrize(
    ("spec", "nested"),
    [(GPT, {"query": (2, 4), "value": (2, 4)}), (ROPE, {"value": (2, 4)}), (VIT, {"query": (2, 4), "value": (2, 4)})],
    ids=["gpt", "rope", "vit"],
)
def test_heads_hold_units_and_every_number_can_move(spec, nested):
    symmetry = traced(spec)
    hidden = 21 if spec == ROPE else 32
    alone = sorted((space.size, space.copies) for space in symmetry if space.parent is None)
    assert alone == [(2, 1), (8, 1), (hidden, 1)]  # heads, the residual stream, and the MLP
    found = {space.name.split(".")[-1]: (space.copies, space.size) for space in symmetry if space.parent}
    assert found == {f"{name}/units": shape for name, shape in nested.items()}


@EVERY_NETWORK
def test_the_proof_holds(spec):
    model = lively(spec, 0)
    isthmus.verify(model, traced(spec), inputs_of(model, 2))


# Matching, averaging, repairing


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spec", [pytest.param(ROPE, marks=pytest.mark.slow), VIT])
def test_copies_merge_into_the_model_they_are_of(spec, method):
    model = lively(spec, 0)
    models = [model, copy.deepcopy(model)]
    found = isthmus.align(models, traced(spec), BRIEF.get(method, method), data=data(spec))
    merged = isthmus.merge(models, found)
    x = data(spec)[0][0]
    with torch.no_grad():  # float32, maps back and forth of condition below 100
        torch.testing.assert_close(merged(x), model(x), rtol=1e-4, atol=1e-4)


SEARCHED = [name for name in METHODS if name != "auto"]


@pytest.mark.parametrize(
    ("spec", "methods", "averages"),
    [
        pytest.param(TIED, SEARCHED, ["mean", "task_arithmetic", "regmean"], id="gpt, every method"),
        pytest.param(VIT, ["identity", "zipit"], list(AVERAGES), id="vit, every average"),
        *(
            pytest.param(spec, SEARCHED, list(AVERAGES), id=name, marks=pytest.mark.slow)
            for name, spec in (("gpt, all", TIED), ("rope, all", ROPE), ("vit, all", VIT))
        ),
    ],
)
def test_every_way_of_merging_is_scored_or_says_why_not(spec, methods, averages):
    ways = [Fisher(samples=4) if name == "fisher" else name for name in averages]
    found = isthmus.compare(
        pair(spec), data(spec), data(spec), traced(spec),
        methods=[BRIEF.get(name, name) for name in methods], averages=ways,
    )  # fmt: skip
    assert len(found.rows) == len(methods) * len(averages) * 2  # no BatchNorm: nothing to reset
    for row in found.rows:
        if row.loss is None:
            assert any(reason in row.note for reason in REASONS), row
            assert "\n" not in row.note
        else:
            assert torch.tensor(row.loss).isfinite()
            assert row.accuracy is not None
    table = found.to_markdown()
    assert "needs base=" in table
    assert "under linear maps" in table


def turned_pair(spec: str) -> tuple[list[nn.Module], isthmus.Alignment]:
    """A model and its copy moved by random elements of all groups, and the alignment that undoes it."""
    model, sym, rng = lively(spec, 0).double(), traced(spec), np.random.default_rng(0)
    planted = {space.name: random_element(space, rng) for space in sym}
    other = isthmus.apply(isthmus.Alignment(sym, (planted,), folded=True), model, 0)
    method = OrthogonalMatching(start="activations", invertible=True)
    return [model, other], isthmus.align([model, other], sym, method, data=data(spec))


@pytest.mark.parametrize("average", ["fisher", "regmean", "pleas", "greedy_soup"])
@pytest.mark.parametrize("spec", [GPT, VIT])
def test_rotations_that_keep_the_function_allow_averages_that_run_the_models(spec, average):
    (model, other), found = turned_pair(spec)
    chosen = Fisher(samples=4) if average == "fisher" else average
    merged = isthmus.merge([model, other], found, chosen, data=data(spec))
    batch = as_batch(data(spec)[0]).to(torch.device("cpu"), torch.float64)
    with torch.no_grad():  # float64; the ridges of regmean and pleas hold on to the plain mean, which is the model
        torch.testing.assert_close(merged(*batch.args), model(*batch.args), rtol=1e-5, atol=1e-5)


@EVERY_NETWORK
def test_repair_leaves_alone_what_nothing_was_lost_of(spec):
    model = lively(spec, 0)
    models = [model, copy.deepcopy(model)]
    mended = isthmus.repair(isthmus.merge(models), data(spec), "repair", parents=models)
    x = data(spec)[0][0]
    with torch.no_grad():  # scales and shifts that differ from 1 and 0 by the rounding of float32 statistics
        torch.testing.assert_close(mended(x), model(x), rtol=1e-4, atol=1e-4)


def test_regmean_answers_its_normal_equations_where_a_tensor_is_cut_in_two():
    models = pair(ROPE)
    merged = isthmus.merge(models, None, RegMean(shrink=0.99, samples=40, rows=10**6), data=data(ROPE))
    weights, grams = [], []
    for model in models:
        read = []
        model.blocks[0].attention.query.register_forward_pre_hook(lambda _, x, read=read: read.append(x[0]))
        with torch.no_grad():
            for x, _ in data(ROPE):
                model(x)
        rows = torch.cat(read).flatten(0, 1).double()
        weights.append(model.blocks[0].attention.query.weight.detach().double())
        gram = rows.T @ rows
        grams.append(0.99 * gram + 0.01 * gram.diagonal().diag())
        model.blocks[0].attention.query._forward_pre_hooks.clear()
    expected = torch.linalg.solve(sum(grams), sum(g @ w.T for g, w in zip(grams, weights, strict=True))).T
    # float32 rows, a Gram matrix of condition up to 100
    torch.testing.assert_close(merged.blocks[0].attention.query.weight.double(), expected, rtol=1e-3, atol=1e-4)


# A tied tensor: two names, and two operations that read it


def test_a_layer_whose_weight_is_an_embedding_too_is_not_fitted():
    weights = {layer.contraction.weight for layer in layers_of(traced(TIED))}
    assert "blocks.0.mlp.up.weight" in weights
    assert not weights & {"tokens.weight", "head.weight"}
    assert "head.weight" in {layer.contraction.weight for layer in layers_of(traced(GPT))}


@pytest.mark.parametrize("average", ["regmean", "pleas", "fisher", "dare"])
def test_a_tied_tensor_gets_what_the_average_found_for_it(average):
    models = pair(TIED)
    base = lively(TIED, 9)
    chosen = AVERAGES[average]()
    seen: dict[str, torch.Tensor] = {}

    class Watched(Average):
        name, needs = chosen.name, chosen.needs

        def __call__(self, aligned):
            found = chosen(aligned)
            seen.update(found.state)
            return found

    merged = isthmus.merge(models, None, Watched(), data=data(TIED), base=base)
    assert merged.head.weight is merged.tokens.weight
    torch.testing.assert_close(merged.tokens.weight.detach(), seen["tokens.weight"], rtol=0, atol=0)
    mean = (models[0].tokens.weight + models[1].tokens.weight) / 2
    assert torch.equal(merged.tokens.weight, mean) == (average in ("regmean", "pleas"))


@EVERY_NETWORK
def test_copies_share_a_trunk(spec):
    model = lively(spec, 0)
    zipped = isthmus.partial_zip([model, copy.deepcopy(model)], data(spec))
    x = data(spec)[0][0]
    with torch.no_grad():
        for output in zipped(x):  # float32, means of equal numbers
            torch.testing.assert_close(output, model(x), rtol=1e-4, atol=1e-4)


# Lines and explanations


@pytest.mark.parametrize("spec", [TIED, VIT])
def test_the_line_between_two_is_measured(spec):
    curve = connect(*pair(spec), data(spec), points=3)
    assert len(curve.losses) == 3
    assert curve.losses[0] == pytest.approx(isthmus.evaluate(pair(spec)[0], data(spec)).loss)


@EVERY_NETWORK
def test_a_merge_is_explained(spec):
    models, symmetry = pair(spec), traced(spec)
    found = isthmus.align(models, symmetry, "activation_matching", data=data(spec))
    merged = isthmus.merge(models, found)
    units = measure_units(models, found, merged, data(spec))
    assert set(units.spaces) == {space.name for space in symmetry}
    assert all(own.top for own in units.spaces.values())
    spectra = measure_spectra(models, found, merged, data(spec), symmetry)
    assert {layer.name for layer in spectra.layers} >= {"blocks.0.mlp.up.weight", "blocks.0.attention.output.weight"}
    values = cka_matrix(models, symmetry, data(spec)).values
    assert np.isfinite(values).all()
    assert taylor_barrier(*models, data(spec)).count == sum(y.numel() for _, y in data(spec))


def coloured(uri: str) -> np.ndarray:
    return imread(io.BytesIO(base64.b64decode(uri.partition(",")[2])))[..., :3]


@pytest.mark.parametrize("spec", [GPT, VIT])
def test_a_merge_of_rotated_copies_is_explained_in_the_folded_frame(spec):
    models, found = turned_pair(spec)
    merged = isthmus.merge(models, found)
    units = measure_units(models, found, merged, data(spec), naive=merged)
    heads = {space.parent for space in found.symmetry}
    mixing = {space.name for space in found.symmetry if space.group is not Group.PERMUTATION}
    found_mixing = {name for name, own in units.spaces.items() if own.mixes}
    assert found_mixing <= mixing  # of a space of four units, one may count for most of a slot
    assert next(iter(found.symmetry)).name in found_mixing
    assert set(units.skipped) == heads - {None}  # what stands for a head is a sum of its units, which rotations change
    for name, own in units.spaces.items():
        for values in (own.matched, own.merged[0], own.norm_ratio):
            # Moments are summed in float32 from rows that float32 data made.
            torch.testing.assert_close(values, torch.ones_like(values), rtol=1e-4, atol=1e-4)
        if name in mixing:
            after = coloured(draw_matches(own, units.moments.spaces[name])["after"])
            red = colormaps["RdBu_r"](1.0)[:3]
            slots = np.arange(len(after))
            np.testing.assert_allclose(after[slots, slots], [red] * len(after), atol=0.02)  # colours of eight bits
    spectra = measure_spectra(models, found, merged, data(spec), traced(spec))
    balanced = {site.parameter for space in traced(spec) for site in space.sites if space.group is Group.INVERTIBLE}
    for layer in spectra.layers:
        assert layer.distance_after < 1e-8 < layer.distance_before
        if layer.name not in balanced:  # rotations alone; float64, matrices of condition below 1000
            assert layer.unchanged < 1e-9
            assert layer.gains == pytest.approx([1] * len(layer.gains), abs=1e-6)


# The command line


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder with a text of seven characters that stands for tinyshakespeare."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "tinyshakespeare.txt").write_text("abcdefgfedcb" * 60)
    return folder


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_window_of_the_text_is_the_models(text, tmp_path, capsys):
    paths = [tmp_path / f"{seed}.safetensors" for seed in range(2)]
    data_of = ["--data", "tinyshakespeare", "--data-dir", text]
    for seed, path in enumerate(paths):
        code, printed, error = run(capsys, "train", GPT, *data_of, "--epochs", 1, "--seed", seed, "-o", path, "--json")
        assert (code, error) == (0, "")
        told = json.loads(printed)
        assert told["preset"] == "cpu_gpt"
        assert told["test"]["count"] == 6 * len(load_data("tinyshakespeare", text, block=6).x_test)
    code, printed, error = run(capsys, "merge", *paths, "--model", GPT, *data_of, "-o", tmp_path / "run")
    assert (code, error) == (0, "")
    code, printed, error = run(capsys, "explain", tmp_path / "run", "--images", 50)
    assert (code, error) == (0, "")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "blocks.0.attention.value/units" in page
    assert "test windows" in page
    assert "No unit is drawn: the networks take no images." in page
    assert page.count("images") == 1  # tokens are none
    assert json.loads((tmp_path / "run" / "features.json").read_text())["spaces"]["tokens"]["units"] == {}


@pytest.mark.parametrize("method", ["weight_matching", "orthogonal_matching"])
def test_a_vision_transformer_is_merged_and_drawn(tmp_path, capsys, method):
    wide = VIT.replace("width=8", "width=32")  # so many units that none counts for most of a rotated slot
    for seed in range(2):
        torch.manual_seed(seed)
        save_file(load_model(wide).state_dict(), tmp_path / f"{seed}.safetensors")
    paths = [tmp_path / f"{seed}.safetensors" for seed in range(2)]
    merge = ["merge", *paths, "--model", wide, "--data", "digits", "--samples", 100, "--repair", "repair"]
    merge += ["--method", method]
    code, _, error = run(capsys, *merge, "-o", tmp_path / "run")
    assert (code, error) == (0, "")
    explain = ["explain", tmp_path / "run", "--images", 50, "--units", 1, "--spaces", 1, "--steps", 2]
    code, _, error = run(capsys, *explain, "--no-claims")
    assert (code, error) == (0, "")
    page = (tmp_path / "run" / "report.html").read_text()
    assert ("not drawn: a linear map mixes their units" in page) == (method == "orthogonal_matching")
    assert (">mixed<" in page) == (method == "orthogonal_matching")
    drawn = json.loads((tmp_path / "run" / "features.json").read_text())["spaces"]
    assert any(each["units"] for each in drawn.values())


def test_inspect_knows_what_a_language_model_reads(capsys):
    code, printed, _ = run(capsys, "inspect", GPT, "--json")
    assert code == 0
    assert json.loads(printed)["input"] == {"0": [6]}


def test_inspect_reads_windows_of_the_models_length(text, capsys):
    code, printed, error = run(
        capsys, "inspect", GPT, "--data", "tinyshakespeare", "--data-dir", text, "--no-verify", "--json"
    )
    assert (code, error) == (0, "")
    assert json.loads(printed)["input"] == {"0": [6]}
