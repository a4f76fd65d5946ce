"""The command line: parse, call, print. Bad input is one line on standard error and exit code 2."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from isthmus.errors import InputError, IsthmusError
from isthmus.recipe import Alignment, Data, Member, Recipe, read_recipe
from isthmus.registry import did_you_mean

app = typer.Typer(
    name="isthmus",
    help="Join independently trained neural networks into one: align, merge, mend, measure.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
console = Console(highlight=False)

# Typer does not export the base of its usage errors.
UsageError: Any = typer.BadParameter.__bases__[0]

# Options of the matching method are taken as they come, so that each method brings its own.
METHOD_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}

SPEC = (
    "zoo:NAME?key=value, package.module:factory?key=value, hf:DIRECTORY, timm:NAME?key=value, "
    "torchvision:NAME?key=value or FILE.pt2."
)
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


@app.command()
def inspect(
    model: NewModel,
    data: DataName = None,
    data_dir: DataDir = None,
    shape: Shape = None,
    no_verify: NoVerify = False,
    as_json: AsJson = False,
) -> None:
    """Show a model's spaces, groups and sites; what is frozen, and why."""
    from isthmus.inspection import freeze_warnings, frozen_tree, space_tree, spoken_gauges
    from isthmus.pipeline import inspect_model

    named = None if data is None else Data(name=data, folder=None if data_dir is None else str(data_dir))
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


