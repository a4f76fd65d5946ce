"""Networks from other libraries and from files: what is built, what is refused, and what is left alone."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import isthmus
from helpers.refusals import refuses
from isthmus.checkpoint import load_state, save_state
from isthmus.cli.commands import main
from isthmus.data import load_data
from isthmus.errors import DataError, ModelError
from isthmus.models import SOURCES, absolute_spec, load_model, parse_spec, spoken_specs
from isthmus.runs.example import example_input

NEEDS_VISION = "timm and torchvision are not in the extra `dev`, since they would replace torch by another build"


class Net(nn.Module):
    """A norm with statistics, dropout, a tied tensor and an input by name."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.middle, self.again, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.again.weight = self.middle.weight

    def forward(self, x, *, scale):
        x = self.drop(torch.relu(self.norm(self.first(x))))
        x = torch.relu(self.again(torch.relu(self.middle(x))))
        return self.last(x) * scale.unsqueeze(1)


def example(samples=2):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(samples, 6, generator=generator),), {"scale": torch.rand(samples, generator=generator)}


def export(model, path, *, dynamic=True):
    args, kwargs = example()
    batch = torch.export.Dim("batch", min=2)
    shapes = {"x": {0: batch}, "scale": {0: batch}} if dynamic else None
    torch.export.save(torch.export.export(model, args, kwargs, dynamic_shapes=shapes), path)
    return path


@pytest.fixture
def program(tmp_path):
    torch.manual_seed(0)
    return export(Net().eval(), tmp_path / "net.pt2")


# ---- specifications


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("mlp", ("zoo", "mlp", "")),
        ("zoo:mlp?width=3", ("zoo", "mlp", "width=3")),
        ("a.b:make?x=y:z", ("a.b", "make", "x=y:z")),
        ("hf:/models/a:b", ("hf", "/models/a:b", "")),
        ("timm:resnet18.a1_in1k?num_classes=3", ("timm", "resnet18.a1_in1k", "num_classes=3")),
        ("torchvision:resnet18", ("torchvision", "resnet18", "")),
        ("pt2:net.bin", ("pt2", "net.bin", "")),
        ("runs/net.pt2", ("pt2", "runs/net.pt2", "")),
        ("pt2:runs/net.pt2", ("pt2", "runs/net.pt2", "")),
        ("C:/net.pt2", ("pt2", "C:/net.pt2", "")),
    ],
)
def test_a_specification_names_a_source_a_network_and_arguments(spec, parts):
    assert parse_spec(spec) == parts


def test_every_text_that_lists_the_sources_lists_them_all(capsys):
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for prefix, source in SOURCES.items():
        assert prefix == source.prefix
        assert source.example in spoken_specs()
        assert f"| `{source.example}" in readme
        with refuses(ModelError, source.example):
            load_model("zoo:none")
    assert main(["merge", "a.safetensors", "b.safetensors", "-o", "out"]) == 2
    assert spoken_specs() in capsys.readouterr().err


def test_only_paths_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = Path(tmp_path).resolve()
    assert absolute_spec("hf:model") == f"hf:{here}/model"
    assert absolute_spec("net.pt2") == absolute_spec("pt2:net.pt2") == f"pt2:{here}/net.pt2"
    for spec in ("mlp?width=3", "zoo:mlp", "timm:resnet18?x=1", "a.b:make"):
        assert absolute_spec(spec) == spec


@pytest.mark.parametrize(
    ("spec", "absent", "extra"),
    [
        ("hf:folder", "transformers", "hf"),
        ("timm:resnet18", "timm", "vision"),
        ("timm:resnet18", "torchvision", "vision"),
        ("torchvision:resnet18", "torchvision", "vision"),
    ],
)
def test_a_missing_library_is_named_with_the_command_that_installs_it(spec, absent, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, absent, None)
    if spec.startswith("timm") and absent == "timm":
        monkeypatch.setattr("isthmus.models.from_timm.import_torchvision", lambda: None)
    with refuses(ModelError, rf"{absent} is not installed; run pip install 'isthmus\[{extra}\]' torch==\d"):
        load_model(spec)


