"""Tiny models of the transformers library: a hand count of free units, and a proof; skipped without the library."""

import sys
from pathlib import Path

import pytest

import isthmus

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

# A stream (64, unless it is an output), then for each of two layers hidden units, heads, and units in each head.
FREE_UNITS = {
    "gpt2": 64 + 2 * (256 + 4 + 64 + 64),
    "gpt_neox": 64 + 2 * (96 + 4 + 64 + 32),  # half of each head's queries and keys is rotated
    "opt": 64 + 2 * (96 + 4 + 64 + 64),
    "bloom": 64 + 2 * (256 + 64 + 64),  # slopes tell heads apart
    "falcon": 64 + 2 * (256 + 4 + 16),  # one head of keys and values
    "llama": 64 + 2 * (96 + 4 + 8 + 32),
    "mixtral": 64 + 2 * (4 + 8 + 32 + 4 + 4 * 96),  # experts, and hidden units in each
    "qwen3": 64 + 2 * (96 + 4 + 8 + 48),
    "gemma2": 64 + 2 * (96 + 4 + 8 + 48),
    "phi3": 64 + 2 * (96 + 4 + 8 + 32),
    "mamba": 64 + 2 * (128 + 6 + 8),  # channels, units of the time step, states
    "bert": 2 * (96 + 4 + 64 + 64),  # the stream is the output
    "mpnet": 4 + 2 * (96 + 64 + 64),  # one table of biases for both layers
    "t5": 64 + (4 + 2 * (96 + 48 + 48)) + (4 + 2 * (96 + 48 + 48 + 4 + 48 + 48)),
    "bart": 64 + 2 * (96 + 4 + 128) + 2 * (80 + 2 * (4 + 128)),
    "vit": 64 + 2 * (96 + 4 + 64 + 64),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FREE_UNITS)
def test_the_free_units_are_those_of_a_hand_count(name, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "coverage", raising=False)
    from coverage_transformers import cases

    case = next(case for case in cases() if case.name == name)
    model = case.factory()
    symmetry = isthmus.trace(model, *case.args, kwargs=case.kwargs)
    for seed in (0, 1):
        isthmus.verify(model, symmetry, *case.args, kwargs=case.kwargs, trials=4, seed=seed)
    assert symmetry.free_units == FREE_UNITS[name]
    assert all(item.expected for item in symmetry.frozen)
