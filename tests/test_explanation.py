"""Explaining finished runs: the zero permutation end to end, every kind of run, and folders that are damaged."""

import copy
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import isthmus
from helpers.pairs import stir
from helpers.refusals import refuses
from isthmus.checkpoint import load_module
from isthmus.data import load_data
from isthmus.errors import CheckpointError, DataError, InputError, IsthmusError
from isthmus.models import load_model
from isthmus.runs.load_run import _with_biases
from isthmus.runs.recipe import AlignOptions, DataOptions, ParentOptions, Recipe
from isthmus.runs.run_explain import ExplainOptions, explain_run
from isthmus.runs.run_merge import run_merge

MLP, CNN = "zoo:mlp?in_features=64&width=12&depth=2", "zoo:cnn?width=0.25"
UNBIASED, WORDS = "explained_nets:unbiased", "explained_nets:words"
NETS = """
from torch import nn

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.hidden, self.head = nn.Embedding(65, 8), nn.Linear(8, 10), nn.Linear(10, 65)

    def forward(self, x):
        return self.head(self.hidden(self.table(x)).relu())

def words():
    return Words()

def unbiased():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 12, bias=False), nn.ReLU(), nn.Linear(12, 12, bias=False), nn.ReLU(),
        nn.Linear(12, 10),
    )
"""
QUICK = {"images": 100, "units": 1, "spaces": 2, "steps": 1}
# Correlations of float32 activations of order one, from float64 moments.
CLOSE = 1e-5


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A folder of checkpoints, `merged(name, …)`, which merges some into a run folder, and `explained(name, …)`."""
    folder = tmp_path_factory.mktemp("explained")
    (folder / "explained_nets.py").write_text(NETS)
    made: dict[tuple, Path] = {}

    class Bench:
        def __init__(self):
            self.folder = folder

        def checkpoint(self, spec: str, seed: int) -> str:
            path = folder / f"{hashlib.sha256(spec.encode()).hexdigest()[:8]}-{seed}.safetensors"
            if not path.exists():
                with torch.random.fork_rng([]):
                    torch.manual_seed(seed)
                    model = load_model(spec)
                stir(model, seed)
                save_file(model.state_dict(), path)
            return str(path)

        def merged(self, spec: str, seeds=(0, 1), **options) -> Path:
            key = (spec, *seeds, *(f"{k}={v!r}" for k, v in options.items()))
            if key not in made:
                data = {"name": "digits", "samples": 200, "batch_size": 100} | options.pop("data", {})
                recipe = Recipe(
                    models=[ParentOptions(model=self.checkpoint(spec, seed)) for seed in seeds],
                    architecture=spec,
                    align=AlignOptions(method=options.pop("method", "weight_matching")),
                    data=DataOptions(**data),
                    **options,
                )
                made[key] = folder / f"run{len(made)}"
                run_merge(recipe, made[key])
            return made[key]

        def copied(self, place: Path, spec: str = MLP, **options) -> Path:
            return Path(shutil.copytree(self.merged(spec, **options), place / "run"))

        def explained(self, place: Path, spec: str = MLP, *, claims: bool = False, fresh: bool = False, **options):
            """A copy of a run that was explained, its explanation, and its pictures."""
            kept = self.merged(spec, **options)
            source = kept.with_name(f"{kept.name}-{claims}")
            if fresh or not source.exists():
                shutil.rmtree(source, ignore_errors=True)
                shutil.copytree(kept, source)
                try:
                    explain_run(source, ExplainOptions(**QUICK, claims=claims))
                except IsthmusError:
                    shutil.rmtree(source)
                    raise
            run = Path(shutil.copytree(source, place / "run"))
            features = json.loads((run / "features.json").read_text())
            return run, json.loads((run / "report.json").read_text())["explain"], features["spaces"]

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield Bench()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- nothing is lost where there is nothing to lose


@pytest.mark.parametrize("spec", [MLP, pytest.param(CNN, marks=pytest.mark.slow)], ids=["mlp", "cnn"])
def test_of_a_network_and_itself_nothing_changes(spec, bench, tmp_path):
    _, told, pictures = bench.explained(tmp_path, spec, seeds=(0, 0), repair=None, claims=spec == MLP)
    assert told["models"] == ["A", "B"]
    for space in told["spaces"]:
        count = space["units"]
        assert space["labels"]["shared"] == space["naive_labels"]["shared"] == count
        assert sum(space["labels"].values()) == sum(space["naive_labels"].values()) == count
        found = space["correlation"]
        every = [found["before"], found["matched"], *found["merged"], *found["naive"]]
        assert every == pytest.approx([1.0] * 6, abs=CLOSE)
        assert found["shuffled"] < 0.99
        assert space["top_overlap"]["merged"] == space["top_overlap"]["naive"] == [1.0, 1.0]
        assert list(space["variance_ratio"].values()) == pytest.approx([1.0] * 3, abs=CLOSE)
        assert space["per_unit"]["sources"] == [list(range(count))] * 2
        assert space["per_unit"]["norm_ratio"] == pytest.approx([1.0] * count, abs=CLOSE)
    for space in told["spaces"]:
        match = pictures[space["name"]]["match"]
        assert match["before"] == match["after"]
        for entry in pictures[space["name"]]["units"].values():
            assert len(set(entry["top"].values())) == 1
            assert len(set(entry["pictures"].values())) == 1
    spectra = told["spectra"]
    # A's, B's and the mean's weights are the same numbers, and so are their decompositions in float64.
    assert (spectra["distance_before"], spectra["distance_after"]) == (0, 0)
    assert len(spectra["thresholds"]) == len(spectra["overlaps"]) > 5
    for each in spectra["overlaps"]:
        assert (each["before"], each["after"]) == pytest.approx((1, 1), abs=1e-10)
    for layer in spectra["layers"]:
        assert layer["b"] == pytest.approx(layer["a"], abs=1e-10)
        assert layer["merged"] == pytest.approx(layer["a"], abs=1e-10)
        assert layer["r_before"] == pytest.approx([1.0] * len(spectra["thresholds"]), abs=1e-10)
        assert layer["r_after"] == pytest.approx([1.0] * len(spectra["thresholds"]), abs=1e-10)
    for matrix in told["cka"]:
        assert np.diag(matrix["values"]) == pytest.approx([1.0] * len(matrix["rows"]), abs=CLOSE)
        np.testing.assert_allclose(matrix["values"], told["cka"][0]["values"], atol=CLOSE)
    # Nothing falls with depth, nothing is gained by matching, and nothing was repaired.
    assert [claim["verdict"] for claim in told["questions"]] == ["holds", None, "does not", "does not", None]
    if spec == MLP:
        assert told["taylor"]["estimate"] == pytest.approx(0, abs=1e-9)
        assert told["taylor"]["real"] == pytest.approx(0, abs=1e-9)
        assert told["barriers"] == pytest.approx(dict.fromkeys(told["barriers"], 0.0), abs=1e-6)  # float32 losses


def test_input_shares_stand_beside_the_chance_of_their_own(bench, tmp_path):
    _, told, _ = bench.explained(tmp_path)
    for layer in told["spectra"]["layers"]:
        inputs = 64 if layer["name"] == "hidden.0.weight" else 12
        kept = max(1, round(0.1 * min(inputs, len(layer["a"]))))
        assert layer["input_chance"] == pytest.approx(kept / inputs)
        assert 0 < layer["input_share"] < 1


# ---- every kind of run


def test_three_models(bench, tmp_path):
    _, told, pictures = bench.explained(tmp_path, seeds=(0, 1, 2), claims=True)
    assert told["models"] == ["A", "B", "C"]
    assert (told["spectra"], told["taylor"], told["claims"]) == (None, None, [])
    assert len(told["questions"]) == 5
    for space in told["spaces"]:
        assert len(space["correlation"]["merged"]) == len(space["per_unit"]["r_models"]) == 3
        assert len(space["per_unit"]["sources"]) == 3
        assert all(sorted(row) == list(range(space["units"])) for row in space["per_unit"]["sources"])
        assert sum(space["labels"].values()) == space["units"]
        for entry in pictures[space["name"]]["units"].values():
            assert list(entry["pictures"]) == ["A", "B", "C", "merged", "naive"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "these are 3" in page
    assert "merged–C" in page


METHODS = [
    "cca",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("zipit", "subset_selection", "procrustes", "ot_fusion")),
]


@pytest.mark.parametrize("method", METHODS)
def test_linear_maps(method, bench, tmp_path):
    run, told, pictures = bench.explained(tmp_path, method=method)
    for space in told["spaces"]:
        assert sum(space["labels"].values()) == space["units"]
        assert all(-1 <= value <= 1 for row in space["per_unit"]["r_models"] for value in row)
        assert max(space["correlation"]["merged"]) > space["correlation"]["before"] + 0.1
        sources = space["per_unit"]["sources"]
        assert all(source is None or 0 <= source < space["units"] for row in sources for source in row)
        # Only units that were chosen singly, or zipped within one model, leave a slot to one model;
        # nothing of the other is shown in it.
        assert method in ("zipit", "subset_selection") or None not in (*sources[0], *sources[1])
        for unit, entry in pictures[space["name"]]["units"].items():
            there = [name for name, row in zip("AB", sources, strict=True) if row[int(unit)] is not None]
            assert [name for name in entry["pictures"] if name in "AB"] == there
            assert [name for name in entry["top"] if name in "AB"] == there
    assert told["spectra"]["layers"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "its unit" in page
    # Where a matrix maps them, no one unit of B stands in a slot.
    sym = isthmus.trace(load_model(MLP).eval(), next(iter(load_data("digits").test(2)))[0])
    found = isthmus.Alignment.load(run / "alignment.safetensors", sym)
    mixed = any(isinstance(transform, isthmus.LinearMap) for transform in found.transforms[1].values())
    assert mixed == ("mostly its unit" in page)


def ratios(run: Path, spec: str, models, at: str = "pre") -> list[float]:
    """The variance of a run's units over its models', from the files alone."""
    parents = [_with_biases(load_module(path, load_model(spec)).eval(), gained(run)) for path in models]
    network = load_module(run / "model.safetensors", parents[0]).eval()
    scored = load_data("digits").test(100, seed=0).take(100)
    sym = isthmus.trace(parents[0], next(iter(scored))[0][:2])
    moments = isthmus.collect([*parents, network], sym, scored, at=at)
    variances = [moments[space.name].deviation.square().mean(dim=1) for space in sym]
    return [float(each[-1] / each[:-1].mean()) for each in variances]


def gained(run: Path) -> list[str]:
    return json.loads((run / "report.json").read_text())["gained_biases"]


@pytest.mark.slow
def test_a_run_with_pleas_tells_of_its_own_network(bench, tmp_path):
    run, told, _ = bench.explained(tmp_path, CNN, merge_method="pleas")
    found = [space["variance_ratio"]["mended"] for space in told["spaces"]]
    assert found == pytest.approx(ratios(run, CNN, [bench.checkpoint(CNN, seed) for seed in (0, 1)]), rel=1e-4)
    assert any(
        abs(space["variance_ratio"]["aligned"] - space["variance_ratio"]["mended"]) > 0.01 for space in told["spaces"]
    )


def test_a_run_whose_layers_gained_biases(bench, tmp_path):
    run, told, _ = bench.explained(tmp_path, UNBIASED, repair="repair")
    assert gained(run) == ["1.bias", "3.bias"]
    found = [space["variance_ratio"]["mended"] for space in told["spaces"]]
    models = [bench.checkpoint(UNBIASED, seed) for seed in (0, 1)]
    assert found == pytest.approx(ratios(run, UNBIASED, models), rel=1e-4)
    assert told["questions"][-1]["verdict"] is not None  # it was repaired


def test_biases_are_added_where_layers_can_hold_them():
    net = nn.Sequential(
        nn.Linear(3, 4, bias=False), nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False), nn.Conv2d(6, 8, 1, bias=False)
    )
    before = copy.deepcopy(net.state_dict())
    grown = _with_biases(net, ["0.bias", "1.bias", "2.bias"])
    assert [len(grown[index].bias) for index in range(3)] == [4, 6, 8]
    assert net.state_dict().keys() == before.keys()
    for name in ("7.bias", "0.weight", "bias", ""):
        with refuses(CheckpointError, "there is no such layer"):
            _with_biases(net, [name])


def test_vectors_get_no_pictures(bench, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"x_{part}": rng.normal(size=(count, 64)).astype(np.float32) for part, count in parts()}
    arrays |= {f"y_{part}": rng.integers(0, 10, count) for part, count in parts()}
    np.savez(bench.folder / "vectors.npz", **arrays)
    _, told, pictures = bench.explained(tmp_path, data={"name": str(bench.folder / "vectors.npz")})
    assert_no_pictures(told, pictures, tmp_path / "run")


@pytest.mark.slow
def test_tokens_get_no_pictures(bench, tmp_path):
    rng = np.random.default_rng(0)
    letters = "".join(chr(97 + index) for index in rng.integers(0, 26, 4000))
    (bench.folder / "tinyshakespeare.txt").write_text(letters)
    data = {"name": "tinyshakespeare", "folder": str(bench.folder), "samples": 20, "batch_size": 4}
    with refuses(DataError, "top=9 of"):  # a tenth of so short a text is two windows
        bench.explained(tmp_path, WORDS, data=data, repair=None)
    (bench.folder / "tinyshakespeare.txt").write_text(letters * 5)
    _, told, pictures = bench.explained(tmp_path, WORDS, data=data, repair=None, seed=1)
    assert_no_pictures(told, pictures, tmp_path / "run")


def parts():
    return (("train", 200), ("test", 100))


def assert_no_pictures(told, pictures, run: Path) -> None:
    assert told["spaces"]
    assert all(space["gallery"] == [] and space["cross_activation"] is None for space in told["spaces"])
    assert all(each["units"] == {} and each["match"] for each in pictures.values())
    page = (run / "report.html").read_text()
    assert "Claims and questions" in page
    assert "What excites a unit" not in page


# ---- what it may change


def test_the_same_run_gives_the_same_bytes_and_only_three_files_change(bench, tmp_path):
    state = torch.random.get_rng_state()
    found = []
    for name in ("one", "two"):
        run, told, _ = bench.explained(tmp_path / name, fresh=name == "two")
        features = json.loads((run / "features.json").read_text())
        features.pop("seconds")
        told.pop("seconds")
        found.append((json.dumps(told), json.dumps(features)))
        before, after = contents(bench.merged(MLP)), contents(run)
        assert {file for file in after if after[file] != before.get(file)} == {
            "report.json",
            "features.json",
            "report.html",
        }
        kept = json.loads(after["report.json"])
        kept.pop("explain")
        assert kept == json.loads(before["report.json"])
    assert found[0] == found[1]
    assert torch.equal(torch.random.get_rng_state(), state)
    explain_run(run, ExplainOptions(**QUICK, claims=False))  # an explained run can be explained again
    assert contents(run).keys() == after.keys()


def test_no_units_draws_none(bench, tmp_path):
    run = bench.copied(tmp_path)
    told = explain_run(run, ExplainOptions(**QUICK | {"units": 0}, claims=False)).explain
    assert all(space["gallery"] == [] for space in told["spaces"])


def test_samples_are_halved_for_what_holds_some_out():
    batches = load_data("digits").train(500, seed=0).take(300)
    parts = batches.halved()
    assert [len(x) for x, _ in parts] == [150, 150]
    assert torch.equal(torch.cat([x for x, _ in parts]), torch.cat([x for x, _ in batches]))
    assert [len(x) for x, _ in batches.take(1).halved()] == [1]


# ---- folders that are not as they were


def damage(name: str, content: bytes | None):
    def change(run: Path) -> None:
        if content is None:
            (run / name).unlink()
        else:
            (run / name).write_bytes(content)

    return change


def truncate(name: str):
    return lambda run: (run / name).write_bytes((run / name).read_bytes()[:-40])


def rewrite(name: str, before: str, after: str):
    def change(run: Path) -> None:
        text = (run / name).read_text()
        assert before in text
        (run / name).write_text(text.replace(before, after))

    return change


def other_model(run: Path) -> None:
    save_file(load_model(CNN).state_dict(), run / "model.safetensors")


BROKEN = {
    "no report": (damage("report.json", None), CheckpointError, "report.json"),
    "damaged report": (damage("report.json", b"{"), CheckpointError, "report.json"),
    "no report of a run": (damage("report.json", b"{}"), CheckpointError, "no report of a run"),
    "no recipe": (damage("recipe.yaml", None), CheckpointError, "no recipe.yaml"),
    "damaged recipe": (damage("recipe.yaml", b"models: ["), InputError, "recipe.yaml"),
    "unknown key": (rewrite("recipe.yaml", "repair:", "repiar:"), InputError, "repiar"),
    "no alignment": (damage("alignment.safetensors", None), CheckpointError, "no alignment.safetensors"),
    "damaged alignment": (truncate("alignment.safetensors"), CheckpointError, "alignment.safetensors"),
    "no model": (damage("model.safetensors", None), CheckpointError, "no model.safetensors"),
    "damaged model": (truncate("model.safetensors"), CheckpointError, "model.safetensors"),
    "another network": (other_model, Exception, "model.safetensors"),
    "a bias that no layer has": (
        rewrite("report.json", '"gained_biases": []', '"gained_biases": ["hidden.9.bias"]'),
        CheckpointError,
        "hidden.9.bias",
    ),
    "a hash of another file": (rewrite("recipe.yaml", "sha256: ", "sha256: 0"), InputError, "has changed"),
    "a data set that is gone": (rewrite("recipe.yaml", "name: digits", "name: gone.npz"), DataError, "gone.npz"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_folder_is_refused_and_stays_as_it_is(name, bench, tmp_path):
    change, kind, told = BROKEN[name]
    run = bench.copied(tmp_path)
    change(run)
    before = contents(run)
    with pytest.raises(IsthmusError if kind is Exception else kind, match=told) as caught:
        explain_run(run, ExplainOptions(**QUICK, claims=False))
    assert len(str(caught.value).splitlines()) == 1
    assert contents(run) == before


def test_a_run_without_data_is_refused(bench, tmp_path):
    recipe = Recipe(
        models=[ParentOptions(model=bench.checkpoint(MLP, seed)) for seed in (0, 1)], architecture=MLP, repair=None
    )
    run_merge(recipe, tmp_path / "run")
    before = contents(tmp_path / "run")
    with refuses(DataError, "was merged without data"):
        explain_run(tmp_path / "run")
    assert contents(tmp_path / "run") == before


def test_pictures_that_are_gone_leave_the_page(bench, tmp_path):
    run, _, _ = bench.explained(tmp_path)
    (run / "features.json").unlink()
    isthmus.report.write_report(run)
    assert "<img" not in (run / "report.html").read_text()
    (run / "features.json").write_text("{")
    with refuses(CheckpointError, "features.json"):
        isthmus.report.write_report(run)
    explain_run(run, ExplainOptions(**QUICK, claims=False))  # and explaining it again mends it
    assert "<img" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("wishes", "told"),
    [
        ({"images": 49}, "images 49"),
        ({"units": -1}, "units -1"),
        ({"spaces": 0}, "spaces 0"),
        ({"method": "forier"}, "did you mean 'fourier'"),
    ],
    ids=["images", "units", "spaces", "method"],
)
def test_wishes_that_cannot_be_met(wishes, told, tmp_path):
    with refuses(InputError, told):
        explain_run(tmp_path, ExplainOptions(**wishes))
