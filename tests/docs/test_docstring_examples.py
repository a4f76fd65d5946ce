"""The worked examples in docstrings print what they say."""

import doctest
import importlib

import pytest

EXAMPLES = {
    "isthmus.match.nested": {"solve_family"},
    "isthmus.symmetry.transform": {"flat_indices", "move_site"},
    "isthmus.tracing.blocks": {"reduce"},
    "isthmus.tracing.labels": {"combine"},
    "isthmus.tracing.relations": {"close_relations"},
    "isthmus.tracing.units": {"UnitTable.relate"},
}


@pytest.mark.parametrize("module", EXAMPLES)
def test_examples_print_what_they_say(module):
    found = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(module))
    tests = [test for test in found if test.examples]
    assert {test.name.removeprefix(f"{module}.") for test in tests} >= EXAMPLES[module]
    for test in tests:
        assert doctest.DocTestRunner().run(test).failed == 0
