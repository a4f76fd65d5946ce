"""The command line: parse, call, print. Bad input is one line on standard error and exit code 2."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from isthmus.cli.arguments import app, build_recipe, command_line, parse_names, parse_shape, split_options
from isthmus.cli.terminal import (
    console,
    print_comparison,
    print_curves,
    print_explanation,
    print_json,
    print_method,
    print_proof,
    print_scores,
)
from isthmus.errors import IsthmusError
from isthmus.merging.repair import REPAIRS
from isthmus.models import spoken_specs
from isthmus.runs.recipe import DataOptions, read_recipe

# Typer does not export the base of its usage errors.
UsageError: Any = typer.BadParameter.__bases__[0]

# Options of the matching method are taken as they come, so that each method brings its own.
METHOD_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}

SPEC = f"{spoken_specs(arguments=True)}."
Model = Annotated[
    str | None,
    typer.Option(
        "--model", help=f"The architecture: {SPEC} Not needed where all checkpoints are Hugging Face folders."
    ),
]
NewModel = Annotated[str, typer.Argument(metavar="MODEL", help=SPEC)]
DataName = Annotated[str | None, typer.Option("--data", help="A data set's name, or FILE.npz.")]
DataDir = Annotated[Path | None, typer.Option("--data-dir", help="Folder of data sets; else $ISTHMUS_DATA.")]
Samples = Annotated[int, typer.Option(help="Training samples for statistics and activations.")]
Method = Annotated[str, typer.Option(help="Matching method; its own options may follow, as --restarts 10.")]
Shape = Annotated[
    str | None,
    typer.Option(
        "--input",
        help="Shape of one input sample, such as 3,32,32; or SHAPE:DTYPE, or SHAPE:DTYPE:BOUND for integers from 0 to "
        "BOUND - 1, such as 128:int64:1000; or several inputs by name, such as 'ids=16:int64:1000; image=3,32,32'.",
    ),
]
Seed = Annotated[int, typer.Option(help="Seeds everything random.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing run folder.")]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Leave out the proof; the report says so.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output and nothing else.")]


@app.command("inspect")
def _inspect_command(
    model: NewModel,
    data: DataName = None,
    data_dir: DataDir = None,
    shape: Shape = None,
    no_verify: NoVerify = False,
    as_json: AsJson = False,
) -> None:
    """Show a model's spaces, groups and sites; what is frozen, and why."""
    from isthmus.cli.trees import freeze_warnings, frozen_tree, space_tree, spoken_gauges
    from isthmus.runs.run_inspect import inspect_model

    named = None if data is None else DataOptions(name=data, folder=None if data_dir is None else str(data_dir))
    report = inspect_model(model, parse_shape(shape), named, prove=not no_verify)
    if as_json:
        return print_json(report)
    symmetry = report["symmetry"]
    console.print(f"[bold]{escape(model)}[/]  {report['parameters']:,} parameters, traced in {report['seconds']:.1f} s")
    if report["assumed"]:
        console.print(f"assumed {escape(report['assumed'])}; --input sets it", style="yellow")
    console.print(space_tree(symmetry))
    console.print(frozen_tree(symmetry))
    if symmetry["gauges"]:
        console.print(f"free beside the spaces: {escape(spoken_gauges(symmetry))}")
    if symmetry["untouched"]:
        console.print(f"never used: {escape(', '.join(symmetry['untouched']))}", style="yellow")
    print_proof(report["proof"])
    for line in freeze_warnings(symmetry):
        console.print(f"warning: {escape(line)}", style="yellow")
    console.print(
        f"{symmetry['free_units']:,} free units; {100 * symmetry['moved_share']:.1f} % of the numbers can move"
    )
    return None


