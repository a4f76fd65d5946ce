"""From words on the command line to typed options: methods' own options, lists, shapes, recipes."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from isthmus.errors import InputError
from isthmus.registry import did_you_mean, parse_value
from isthmus.runs.recipe import AlignOptions, DataOptions, ParentOptions, Recipe

# The commands are in cli.py.
app = typer.Typer(
    name="isthmus",
    help="Join independently trained neural networks into one: align, merge, repair, measure.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


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


def parse_names(text: str | None) -> list[str] | None:
    """The names in a text such as `mean,pleas`, or with options as in `cca?gamma=0.1,zipit`."""
    if text is None:
        return None
    parts = [part.strip().partition("?") for part in text.split(",") if part.strip()]
    return [name.replace("-", "_") + mark + options for name, mark, options in parts]


def parse_shape(text: str | None) -> list[int] | str | None:
    """The shape in a text such as `3,32,32`; a text that says more than a shape as it is, once it is found right.

    Raises:
        InputError: It describes no input.
    """
    from isthmus.runs.example import parse_input

    if text is None:
        return None
    first, *others = parse_input(text)
    plain = not others and (first.name, first.dtype) == (None, None)
    return list(first.shape) if plain else text


def _find_architecture(paths: Sequence[str], model: str | None) -> str:
    """The architecture that was named; if none was, the one of the Hugging Face folders that the checkpoints are.

    Raises:
        InputError: None was named, and not all checkpoints are such folders.
    """
    from isthmus.models import absolute_spec, spoken_specs
    from isthmus.models.hugging_face import describes_model

    if model is not None:
        return absolute_spec(model)
    other = next((path for path in paths if not describes_model(Path(path))), None)
    if other is not None or not paths:
        told = f" ({other} is no Hugging Face folder, which would say)" if other is not None else ""
        raise InputError(f"no architecture{told}: give --model {spoken_specs()}")
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
    _check_option_names(method, options)
    architecture = _find_architecture(paths, model)
    if samples < 1:
        raise InputError(f"--samples {samples}: give a positive number")
    members = [ParentOptions(model=path) for path in paths]
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
        align=AlignOptions(method=method, options=options),
        data=None if data is None else DataOptions(name=data, folder=folder, samples=samples),
        input=parse_shape(shape),
        seed=seed,
        verify=not no_verify,
        parameters=averaging,
        **rest,
    )
    recipe.check()
    return recipe


def _check_option_names(method: str, options: Mapping[str, Any]) -> None:
    """Refuses an option that neither the command nor the method has, with a hint at the nearest of both."""
    import dataclasses

    from isthmus.match import METHODS

    if method not in METHODS:
        return  # the recipe's own check names the methods there are
    fields: Any = METHODS[method]
    own = [_flag(field.name) for field in dataclasses.fields(fields)]
    commands: Any = typer.main.get_command(app)
    known = sorted(
        {p.opts[-1] for command in commands.commands.values() for p in command.params if p.opts[-1][0] == "-"}
    )
    for name in options:
        if _flag(name) not in own:
            hint = did_you_mean(_flag(name), [*own, *known])
            raise InputError(f"no option {_flag(name)}{hint}: {method} has {', '.join(own) or 'none'}; see --help")


def _flag(name: str) -> str:
    """An option as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


def command_line() -> str:
    """The command as it was given, for the report."""
    return shlex.join(["isthmus", *sys.argv[1:]])
