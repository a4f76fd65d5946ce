"""Run folders from recipes, and example inputs that nobody named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from isthmus.data import load_data
from isthmus.errors import CheckpointError, DataError, InputError
from isthmus.models import load_model
from isthmus.report.page import read_report
from isthmus.runs.example import example_input
from isthmus.runs.recipe import AlignOptions, DataOptions, ParentOptions, Recipe, read_recipe
from isthmus.runs.run_align import run_align
from isthmus.runs.run_connect import run_connect
from isthmus.runs.run_merge import run_merge

ARCHITECTURE = "zoo:cnn?width=0.5"


def parents(folder, count=2, dtype=torch.float32):
    members = []
    for seed in range(count):
        torch.manual_seed(seed)
        (folder / str(seed)).mkdir()
        path = folder / str(seed) / "model.safetensors"
        save_file(
            {k: v.to(dtype) if v.is_floating_point() else v for k, v in load_model(ARCHITECTURE).state_dict().items()},
            path,
        )
        members.append(ParentOptions(model=str(path)))
    return members


def test_three_models_become_one(tmp_path):
    recipe = Recipe(
        models=parents(tmp_path, 3), architecture=ARCHITECTURE, data=DataOptions(name="digits", samples=200)
    )
    report = run_merge(recipe, tmp_path / "run")
    assert len(report.scores.parents) == 3
    assert [pair["models"] for pair in report.curves] == [[0, 1], [0, 2], [1, 2]]
    assert report.curves[2]["aligned"]["lambdas"] == (0.0, 0.5, 1.0)
    assert "mean loss barrier between two" in report.verdict
    assert [len(space["moved"]) for space in report.symmetry["spaces"]] == [3, 3, 3]
    assert "3 models" in report.verdict


MERGE_KEYS = [
    "isthmus", "created", "command", "seed", "versions", "model", "models", "data", "assumed", "method", "average",
    "repair", "gained_biases", "proof", "symmetry", "scores", "curves", "simplex", "seconds", "verdict",
]  # fmt: skip
ALIGN_KEYS = [key for key in MERGE_KEYS if key not in ("average", "repair", "gained_biases", "curves", "simplex")]
ALIGN_KEYS[ALIGN_KEYS.index("scores")] = "aligned"


def test_the_report_on_disk_has_the_same_keys_ever_and_is_read_back_whole(tmp_path):
    members = parents(tmp_path)
    data = DataOptions(name="digits", samples=200)
    run_merge(Recipe(models=members, architecture=ARCHITECTURE, data=data), tmp_path / "merged")
    run_align(Recipe(models=members, architecture=ARCHITECTURE), tmp_path / "aligned")
    for name, keys in (("merged", MERGE_KEYS), ("aligned", ALIGN_KEYS)):
        path = tmp_path / name / "report.json"
        content = json.loads(path.read_text())
        assert list(content) == keys
        assert read_report(path).to_json() == content
        path.write_text(json.dumps({**content, "of a later version": [1]}))
        assert read_report(path).to_json() == {**content, "of a later version": [1]}
    merged = json.loads((tmp_path / "merged" / "report.json").read_text())
    assert list(merged["scores"]) == ["parents", "ensemble", "naive", "naive_mended", "aligned", "merged"]
    assert list(merged["scores"]["parents"][0]) == ["loss", "accuracy", "count"]
    assert list(merged["proof"]) == ["max_error", "tolerance", "trials", "weakest_control", "no_ops", "dtype"]


def test_files_of_one_name_are_numbered(tmp_path):
    recipe = Recipe(models=parents(tmp_path), architecture=ARCHITECTURE)
    report = run_align(recipe, tmp_path / "run")
    assert report.aligned == ["0-model.safetensors", "1-model.safetensors"]


def test_a_folder_is_a_checkpoint_and_its_config_is_kept(tmp_path):
    members = parents(tmp_path)
    (tmp_path / "0" / "config.json").write_text('{"a": 1}')
    folders = [ParentOptions(model=str(tmp_path / str(index))) for index in range(2)]
    run_merge(Recipe(models=folders, architecture=ARCHITECTURE), tmp_path / "run")
    run_merge(Recipe(models=members, architecture=ARCHITECTURE), tmp_path / "again")
    assert (tmp_path / "run" / "config.json").read_text() == '{"a": 1}'
    bytes_of = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "again")]
    assert bytes_of[0] == bytes_of[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_out_dtype_is_written(tmp_path, dtype):
    recipe = Recipe(models=parents(tmp_path), architecture=ARCHITECTURE, out_dtype=dtype)
    run_merge(recipe, tmp_path / "run")
    state = load_file(tmp_path / "run" / "model.safetensors")
    assert {t.dtype for t in state.values() if t.is_floating_point()} == {getattr(torch, dtype)}
    assert all(t.dtype == torch.int64 for name, t in state.items() if name.endswith("num_batches_tracked"))


def test_the_report_is_plain_json(tmp_path):
    recipe = Recipe(models=parents(tmp_path), architecture=ARCHITECTURE, data=DataOptions(name="digits", samples=200))
    report = run_merge(recipe, tmp_path / "run")
    text = (tmp_path / "run" / "report.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["verdict"] == report.verdict
    assert read_recipe(tmp_path / "run" / "recipe.yaml").models[0].sha256 == report.provenance.models[0].sha256


def test_no_proof_is_said_so(tmp_path):
    recipe = Recipe(models=parents(tmp_path), architecture=ARCHITECTURE, verify=False)
    assert run_merge(recipe, tmp_path / "run").proof is None
    assert "--no-verify" in (tmp_path / "run" / "report.html").read_text()


def test_nothing_is_written_when_the_last_step_fails(tmp_path, monkeypatch):
    recipe = Recipe(models=parents(tmp_path), architecture=ARCHITECTURE)

    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("isthmus.runs.folder.write_report", full_disk)
    with pytest.raises((OSError, CheckpointError), match="No space left"):
        run_merge(recipe, tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_connect_needs_two_models_and_data(tmp_path):
    members = parents(tmp_path, 3)
    with pytest.raises(InputError, match="a line connects two"):
        run_connect(Recipe(models=members, architecture=ARCHITECTURE, data=DataOptions(name="digits")))
    with pytest.raises(DataError, match="--data"):
        run_connect(Recipe(models=members[:2], architecture=ARCHITECTURE))


def test_the_first_weight_suggests_an_input_and_it_is_said():
    model = nn.Sequential(nn.Conv2d(5, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    batch, assumed = example_input(model.eval(), None, None)
    assert batch.args[0].shape[1] == 5
    assert "5" in assumed


def test_an_input_that_cannot_be_guessed_is_asked_for():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 2)

        def forward(self, x):
            return self.layer(x.reshape(-1, 3, 2, 1).flatten(1)) + x.view(-1, 1, 2, 3)[:, 0, 0, :2] * x[:, 7:9]

    with pytest.raises(InputError, match="--input"):
        example_input(Picky().eval(), None, None)


def test_data_that_does_not_fit_the_model_is_named():
    with pytest.raises(DataError, match="digits"):
        example_input(load_model("zoo:cnn?in_channels=3").eval(), None, load_data("digits"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"align": AlignOptions(method="weight_matchin")}, "did you mean 'weight_matching'"),
        ({"align": AlignOptions(options={"restart": 2})}, "did you mean 'restarts'"),
        ({"out_dtype": "bfloat"}, "did you mean 'bfloat16'"),
        (
            {"models": [ParentOptions(model="a", parameters={"wieght": 1.0}), ParentOptions(model="b")]},
            "did you mean 'weight'",
        ),
    ],
)
def test_a_recipe_is_checked_before_anything_is_read(changes, told):
    recipe = Recipe(models=[ParentOptions(model="a"), ParentOptions(model="b")], architecture=ARCHITECTURE)
    with pytest.raises(InputError, match=told):
        recipe.model_copy(update=changes).check()


def test_weights_by_layer_in_a_recipe(tmp_path):
    members = parents(tmp_path)
    head = "head"
    members[0].parameters = {"weight": {head: 1.0, "": 3.0}}
    members[1].parameters = {"weight": {head: 0.0}}
    recipe = Recipe(models=members, architecture=ARCHITECTURE, verify=False)
    assert recipe.coefficients == {"": [3.0, 1.0], head: [1.0, 0.0]}
    report = run_merge(recipe, tmp_path / "run")
    assert report.average.coefficients == [0.75, 0.25]
    assert report.average.coefficients_by_path == {head: [1.0, 0.0]}
    assert "in <code>head</code> 1" in (tmp_path / "run" / "report.html").read_text()
    merged, first = load_file(tmp_path / "run" / "model.safetensors"), load_file(members[0].model)
    assert torch.equal(merged["head.bias"], first["head.bias"])
    again = read_recipe(tmp_path / "run" / "recipe.yaml")
    assert again.coefficients == recipe.coefficients


def test_a_weight_for_a_layer_that_is_not_there_is_named(tmp_path):
    members = parents(tmp_path)
    members[0].parameters = {"weight": {"haed": 1.0}}
    with pytest.raises(InputError, match="did you mean 'head'"):
        run_merge(Recipe(models=members, architecture=ARCHITECTURE, verify=False), tmp_path / "run")