@app.command("merge", context_settings=METHOD_OPTIONS)
def _merge_command(
    checkpoints: Annotated[list[str], typer.Argument(help="Checkpoints, or one recipe (.yaml).")],
    out: Out,
    model: Model = None,
    method: Method = "weight_matching",
    average: Annotated[
        str, typer.Option(help="How aligned weights are averaged; its options as --average.density 0.2.")
    ] = "mean",
    base: Annotated[str | None, typer.Option(help="The models' common ancestor, for averages that need it.")] = None,
    weights: Annotated[str | None, typer.Option(help="One weight a model, such as 0.7,0.3.")] = None,
    repair: Annotated[str, typer.Option(help=f"{', '.join(REPAIRS)} or none.")] = "reset",
    data: DataName = None,
    data_dir: DataDir = None,
    samples: Samples = 10_000,
    shape: Shape = None,
    dtype: Annotated[str | None, typer.Option(help="Load the models in this precision.")] = None,
    out_dtype: Annotated[str | None, typer.Option(help="Write the merged model in this precision.")] = None,
    seed: Seed = 0,
    force: Force = False,
    no_verify: NoVerify = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the recipe, write nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Merge checkpoints of one architecture into one model: prove, align, average, repair, measure."""
    from isthmus.runs.inputs import load_inputs
    from isthmus.runs.run_merge import run_merge

    paths, options = split_options(checkpoints)
    if len(paths) == 1 and Path(paths[0]).suffix in (".yaml", ".yml"):
        recipe = read_recipe(Path(paths[0]))
    else:
        recipe = build_recipe(
            paths, model, method, options, data, data_dir, samples, shape, seed, no_verify,
            merge_method=average, base_model=base, repair=None if repair == "none" else repair, dtype=dtype,
            out_dtype=out_dtype, weights=weights,
        )  # fmt: skip
    recipe.check()
    if dry_run:
        load_inputs(recipe)
        return console.print(recipe.to_yaml(), end="", markup=False)
    report = run_merge(recipe, out, force=force, command=command_line())
    if as_json:
        return print_json(report)
    print_proof(report.proof)
    print_method(report.method)
    print_scores(report)
    console.print(escape(report.verdict), style="bold")
    if report.repair is None and repair != "none" and data is None:
        console.print("no --data: BatchNorm statistics, if any, are averaged and not repaired", style="yellow")
    if report.left_out:
        console.print(
            f"the parents do not agree on {escape(', '.join(report.left_out))}: not copied, choose one yourself",
            style="yellow",
        )
    console.print(f"written to {escape(str(out))}: model.safetensors, report.html, recipe.yaml")
    return None


@app.command("align", context_settings=METHOD_OPTIONS)
def _align_command(
    checkpoints: Annotated[list[str], typer.Argument(help="Checkpoints of one architecture.")],
    out: Out,
    model: Model = None,
    method: Method = "weight_matching",
    data: DataName = None,
    data_dir: DataDir = None,
    samples: Samples = 10_000,
    shape: Shape = None,
    seed: Seed = 0,
    force: Force = False,
    no_verify: NoVerify = False,
    as_json: AsJson = False,
) -> None:
    """Write each checkpoint in the first one's frame: the same function, weights that can be averaged."""
    from isthmus.runs.run_align import run_align

    paths, options = split_options(checkpoints)
    recipe = build_recipe(paths, model, method, options, data, data_dir, samples, shape, seed, no_verify, repair=None)
    report = run_align(recipe, out, force=force, command=command_line())
    if as_json:
        return print_json(report)
    print_proof(report.proof)
    print_method(report.method)
    console.print(escape(report.verdict), style="bold")
    console.print(f"written to {escape(str(out))}: {escape(', '.join(report.aligned or ()))}, alignment.safetensors")
    return None


@app.command("connect", context_settings=METHOD_OPTIONS)
def _connect_command(
    checkpoints: Annotated[list[str], typer.Argument(help="Two checkpoints of one architecture.")],
    model: Model = None,
    data: DataName = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder for curve.json, curve.svg, curve.png.")
    ] = None,
    method: Method = "weight_matching",
    data_dir: DataDir = None,
    samples: Samples = 10_000,
    points: Annotated[int, typer.Option(help="How many λ to measure, both ends included.")] = 11,
    split: Annotated[str, typer.Option(help="Score on test or train.")] = "test",
    raw: Annotated[bool, typer.Option("--raw", help="Leave BatchNorm statistics interpolated.")] = False,
    shape: Shape = None,
    seed: Seed = 0,
    force: Force = False,
    no_verify: NoVerify = False,
    as_json: AsJson = False,
) -> None:
    """Measure loss and accuracy along the line between two models, as they are and aligned."""
    from isthmus.runs.run_connect import run_connect

    paths, options = split_options(checkpoints)
    recipe = build_recipe(paths, model, method, options, data, data_dir, samples, shape, seed, no_verify, repair=None)

    def run() -> dict[str, Any]:
        return run_connect(recipe, points=points, split=split, raw=raw)

    report = _run_into(out, force, run, _write_curve)
    if as_json:
        return print_json(report)
    print_method(report["method"])
    print_curves(report)
    if out is not None:
        console.print(f"written to {escape(str(out))}: curve.svg, curve.png, report.json")
    return None


