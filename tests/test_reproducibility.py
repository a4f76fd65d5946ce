"""What docs/reproducibility.md says: the same bytes on one machine, and what other kernels and threads leave alone."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import isthmus
from helpers.pairs import CNN, learnt, symmetry

# Instructions of the oldest processors, in every library that chooses by what the processor has.
OLD = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_CBWR": "COMPATIBLE",
    "OPENBLAS_CORETYPE": "Prescott",
}
ELSEWHERE = {"other kernels": OLD, "two threads": {"OMP_NUM_THREADS": "2"}}

pytestmark = pytest.mark.slow  # each test starts a process or two


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Merges two networks of one file each, by `isthmus merge` in a process of its own, and gives the run folder."""
    folder = tmp_path_factory.mktemp("reproducibility")
    for seed, name in enumerate("ab"):
        save_file(learnt(CNN, seed).state_dict(), folder / f"{name}.safetensors")

    def merged(name: str, **variables: str):
        command = [sys.executable, "-m", "isthmus", "merge", folder / "a.safetensors", folder / "b.safetensors"]
        command += ["--model", f"zoo:{CNN}", "--method", "activation_matching", "--data", "digits", "--samples", "200"]
        own = {key: value for key, value in os.environ.items() if key not in (*OLD, "OMP_NUM_THREADS")}
        environment = {**own, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **variables}
        subprocess.run([*command, "-o", folder / name], env=environment, check=True, capture_output=True)
        return folder / name

    merged("first")
    return merged


def told(folder) -> dict:
    return json.loads((folder / "report.json").read_text())


def test_another_process_gives_the_same_bytes(run):
    first = run("first-again").with_name("first")
    again = first.with_name("first-again")
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert told(first)["scores"] == told(again)["scores"]
    assert told(first)["curves"] == told(again)["curves"]


@pytest.mark.parametrize("where", ELSEWHERE)
def test_elsewhere_index_work_is_exact_and_numbers_agree(run, where):
    there = run(where.replace(" ", "-"), **ELSEWHERE[where])
    first = there.with_name("first")
    # Which units are tied, and which face each other: integers.
    assert told(there)["symmetry"] == told(first)["symmetry"]
    ours, theirs = (isthmus.Alignment.load(each / "alignment.safetensors", symmetry(CNN)) for each in (first, there))
    for own, other in zip(ours.transforms, theirs.transforms, strict=True):
        assert all(np.array_equal(own[name].indices, other[name].indices) for name in own)
    # Correlations of up to 200 · 64 samples, summed in float32.
    assert theirs.objective == pytest.approx(ours.objective, rel=1e-5)
    own, other = (load_file(each / "model.safetensors") for each in (first, there))
    assert own.keys() == other.keys()
    for name, tensor in own.items():
        if "running" in name:  # measured on the data, behind up to three layers of float32 sums
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5)
        else:  # moved, and averaged number by number in float64
            assert torch.equal(other[name], tensor), name
    for ours_, theirs_ in zip(told(first)["scores"]["parents"], told(there)["scores"]["parents"], strict=True):
        assert theirs_["loss"] == pytest.approx(ours_["loss"], rel=1e-4)
