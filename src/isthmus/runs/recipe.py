"""Recipes: everything that a run depends on, as YAML, with mergekit's words where it has one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from isthmus.average import AVERAGES
from isthmus.average.coefficients import lies_in
from isthmus.errors import InputError
from isthmus.match import METHODS
from isthmus.merging.repair import REPAIRS
from isthmus.registry import configure, did_you_mean
from isthmus.runs.example import parse_input

DTYPES = ("float32", "float16", "bfloat16", "float64")


class Strict(BaseModel):
    """A part of a recipe; keys that it does not know are errors."""

    model_config = ConfigDict(extra="forbid")


class ParentOptions(Strict):
    """One checkpoint: its path, its weight in the merge, and the hash it must have, if one is noted.

    The weight, `parameters: {weight: …}`, is a number, or numbers by module path, with `""` for all other tensors.
    """

    model: str
    parameters: dict[str, float | dict[str, float]] = Field(default_factory=dict)
    sha256: str | None = None


class AlignOptions(Strict):
    """How the models are aligned: a method's name and its options."""

    method: str = "weight_matching"
    options: dict[str, Any] = Field(default_factory=dict)


class DataOptions(Strict):
    """What the run reads: a data set's name or an .npz file, its folder, and how many training samples to use."""

    name: str
    folder: str | None = None
    samples: int = Field(default=10_000, gt=0)
    batch_size: int = Field(default=500, gt=0)
    sha256: str | None = None


class Recipe(Strict):
    """A merge, complete: running it again on the same files gives the same bytes."""

    models: list[ParentOptions]
    architecture: str
    merge_method: str = "mean"
    parameters: dict[str, Any] = Field(default_factory=dict)
    align: AlignOptions = Field(default_factory=AlignOptions)
    repair: str | None = "reset"
    data: DataOptions | None = None
    base_model: str | None = None
    input: list[int] | str | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    seed: int = 0
    verify: bool = True

    @property
    def coefficients(self) -> dict[str, list[float]] | None:
        """One weight a model, by module path, with `""` for all other tensors; None where all are alike."""
        own = [member.parameters.get("weight", 1.0) for member in self.models]
        numbers = [weight if isinstance(weight, dict) else {"": weight} for weight in own]
        paths = dict.fromkeys(["", *(path for each in numbers for path in each)])
        weights = {path: [_weight_at(each, path) for each in numbers] for path in paths}
        return None if len(weights) == 1 and len(set(weights[""])) == 1 else weights

    def check(self) -> None:
        """Checks what the types alone do not say.

        Raises:
            InputError: Fewer than two models, an unknown name or option, or a method without its data.
        """
        if len(self.models) < 2:
            raise InputError(f"{len(self.models)} checkpoint given: merging needs at least two")
        method = configure("matching method", self.align.method, METHODS, self.align.options)
        average = configure("average", self.merge_method, AVERAGES, self.parameters)
        for member in self.models:
            for key in set(member.parameters) - {"weight"}:
                raise InputError(f"{member.model}: no parameter {key!r}{did_you_mean(key, ['weight'])}: use weight")
        if self.repair is not None and self.repair not in REPAIRS:
            raise InputError(
                f"no repair {self.repair!r}{did_you_mean(self.repair, REPAIRS)}: use {', '.join(REPAIRS)} or none"
            )
        for name in (self.dtype, self.out_dtype):
            if name is not None and name not in DTYPES:
                raise InputError(f"no dtype {name!r}{did_you_mean(name, DTYPES)}: choose from {', '.join(DTYPES)}")
        if isinstance(self.input, str):
            parse_input(self.input)
        for chosen in (method, average):
            if chosen.needs in ("data", "labels") and self.data is None:
                raise InputError(f"{chosen.name} needs data: give --data NAME or --data FILE.npz")
            if chosen.needs == "base" and self.base_model is None:
                raise InputError(f"{chosen.name} needs the models' common ancestor: give base_model (--base FILE)")

    def to_yaml(self) -> str:
        """The recipe as YAML text, all defaults written out."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


def _weight_at(weights: Mapping[str, float], path: str) -> float:
    """A model's weight at a module path: the one given for the longest path that it lies in, else 1."""
    above = [given for given in weights if not given or lies_in(path, given)]
    return weights[max(above, key=len)] if above else 1.0


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file.

    Raises:
        InputError: The file cannot be read, is no YAML, or has a key or value that no recipe has.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        told = " ".join(str(error).split())
        raise InputError(f"{path} cannot be read as YAML ({told}): give a recipe") from error
    if not isinstance(content, Mapping):
        raise InputError(f"{path} is no recipe: it must hold keys such as models, architecture and align")
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{path}: {_explain(error, content)}") from error
    recipe.check()
    return recipe


def _explain(error: ValidationError, content: Mapping[str, Any]) -> str:
    """The first thing wrong with a recipe, in one line."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        part: Any = Recipe
        for step in first["loc"][:-1]:
            field = part.model_fields.get(step) if isinstance(step, str) and isinstance(part, type) else None
            part = (
                part
                if field is None
                else {"align": AlignOptions, "data": DataOptions, "models": ParentOptions}.get(str(step), part)
            )
        known = list(part.model_fields)
        return f"unknown key {where}{did_you_mean(str(first['loc'][-1]), known)}: the keys are {', '.join(known)}"
    if first["type"] == "missing":
        return f"{where} is missing: a recipe needs it"
    return f"{where}: {first['msg'].lower()} (found {json.dumps(first['input'], default=str)[:60]})"
