"""The public face: what users get back tells itself in one short line, and every name leads where it says."""

import dataclasses
import importlib
import inspect
import pkgutil
import runpy
import sys
from functools import cache
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import isthmus
from isthmus import average, data, explain, match, symmetry
from isthmus.symmetry import Alignment, LinearMap, Permutation

LONGEST = 200
FACES = (isthmus, symmetry, match, average, explain, data)


class Bottleneck(nn.Module):
    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.downsample = nn.Sequential()
        if stride > 1 or channels != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x):
        branch = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))))
        return F.relu(branch + self.downsample(x))


class ResNet50(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        blocks, channels = [], 64
        for stage, depth in enumerate((3, 4, 6, 3)):
            for block in range(depth):
                blocks.append(Bottleneck(channels, 64 << stage, 2 if stage and not block else 1))
                channels = 4 * (64 << stage)
        self.blocks, self.fc = nn.Sequential(*blocks), nn.Linear(channels, 1000)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.fc(self.blocks(x).mean(dim=(2, 3)))


@cache
def found() -> isthmus.Symmetry:
    """The symmetry of a ResNet50, found without weights."""
    with torch.device("meta"):
        return isthmus.trace(ResNet50(), torch.empty(2, 3, 64, 64))


def lists(length: int) -> tuple[float, ...]:
    return tuple(1 / (1 + index) for index in range(length))


@cache
def objects() -> dict[str, object]:
    """One large object of every public class that holds results, by the class's name."""
    spaces, long = found(), "layer4.2.very_long_module_name." * 5
    space = max(spaces, key=lambda space: space.size)
    alignment = Alignment(spaces, ({s.name: Permutation.identity(s) for s in spaces},) * 2, "weight_matching", 812.4)
    moments = symmetry_moments(space.size)
    score = isthmus.Score(0.123456789, 0.987654321, 50_000)
    row = isthmus.Row(long, long, "repair", *lists(4), 10.5, 1 << 30, note=long)
    pixels = torch.zeros(7, 3, 32, 32)
    images = data.Batches(pixels, torch.zeros(7, dtype=torch.int64), 2)
    statistics = explain.ImageStatistics(*torch.zeros(3, 3), torch.eye(3), torch.zeros(3, 32, 17))
    units = torch.zeros(space.size)
    two = torch.zeros(2, space.size)
    fates = explain.SpaceFates(long, ("A", "B"), 0.5, two.long().numpy(), units, units, two, two, two, units)
    overlap = explain.spectrum.Overlap(0.0, 10.123456, 12.123456, 2048, 2048)
    layer = explain.LayerSpectrum(
        long,
        (1, 2048, 512),
        *(lists(512),) * 4,
        0.0,
        1e-10,
        (overlap,),
        lists(512),
        0.5,
        lists(512),
        None,
        "",
        1.0,
        0.5,
    )
    part = explain.directions.MatchedPart("top", 0.25, 0.5, 1.0, 0.5, 0.1, 0.05, {0.0: 0.5, 0.3: 0.6})
    made = [
        spaces,
        space,
        *(each for each in (*spaces.frozen, *spaces.gains, *spaces.gauges)),
        *(site for each in spaces for site in each.sites),
        dataclasses.replace(space, name=long, parent=long),
        isthmus.Frozen(long, "0, 1", 2048, "aten.some_operation.default", long, long, expected=False),
        isthmus.Gain(long, 1.0, long, (symmetry.Consumer(long, 1, long),) * 30),
        isthmus.Gain(long, obstacle=long),
        isthmus.Gauge(long, "rotation", space.sites),
        symmetry.Consumer(long, 1, long),
        alignment,
        dataclasses.replace(alignment, method=long, converged=False, details={long: long}),
        Permutation(np.arange(2048)[::-1]),
        LinearMap(torch.eye(2048), torch.eye(2048)),
        moments,
        moments["space"],
        isthmus.Proof(1e-14, 1e-11, 8, {f"{long}{index}": 0.1 for index in range(160)}, (long,) * 40),
        isthmus.Curve(*(lists(1001),) * 5, "reset"),
        isthmus.Simplex((lists(9),) * 9, *(lists(9),) * 4, "reset"),
        isthmus.Plane(lists(99), lists(99), ((0.0, 0.0),) * 3, (lists(99),) * 99, (lists(99),) * 99),
        isthmus.CycleError(long, ((0, 1, 2),) * 60, {long: lists(60)}, {long: lists(60)}),
        isthmus.Comparison((score,) * 9, score, (row,) * 99),
        row,
        score,
        images,
        data.DataSet(long, pixels, images.y, pixels, images.y, 10, lists(3), lists(3)),
        data.Batch((pixels,), {"mask": pixels}, images.y),
        average.Coefficients(lists(50), {f"{long}{index}": lists(50) for index in range(160)}),
        average.AveragingProblem([zoo_cnn().state_dict()] * 2, average.Coefficients((0.5, 0.5)), zoo_cnn()),
        average.Averaged(zoo_cnn().state_dict(), frozenset(zoo_cnn().state_dict())),
        match.MatchingProblem([zoo_cnn()] * 2, spaces, images),
        *(method() for method in match.METHODS.values()),
        *(each() for each in average.AVERAGES.values()),
        explain.Claim(long, long, "holds", long),
        explain.Pictures(pixels, units[:7], tuple(range(7)), long, "pre", units[:3], units[:3], 1.0),
        statistics,
        explain.FourierImages(),
        explain.Maco(),
        explain.CKAMatrix((long,) * 54, np.zeros((54, 54)), 2000, 4),
        layer,
        explain.Spectra((layer,) * 54, {long: long}, 10.0, 5.0, True, "weight_matching"),
        overlap,
        part,
        explain.Intervention((part,) * 40, "reset"),
        fates,
        explain.UnitFates({f"{long}{index}": fates for index in range(50)}, {long: long}, moments, 2000),
        explain.TaylorBarrier(0.123456789, 0.123456789, 0.123456789, 10_000),
        spaces.traced,
        spaces.traced.program,
        *spaces.traced.contractions[:1],
        *spaces.traced.batch_norms[:1],
    ]
    return {f"{type(each).__name__} {index}": each for index, each in enumerate(made)}


def symmetry_moments(units: int) -> isthmus.Moments:
    space = isthmus.observe.moments.SpaceMoments(100, torch.zeros(2, units), torch.zeros(1).expand(2, units, 2, units))
    return isthmus.Moments({"space": space}, "post", 2000)


@cache
def zoo_cnn() -> nn.Module:
    return isthmus.load_model("zoo:cnn?width=3")


def test_every_public_class_tells_itself_in_one_short_line_without_arrays():
    for name, each in objects().items():
        text = repr(each)
        assert len(text) <= LONGEST, f"{name}: {len(text)} characters: {text}"
        assert "\n" not in text, f"{name}: {text}"
        assert "tensor(" not in text, text
        assert "array(" not in text, text
        assert text.startswith(f"{type(each).__name__}("), text


def test_no_public_class_is_left_out():
    built = {type(each) for each in objects().values()} | {isthmus.PartialZip}  # which has a test of its own
    for face in FACES:
        for name in face.__all__:
            thing = getattr(face, name)
            if inspect.isclass(thing) and not issubclass(thing, Exception | isthmus.Group):
                abstract = inspect.isabstract(thing) or getattr(thing, "_is_protocol", False)
                assert abstract or thing in built, f"{face.__name__}.{name} has no object in this test"


def test_a_partial_merge_tells_itself():
    model = zoo_cnn()
    labels = torch.zeros(8, dtype=torch.int64)
    joined = isthmus.partial_zip([model, model], [(torch.randn(8, 1, 8, 8), labels)] * 2)
    assert repr(joined).startswith("PartialZip(2 models, ")
    assert len(repr(joined)) <= LONGEST


def test_lines_say_what_the_objects_hold():
    spaces = found()
    units, frozen = spaces.free_units, len(spaces.frozen)
    assert repr(spaces) == f"Symmetry({len(spaces)} spaces, {units:,} free units, {frozen} frozen axes)"
    one = {space.name: Permutation.identity(space) for space in spaces}
    alignment = Alignment(spaces, (one, one), "weight_matching", 812.4)
    expected = f"Alignment(weight_matching, 2 models, {len(spaces)} spaces, objective 812.4, converged)"
    assert repr(alignment) == expected
    assert repr(dataclasses.replace(alignment, converged=False)).endswith("812.4, not converged)")


def test_a_printed_symmetry_has_a_row_for_each_space():
    spaces = found()
    head, *rows, rest = str(spaces).splitlines()
    assert head.split() == ["space", "size", "copies", "group", "parent", "sites"]
    assert len(rows) == len(spaces)
    for space, row in zip(spaces, rows, strict=True):
        name, size, copies, *_, parent, sites = row.split()
        assert (name, size.replace(",", ""), copies) == (space.name, str(space.size), str(space.copies))
        assert (parent, sites) == (space.parent or "–", str(len(space.sites)))
        assert row.index(space.group.value) == head.index("group")
    assert f"{spaces.free_units:,} free units" in rest
    assert f"{len(spaces.frozen)} frozen axes" in rest


def test_the_table_for_notebooks_has_the_same_rows_and_escapes_names():
    spaces = dataclasses.replace(found(), spaces=(dataclasses.replace(found().spaces[0], name="<b>&"),))
    table = spaces._repr_html_()
    assert table.count("<tr>") == 1 + len(spaces)
    assert '<td style="text-align: left">&lt;b&gt;&amp;</td>' in table
    assert "<b>" not in table


def test_a_symmetry_without_spaces_is_told_too():
    empty = isthmus.Symmetry((), (), {})
    assert repr(empty) == "Symmetry(0 spaces, 0 free units, 0 frozen axes)"
    assert str(empty).splitlines()[-1] == "0 free units; 0 frozen axes"


def test_the_top_level_has_what_a_quick_start_needs():
    for name in ("METHODS", "AVERAGES", "load_model", "load_data", "load_module", "save_state", "__version__"):
        assert name in isthmus.__all__
    assert isthmus.METHODS is match.METHODS
    assert isthmus.AVERAGES is average.AVERAGES
    assert all(hasattr(isthmus, name) for name in isthmus.__all__)


def test_the_version_is_that_of_the_installed_distribution():
    from importlib.metadata import version

    assert isthmus.__version__ == version("isthmus")


def test_python_runs_the_package(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["isthmus", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("isthmus", run_name="__main__")
    assert ended.value.code == 0
    assert "merge" in capsys.readouterr().out


def modules() -> list[str]:
    walked = pkgutil.walk_packages(isthmus.__path__, "isthmus.")
    return [module.name for module in walked if module.name != "isthmus.__main__"]


@pytest.mark.parametrize("name", modules())
def test_a_path_to_a_module_leads_to_a_module(name):
    module = importlib.import_module(name)
    parent, _, own = name.rpartition(".")
    assert isinstance(module, ModuleType)
    assert getattr(importlib.import_module(parent), own) is module


@pytest.mark.parametrize("face", FACES, ids=lambda face: face.__name__)
def test_no_module_takes_the_name_of_something_else(face):
    inside = {module.name for module in pkgutil.iter_modules(face.__path__)}
    for name in face.__all__:
        thing = getattr(face, name)
        assert not inspect.ismodule(thing) or name in inside
        assert inspect.ismodule(thing) or name not in inside, f"{face.__name__}.{name} is a module too"
