"""From a recipe to a finished run folder: read, check, trace, prove, align, merge, mend, measure, write."""

import datetime
import json
import math
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from isthmus.average import AVERAGES
from isthmus.checkpoint import hash_file, load_state, new_folder, save_state, write_text
from isthmus.connect import Curve, Ensemble, Score, connect, evaluate
from isthmus.data import Batches, DataSet, load_data
from isthmus.errors import DataError, InputError, ModelError
from isthmus.match import METHODS, align
from isthmus.members import as_modules
from isthmus.merge import merge
from isthmus.models import load_model, sample_shape
from isthmus.recipe import Recipe
from isthmus.registry import configure
from isthmus.repair import normalisation_layers, repair
from isthmus.report import write_report
from isthmus.symmetry import Symmetry
from isthmus.trace import Proof, trace, verify
from isthmus.transform import Alignment, Permutation, apply, flat_indices

# Shapes of one sample that are tried when nothing says what the model reads, by the rank of its first weight.
USUAL_SHAPES = {2: ((),), 3: ((128,),), 4: ((32, 32), (28, 28), (224, 224), (8, 8)), 5: ((16, 32, 32),)}


@dataclass(eq=False)
class Inputs:
    """What a run reads, loaded and checked.

    Attributes:
        architecture: What `--model` named.
        models: The models, in `eval()`.
        data: The data set, or None.
        calibration: Training batches for statistics and activations, or None.
        example: A batch of two, for tracing.
        assumed: What was assumed about the example, or "" where it is known.
    """

    architecture: nn.Module
    models: list[nn.Module]
    data: DataSet | None
    calibration: Batches | None
    example: tuple[Tensor, ...]
    assumed: str


def load_inputs(recipe: Recipe) -> Inputs:
    """Everything that a recipe names, read and checked; nothing is written.

    Raises:
        CheckpointError: A checkpoint cannot be read.
        DataError: The data cannot be read or does not fit the model.
        InputError: A file is not the one that the recipe's hash names.
        ModelError: The model cannot be built, or a checkpoint is not of its architecture.
    """
    torch.manual_seed(recipe.seed)
    architecture = load_model(recipe.architecture).eval()
    states = []
    for member in recipe.models:
        state = load_state(member.model)
        found = hash_file(member.model) if member.sha256 else None
        if found != member.sha256:
            raise InputError(f"{member.model} has changed since the recipe was written: remove its sha256 to use it as it is")
        states.append(state)
    models = as_modules(states, architecture, names=[member.model for member in recipe.models])
    if recipe.dtype is not None:
        models = [model.to(getattr(torch, recipe.dtype)) for model in models]
    data = calibration = None
    if recipe.data is not None:
        data = load_data(recipe.data.name, recipe.data.folder)
        calibration = data.train(recipe.data.batch_size, seed=recipe.seed).take(recipe.data.samples)
    example, assumed = example_input(models[0], recipe.input, data)
    return Inputs(architecture, models, data, calibration, example, assumed)


def example_input(
    model: nn.Module, shape: Sequence[int] | None, data: DataSet | None
) -> tuple[tuple[Tensor, ...], str]:
    """A batch of two inputs on which the model runs, and what was assumed to make it.

    The shape is the one given, else the data's, else the one that the model states, else one that its first weight
    suggests.

    Raises:
        DataError: The model does not run on the data.
        InputError: The model does not run on the given shape, or on any that can be guessed.
    """
    reference = next((t for t in model.state_dict().values() if t.is_floating_point()), torch.zeros(()))
    if shape is None and data is not None:
        batch = next(iter(data.test(2)))[0]
        batch = batch.to(reference.dtype) if batch.is_floating_point() else batch
        failure = why_not(model, batch)
        if failure:
            raise DataError(f"the model does not run on {data.name} (samples {data.sample_shape}: {failure}): check --model")
        return (batch,), ""
    stated = sample_shape(model) if shape is None else tuple(shape)
    if stated is not None:
        batch = torch.randn(2, *stated, dtype=reference.dtype)
        failure = why_not(model, batch)
        if failure:
            raise InputError(f"the model does not run on inputs of shape {stated} ({failure}): give --input, such as 3,32,32")
        return (batch,), ""
    weight = next((t for t in model.state_dict().values() if t.ndim >= 2), None)
    for rest in USUAL_SHAPES.get(weight.ndim, ()) if weight is not None else ():
        assert weight is not None
        guess = (weight.shape[1], *rest)
        batch = torch.randn(2, *guess, dtype=reference.dtype)
        if not why_not(model, batch):
            return (batch,), f"inputs of shape {guess}, from the first weight's shape {tuple(weight.shape)}"
    raise InputError("no input is known on which the model runs: give --input, such as 3,32,32, or --data")


