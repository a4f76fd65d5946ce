"""The house's rules that a machine can keep."""

import ast
import tomllib
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

import isthmus

SOURCE = Path(isthmus.__file__).parent
PROJECT = SOURCE.parent.parent

# A file is read in one sitting, and a function without scrolling.
LONGEST_FILE, LONGEST_FUNCTION = 450, 60

# Files at the top, and floors: a newcomer sees all of either at one glance.
MOST_LOOSE_FILES, MOST_FLOORS = 6, 14

# Fields that hold what has any form: options by name, what a method reports beside its result, a file's JSON.
FREE_FORM = {"details", "options", "report"}


def _source_files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def _length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function, its signature among them and its docstring not."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function, clean=False) is not None:
        first = function.body[0]
        assert first.end_lineno is not None
        lines -= first.end_lineno - first.lineno + 1
    return lines


def test_no_file_is_too_long():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in _source_files()}
    assert lengths
    assert {str(path.relative_to(SOURCE)): n for path, n in lengths.items() if n >= LONGEST_FILE} == {}


def test_no_function_is_too_long():
    found = {
        f"{path.relative_to(SOURCE)}:{node.name}": _length(node)
        for path in _source_files()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert found
    assert {name: n for name, n in found.items() if n >= LONGEST_FUNCTION} == {}


def test_a_docstring_does_not_count_as_length():
    function = ast.parse('def f(x):\n    """One.\n\n    Two.\n    """\n    return x\n').body[0]
    assert isinstance(function, ast.FunctionDef)
    assert _length(function) == 2


Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def trees() -> dict[str, ast.Module]:
    """Every file of the package, parsed, by the module's dotted name."""
    files = sorted(SOURCE.rglob("*.py"))
    assert len(files) > 100
    parts = {path: path.relative_to(SOURCE.parent).with_suffix("").parts for path in files}
    return {
        ".".join(names[:-1] if names[-1] == "__init__" else names): ast.parse(path.read_text(encoding="utf-8"))
        for path, names in parts.items()
    }


def public(kind: type | tuple[type, ...]) -> dict[str, list[str]]:
    """The modules that define each public name of that kind at their top level."""
    found = defaultdict(list)
    for module, tree in trees().items():
        for node in tree.body:
            if isinstance(node, kind) and not node.name.startswith("_"):
                found[node.name].append(module)
    return found


@cache
def faces() -> dict[str, frozenset[str]]:
    """The names in each module's `__all__`, where it has one."""
    return {
        module: frozenset(ast.literal_eval(node.value))
        for module, tree in trees().items()
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    }


@cache
def imported() -> set[tuple[str, str]]:
    """Every module and name of it that some other module of the package imports, or reaches through the module."""
    used = set()
    for module, tree in trees().items():
        known: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "isthmus":
                for alias in node.names:
                    known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                    if node.module != module:
                        used.add((node.module, alias.name))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
                used.add((known[node.value.id], node.attr))
    return used


@pytest.mark.parametrize("kind", [Function, ast.ClassDef], ids=["function", "class"])
def test_no_public_name_is_spent_twice(kind):
    defined = public(kind)
    assert defined
    assert {name: where for name, where in defined.items() if len(where) > 1} == {}


def test_a_function_of_its_own_file_alone_has_an_underscore():
    shown = frozenset.union(*faces().values())
    lonely = [
        f"{module}.{name}"
        for name, where in public(Function).items()
        for module in where
        if (module, name) not in imported() and name not in shown
    ]
    assert lonely == []


def test_few_files_lie_loose_at_the_top():
    loose = sorted(path.stem for path in SOURCE.glob("*.py"))
    assert 0 < len(loose) <= MOST_LOOSE_FILES, loose


def test_the_house_has_few_floors_and_no_back_stairs():
    settings = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    floors = [contract for contract in settings["contracts"] if contract["type"] == "layers"]
    assert floors
    for contract in floors:
        assert len(contract["layers"]) <= MOST_FLOORS
    assert not any("ignore_imports" in contract for contract in settings["contracts"])


def test_fields_of_public_dataclasses_have_types():
    untyped = [
        f"{module}.{node.name}.{field.target.id}: {ast.unparse(field.annotation)}"
        for module, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
        if any("dataclass" in ast.unparse(each) for each in node.decorator_list)
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if field.target.id not in FREE_FORM
        if any(isinstance(part, ast.Name) and part.id == "Any" for part in ast.walk(field.annotation))
    ]
    assert untyped == []
