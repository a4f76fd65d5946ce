"""The house's rules that a machine can keep."""

import ast
from pathlib import Path

import isthmus

SOURCE = Path(isthmus.__file__).parent

# A file is read in one sitting, and a function without scrolling.
LONGEST_FILE, LONGEST_FUNCTION = 450, 60


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