def why_not(model: nn.Module, batch: Tensor) -> str:
    """Why the model does not run on a batch, in one line; empty where it does."""
    try:
        with torch.no_grad():
            model(batch)
    except Exception as error:  # a foreign model may raise anything on inputs that do not fit
        return " ".join(str(error).split())[:160] or type(error).__name__
    return ""


def prepare(recipe: Recipe, inputs: Inputs) -> tuple[Symmetry, Proof | None, Alignment]:
    """The symmetry, its proof unless the recipe leaves it out, and the alignment."""
    symmetry = trace(inputs.models[0], *inputs.example)
    proof = verify(inputs.models[0], symmetry, *inputs.example, seed=recipe.seed) if recipe.verify else None
    method = configure("matching method", recipe.align.method, METHODS, recipe.align.options)
    data = inputs.calibration if method.needs else None
    return symmetry, proof, align(inputs.models, symmetry, method, data=data, seed=recipe.seed)


def run_merge(recipe: Recipe, out: Path, *, force: bool = False, command: str = "") -> dict[str, Any]:
    """Merges what the recipe names into a run folder, and returns its report.

    The folder holds `model.safetensors`, `alignment.safetensors`, `recipe.yaml`, `report.json`, `report.html` and
    `README.md`; it appears whole or not at all.

    Raises:
        CheckpointError: A checkpoint cannot be read, or the folder cannot be written.
        IsthmusError: Anything else that `load_inputs` and the steps of the run raise.
    """
    recipe.check()
    with new_folder(out, force) as folder:
        start = time.perf_counter()
        inputs = load_inputs(recipe)
        symmetry, proof, alignment = prepare(recipe, inputs)
        average = configure("average", recipe.merge_method, AVERAGES)
        base = None if recipe.base_model is None else load_state(recipe.base_model)
        merged = merge(
            inputs.models, alignment, average, recipe.coefficients, data=inputs.calibration, base=base, seed=recipe.seed
        )
        mended = mend(merged, recipe, inputs, alignment)
        if recipe.out_dtype is not None:
            mended = mended.to(getattr(torch, recipe.out_dtype))
        scores, curves = measure(recipe, inputs, alignment, merged, mended)
        report = {
            **provenance(recipe, inputs, command),
            "method": describe_alignment(recipe, alignment),
            "average": {
                "name": recipe.merge_method,
                "options": {},
                "coefficients": recipe.coefficients or [1 / len(inputs.models)] * len(inputs.models),
            },
            "repair": recipe.repair if inputs.calibration is not None else None,
            "gained_biases": getattr(mended, "gained_biases", []),
            "proof": describe_proof(proof),
            "symmetry": describe_symmetry(symmetry, alignment),
            "scores": scores,
            "curves": curves,
        }
        report["seconds"] = time.perf_counter() - start
        report["verdict"] = verdict(report)
        save_state(mended.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
        alignment.save(folder / "alignment.safetensors")
        write_run(folder, recipe, report)
        copy_config(recipe.models[0].model, folder)
        write_text(folder / "README.md", model_card(recipe, report))
    return report


def run_align(recipe: Recipe, out: Path, *, force: bool = False, command: str = "") -> dict[str, Any]:
    """Writes every model, carried into the common frame, and the alignment into a folder; returns the report.

    Raises:
        CheckpointError: A checkpoint cannot be read, or the folder cannot be written.
        IsthmusError: Anything else that `load_inputs` and the steps of the run raise.
    """
    recipe.check()
    with new_folder(out, force) as folder:
        start = time.perf_counter()
        inputs = load_inputs(recipe)
        symmetry, proof, alignment = prepare(recipe, inputs)
        names = aligned_names([member.model for member in recipe.models])
        for index, (model, name) in enumerate(zip(inputs.models, names, strict=True)):
            save_state(apply(alignment, model, index).state_dict(), folder / name, metadata={"format": "pt"})
        alignment.save(folder / "alignment.safetensors")
        report = {
            **provenance(recipe, inputs, command),
            "method": describe_alignment(recipe, alignment),
            "proof": describe_proof(proof),
            "symmetry": describe_symmetry(symmetry, alignment),
            "aligned": names,
        }
        report["seconds"] = time.perf_counter() - start
        report["verdict"] = (
            f"{len(names)} models aligned by {spoken(recipe.align.method)}; each computes the function it had before."
        )
        write_run(folder, recipe, report)
    return report


def write_run(folder: Path, recipe: Recipe, report: Mapping[str, Any]) -> None:
    """Writes the recipe with all hashes, the report and its page."""
    members = [
        member.model_copy(update={"model": str(Path(member.model).resolve()), "sha256": entry["sha256"]})
        for member, entry in zip(recipe.models, report["models"], strict=True)
    ]
    complete = recipe.model_copy(update={"models": members})
    if recipe.data is not None and Path(recipe.data.name).suffix == ".npz":
        path = Path(recipe.data.name).resolve()
        complete.data = recipe.data.model_copy(update={"name": str(path), "sha256": hash_file(path)})
    write_text(folder / "recipe.yaml", complete.to_yaml())
    write_text(folder / "report.json", json.dumps(finite(report), indent=1, ensure_ascii=False))
    write_report(folder)


def finite(value: Any) -> Any:
    """The value as plain JSON: tuples become lists, and numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def mend(merged: nn.Module, recipe: Recipe, inputs: Inputs, alignment: Alignment) -> nn.Module:
    """The merged model repaired as the recipe says.

    Raises:
        DataError: The merge left statistics that need data, and there is none, or the recipe repairs nothing.
    """
    if recipe.repair is None or inputs.calibration is None:
        if merged.needs_repair:
            raise DataError("the merged model's BatchNorm statistics are undefined: give --data and --repair reset")
        if normalisation_layers(merged) and recipe.repair is not None and recipe.data is None:
            return merged
        return merged
    return repair(
        merged,
        inputs.calibration,
        recipe.repair,
        parents=inputs.models,
        alignment=alignment,
        coefficients=recipe.coefficients,
    )


def measure(
    recipe: Recipe, inputs: Inputs, alignment: Alignment, merged: nn.Module, mended: nn.Module
) -> tuple[dict[str, Any] | None, list[dict[str, Any]] | None]:
    """Scores of parents, ensemble, naive average and result on the test split, and curves between two models."""
    if inputs.data is None:
        return None, None
    test = inputs.data.test()
    naive = merge(inputs.models, None, "mean", recipe.coefficients)
    scores = {
        "parents": [describe_score(evaluate(model, test)) for model in inputs.models],
        "ensemble": describe_score(evaluate(Ensemble(inputs.models), test)),
        "naive": describe_score(evaluate(naive, test)),
        "naive_mended": None,
        "aligned": describe_score(evaluate(merged, test)) if not merged.needs_repair else None,
        "merged": describe_score(evaluate(mended, test)),
    }
    if recipe.repair is not None and (normalisation_layers(naive) or recipe.repair == "repair"):
        naive = repair(naive, inputs.calibration, recipe.repair, parents=inputs.models, coefficients=recipe.coefficients)
        scores["naive_mended"] = describe_score(evaluate(naive, test))
    if len(inputs.models) != 2 or not alignment.is_exact:
        return scores, None
    moved = apply(alignment, inputs.models[1], 1)
    reference = apply(alignment, inputs.models[0], 0)
    curves = {
        "naive": connect(inputs.models[0], inputs.models[1], test, calibration=inputs.calibration).to_dict(),
        "aligned": connect(reference, moved, test, calibration=inputs.calibration).to_dict(),
    }
    return scores, [{"models": [0, 1], **curves}]


def describe_score(score: Score) -> dict[str, Any]:
    """A score as plain JSON values."""
    return {"loss": score.loss, "accuracy": score.accuracy, "count": score.count}


def provenance(recipe: Recipe, inputs: Inputs, command: str) -> dict[str, Any]:
    """What was run, on what, with which versions."""
    data = None
    if recipe.data is not None and inputs.data is not None and inputs.calibration is not None:
        data = {
            "name": inputs.data.name,
            "score_split": "test",
            "score_samples": len(inputs.data.y_test),
            "calibration_split": "train",
            "calibration_samples": min(recipe.data.samples, len(inputs.data.y_train)),
        }
    return {
        "isthmus": version("isthmus"),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "seed": recipe.seed,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "model": recipe.architecture,
        "models": [
            {"path": str(Path(member.model).resolve()), "sha256": hash_file(member.model)} for member in recipe.models
        ],
        "data": data,
        "assumed": inputs.assumed,
    }


def describe_alignment(recipe: Recipe, alignment: Alignment) -> dict[str, Any]:
    """The matching's facts as plain JSON values."""
    return {
        "name": recipe.align.method,
        "options": recipe.align.options,
        "objective": alignment.objective,
        "upper_bound": alignment.upper_bound,
        "converged": alignment.converged,
        "seconds": alignment.seconds,
        "details": dict(alignment.details),
    }


def describe_proof(proof: Proof | None) -> dict[str, Any] | None:
    """The proof as plain JSON values."""
    if proof is None:
        return None
    return {
        "max_error": proof.max_error,
        "tolerance": proof.tolerance,
        "trials": proof.trials,
        "weakest_control": proof.weakest_control,
        "no_ops": list(proof.no_ops),
        "dtype": proof.dtype,
    }


def describe_symmetry(symmetry: Symmetry, alignment: Alignment | None = None) -> dict[str, Any]:
    """Spaces, frozen axes, and how many units of each space an alignment moved."""
    touched = sum(math.prod(symmetry.shapes[name]) for name in symmetry.sites)
    everything = sum(math.prod(shape) for shape in symmetry.shapes.values())
    return {
        "free_units": symmetry.free_units,
        "moved_share": touched / everything if everything else 0.0,
        "spaces": [
            {
                "name": space.name,
                "size": space.size,
                "copies": space.copies,
                "parent": space.parent,
                "group": space.group.value,
                "sites": [
                    {"parameter": site.parameter, "dims": list(site.dims), "role": site.role} for site in space.sites
                ],
                "moved": None if alignment is None else moved_shares(alignment, space.name),
            }
            for space in symmetry
        ],
        "frozen": [vars(item) for item in symmetry.frozen],
        "untouched": list(symmetry.untouched),
    }


def moved_shares(alignment: Alignment, name: str) -> list[float | None]:
    """For every model, the share of a space's units that do not stay where they were; None under a linear map."""
    shares: list[float | None] = []
    space = alignment.symmetry[name]
    for transforms in alignment.transforms:
        if isinstance(transforms[name], Permutation):
            flat = flat_indices(transforms, alignment.symmetry, space)
            shares.append(float((flat != np.arange(len(flat))).mean()))
        else:
            shares.append(None)
    return shares


def spoken(name: str) -> str:
    """A method's name in running text."""
    return name.replace("_", " ")


def percent(value: float) -> str:
    """A share as text."""
    return f"{100 * value:.1f} %"


def verdict(report: Mapping[str, Any]) -> str:
    """What the run found, in a sentence or two, from its own figures."""
    models, method = len(report["models"]), spoken(report["method"]["name"])
    scores = report.get("scores")
    if not scores or scores["merged"]["accuracy"] is None:
        return f"{models} models became one, aligned by {method}. No data was given, so its quality was not measured."
    parents = [score["accuracy"] for score in scores["parents"]]
    merged, mean = scores["merged"]["accuracy"], sum(parents) / len(parents)
    naive = (scores["naive_mended"] or scores["naive"])["accuracy"]
    gap = 100 * (merged - mean)
    named = " and ".join(percent(p) for p in parents) if models == 2 else f"{percent(mean)} on average"
    text = (
        f"{models} models with {named} became one with {percent(merged)} on {report['data']['name']} "
        f"({report['data']['score_split']}), {abs(gap):.1f} points {'above' if gap >= 0 else 'below'} their mean; "
        f"averaged without alignment it has {percent(naive)}."
    )
    curves: Sequence[Mapping[str, Any]] = report.get("curves") or ()
    if curves:
        before, after = curves[0]["naive"]["barrier"], curves[0]["aligned"]["barrier"]
        text += f" Aligned by {method}, the loss barrier between them falls from {before:.2f} to {after:.2f}."
    return text


def aligned_names(paths: Sequence[str]) -> list[str]:
    """A file name for every aligned model: the source's own where they differ, numbered where not."""
    stems = [Path(path).stem if Path(path).suffix else Path(path).name for path in paths]
    if len(set(stems)) == len(stems) and "alignment" not in stems:
        return [f"{stem}.safetensors" for stem in stems]
    return [f"{index}-{stem}.safetensors" for index, stem in enumerate(stems)]


def copy_config(source: str, folder: Path) -> None:
    """Copies `config.json` from beside the first checkpoint, where there is one."""
    path = Path(source)
    config = (path if path.is_dir() else path.parent) / "config.json"
    if config.is_file():
        shutil.copyfile(config, folder / "config.json")


def model_card(recipe: Recipe, report: Mapping[str, Any]) -> str:
    """A README for the run folder: what the model is, how it was made, how to load it."""
    rows = ["| model | accuracy | loss |", "| --- | ---: | ---: |"]
    scores = report.get("scores")
    if scores:
        named = [(f"parent {i}", score) for i, score in enumerate(scores["parents"])]
        named += [("ensemble of the parents", scores["ensemble"]), ("average without alignment", scores["naive"])]
        named += [("the same, mended", scores["naive_mended"]), ("aligned average", scores["aligned"])]
        named += [("**this model**", scores["merged"])]
        for name, score in named:
            if score is not None:
                accuracy = "–" if score["accuracy"] is None else percent(score["accuracy"])
                rows.append(f"| {name} | {accuracy} | {score['loss']:.4f} |")
    parents = "\n".join(f"- `{entry['path']}` (sha256 `{entry['sha256'][:12]}…`)" for entry in report["models"])
    data = report["data"]
    table = "\n".join(rows) + f"\n\nScored on {data['name']}, split {data['score_split']}.\n" if scores else ""
    biases = report.get("gained_biases") or []
    note = f"\nThese layers gained a bias that the parents do not have: {', '.join(biases)}.\n" if biases else ""
    return f"""# A merged model

{report["verdict"]}

{table}
## How it was made

Parents, all of architecture `{recipe.architecture}`:

{parents}

Aligned by {spoken(recipe.align.method)}, averaged by {spoken(recipe.merge_method)}, statistics mended by {report["repair"] or "nothing"}.
`recipe.yaml` holds every option; `isthmus merge recipe.yaml -o FOLDER` makes this model again.
{note}
## How to load it

```python
from isthmus.checkpoint import load_module
from isthmus.models import load_model

model = load_module("model.safetensors", load_model("{recipe.architecture}"))
```

Open `report.html` for the figures and plots.
"""


def run_connect(
    recipe: Recipe, *, points: int = 11, split: str = "test", raw: bool = False
) -> dict[str, Any]:
    """Loss and accuracy along the line between two models, as they are and aligned; returns both curves.

    Raises:
        DataError: There is no data, or it does not fit.
        InputError: Not exactly two checkpoints, or an unknown split.
    """
    recipe.check()
    if len(recipe.models) != 2:
        raise InputError(f"{len(recipe.models)} checkpoints: a line connects two")
    if split not in ("train", "test"):
        raise InputError(f"split {split!r}: score on 'test' or 'train'")
    if recipe.data is None:
        raise DataError("connecting models measures their loss: give --data NAME or --data FILE.npz")
    inputs = load_inputs(recipe)
    assert inputs.data is not None and inputs.calibration is not None
    scored = inputs.data.test() if split == "test" else inputs.calibration
    mending = None if raw else "reset"
    symmetry, proof, alignment = prepare(recipe, inputs)
    moved = [apply(alignment, model, index) for index, model in enumerate(inputs.models)]
    naive: Curve = connect(*inputs.models, scored, points, mending, inputs.calibration)
    aligned: Curve = connect(moved[0], moved[1], scored, points, mending, inputs.calibration)
    return {
        **provenance(recipe, inputs, ""),
        "method": describe_alignment(recipe, alignment),
        "proof": describe_proof(proof),
        "free_units": symmetry.free_units,
        "split": split,
        "curves": [{"models": [0, 1], "naive": naive.to_dict(), "aligned": aligned.to_dict()}],
    }


def inspect_model(
    architecture: str, shape: Sequence[int] | None, data: DataSet | None, *, prove: bool = True
) -> dict[str, Any]:
    """A model's spaces and frozen axes, and the proof that they are right.

    Raises:
        InputError: No input is known on which the model runs.
        ModelError: The model cannot be built.
        TraceError: The model cannot be captured.
    """
    torch.manual_seed(0)
    model = load_model(architecture).eval()
    if not model.state_dict():
        raise ModelError(f"{architecture} has no parameters: there is nothing to inspect")
    example, assumed = example_input(model, shape, data)
    start = time.perf_counter()
    symmetry = trace(model, *example)
    traced = time.perf_counter() - start
    proof = verify(model, symmetry, *example) if prove else None
    return {
        "isthmus": version("isthmus"),
        "model": architecture,
        "input": list(example[0].shape[1:]),
        "assumed": assumed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": traced,
        "symmetry": describe_symmetry(symmetry),
        "proof": describe_proof(proof),
    }