@app.command("compare")
def _compare_command(
    checkpoints: Annotated[list[str], typer.Argument(help="Two or more checkpoints of one architecture.")],
    model: Model = None,
    data: DataName = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder for compare.json, table.md, compare.svg, compare.png.")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Matching methods, separated by commas, each with options if need be, such as 'cca?gamma=0.1,zipit'; "
            "all that the data allows by default."
        ),
    ] = None,
    averages: Annotated[str | None, typer.Option(help="Averages, separated by commas: mean,pleas by default.")] = None,
    repairs: Annotated[str | None, typer.Option(help=f"raw,{','.join(REPAIRS)}, or some of them.")] = None,
    base: Annotated[str | None, typer.Option(help="The models' common ancestor, for averages that need it.")] = None,
    data_dir: DataDir = None,
    samples: Samples = 10_000,
    split: Annotated[str, typer.Option(help="Score on test or train.")] = "test",
    cycles: Annotated[
        bool,
        typer.Option("--cycles", help="Three models or more: also cycle errors, and barriers between moved models."),
    ] = False,
    shape: Shape = None,
    seed: Seed = 0,
    force: Force = False,
    no_verify: NoVerify = False,
    as_json: AsJson = False,
) -> None:
    """Merge the same checkpoints in every way, and score each beside the parents and their ensemble."""
    from isthmus.runs.run_compare import run_compare

    recipe = build_recipe(
        checkpoints, model, "identity", {}, data, data_dir, samples, shape, seed, no_verify, repair=None,
        base_model=base,
    )  # fmt: skip

    def run() -> dict[str, Any]:
        return run_compare(
            recipe, methods=parse_names(methods), averages=parse_names(averages), repairs=parse_names(repairs),
            split=split, cycles=cycles,
        )  # fmt: skip

    report = _run_into(out, force, run, _write_comparison)
    if as_json:
        return print_json(report)
    print_comparison(report)
    if out is not None:
        console.print(f"written to {escape(str(out))}: table.md, compare.json, compare.svg, compare.png")
    return None


def _run_into(
    out: Path | None,
    force: bool,
    run: Callable[[], dict[str, Any]],
    write: Callable[[Path, Mapping[str, Any]], None],
) -> dict[str, Any]:
    """What a run finds; where a folder is named, it is claimed first, and what was found is written into it."""
    from isthmus.checkpoint.folders import new_folder

    if out is None:
        return run()
    with new_folder(out, force) as folder:
        report = run()
        write(folder, report)
    return report


def _write_curve(folder: Path, report: Mapping[str, Any]) -> None:
    """Writes the curves of a run as JSON and as pictures."""
    from isthmus.checkpoint.writing import write_text
    from isthmus.report.curves import draw_curve
    from isthmus.runs.facts import plain_json

    write_text(folder / "report.json", json.dumps(plain_json(report), indent=1))
    for kind in ("svg", "png"):
        (folder / f"curve.{kind}").write_bytes(draw_curve(report, kind))


def _write_comparison(folder: Path, report: Mapping[str, Any]) -> None:
    """Writes a comparison as JSON, as a table and as pictures."""
    from isthmus.checkpoint.writing import write_text
    from isthmus.report.bars import draw_comparison
    from isthmus.runs.facts import plain_json

    write_text(folder / "compare.json", json.dumps(plain_json(report), indent=1))
    write_text(folder / "table.md", report["table"])
    for kind in ("svg", "png"):
        (folder / f"compare.{kind}").write_bytes(draw_comparison(report["comparison"], kind))


