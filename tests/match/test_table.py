"""A method is one file and one line."""

import ast
import sys
from pathlib import Path

import isthmus
from isthmus.match import METHODS, Auto, methods
from isthmus.match.methods import CANDIDATES

FILES = {method.__module__ for method in CANDIDATES.values()}


def imported(module: str) -> set[str]:
    """The modules that a module's source imports, anywhere in it."""
    found = sys.modules[module].__file__
    assert found is not None
    tree = ast.parse(Path(found).read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_no_method_imports_another():
    assert len(FILES) == len(CANDIDATES)
    assert {file: imported(file) & (FILES - {file}) for file in FILES if imported(file) & (FILES - {file})} == {}


def test_what_methods_share_imports_none_of_them():
    package = Path(methods.__file__).parent
    shared = {f"isthmus.match.{path.stem}" for path in package.glob("*.py")} - FILES
    shared -= {"isthmus.match.__init__", "isthmus.match.methods"}
    assert {file: imported(file) & FILES for file in shared if imported(file) & FILES} == {}


def test_the_table_is_in_the_order_of_its_lines():
    tree = ast.parse(Path(methods.__file__).read_text(encoding="utf-8"))
    lines = [node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.module in FILES]
    assert [method.__module__ for method in CANDIDATES.values()] == lines
    assert list(METHODS) == ["auto", *CANDIDATES]


def test_every_method_is_a_name_of_the_package():
    assert all(getattr(isthmus.match, method.__name__) is method for method in METHODS.values())
    assert METHODS["auto"] is Auto
