"""What `isthmus inspect` shows: the tree of spaces, what is frozen and where, warnings."""

import io
import json

import torch
from rich.console import Console

from isthmus.cli import main
from isthmus.facts import describe_symmetry
from isthmus.inspection import freeze_warnings, frozen_tree, space_tree
from isthmus.symmetry import Frozen, Symmetry
from isthmus.trace import trace

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