@app.command("explain")
def _explain_command(
    folder: Annotated[Path, typer.Argument(help="The folder of a finished isthmus merge.")],
    images: Annotated[int, typer.Option(help="Inputs of the test split to score units on.")] = 2000,
    units: Annotated[int, typer.Option(help="Best, middle and worst units to draw of a space; 0 draws none.")] = 2,
    spaces: Annotated[int, typer.Option(help="Of how many spaces units are drawn.")] = 6,
    pictures: Annotated[str, typer.Option(help="How they are drawn: fourier or maco.")] = "fourier",
    steps: Annotated[int | None, typer.Option(help="Steps of gradient ascent a picture.")] = None,
    no_claims: Annotated[
        bool,
        typer.Option("--no-claims", help="Leave out the claims on weight matching, which match in three more ways."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Explain a merge, unit by unit and direction by direction, in its report.html."""
    from isthmus.runs.run_explain import ExplainOptions, explain_run

    wishes = ExplainOptions(images, units, spaces, pictures, steps, not no_claims)
    report = explain_run(folder, wishes)
    if as_json:
        return print_json(report)
    assert report.explain is not None
    print_explanation(report.explain)
    console.print(f"written to {escape(str(folder))}: report.html, report.json, features.json")
    return None


@app.command("train")
def _train_command(
    model: NewModel,
    data: Annotated[str, typer.Option("--data", help="A data set's name, or FILE.npz.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Checkpoint to write (.safetensors).")],
    seed: Seed = 0,
    preset: Annotated[str | None, typer.Option(help="Training recipe, such as cpu_mlp or horoi2024_vgg11.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples a step.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="L2 penalty.")] = None,
    split: Annotated[
        str, typer.Option(help="none, 80-20, dirichlet or classes: what this model's part of the data is.")
    ] = "none",
    part: Annotated[int, typer.Option(help="Which part of the split this model gets.")] = 0,
    parts: Annotated[int, typer.Option(help="How many parts the split has.")] = 2,
    data_dir: DataDir = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Train one parent; an interrupted training continues when the same command is given again."""
    from isthmus.runs.run_train import run_train

    report = run_train(
        model, data, out, seed=seed, preset=preset, split=split, part=part, parts=parts, folder=data_dir, force=force,
        changes={
            "epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size, "weight_decay": weight_decay,
        },
    )  # fmt: skip
    if as_json:
        return print_json(report)
    score = report["test"]
    console.print(
        f"{escape(str(out))}: {100 * score['accuracy']:.2f} % on {escape(data)} (test), loss {score['loss']:.4f}, "
        f"{report['seconds']:.0f} s"
    )
    return None


@app.command("demo")
def _demo_command(
    out: Out = Path("runs/demo"),
    as_json: AsJson = False,
) -> None:
    """Train two small networks here, show that averaging fails, and join them: about half a minute."""
    from isthmus.runs.demo import run_demo

    report = run_demo(out, say=None if as_json else console.print)
    if as_json:
        return print_json(report)
    print_scores(report)
    console.print(escape(report.verdict), style="bold")
    console.print(f"open {escape(str(out / 'report.html'))} for the whole story")
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, 2 for bad input, 130 when interrupted."""
    command = typer.main.get_command(app)
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        result = command.main(args=arguments, standalone_mode=False, prog_name="isthmus")
        return result if isinstance(result, int) else 0
    except (typer.Abort, KeyboardInterrupt):
        return _interrupted()
    except UsageError as error:
        return _refuse(f"{error.format_message().rstrip('.')}; see isthmus {' '.join(arguments[:1])} --help")
    except IsthmusError as error:
        return _refuse(str(error))
    except OSError as error:
        return _refuse(
            f"{error.strerror or error}: {error.filename or 'while reading or writing'}; check the path and the disk"
        )


def _refuse(message: str) -> int:
    """Prints one line on standard error; the exit code for bad input."""
    sys.stderr.write(f"isthmus: {' '.join(message.split())}\n")
    return 2


def _interrupted() -> int:
    """Says that the user stopped the run; the exit code for that."""
    sys.stderr.write("isthmus: interrupted; nothing was written\n")
    return 130


if __name__ == "__main__":
    sys.exit(main())
