"""What `isthmus inspect` shows: the tree of spaces, what is frozen and where, warnings."""

import io
import json
import os
import resource

import pytest
import torch
from rich.console import Console
from torch import nn

from helpers.refusals import refuses
from isthmus import trace, verify
from isthmus.cli.commands import main
from isthmus.cli.trees import freeze_warnings, frozen_tree, space_tree, spoken_gauges
from isthmus.errors import ModelError
from isthmus.models.structure import parameters_on_meta
from isthmus.runs.facts import describe_symmetry
from isthmus.runs.run_inspect import _build_example, inspect_model
from isthmus.symmetry import Frozen, Symmetry

NET = """
import torch
from torch import Tensor, nn

if not hasattr(torch.ops.inspected, "mystery"):
    torch.library.custom_op("inspected::mystery", lambda x: x.flip(1), mutates_args=(), schema="(Tensor x) -> Tensor")
    torch.library.register_fake("inspected::mystery", torch.empty_like)

class Middle(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 6)

    def forward(self, x):
        return torch.ops.inspected.mystery(self.layer(x))

def make():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Middle(), nn.Linear(6, 3))
    model.sample_shape = (4,)
    return model
"""


def printed(renderable):
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(renderable)
    return console.file.getvalue().splitlines()


class Heads(torch.nn.Module):
    """Two heads of three units, and a width of four."""

    def __init__(self):
        super().__init__()
        self.into, self.out = torch.nn.Linear(5, 6), torch.nn.Linear(6, 5)

    def forward(self, x):
        heads = self.into(x).view(len(x), 2, 3).softmax(-1)
        return self.out(heads.flatten(1))


def test_children_stand_under_their_parents():
    symmetry = trace(Heads(), torch.randn(2, 5))
    child = next(space for space in symmetry if space.parent is not None)
    lines = printed(space_tree(describe_symmetry(symmetry)))
    depth = {space.name: next(i for i, line in enumerate(lines) if f" {space.name}  " in line) for space in symmetry}
    assert depth[child.parent] < depth[child.name]
    parent_line, child_line = lines[depth[child.parent]], lines[depth[child.name]]
    assert child_line.index(child.name) > parent_line.index(child.parent)
    assert f"{child.size} units × {child.copies} copies, permutation, {len(child.sites)} sites" in child_line
    assert sum("vector" in line for line in lines) == sum(len(space.sites) for space in symmetry)


def frozen(parameter, operation, module, reason, expected):
    return Frozen(parameter, "0", 3, operation, module, reason, expected)


def test_every_frozen_axis_is_named_with_operation_module_and_reason():
    items = [frozen(f"layers.{i}.weight", "aten.sort", f"layers.{i}", "has no rule", False) for i in range(12)]
    items.append(frozen("head.weight", "output", "", "output of the model", True))
    lines = printed(frozen_tree({"frozen": [vars(item) for item in reversed(items)]}))
    assert lines[:2] == ["frozen", "├── aten.sort: has no rule (36 units)"]  # unexpected ones first
    for index in range(12):
        assert any(f"in layers.{index}: layers.{index}.weight [0]" in line for line in lines)
    assert lines[-2:] == ["└── output: output of the model (3 units)", "    └── in the model: head.weight [0]"]
    (warning,) = freeze_warnings({"frozen": [vars(item) for item in items]})
    assert warning.startswith("aten.sort in layers.0, layers.1, layers.10 and 9 more: has no rule; 36 units on 12 axes")


def test_nothing_frozen_and_nothing_free_are_said():
    empty = {"spaces": [], "frozen": []}
    assert printed(space_tree(empty)) == ["no spaces: nothing can move"]
    assert printed(frozen_tree(empty)) == ["nothing is frozen"]
    assert freeze_warnings(empty) == []


