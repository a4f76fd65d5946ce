"""Traces and verifies the models of a library, one by one, and writes docs/coverage.md.

    python benchmarks/coverage.py --source all|torchvision|timm|transformers [--only REGEX] [--json OUT] [--limit 300]

Each model runs in a process of its own with a time limit. Rows go to OUT (default
benchmarks/results/coverage-SOURCE.json, where rows of models that did not run now stay), and docs/coverage.md is
written anew from all files in that folder. `--render` only does the latter. Run by hand; the libraries are no
dependency of the package or its tests.

A source is a module beside this file with a function `cases()` that yields a `Case` for each model; see SOURCES.
"""

import argparse
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "coverage.md"

# Where each source's `cases` is, and the package whose version the table names.
SOURCES = {
    "torchvision": ("coverage_torchvision", "torchvision"),
    "timm": ("coverage_timm", "timm"),
    "transformers": ("coverage_transformers", "transformers"),
}

# Above so many parameters a proof runs once, since its copies of the weights are in float64; above MANY without
# controls, which need the gradients of all weights as well.
LARGE, MANY = 100_000_000, 400_000_000


# A model may take so many times its limit in wall time, on a machine that is busy with other things.
PATIENCE = 6


@dataclass(frozen=True, eq=False)
class Case:
    """One model of a source.

    Attributes:
        name: Unique in its source.
        factory: Makes the model, on the CPU, with any weights.
        args: Positional example inputs.
        kwargs: Keyword example inputs.
        family: What the table groups by: the module of the library, or the architecture.
        note: How it differs from the library's default ("images of 64 pixels").
    """

    name: str
    factory: Callable[[], Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    family: str = ""
    note: str = ""


def cases_of(source: str) -> list[Case]:
    """All models of a source."""
    return list(importlib.import_module(SOURCES[source][0]).cases())


def peak_gigabytes() -> float:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(case: Case, trials: int, tell: Callable[[dict[str, Any]], None]) -> None:
    """Traces and verifies one model; tells its row after each step, so that a time-out loses only the next one."""
    import torch

    import isthmus
    from isthmus.errors import IsthmusError, SymmetryError

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.manual_seed(0)
    row: dict[str, Any] = {"model": case.name, "family": case.family, "note": case.note, "outcome": "not built"}
    try:
        model = case.factory().eval()
        row |= {"parameters": sum(p.numel() for p in model.parameters()), "outcome": "not captured"}
        row["memory_model"] = peak_gigabytes()
        tell(row)
        start = time.process_time()
        symmetry = isthmus.trace(model, *case.args, kwargs=case.kwargs)
        row |= {
            "seconds_trace": time.process_time() - start,
            "memory_trace": peak_gigabytes(),
            "spaces": len(symmetry),
            "free_units": symmetry.free_units,
            "moved": share_moved(symmetry, {name for name, _ in model.named_parameters()}),
            "frozen": unexpected(symmetry),
            "untouched": len(symmetry.untouched),
            "outcome": "not verified",
        }
        tell(row)
        large, many = row["parameters"] > LARGE, row["parameters"] > MANY
        row |= {"trials": 1 if large else trials, "controls": not many}
        start = time.process_time()
        proof = isthmus.verify(
            model, symmetry, *case.args, kwargs=case.kwargs, trials=row["trials"], controls=row["controls"]
        )
        row |= {
            "seconds_verify": time.process_time() - start,
            "memory_verify": peak_gigabytes(),
            "error": proof.max_error,
            "tolerance": proof.tolerance,
            "weakest_control": proof.weakest_control if proof.controls else None,
            "no_ops": list(proof.no_ops),
            "outcome": "verified" if len(symmetry) else "nothing to move",
        }
    except SymmetryError as error:
        row |= {"outcome": "wrong", "message": str(error)}
    except IsthmusError as error:
        row |= {"message": str(error)}
    except Exception as error:  # a table of coverage tells every failure, whatever its type
        row |= {"message": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}
    tell(row)


def share_moved(symmetry: Any, parameters: set[str]) -> float:
    """The share of all numbers in parameters (buffers apart) that some space moves."""
    import numpy as np

    moved = total = 0
    sites = symmetry.sites
    for name, shape in symmetry.shapes.items():
        if name not in parameters or name in symmetry.tied:
            continue
        total += int(np.prod(shape))
        touched: dict[tuple[int, ...], Any] = {}
        for _, site in sites.get(name, ()):
            flat = touched.setdefault(site.dims, np.zeros([shape[d] for d in site.dims], dtype=bool))
            flat.reshape(-1)[site.positions.ravel()] = True
        left = np.ones((1,) * len(shape), dtype=bool)
        for dims, mask in touched.items():
            left = left & ~mask.reshape([size if d in dims else 1 for d, size in enumerate(shape)])
        moved += int(np.prod(shape)) - int(np.broadcast_to(left, shape).sum())
    return moved / max(total, 1)


def unexpected(symmetry: Any) -> list[str]:
    """What was frozen for want of a rule or by an irregular pattern: operation, reason, and units lost."""
    lost: dict[tuple[str, str], int] = {}
    for item in symmetry.frozen:
        if not item.expected:
            key = (item.operation, item.reason)
            lost[key] = lost.get(key, 0) + item.units
    return [f"{operation or 'structure'}: {reason} ({units} units)" for (operation, reason), units in lost.items()]


def in_child(case: Case, trials: int, limit: float, gigabytes: float) -> dict[str, Any]:
    """The row of one model, measured in a process of its own that has imported what this one has."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        child = multiprocessing.get_context("fork").Process(target=work, args=(case, trials, limit, gigabytes, out))
        child.start()
        child.join(PATIENCE * limit)
        if child.is_alive():
            child.kill()
            child.join()
        row = json.loads(out.read_text()) if out.exists() else {"model": case.name, "outcome": "not built"}
        if child.exitcode:
            stopped = child.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
            row["message"] = f"stopped after {limit:.0f} s" if stopped else f"exit {child.exitcode}"
        return row


def work(case: Case, trials: int, limit: float, gigabytes: float, out: Path) -> None:
    """Measures one model under limits of processor time and memory."""
    most = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 5))
    measure(case, trials, lambda row: out.write_text(json.dumps(row)) and None)


def run(source: str, only: str, out: Path, trials: int, limit: float, gigabytes: float) -> None:
    """Measures all models of a source whose name matches, and keeps the rows of the others."""
    import torch

    import isthmus  # noqa: F401 - so that every child finds it imported

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    cases = cases_of(source)
    rows: dict[str, Any] = {}
    if out.exists():
        rows = {row["model"]: row for row in json.loads(out.read_text())["rows"]}
    about = {
        "source": source,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            SOURCES[source][1]: version(source),
        },
        "threads": int(os.environ.get("OMP_NUM_THREADS", "1")),
    }
    chosen = [case for case in cases if re.search(only, case.name)]
    for number, case in enumerate(chosen, 1):
        rows[case.name] = in_child(case, trials, limit, gigabytes)
        print(f"{number}/{len(chosen)} {short(rows[case.name])}", flush=True)
        ordered = [rows[case.name] for case in cases if case.name in rows]
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(about | {"rows": ordered}, indent=1) + "\n")


def version(source: str) -> str:
    """Version of the package that a source's models come from."""
    return importlib.metadata.version(SOURCES[source][1])


def short(row: Mapping[str, Any]) -> str:
    """One line for the terminal."""
    words = [row["model"], row["outcome"]]
    words += [f"{row[key]:,} {key.replace('_', ' ')}" for key in ("spaces", "free_units") if key in row]
    words += [
        f"{key.removeprefix('seconds_')} {row[key]:.1f} s" for key in ("seconds_trace", "seconds_verify") if key in row
    ]
    words += [str(row["message"])] if "message" in row else []
    words += [f"frozen: {item}" for item in row.get("frozen", ())]
    return " | ".join(words)


INTRODUCTION = """# Coverage

Which models of well-known libraries `isthmus.trace` can take apart, and how much of each it finds. Every row is one run of
`isthmus.trace` and `isthmus.verify` (float64, random transforms of all spaces at once, and each touched tensor left
behind once as a negative control) on an untrained model: a symmetry belongs to the architecture, not to the weights.

- **free units**: units that can be re-labelled, over all spaces and their copies (the inner units of each head are counted);
- **moved**: share of the model's parameters that some space moves;
- **trace**, **verify**: seconds of processor time; **memory**: the most the process held while tracing, with the model and libraries;
- **error**: the largest relative change of the outputs under random transforms; zero means bit for bit the same. "1 trial" and "no controls" mark models
  too large for the usual proof;
- **lost**: what was frozen although it might move, by an operation without a rule or by an irregular pattern. It is never
  wrong: what is frozen stays where it is.

Of recurrent layers (LSTM, GRU, plain; deep, both ways) the hidden units move; projected hidden states stay. Under
`weight_norm` and `spectral_norm` of `torch.nn.utils.parametrizations` what is stored moves with the units; under other
parametrizations (`orthogonal`) the axes that they mix stay, with a warning. Experts of a mixture move with the router's
outputs if they are one stacked tensor, and stay in place if a Python loop picks them; their units move in both.

Written by `python benchmarks/coverage.py --source all` (see its first lines), each model in a process of its own.
"""  # noqa: E501


def render(files: Iterable[Path]) -> str:
    """The page: a table for each source."""
    parts = [INTRODUCTION]
    for path in files:
        found = json.loads(path.read_text())
        rows = found["rows"]
        versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
        good = sum(row["outcome"] in ("verified", "nothing to move") for row in rows)
        wrong = sum(row["outcome"] == "wrong" for row in rows)
        families = len({row.get("family") or row["model"] for row in rows})
        whole = sum(not row.get("frozen") for row in rows if row["outcome"] == "verified")
        parts.append(
            f"## {found['source']}\n\n{versions}; {found['threads']} thread(s). {len(rows)} models of {families} "
            f"families: {good} verified ({100 * good / max(len(rows), 1):.0f} %), of these {whole} with nothing lost; "
            f"{wrong} wrong.\n"
        )
        parts.append(table(rows))
    return "\n".join(parts)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One row a model."""
    head = (
        "model",
        "parameters",
        "spaces",
        "free units",
        "moved",
        "trace",
        "verify",
        "memory",
        "error",
        "outcome",
        "lost",
    )
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * 8 + "---|---|"]
    for row in rows:
        outcome = [row["outcome"]]
        outcome += [f"{row['trials']} trial"] if row.get("trials") == 1 else []
        outcome += ["no controls"] if row.get("controls") is False else []
        outcome += [f"no effect: {len(row['no_ops'])} tensors"] if row.get("no_ops") else []
        outcome += [row["message"]] if "message" in row else []
        cells = [
            row["model"] + (f" ({row['note']})" if row.get("note") else ""),
            number(row, "parameters", "{:,}"),
            number(row, "spaces", "{:,}"),
            number(row, "free_units", "{:,}"),
            number(row, "moved", "{:.1%}"),
            number(row, "seconds_trace", "{:.1f} s"),
            number(row, "seconds_verify", "{:.0f} s"),
            number(row, "memory_trace", "{:.1f} GB"),
            number(row, "error", "{:.0e}"),
            "; ".join(outcome),
            "; ".join(row.get("frozen", ())),
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def number(row: Mapping[str, Any], key: str, form: str) -> str:
    """A cell; empty where the run did not get so far."""
    return form.format(row[key]) if row.get(key) is not None else ""


def main() -> None:
    """Runs a source, or renders the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", choices=("all", *SOURCES))
    parser.add_argument("--only", default="", help="a regular expression; models whose name it finds")
    parser.add_argument("--json", type=Path, help="where rows go")
    parser.add_argument("--limit", type=float, default=300, help="seconds of processor time a model")
    parser.add_argument("--memory", type=float, default=14, help="gigabytes a model may hold")
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--render", action="store_true", help="only write the page from the rows that there are")
    options = parser.parse_args()
    sys.path.insert(0, str(HERE))
    if options.source is None and not options.render:
        parser.error("--source or --render")
    if options.source == "all" and options.json is not None:
        parser.error("--json takes the rows of one source")
    for source in () if options.render else SOURCES if options.source == "all" else (options.source,):
        out = options.json or RESULTS / f"coverage-{source}.json"
        run(source, options.only, out, options.trials, options.limit, options.memory)
    if options.json is not None:
        return
    PAGE.write_text(render(sorted(RESULTS.glob("coverage-*.json"))))


if __name__ == "__main__":
    sys.modules["coverage"] = sys.modules["__main__"]  # sources import Case from here
    main()
