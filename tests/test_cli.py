"""The command line as a user meets it: real files, wrong files, one line and exit code 2."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from isthmus.checkpoint import hash_file
from isthmus.cli.commands import main
from isthmus.models import load_model
from isthmus.runs.recipe import read_recipe

ARCHITECTURE = "zoo:cnn?width=0.5"


class Code:
    def __reduce__(self):
        return (os.system, ("echo code ran > /tmp/code_ran_in_a_pickle",))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for seed in range(3):
        torch.manual_seed(seed)
        save_file(load_model(ARCHITECTURE).state_dict(), folder / f"{'abc'[seed]}.safetensors")
    good = load_file(folder / "a.safetensors")
    save_file(load_model("zoo:mlp?in_features=64&width=8").state_dict(), folder / "mlp.safetensors")
    save_file({k: v for k, v in good.items() if k != "head.bias"}, folder / "missing.safetensors")
    save_file({**good, "head.bias": torch.zeros(3)}, folder / "shape.safetensors")
    save_file({**good, "head.bias": torch.full((10,), float("nan"))}, folder / "nan.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "a.safetensors").read_bytes()[:5000])
    (folder / "code.pt").write_bytes(pickle.dumps({"weight": Code()}))
    (folder / "empty.npz").write_bytes(b"")
    return folder


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def merge(files, *more):
    return ["merge", files / "a.safetensors", files / "b.safetensors", "--model", ARCHITECTURE, *more]


def test_merge_writes_a_whole_run_folder(files, tmp_path, capsys):
    out = tmp_path / "run"
    code, printed, error = run(capsys, *merge(files, "--data", "digits", "-o", out))
    assert (code, error) == (0, "")
    assert "Merged" in printed
    names = {"model.safetensors", "alignment.safetensors", "recipe.yaml", "report.json", "report.html", "README.md"}
    assert {path.name for path in out.iterdir()} == names
    report = json.loads((out / "report.json").read_text())
    assert report["proof"]["max_error"] <= 1e-12
    assert report["models"][0]["sha256"] == hash_file(files / "a.safetensors")
    load_model(ARCHITECTURE).load_state_dict(load_file(out / "model.safetensors"))


def test_the_written_recipe_makes_the_same_bytes(files, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(capsys, *merge(files, "--weights", "3,1", "--data", "digits", "-o", first))[0] == 0
    assert run(capsys, "merge", first / "recipe.yaml", "-o", second)[0] == 0
    for name in ("model.safetensors", "recipe.yaml"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_recipe_refuses_a_file_that_changed(files, tmp_path, capsys):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes((files / "a.safetensors").read_bytes())
    arguments = ["merge", copy, files / "b.safetensors", "--model", ARCHITECTURE, "-o", tmp_path / "run"]
    assert run(capsys, *arguments)[0] == 0
    copy.write_bytes((files / "c.safetensors").read_bytes())
    code, _, error = run(capsys, "merge", tmp_path / "run" / "recipe.yaml", "-o", tmp_path / "again")
    assert code == 2
    assert "has changed" in error


def test_json_is_all_that_is_printed(files, tmp_path, capsys):
    code, printed, error = run(capsys, *merge(files, "--json", "-o", tmp_path / "run"))
    assert (code, error) == (0, "")
    assert json.loads(printed)["method"]["name"] == "weight_matching"


def test_dry_run_writes_nothing(files, tmp_path, capsys):
    code, printed, _ = run(capsys, *merge(files, "--restarts", "7", "--dry-run", "-o", tmp_path / "run"))
    assert code == 0
    assert "restarts: 7" in printed
    assert not list(tmp_path.iterdir())


def test_options_of_the_average_are_its_own(files, tmp_path, capsys):
    ties = ["--base", files / "c.safetensors", "--average", "ties"]
    code, _, error = run(capsys, *merge(files, "-o", tmp_path / "run", *ties, "--average.density", "0.5"))
    assert (code, error) == (0, "")
    recipe = read_recipe(tmp_path / "run" / "recipe.yaml")
    assert (recipe.merge_method, recipe.parameters) == ("ties", {"density": 0.5})
    code, _, error = run(capsys, *merge(files, "-o", tmp_path / "none", *ties, "--average.densty", "1"))
    assert code == 2
    assert "did you mean 'density'" in error
    code, _, error = run(capsys, *merge(files, "-o", tmp_path / "none", "--average", "ties"))
    assert code == 2
    assert "--base" in error
    assert not (tmp_path / "none").exists()


def test_compare_writes_a_table_and_a_picture(files, tmp_path, capsys):
    asked = ["--methods", "identity,weight-matching", "--averages", "mean", "--repairs", "raw,reset"]
    paths = [files / f"{name}.safetensors" for name in "abc"]
    code, printed, error = run(
        capsys, "compare", *paths, "--model", ARCHITECTURE, "--data", "digits", *asked, "-o", tmp_path / "out"
    )
    assert (code, error) == (0, "")
    assert "weight_matching" in printed
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "compare.json", "table.md", "compare.svg", "compare.png",
    }  # fmt: skip
    report = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert len(report["comparison"]["rows"]) == 4
    assert "ensemble" in (tmp_path / "out" / "table.md").read_text()
    assert report["cycles"] == []
    options = ["--model", ARCHITECTURE, "--data", "digits", "--methods", "identity,weight-matching,cca"]
    less = ["--averages", "mean", "--repairs", "raw", "--samples", "1000", "--json"]
    code, printed, error = run(capsys, "compare", *paths, *options, *less, "--cycles")
    assert (code, error) == (0, "")
    cycles = json.loads(printed)["cycles"]
    assert [each["method"] for each in cycles] == ["identity", "weight_matching"]  # maps of cca keep no function
    assert cycles[0]["share_lost"] == 0
    assert [line["models"] for line in cycles[1]["lines"]] == [[0, 1], [0, 2], [1, 2]]
    code, _, error = run(capsys, "compare", *paths[:2], *options, *less, "--cycles")
    assert code == 2
    assert "a cycle needs three" in error
    code, _, error = run(
        capsys,
        "compare",
        *paths,
        "--model",
        ARCHITECTURE,
        "--data",
        "digits",
        "--averages",
        "maen",
        "-o",
        tmp_path / "no",
    )
    assert code == 2
    assert "did you mean 'mean'" in error
    assert not (tmp_path / "no").exists()


def test_align_keeps_each_function(files, tmp_path, capsys):
    out = tmp_path / "aligned"
    arguments = ["align", *(files / f"{name}.safetensors" for name in "abc"), "--model", ARCHITECTURE, "-o", out]
    assert run(capsys, *arguments)[0] == 0
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    for name in "abc":
        models = []
        for folder in (files, out):
            model = load_model(ARCHITECTURE)
            model.load_state_dict(load_file(folder / f"{name}.safetensors"))
            models.append(model.double().eval())
        # A permuted float64 sum differs in its last digits only.
        torch.testing.assert_close(models[0](x), models[1](x), rtol=1e-10, atol=1e-10)
    assert load_file(files / "a.safetensors").keys() == load_file(out / "a.safetensors").keys()


def test_connect_draws_the_path(files, tmp_path, capsys):
    out = tmp_path / "path"
    arguments = ["connect", files / "a.safetensors", files / "b.safetensors", "--model", ARCHITECTURE]
    code, printed, _ = run(capsys, *arguments, "--data", "digits", "--points", "3", "-o", out)
    assert code == 0
    assert "barrier" in printed
    assert {path.name for path in out.iterdir()} == {"report.json", "curve.svg", "curve.png"}


ROWS = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, post):
        super().__init__()
        self.post, self.norm, self.up, self.down = post, nn.LayerNorm(12), nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x):
        if self.post:
            return self.norm(x + self.down(torch.relu(self.up(x))))
        return x + self.down(torch.relu(self.up(self.norm(x))))

class Rows(nn.Module):
    sample_shape = (1, 8, 8)

    def __init__(self, post=False):
        super().__init__()
        self.stem, self.block, self.norm, self.head = nn.Linear(8, 12), Block(post), nn.LayerNorm(12), nn.Linear(12, 10)
        for norm in (self.block.norm, self.norm):
            nn.init.uniform_(norm.weight, 0.5, 1.5)

    def forward(self, x):
        return self.head(self.norm(self.block(self.stem(x.squeeze(1)))).mean(1))
"""


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """A folder with a pre-norm network of a module of its own, and two checkpoints of it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows_of_pixels.py").write_text(ROWS)
    for seed in range(2):
        torch.manual_seed(seed)
        save_file(load_model("rows_of_pixels:Rows").state_dict(), tmp_path / f"{'ab'[seed]}.safetensors")
    return tmp_path


def test_one_command_merges_by_rotations(rows, capsys):
    arguments = ["a.safetensors", "b.safetensors", "--model", "rows_of_pixels:Rows", "--method", "orthogonal_matching"]
    code, _, error = run(capsys, "merge", *arguments, "--data", "digits", "-o", rows / "run")
    assert (code, error) == (0, "")
    report = json.loads((rows / "run" / "report.json").read_text())
    assert report["method"]["folded"]
    assert report["scores"]["aligned"] is not None
    assert report["curves"][0]["aligned"]["losses"][0] == pytest.approx(report["curves"][0]["naive"]["losses"][0])
    assert report["curves"][0]["aligned"]["losses"][-1] == pytest.approx(report["curves"][0]["naive"]["losses"][-1])
    merged = load_file(rows / "run" / "model.safetensors")
    assert bool((merged["norm.weight"] == 1).all())
    code, _, error = run(capsys, "align", *arguments, "--data", "digits", "-o", rows / "moved")
    assert (code, error) == (0, "")
    x = torch.rand(3, 1, 8, 8)
    for name in "ab":
        before, after = load_model("rows_of_pixels:Rows").eval(), load_model("rows_of_pixels:Rows").eval()
        before.load_state_dict(load_file(rows / f"{name}.safetensors"))
        after.load_state_dict(load_file(rows / "moved" / f"{name}.safetensors"))
        torch.testing.assert_close(after(x), before(x), rtol=1e-4, atol=1e-5)


def test_inspect_says_why_a_stream_is_only_permuted(rows, capsys):
    code, printed, _ = run(capsys, "inspect", "rows_of_pixels:Rows")
    assert code == 0
    assert "12 units, orthogonal fixing ones" in printed
    assert "cannot be folded" not in printed
    code, printed, _ = run(capsys, "inspect", "rows_of_pixels:Rows?post=true")
    assert code == 0
    assert "cannot be folded: aten.layer_norm" in " ".join(printed.split())


def test_inspect_shows_spaces_and_proof(capsys):
    code, printed, _ = run(capsys, "inspect", ARCHITECTURE)
    assert code == 0
    assert "features.0" in printed
    assert "proved" in printed


def test_train_then_merge_with_an_external_factory(tmp_path, capsys, monkeypatch):
    (tmp_path / "mynets.py").write_text(
        "from torch import nn\n"
        "def tiny(width=8):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    spec = "mynets:tiny?width=16"
    for seed in (0, 1):
        arguments = ["train", spec, "--data", "digits", "--epochs", "2", "--seed", seed, "-o", f"{seed}.safetensors"]
        code, printed, error = run(capsys, *arguments)
        assert code == 0, error
    code, printed, error = run(capsys, "merge", "0.safetensors", "1.safetensors", "--model", spec, "-o", "out")
    assert code == 0, error
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert "proved" in printed


LITTLE = ["--no-claims", "--units", "1", "--spaces", "1", "--steps", "1", "--images", "60"]


def test_explain_adds_to_a_run_folder(files, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(capsys, *merge(files, "--data", "digits", "--samples", "200", "-o", out))[0] == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    code, printed, error = run(capsys, "explain", out, *LITTLE)
    assert (code, error) == (0, "")
    for expected in ("60 images of digits (test split)", "features.4", "shared", "Matching, not averaging alone"):
        assert expected in printed
    assert {path.name for path in out.iterdir()} == {*before, "features.json"}
    report = json.loads((out / "report.json").read_text())
    assert report["explain"]["options"] == {
        "images": 60, "units": 1, "spaces": 1, "method": "fourier", "steps": 1, "claims": False,
    }  # fmt: skip
    assert report["explain"]["claims"] == []
    assert "were left out (--no-claims)" in (out / "report.html").read_text()
    # The other way to print it; and what cannot be done leaves the folder as it is.
    code, printed, error = run(capsys, "explain", out, "--no-claims", "--units", "0", "--images", "50", "--json")
    assert (code, error) == (0, "")
    assert json.loads(printed)["explain"]["data"]["images"] == 50
    kept = {path.name: path.read_bytes() for path in out.iterdir()}
    for more, told in (
        (["--pictures", "macco"], "did you mean 'maco'"),
        (["--images", "10"], "images 10"),
        (["--unit", "2"], "--units"),
    ):
        code, printed, error = run(capsys, "explain", out, *more)
        assert (code, printed) == (2, "")
        assert told in error
        assert error.count("\n") == 1
    (out / "alignment.safetensors").write_bytes(kept["alignment.safetensors"][:100])
    code, printed, error = run(capsys, "explain", out)
    assert (code, printed, error.count("\n")) == (2, "", 1)
    assert "alignment.safetensors" in error
    kept["alignment.safetensors"] = kept["alignment.safetensors"][:100]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == kept


def test_explain_refuses_what_is_no_explainable_run(files, tmp_path, capsys):
    copied = tmp_path / "a.safetensors"
    copied.write_bytes((files / "a.safetensors").read_bytes())
    plain = ["merge", copied, files / "b.safetensors", "--model", ARCHITECTURE, "--no-verify"]
    assert run(capsys, *plain, "-o", tmp_path / "bare")[0] == 0
    assert run(capsys, *plain, "--data", "digits", "--samples", "100", "-o", tmp_path / "run")[0] == 0
    copied.write_bytes((files / "c.safetensors").read_bytes())
    for folder, told in (("none", "report.json"), ("bare", "without data"), ("run", "has changed")):
        before = sorted((tmp_path / folder).glob("*"))
        code, printed, error = run(capsys, "explain", tmp_path / folder)
        assert (code, printed, error.count("\n")) == (2, "", 1)
        assert told in error
        assert sorted((tmp_path / folder).glob("*")) == before


REFUSED = {
    "other architecture": (["merge", "{a}", "{mlp}", "--model", ARCHITECTURE], "mlp.safetensors"),
    "missing key": (["merge", "{a}", "{missing}", "--model", ARCHITECTURE], "head.bias"),
    "wrong shape": (["merge", "{a}", "{shape}", "--model", ARCHITECTURE], "head.bias"),
    "NaN weight": (["merge", "{a}", "{nan}", "--model", ARCHITECTURE], "head.bias"),
    "truncated file": (["merge", "{a}", "{cut}", "--model", ARCHITECTURE], "cut.safetensors"),
    "pickle with code": (["merge", "{a}", "{code.pt}", "--model", ARCHITECTURE], "code.pt"),
    "missing file": (["merge", "{a}", "{none}", "--model", ARCHITECTURE], "none.safetensors"),
    "empty data": (["merge", "{a}", "{b}", "--model", ARCHITECTURE, "--data", "{empty.npz}"], "empty.npz"),
    "unknown data": (["merge", "{a}", "{b}", "--model", ARCHITECTURE, "--data", "digit"], "did you mean 'digits'"),
    "one checkpoint": (["merge", "{a}", "--model", ARCHITECTURE], "at least two"),
    "no checkpoint": (["merge", "--model", ARCHITECTURE], "checkpoints"),
    "no architecture": (["merge", "{a}", "{b}"], "--model"),
    "unknown method": (["merge", "{a}", "{b}", "--model", ARCHITECTURE, "--method", "wieght_matching"], "did you mean"),
    "unknown average": (["merge", "{a}", "{b}", "--model", ARCHITECTURE, "--average", "meen"], "did you mean 'mean'"),
    "unknown repair": (["merge", "{a}", "{b}", "--model", ARCHITECTURE, "--repair", "rest"], "did you mean 'reset'"),
    "unknown option": (["merge", "{a}", "{b}", "--model", ARCHITECTURE, "--restart", "3"], "did you mean '--restarts'"),
    "misspelt option": (["merge", "{a}", "{b}", "--modle", ARCHITECTURE], "did you mean '--model'"),
    "unknown network": (["merge", "{a}", "{b}", "--model", "zoo:resnet21"], "did you mean"),
    "method without data": (
        ["merge", "{a}", "{b}", "--model", ARCHITECTURE, "--method", "activation_matching"],
        "needs data",
    ),
    "weights that do not fit": (["merge", "{a}", "{b}", "--model", ARCHITECTURE, "--weights", "1"], "2 numbers"),
    "wrong input shape": (["merge", "{a}", "{b}", "--model", ARCHITECTURE, "--input", "7,8,8"], "--input"),
    "bad input shape": (["merge", "{a}", "{b}", "--model", ARCHITECTURE, "--input", "big"], "--input"),
    "data of another shape": (
        ["merge", "{a}", "{b}", "--model", "zoo:cnn?width=0.5&in_channels=3", "--data", "digits"],
        "a.safetensors",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_line_and_nothing_is_written(name, files, tmp_path, capsys):
    arguments, told = REFUSED[name]
    places = {"{" + p.name.removesuffix(".safetensors") + "}": str(p) for p in files.iterdir()}
    places["{none}"] = str(files / "none.safetensors")
    out = tmp_path / "run"
    code, printed, error = run(capsys, *(places.get(word, word) for word in arguments), "-o", out)
    assert code == 2
    assert printed == ""
    assert error.count("\n") == 1
    assert told in error
    assert not list(tmp_path.iterdir())
    assert not Path("/tmp/code_ran_in_a_pickle").exists()


def test_an_existing_folder_stays_without_force(files, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(capsys, *merge(files, "-o", out))[0] == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    code, _, error = run(capsys, *merge(files, "--seed", "1", "-o", out))
    assert code == 2
    assert "--force" in error
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert run(capsys, *merge(files, "--seed", "1", "--force", "-o", out))[0] == 0
    assert (out / "report.json").read_bytes() != before["report.json"]


def test_a_misspelt_recipe_key_is_refused(files, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"models: [{{model: {files / 'a.safetensors'}}}, {{model: {files / 'b.safetensors'}}}]\n"
        f"architecture: '{ARCHITECTURE}'\nmerge_methd: mean\n"
    )
    code, _, error = run(capsys, "merge", recipe, "-o", tmp_path / "run")
    assert code == 2
    assert "did you mean 'merge_method'" in error


def test_the_installed_command_exits_with_two(tmp_path):
    command = Path(sys.executable).parent / "isthmus"
    done = subprocess.run([command, "merge", "x", "-o", tmp_path / "o"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("isthmus: ")


@pytest.mark.slow
def test_demo_tells_the_whole_story(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, printed, error = run(capsys, "demo")
    assert (code, error) == (0, "")
    report = json.loads((tmp_path / "runs" / "demo" / "report.json").read_text())
    parents = [score["accuracy"] for score in report["scores"]["parents"]]
    assert min(parents) > 0.97
    assert report["scores"]["naive"]["accuracy"] < 0.5  # averaging fails
    assert report["scores"]["merged"]["accuracy"] > min(parents) - 0.05  # aligned and repaired, it works
    assert report["curves"][0]["aligned"]["barrier"] < report["curves"][0]["naive"]["barrier"] / 2
    told = report["explain"]
    assert len(told["claims"]) == len(told["questions"]) == 5
    # Deeper than the first space, matching keeps what averaging alone loses.
    for space in told["spaces"][1:]:
        assert min(space["correlation"]["merged"]) > max(space["correlation"]["naive"]) + 0.1
        assert space["labels"]["lost"] < space["naive_labels"]["lost"]
    page = (tmp_path / "runs" / "demo" / "report.html").read_text()
    assert "What excites a unit" in page
    assert page.count("<img") > 50
    assert "report.html" in printed