def test_a_tied_tensor_counts_once_in_the_share_that_can_move():
    net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    symmetry = trace(net, torch.ones(2, 2))
    share = (8 + 4 + 8) / (8 + 4 + 8 + 2)  # all but the last bias
    assert describe_symmetry(symmetry)["moved_share"] == share
    shapes = {**symmetry.shapes, "again": (4, 2)}
    tied = Symmetry(spaces=symmetry.spaces, frozen=(), shapes=shapes, tied={"again": "0.weight"})
    assert describe_symmetry(tied)["moved_share"] == share


def test_an_operation_without_a_rule_is_a_warning(tmp_path, monkeypatch, capsys):
    (tmp_path / "inspected_net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "inspected_net:make"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "0 8 units, permutation, 3 sites" in text
    assert "warning: inspected.mystery in 2: reaches an operation without a rule" in text
    assert "in 2: 2.layer.weight [0], 2.layer.bias [0]" in text
    assert "8 free units" in text
    assert main(["inspect", "inspected_net:make", "--json", "--no-verify"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["input"] == {"0": [4]}
    assert {item["operation"] for item in report["symmetry"]["frozen"] if not item["expected"]} == {"inspected.mystery"}


LARGE = """
from torch import nn

def network(units):
    return nn.Sequential(nn.Linear(3, units), nn.Tanh(), nn.Linear(units, units), nn.Tanh(), nn.Linear(units, 2))

class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.scale = self.layer.weight.abs().sum().item()

    def forward(self, x):
        return self.head(self.layer(x).tanh() / self.scale)
"""


@pytest.fixture
def large(tmp_path, monkeypatch):
    (tmp_path / "large_networks.py").write_text(LARGE)
    monkeypatch.syspath_prepend(tmp_path)


def test_without_a_proof_weights_take_no_memory(large):
    units = 2**14  # 1 GiB of weights
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    symmetry = inspect_model(f"large_networks:network?units={units}", (3,), None, prove=False)["symmetry"]
    assert symmetry["free_units"] == 2 * units
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # in KiB: half a GiB


def test_a_proof_that_memory_cannot_hold_is_refused(monkeypatch):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(2, 3)
    symmetry = trace(model, x)
    sizes = {"SC_PHYS_PAGES": 1, "SC_PAGE_SIZE": 2 * 8 * 26}  # 12 + 4 + 8 + 2 numbers, twice, in eight bytes
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    verify(model, symmetry, x)
    sizes["SC_PAGE_SIZE"] -= 1
    with refuses(ModelError, "a proof of 26 numbers in float64 takes .* prove a narrow copy of the model"):
        verify(model, symmetry, x)


@pytest.mark.parametrize("model", ["gpt?block=8", "vit?depth=1", "resnet20?width=0.5"])
def test_without_a_proof_the_same_is_found(model):
    """Tables of indices and the like are there, though parameters have no numbers."""
    network, example, _ = _build_example(model, None, None, weights=True)
    symmetry = trace(network, *example.args, kwargs=example.kwargs)
    assert inspect_model(model, None, None, prove=False)["symmetry"] == describe_symmetry(symmetry)


def test_networks_that_need_numbers_while_they_are_built_have_them(large):
    assert inspect_model("large_networks:Scaled", (3,), None, prove=False)["symmetry"]["free_units"] == 4


def test_parameters_on_meta_stay_tied_and_the_next_ones_have_numbers():
    with parameters_on_meta():
        model = nn.Module()
        model.first, model.second, model.norm = nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)
        model.second.weight = model.first.weight
    assert model.second.weight is model.first.weight
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(model.norm.running_var, torch.ones(3))
    assert not nn.Linear(3, 3).weight.is_meta


def test_what_is_free_beside_the_spaces_is_said_in_a_line():
    names = [("one", "sign"), *((f"layer{k}/turns", "rotation") for k in range(5))]
    told = spoken_gauges({"gauges": [{"space": name, "kind": kind} for name, kind in names]})
    assert told == (
        "signs of single units in one; turns of pairs under rotary positions in layer0, layer1, layer2 and 2 more"
    )
    assert spoken_gauges({"gauges": []}) == ""
