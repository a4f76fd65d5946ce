"""What the command line prints: proofs, scores, tables, curves; JSON where it is asked for."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from isthmus.report.schema import MethodFacts, ProofFacts, RunReport, score_rows

console = Console(highlight=False)


def print_json(report: RunReport | Mapping[str, Any]) -> None:
    """Prints a report as JSON."""
    from isthmus.runs.facts import plain_json

    sys.stdout.write(json.dumps(plain_json(report), ensure_ascii=False) + "\n")


def print_proof(proof: ProofFacts | None) -> None:
    """Prints what was proved."""
    if proof is None:
        console.print("not proved (--no-verify)", style="yellow")
        return
    silent = f"; no effect on the outputs: {', '.join(proof.no_ops)}" if proof.no_ops else ""
    console.print(
        f"proved: random transforms of all spaces change the outputs by {proof.max_error:.0e} at most "
        f"(rounding: {proof.tolerance:.0e}), leaving one tensor out by {proof.weakest_control:.0e} up"
        f"{escape(silent)}",
        style="green",
    )


def print_method(method: MethodFacts) -> None:
    """Prints what the matching reached."""
    reached = ""
    if method.objective is not None:
        reached = f", objective {method.objective:.6g}"
        if method.upper_bound:
            reached += f" ({100 * method.objective / method.upper_bound:.0f} % of its upper bound)"
    done = "" if method.converged else ", not converged"
    console.print(f"aligned by {method.name.replace('_', ' ')} in {method.seconds:.1f} s{reached}{done}")


def print_scores(report: RunReport) -> None:
    """Prints the scores as a table."""
    rows, data = score_rows(report), report.provenance.data
    if not rows or data is None:
        return
    table = Table(title=f"{data.name}, {data.score_split} split", title_justify="left")
    table.add_column("model")
    table.add_column("accuracy", justify="right")
    table.add_column("loss", justify="right")
    for row in rows:
        style = "bold" if row.kind == "merged" else None
        table.add_row(row.name, _spoken_share(row.score.accuracy), f"{row.score.loss:.4f}", style=style)
    console.print(table)


def print_comparison(report: Mapping[str, Any]) -> None:
    """Prints every way of merging with its scores; the best accuracy (else loss) of all is bold."""
    found = report["comparison"]
    key, sign = ("accuracy", -1) if found["ensemble"]["accuracy"] is not None else ("loss", 1)
    title = f"{report['data']['name']}, {report['split']} split"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("method", "average", "repair"):
        table.add_column(column, no_wrap=True)
    for column in ("accuracy", "loss", "barrier", "seconds", "MiB"):
        table.add_column(column, justify="right", no_wrap=True)
    reference = [(f"parent {index}", score) for index, score in enumerate(found["parents"])]
    for name, score in [*reference, ("ensemble", found["ensemble"])]:
        table.add_row(name, "", "", _spoken_share(score["accuracy"]), f"{score['loss']:.4f}", "", "", "", style="dim")
    scored = [row[key] for row in found["rows"] if row[key] is not None]
    best = min(scored, key=lambda value: sign * value, default=None)
    for row in found["rows"]:
        names = (row["method"], row["average"], row["repair"])
        if row["note"]:
            table.add_row(*names, "–", "–", "–", "–", "–", style="dim")
            continue
        memory = "–" if row["memory"] is None else f"{row['memory'] / 2**20:.0f}"
        table.add_row(
            *names, _spoken_share(row["accuracy"]), f"{row['loss']:.4f}", f"{row['barrier']:+.4f}",
            f"{row['seconds']:.1f}", memory, style="bold" if row[key] == best else None,
        )  # fmt: skip
    console.print(table)
    for note in dict.fromkeys((row["method"], row["note"]) for row in found["rows"] if row["note"]):
        console.print(f"{note[0]}: {escape(note[1])}", style="yellow")
    if report["cycles"]:
        _print_cycles(report["cycles"])


def _print_cycles(cycles: Sequence[Mapping[str, Any]]) -> None:
    """Prints every method's cycle error and the barriers half way between the models that it moved."""
    table = Table(
        title="Around cycles", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    table.add_column("method", no_wrap=True)
    table.add_column("units lost", justify="right", no_wrap=True)
    for line in cycles[0]["lines"]:
        table.add_column(f"barrier {line['models'][0]}–{line['models'][1]}", justify="right", no_wrap=True)
    for each in cycles:
        table.add_row(
            each["method"], _spoken_share(each["share_lost"]), *(f"{line['barrier']:+.4f}" for line in each["lines"])
        )
    console.print(table)


def print_explanation(told: Mapping[str, Any]) -> None:
    """Prints what became of the units, space by space, and the verdicts."""
    data = told["data"]
    title = f"units, on {data['images']} {data['noun']}s of {data['name']} ({data['split']} split)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("space", no_wrap=True)
    for column in ("units", "matched", "merged", "naive", "shared", "of some", "lost"):
        table.add_column(column, justify="right", no_wrap=True)
    for space in told["spaces"]:
        correlation, labels = space["correlation"], space["labels"]
        naive = "–" if correlation["naive"] is None else f"{min(correlation['naive']):.2f}"
        some = space["units"] - labels["shared"] - labels["lost"]
        table.add_row(
            space["name"], str(space["units"]), f"{correlation['matched']:.2f}", f"{min(correlation['merged']):.2f}",
            naive, str(labels["shared"]), str(some), str(labels["lost"]),
        )  # fmt: skip
    console.print(table)
    for claim in [*told["claims"], *told["questions"]]:
        console.print(f"[bold]{claim['verdict'] or 'not measured'}[/bold]: {escape(claim['text'])}")
        console.print(f"  {escape(claim['figure'])}", style="dim")


def _spoken_share(value: float | None) -> str:
    """A share in percent, or a dash."""
    return "–" if value is None else f"{100 * value:.2f} %"


def print_curves(report: Mapping[str, Any]) -> None:
    """Prints the curves of the models as they are (naive) and aligned, λ by λ, and their barriers."""
    curves = report["curves"][0]
    table = Table(title=f"{report['data']['name']}, {report['split']} split", title_justify="left")
    table.add_column("λ", justify="right")
    for column in ("naive loss", "naive accuracy", "aligned loss", "aligned accuracy"):
        table.add_column(column, justify="right", no_wrap=True)
    naive, aligned = curves["naive"], curves["aligned"]
    for index, x in enumerate(naive["lambdas"]):
        cells = []
        for curve in (naive, aligned):
            cells.append(f"{curve['losses'][index]:.4f}")
            cells.append(f"{100 * curve['accuracies'][index]:.2f} %" if curve["accuracies"] else "–")
        table.add_row(f"{x:.2f}", *cells)
    console.print(table)
    for name, curve in (("naive", naive), ("aligned", aligned)):
        console.print(
            f"{name}: loss barrier {curve['barrier']:.4f} (at ½ {curve['midpoint_barrier']:.4f}), "
            f"error barrier {100 * curve['error_barrier']:.2f} points"
        )
