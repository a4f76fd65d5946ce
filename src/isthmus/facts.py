"""What a run found, as plain JSON values and sentences: the content of `report.json` and of the model card."""

import datetime
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isthmus.checkpoint import hash_file
from isthmus.inputs import Inputs
from isthmus.recipe import Recipe
from isthmus.score import Score
from isthmus.symmetry import Symmetry
from isthmus.trace import Proof
from isthmus.transform import Alignment, Permutation, flat_indices

# Samples of the test split on which the networks between the models are scored, and on whose number of training samples
# their statistics are re-estimated: a merge of two networks scores 44 such.
WALKED_SAMPLES = 2000


def provenance(recipe: Recipe, inputs: Inputs, command: str) -> dict[str, Any]:
    """What was run, on what, with which versions."""
    data = None
    if recipe.data is not None and inputs.data is not None and inputs.calibration is not None:
        data = {
            "name": inputs.data.name,
            "noun": inputs.data.sample_noun,
            "score_split": "test",
            "score_samples": len(inputs.data.y_test),
            "walked_samples": min(WALKED_SAMPLES, len(inputs.data.y_test)),
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
        "folded": alignment.folded,
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
    everything = sum(math.prod(shape) for name, shape in symmetry.shapes.items() if name not in symmetry.tied)
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
        "gains": [{"parameter": gain.parameter, "obstacle": gain.obstacle} for gain in symmetry.gains],
        "gauges": [{"space": gauge.space, "kind": gauge.kind} for gauge in symmetry.gauges],
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
    if not scores:
        return f"{models} models became one, aligned by {method}. No data was given, so its quality was not measured."
    if scores["merged"]["accuracy"] is None:
        mean_loss = sum(score["loss"] for score in scores["parents"]) / models
        return (
            f"{models} models with a mean loss of {mean_loss:.3f} became one with {scores['merged']['loss']:.3f} on "
            f"{report['data']['name']} ({report['data']['score_split']}), aligned by {method}."
        )
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
        before, after = (sum(pair[kind]["barrier"] for pair in curves) / len(curves) for kind in ("naive", "aligned"))
        between = (
            "the loss barrier between them falls" if models == 2 else "the mean loss barrier between two of them falls"
        )
        text += f" Aligned by {method}, {between} from {before:.2f} to {after:.2f}."
    return text


def describe_score(score: Score) -> dict[str, Any]:
    """A score as plain JSON values."""
    return {"loss": score.loss, "accuracy": score.accuracy, "count": score.count}


def finite(value: Any) -> Any:
    """The value as plain JSON: tuples become lists, and numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


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

Aligned by {spoken(recipe.align.method)}, averaged by {spoken(recipe.merge_method)}, statistics mended by
{report["repair"] or "nothing"}. `recipe.yaml` holds every option; `isthmus merge recipe.yaml -o FOLDER` makes
this model again.
{note}
## How to load it

```python
{loading(recipe, report)}
```

Open `report.html` for the figures and plots.
"""


def loading(recipe: Recipe, report: Mapping[str, Any]) -> str:
    """The lines of Python that load the model of a run folder."""
    name = report.get("transformers_class")
    if name:
        return f'from transformers import {name}\n\nmodel = {name}.from_pretrained(".")'
    return (
        "from isthmus.checkpoint import load_module\nfrom isthmus.models import load_model\n\n"
        f'model = load_module("model.safetensors", load_model("{recipe.architecture}"))'
    )


def describe_coefficients(recipe: Recipe, models: int) -> dict[str, Any]:
    """One weight a model, as scaled for averaging, and by module path where some differ."""
    weights = recipe.coefficients or {"": [1.0] * models}
    shares = {path: [value / sum(each) for value in each] for path, each in weights.items()}
    return {"coefficients": shares.pop(""), "coefficients_by_path": shares}
