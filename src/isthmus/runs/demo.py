"""The whole story on data that is always there: two networks trained from different seeds become one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from isthmus.report.schema import RunReport
from isthmus.runs.recipe import AlignOptions, DataOptions, ParentOptions, Recipe
from isthmus.runs.run_explain import explain_run
from isthmus.runs.run_merge import run_merge
from isthmus.runs.run_train import run_train

ARCHITECTURE = "zoo:cnn?width=3"
SEEDS = (0, 1)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Runs torch on one thread: networks this small gain nothing from more, and lose much where cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
def run_demo(out: Path, say: Callable[[str], None] | None = None) -> RunReport:
    """Trains two small networks on digits, merges them into a run folder, and returns its report.

    Args:
        out: The run folder; one written before is replaced.
        say: Called with a line at each step.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    tell = say or (lambda line: None)
    parents = out.parent / f"{out.name}-parents"
    members = []
    for seed in SEEDS:
        path = parents / f"seed{seed}.safetensors"
        report = run_train(ARCHITECTURE, "digits", path, seed=seed, force=True)
        tell(f"trained a network from seed {seed}: {100 * report['test']['accuracy']:.1f} % of digits right")
        members.append(ParentOptions(model=str(path)))
    recipe = Recipe(
        models=members,
        architecture=ARCHITECTURE,
        align=AlignOptions(method="weight_matching"),
        data=DataOptions(name="digits"),
        repair="reset",
    )
    tell("tracing, proving, aligning, merging, mending and measuring …")
    run_merge(recipe, out, force=True, command="isthmus demo")
    tell("explaining it, unit by unit …")
    return explain_run(out)
