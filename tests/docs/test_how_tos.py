"""The how-tos are true: the code that they print is run as it stands, and obeys what all of its kind obey."""

import importlib.util
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import isthmus
import laws.test_averaging as averaging_laws
import laws.test_matching as matching_laws
from helpers.pairs import CNN, MLP, lively, planted, symmetry
from isthmus.average import AVERAGES, Average
from isthmus.match import METHODS, Match
from isthmus.registry import table_of
from isthmus.tracing.rules import TABLE

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str) -> list[str]:
    """The Python code of a page, block by block."""
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.M | re.S)


def module(source: str, name: str, folder: Path) -> ModuleType:
    """The code as a module of that name, which can be imported by it until it is taken out of `sys.modules`."""
    path = folder / f"{name.rpartition('.')[2]}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    spec.loader.exec_module(made)
    return made


def entered(page: str, base: type, folder: Path, monkeypatch) -> type:
    """The class that a page's file holds and its line enters into a table."""
    source, line = blocks(page)
    name = re.fullmatch(r"from (isthmus\.\w+\.\w+) import (\w+) as \2\n", line)[1]
    monkeypatch.setitem(sys.modules, name, None)  # taken back afterwards
    module(source, name, folder)
    namespace: dict[str, object] = {}
    exec(line, namespace)
    ((_, found),) = table_of(base, namespace).items()
    return found


@pytest.fixture
def method(tmp_path, monkeypatch) -> str:
    found = entered("add_a_method.md", Match, tmp_path, monkeypatch)
    monkeypatch.setitem(METHODS, found.name, found)
    return found.name


@pytest.fixture
def average(tmp_path, monkeypatch) -> str:
    found = entered("add_an_average.md", Average, tmp_path, monkeypatch)
    monkeypatch.setitem(AVERAGES, found.name, found)
    return found.name


def laws(source: ModuleType, of: str) -> list:
    """The tests of a module that are about one entry of its table."""
    tests = {name: test for name, test in vars(source).items() if name.startswith("test_")}
    return [pytest.param(t, id=name) for name, t in tests.items() if of in inspect.signature(t).parameters]


def obey(law, **entry: str) -> None:
    """Runs a law on one network, in one precision."""
    usual = {"name": MLP, "dtype": torch.float16}
    law(**entry, **{name: usual[name] for name in inspect.signature(law).parameters if name not in entry})


@pytest.mark.parametrize("law", laws(matching_laws, "method"))
def test_the_printed_method_obeys_the_laws(law, method):
    obey(law, method=method)


@pytest.mark.parametrize("spec", [MLP, CNN])
def test_the_printed_method_finds_a_planted_permutation(spec, method):
    model, sym = lively(spec, 0), symmetry(spec)
    other, _ = planted(model, sym, 1)
    found = isthmus.align([model, other], sym, method)
    back = isthmus.apply(found, other, 1).state_dict()
    assert all(torch.equal(tensor, back[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("law", laws(averaging_laws, "average"))
def test_the_printed_average_obeys_the_laws(law, average):
    obey(law, average=average)


class Compared(nn.Module):
    """How alike two views of the input are, by the cosine of their hidden units."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 6), nn.Linear(3, 6)

    def forward(self, x):
        return nn.functional.cosine_similarity(self.left(x).relu(), self.right(x).relu(), dim=-1)


def test_the_printed_rule_finds_units_that_are_free(tmp_path, monkeypatch):
    model, x = Compared().eval(), torch.randn(2, 3)
    (source,) = blocks("add_an_operation_rule.md")
    monkeypatch.setitem(sys.modules, "printed_rule", None)
    for name, rule in module(source, "printed_rule", tmp_path).REDUCTIONS.items():
        assert len(isthmus.trace(model, x)) == 0  # or the page no longer needs to tell how it is added
        monkeypatch.setitem(TABLE, name, rule)
    found = isthmus.trace(model, x)
    assert [(space.size, space.copies, space.group) for space in found] == [(6, 1, isthmus.Group.PERMUTATION)]
    isthmus.verify(model, found, x)


def test_the_page_of_rules_names_what_is_there():
    source = Path(isthmus.__file__).parent
    text = (DOCS / "add_an_operation_rule.md").read_text(encoding="utf-8")
    paths = re.findall(r"`(tracing/[\w/]+\.py)`", text)
    assert paths
    assert all((source / path).exists() for path in paths)