@app.command(context_settings=METHOD_OPTIONS)
def merge(
    checkpoints: Annotated[list[str], typer.Argument(help="Checkpoints, or one recipe (.yaml).")],
    out: Out,
    model: Model = None,
    method: Method = "weight_matching",
    average: Annotated[
        str, typer.Option(help="How aligned weights are averaged; its options as --average.density 0.2.")
    ] = "mean",
    base: Annotated[str | None, typer.Option(help="The models' common ancestor, for averages that need it.")] = None,
    weights: Annotated[str | None, typer.Option(help="One weight a model, such as 0.7,0.3.")] = None,
    repair: Annotated[str, typer.Option(help="reset, repair or none.")] = "reset",
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
    """Merge checkpoints of one architecture into one model: prove, align, average, mend, measure."""
    from isthmus.inputs import load_inputs
    from isthmus.pipeline import run_merge

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
    print_proof(report["proof"])
    print_method(report["method"])
    print_scores(report)
    console.print(escape(report["verdict"]), style="bold")
    if report["repair"] is None and repair != "none" and data is None:
        console.print("no --data: BatchNorm statistics, if any, are averaged and not mended", style="yellow")
    if report.get("left_out"):
        console.print(
            f"the parents do not agree on {escape(', '.join(report['left_out']))}: not copied, choose one yourself",
            style="yellow",
        )
    console.print(f"written to {escape(str(out))}: model.safetensors, report.html, recipe.yaml")
    return None


@app.command(context_settings=METHOD_OPTIONS)
def align(
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
    from isthmus.pipeline import run_align

    paths, options = split_options(checkpoints)
    recipe = build_recipe(paths, model, method, options, data, data_dir, samples, shape, seed, no_verify, repair=None)
    report = run_align(recipe, out, force=force, command=command_line())
    if as_json:
        return print_json(report)
    print_proof(report["proof"])
    print_method(report["method"])
    console.print(escape(report["verdict"]), style="bold")
    console.print(f"written to {escape(str(out))}: {escape(', '.join(report['aligned']))}, alignment.safetensors")
    return None


@app.command(context_settings=METHOD_OPTIONS)
def connect(
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
    from isthmus.checkpoint import new_folder, write_text
    from isthmus.facts import finite
    from isthmus.pipeline import run_connect
    from isthmus.report import draw_curve

    paths, options = split_options(checkpoints)
    recipe = build_recipe(paths, model, method, options, data, data_dir, samples, shape, seed, no_verify, repair=None)

    def run() -> dict[str, Any]:
        return run_connect(recipe, points=points, split=split, raw=raw)

    if out is None:
        report = run()
    else:
        with new_folder(out, force) as folder:
            report = run()
            write_text(folder / "report.json", json.dumps(finite(report), indent=1))
            for kind in ("svg", "png"):
                (folder / f"curve.{kind}").write_bytes(draw_curve(report, kind))
    if as_json:
        return print_json(report)
    print_method(report["method"])
    print_curves(report)
    if out is not None:
        console.print(f"written to {escape(str(out))}: curve.svg, curve.png, report.json")
    return None


@app.command()
def compare(
    checkpoints: Annotated[list[str], typer.Argument(help="Two or more checkpoints of one architecture.")],
    model: Model = None,
    data: DataName = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder for compare.json, table.md, compare.svg, compare.png.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Matching methods, separated by commas; all that the data allows by default.")
    ] = None,
    averages: Annotated[str | None, typer.Option(help="Averages, separated by commas: mean,pleas by default.")] = None,
    repairs: Annotated[str | None, typer.Option(help="raw,reset,repair, or some of them.")] = None,
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
    from isthmus.checkpoint import new_folder, write_text
    from isthmus.facts import finite
    from isthmus.pipeline import run_compare
    from isthmus.report import draw_comparison

    recipe = build_recipe(
        checkpoints, model, "identity", {}, data, data_dir, samples, shape, seed, no_verify, repair=None,
        base_model=base,
    )  # fmt: skip

    def run() -> dict[str, Any]:
        return run_compare(
            recipe, methods=parse_names(methods), averages=parse_names(averages), repairs=parse_names(repairs),
            split=split, cycles=cycles,
        )  # fmt: skip

    if out is None:
        report = run()
    else:
        with new_folder(out, force) as folder:
            report = run()
            write_text(folder / "compare.json", json.dumps(finite(report), indent=1))
            write_text(folder / "table.md", report["table"])
            for kind in ("svg", "png"):
                (folder / f"compare.{kind}").write_bytes(draw_comparison(report["comparison"], kind))
    if as_json:
        return print_json(report)
    print_comparison(report)
    if out is not None:
        console.print(f"written to {escape(str(out))}: table.md, compare.json, compare.svg, compare.png")
    return None


@app.command()
def explain(
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
    from isthmus.explanation import Wishes, explain_run

    wishes = Wishes(images, units, spaces, pictures, steps, not no_claims)
    report = explain_run(folder, wishes)
    if as_json:
        return print_json(report)
    print_explanation(report["explain"])
    console.print(f"written to {escape(str(folder))}: report.html, report.json, features.json")
    return None


@app.command()
def train(
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
    from isthmus.training import run_train

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


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    as_json: AsJson = False,
) -> None:
    """Train two small networks here, show that averaging fails, and join them: about half a minute."""
    from isthmus.demo import run_demo

    report = run_demo(out, say=None if as_json else console.print)
    if as_json:
        return print_json(report)
    print_scores(report)
    console.print(escape(report["verdict"]), style="bold")
    console.print(f"open {escape(str(out / 'report.html'))} for the whole story")
    return None


def split_options(tokens: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Positional paths, and the options `--name value` among them, which belong to the matching method.

    Raises:
        InputError: An option without a value.
    """
    paths: list[str] = []
    options: dict[str, Any] = {}
    index = 0
    while index < len(tokens):
        token = tokens[index]
        if token.startswith("-") and token != "-":
            name, equals, value = token.lstrip("-").partition("=")
            if not equals:
                index += 1
                if index == len(tokens):
                    raise InputError(f"option {token} has no value: give one, as {token} VALUE")
                value = tokens[index]
            options[name.replace("-", "_")] = parse_value(value)
        else:
            paths.append(token)
        index += 1
    return paths, options


def parse_value(text: str) -> Any:
    """JSON, or else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def parse_names(text: str | None) -> list[str] | None:
    """The names in a text such as `mean,pleas`."""
    return None if text is None else [name.strip().replace("-", "_") for name in text.split(",") if name.strip()]


def parse_shape(text: str | None) -> list[int] | str | None:
    """The shape in a text such as `3,32,32`; a text that says more than a shape as it is, once it is found right.

    Raises:
        InputError: It describes no input.
    """
    from isthmus.example import parse_input

    if text is None:
        return None
    first, *others = parse_input(text)
    plain = not others and (first.name, first.dtype) == (None, None)
    return list(first.shape) if plain else text


def find_architecture(paths: Sequence[str], model: str | None) -> str:
    """The architecture that was named, else that of the Hugging Face folders which the checkpoints are.

    Raises:
        InputError: None was named, and not all checkpoints are such folders.
    """
    from isthmus.models import absolute_spec
    from isthmus.models.hugging_face import describes_model

    if model is not None:
        return absolute_spec(model)
    other = next((path for path in paths if not describes_model(Path(path))), None)
    if other is not None or not paths:
        told = f" ({other} is no Hugging Face folder, which would say)" if other is not None else ""
        raise InputError(f"no architecture{told}: give --model zoo:NAME, module:factory, timm:NAME or hf:DIRECTORY")
    return absolute_spec(f"hf:{paths[0]}")


def build_recipe(
    paths: Sequence[str],
    model: str | None,
    method: str,
    options: dict[str, Any],
    data: str | None,
    data_dir: Path | None,
    samples: int,
    shape: str | None,
    seed: int,
    no_verify: bool,
    *,
    weights: str | None = None,
    **rest: Any,
) -> Recipe:
    """The recipe that command-line options describe.

    Raises:
        InputError: No architecture, weights that do not fit, or an unknown option.
    """
    averaging = {name.removeprefix("average."): value for name, value in options.items() if name.startswith("average.")}
    options = {name: value for name, value in options.items() if not name.startswith("average.")}
    check_option_names(method, options)
    architecture = find_architecture(paths, model)
    if samples < 1:
        raise InputError(f"--samples {samples}: give a positive number")
    members = [Member(model=path) for path in paths]
    if weights is not None:
        numbers = [parse_value(part) for part in weights.split(",")]
        if len(numbers) != len(members) or not all(isinstance(x, int | float) for x in numbers):
            raise InputError(f"--weights {weights}: give {len(members)} numbers, one a model, separated by commas")
        members = [
            m.model_copy(update={"parameters": {"weight": float(x)}}) for m, x in zip(members, numbers, strict=True)
        ]
    folder = None if data_dir is None else str(data_dir)
    recipe = Recipe(
        models=members,
        architecture=architecture,
        align=Alignment(method=method, options=options),
        data=None if data is None else Data(name=data, folder=folder, samples=samples),
        input=parse_shape(shape),
        seed=seed,
        verify=not no_verify,
        parameters=averaging,
        **rest,
    )
    recipe.check()
    return recipe


def check_option_names(method: str, options: Mapping[str, Any]) -> None:
    """Refuses an option that neither the command nor the method has, with a hint at the nearest of both."""
    import dataclasses

    from isthmus.match import METHODS

    if method not in METHODS:
        return  # the recipe's own check names the methods there are
    fields: Any = METHODS[method]
    own = [flag(field.name) for field in dataclasses.fields(fields)]
    commands: Any = typer.main.get_command(app)
    known = sorted(
        {p.opts[-1] for command in commands.commands.values() for p in command.params if p.opts[-1][0] == "-"}
    )
    for name in options:
        if flag(name) not in own:
            hint = did_you_mean(flag(name), [*own, *known])
            raise InputError(f"no option {flag(name)}{hint}: {method} has {', '.join(own) or 'none'}; see --help")


def flag(name: str) -> str:
    """An option as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


def command_line() -> str:
    """The command as it was given, for the report."""
    return shlex.join(["isthmus", *sys.argv[1:]])


def print_json(report: Mapping[str, Any]) -> None:
    """Prints a report as JSON."""
    from isthmus.facts import finite

    sys.stdout.write(json.dumps(finite(report), ensure_ascii=False) + "\n")


def print_proof(proof: Mapping[str, Any] | None) -> None:
    """Prints what was proved."""
    if proof is None:
        console.print("not proved (--no-verify)", style="yellow")
        return
    silent = f"; no effect on the outputs: {', '.join(proof['no_ops'])}" if proof["no_ops"] else ""
    console.print(
        f"proved: random transforms of all spaces change the outputs by {proof['max_error']:.0e} at most "
        f"(rounding: {proof['tolerance']:.0e}), leaving one tensor out by {proof['weakest_control']:.0e} up"
        f"{escape(silent)}",
        style="green",
    )


def print_method(method: Mapping[str, Any]) -> None:
    """Prints what the matching reached."""
    reached = ""
    if method["objective"] is not None:
        reached = f", objective {method['objective']:.6g}"
        if method["upper_bound"]:
            reached += f" ({100 * method['objective'] / method['upper_bound']:.0f} % of its upper bound)"
    done = "" if method["converged"] else ", not converged"
    console.print(f"aligned by {method['name'].replace('_', ' ')} in {method['seconds']:.1f} s{reached}{done}")


def print_scores(report: Mapping[str, Any]) -> None:
    """Prints the scores as a table."""
    scores = report.get("scores")
    if not scores:
        return
    table = Table(title=f"{report['data']['name']}, {report['data']['score_split']} split", title_justify="left")
    table.add_column("model")
    table.add_column("accuracy", justify="right")
    table.add_column("loss", justify="right")
    rows = [(f"parent {index}", score) for index, score in enumerate(scores["parents"])]
    rows += [
        ("ensemble", scores["ensemble"]),
        ("naive average", scores["naive"]),
        ("naive average, mended", scores["naive_mended"]),
        ("aligned average", scores["aligned"]),
        ("merged model", scores["merged"]),
    ]
    for name, score in rows:
        if score is not None:
            accuracy = "–" if score["accuracy"] is None else f"{100 * score['accuracy']:.2f} %"
            table.add_row(name, accuracy, f"{score['loss']:.4f}", style="bold" if name == "merged model" else None)
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
        table.add_row(name, "", "", spoken_share(score["accuracy"]), f"{score['loss']:.4f}", "", "", "", style="dim")
    scored = [row[key] for row in found["rows"] if row[key] is not None]
    best = min(scored, key=lambda value: sign * value, default=None)
    for row in found["rows"]:
        names = (row["method"], row["average"], row["repair"])
        if row["note"]:
            table.add_row(*names, "–", "–", "–", "–", "–", style="dim")
            continue
        memory = "–" if row["memory"] is None else f"{row['memory'] / 2**20:.0f}"
        table.add_row(
            *names, spoken_share(row["accuracy"]), f"{row['loss']:.4f}", f"{row['barrier']:+.4f}",
            f"{row['seconds']:.1f}", memory, style="bold" if row[key] == best else None,
        )  # fmt: skip
    console.print(table)
    for note in dict.fromkeys((row["method"], row["note"]) for row in found["rows"] if row["note"]):
        console.print(f"{note[0]}: {escape(note[1])}", style="yellow")
    if report["cycles"]:
        print_cycles(report["cycles"])


def print_cycles(cycles: Sequence[Mapping[str, Any]]) -> None:
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
            each["method"], spoken_share(each["share_lost"]), *(f"{line['barrier']:+.4f}" for line in each["lines"])
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


def spoken_share(value: float | None) -> str:
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, 2 for bad input, 130 when interrupted."""
    command = typer.main.get_command(app)
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        result = command.main(args=arguments, standalone_mode=False, prog_name="isthmus")
        return result if isinstance(result, int) else 0
    except (typer.Abort, KeyboardInterrupt):
        return interrupted()
    except UsageError as error:
        return refuse(f"{error.format_message().rstrip('.')}; see isthmus {' '.join(arguments[:1])} --help")
    except IsthmusError as error:
        return refuse(str(error))
    except OSError as error:
        return refuse(
            f"{error.strerror or error}: {error.filename or 'while reading or writing'}; check the path and the disk"
        )


def refuse(message: str) -> int:
    """Prints one line on standard error; the exit code for bad input."""
    sys.stderr.write(f"isthmus: {' '.join(message.split())}\n")
    return 2


def interrupted() -> int:
    """Says that the user stopped the run; the exit code for that."""
    sys.stderr.write("isthmus: interrupted; nothing was written\n")
    return 130


if __name__ == "__main__":
    sys.exit(main())