def test_the_library_itself_imports_none_of_them():
    code = (
        "import sys, isthmus, isthmus.cli, isthmus.runs.run_merge\n"
        "print({'transformers', 'timm', 'torchvision'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# ---- torchvision beside a torch that its binary part does not fit


PACKAGES = {
    "whole": "defined_itself = True",
    "another operator missing": "raise RuntimeError('operator torchvision::roi_align does not exist')",
    "cannot be linked": "raise ImportError('libcudart is absent')",
    # Registers a shape for an operator, as the real package does.
    "operators missing": "import torch\ntorch.library.register_fake('torchvision::nms')(lambda *a: a)",
}
DECLARING = """
import importlib, sys, torch
from isthmus.models.from_torchvision import import_torchvision
for number in range(int(sys.argv[1])):
    sys.path.insert(0, str(number))
    sys.modules.pop("torchvision", None)
    importlib.invalidate_caches()
    try:
        import_torchvision()
        outcome = "imported"
    except Exception as error:
        outcome = type(error).__name__
    print(outcome, *(name for name in ("nms", "qnms") if hasattr(torch.ops.torchvision, name)))
    sys.path.remove(str(number))
"""


def test_missing_operators_are_declared_only_where_their_absence_stops_the_import(tmp_path):
    for number, text in enumerate(PACKAGES.values()):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "torchvision.py").write_text(text)
    result = subprocess.run(
        [sys.executable, "-c", DECLARING, str(len(PACKAGES))], capture_output=True, text=True, check=True, cwd=tmp_path,
        env={"PYTHONPATH": str(Path(isthmus.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    printed = dict(zip(PACKAGES, result.stdout.splitlines(), strict=True))
    assert printed == {
        "whole": "imported",
        "another operator missing": "RuntimeError",
        "cannot be linked": "ImportError",
        "operators missing": "imported nms qnms",
    }


# ---- exported programs


@pytest.mark.parametrize("prefix", ["", "pt2:"])
def test_an_exported_program_is_the_model_it_was_made_of(program, prefix):
    torch.manual_seed(0)
    model, loaded = Net().eval(), load_model(f"{prefix}{program}")
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert not any(module.training for module in loaded.eval().modules())
    args, kwargs = example(5)
    assert torch.equal(loaded(*args, **kwargs), model(*args, **kwargs))


def test_an_exported_program_has_the_symmetry_of_its_model(program):
    model, loaded = Net().eval(), load_model(str(program))
    batch, assumed = example_input(loaded, None, None)
    assert assumed == ""
    assert torch.equal(batch.args[0], example()[0][0])
    own, other = (isthmus.trace(each, *batch.args, kwargs=batch.kwargs) for each in (model, loaded))
    assert own.hash == other.hash
    assert own.free_units == 8
    assert own.tied == other.tied == {"again.weight": "middle.weight"}
    isthmus.verify(loaded, other, *batch.args, kwargs=batch.kwargs, trials=2)


def test_an_example_survives_copies_of_the_program(program):
    loaded = copy.deepcopy(copy.deepcopy(load_model(str(program))))
    assert torch.equal(example_input(loaded.eval(), None, None)[0].args[0], example()[0][0])


def test_a_program_in_training_mode_is_refused(tmp_path):
    with refuses(ModelError, r"runs in training mode; export the model again after model\.eval\(\)"):
        load_model(str(export(Net().train(), tmp_path / "net.pt2")))


def test_programs_are_merged_and_the_run_can_be_repeated(program, tmp_path, capsys):
    for seed in range(2):
        torch.manual_seed(seed)
        save_state(Net().state_dict(), tmp_path / f"{seed}.safetensors")
    paths = [str(tmp_path / f"{seed}.safetensors") for seed in range(2)]
    assert main(["merge", *paths, "--model", str(program), "-o", str(tmp_path / "run")]) == 0
    assert main(["merge", str(tmp_path / "run" / "recipe.yaml"), "-o", str(tmp_path / "again")]) == 0
    assert "written to" in capsys.readouterr().out
    first, again = (load_state(tmp_path / name / "model.safetensors") for name in ("run", "again"))
    assert first.keys() == Net().state_dict().keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_program_of_one_batch_size_is_refused_on_data(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 10)).eval()
    torch.export.save(torch.export.export(model, (torch.zeros(2, 1, 8, 8),)), tmp_path / "net.pt2")
    loaded = load_model(str(tmp_path / "net.pt2"))
    assert isthmus.trace(loaded, *example_input(loaded, None, None)[0].args).free_units == 4
    with refuses(DataError, "runs on 2 samples of digits and not on 3 .*dynamic batch size"):
        example_input(loaded, None, load_data("digits"))


# ---- timm and torchvision


def test_torchvision_networks_state_their_images_and_bring_no_weights():
    models = vision().models
    torch.manual_seed(0)
    model = load_model("torchvision:resnet18?num_classes=7")
    torch.manual_seed(0)
    same = models.resnet18(weights=None, num_classes=7)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), same.state_dict().values(), strict=True))
    assert model.sample_shape == (3, 224, 224)
    with torch.device("meta"):
        assert load_model("torchvision:vit_b_32?image_size=64").sample_shape == (3, 64, 64)
        fully_convolutional = load_model("torchvision:fcn_resnet50")
    assert not hasattr(fully_convolutional, "sample_shape")  # takes images of any size
    for spec, says in (
        ("torchvision:resnet19", r"no network 'resnet19' \(did you mean 'resnet1"),
        ("torchvision:resnet18?weights=DEFAULT", "weights= would download"),
        ("torchvision:resnet18?weights_backbone=DEFAULT", "weights_backbone= would download"),
        ("torchvision:resnet18?num_clases=3", "num_clases"),
    ):
        with refuses(ModelError, says):
            load_model(spec)


def test_timm_networks_state_their_images_and_bring_no_weights():
    vision()
    timm = pytest.importorskip("timm", reason=NEEDS_VISION)
    torch.manual_seed(0)
    model = load_model("timm:test_resnet?num_classes=7&in_chans=1")
    torch.manual_seed(0)
    same = timm.create_model("test_resnet", num_classes=7, in_chans=1)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), same.state_dict().values(), strict=True))
    assert model.sample_shape == (1, 160, 160)
    assert load_model("timm:test_vit?img_size=32").sample_shape == (3, 32, 32)
    for spec, says in (
        ("timm:resnet18x", "timm has no network 'resnet18x' .did you mean"),
        ("timm:hf-hub:owner/model", "timm has no network 'hf-hub:owner/model'"),
        ("timm:resnet18?pretrained=true", "pretrained= would load weights"),
        ("timm:resnet18?checkpoint_path=x.pth", "checkpoint_path= would load weights"),
    ):
        with refuses(ModelError, says):
            load_model(spec)


def vision():
    """The torchvision package, also where its binary part does not fit."""
    from isthmus.models.from_torchvision import import_torchvision

    try:
        return import_torchvision()
    except ImportError:
        pytest.skip(NEEDS_VISION)
