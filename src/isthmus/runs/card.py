"""The model card of a run folder, and sentences about a run."""

from collections.abc import Mapping, Sequence
from typing import Any

from isthmus.runs.recipe import Recipe


def spoken(name: str) -> str:
    """A method's name in running text."""
    return name.replace("_", " ")


def _percent(value: float) -> str:
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
    named = " and ".join(_percent(p) for p in parents) if models == 2 else f"{_percent(mean)} on average"
    text = (
        f"{models} models with {named} became one with {_percent(merged)} on {report['data']['name']} "
        f"({report['data']['score_split']}), {abs(gap):.1f} points {'above' if gap >= 0 else 'below'} their mean; "
        f"averaged without alignment it has {_percent(naive)}."
    )
    curves: Sequence[Mapping[str, Any]] = report.get("curves") or ()
    if curves:
        before, after = (sum(pair[kind]["barrier"] for pair in curves) / len(curves) for kind in ("naive", "aligned"))
        between = (
            "the loss barrier between them falls" if models == 2 else "the mean loss barrier between two of them falls"
        )
        text += f" Aligned by {method}, {between} from {before:.2f} to {after:.2f}."
    return text


def model_card(recipe: Recipe, report: Mapping[str, Any]) -> str:
    """A README for the run folder: what the model is, how it was made, how to load it."""
    rows = ["| model | accuracy | loss |", "| --- | ---: | ---: |"]
    scores = report.get("scores")
    if scores:
        named = [(f"parent {i}", score) for i, score in enumerate(scores["parents"])]
        named += [("ensemble of the parents", scores["ensemble"]), ("average without alignment", scores["naive"])]
        named += [("the same, repaired", scores["naive_mended"]), ("aligned average", scores["aligned"])]
        named += [("**this model**", scores["merged"])]
        for name, score in named:
            if score is not None:
                accuracy = "–" if score["accuracy"] is None else _percent(score["accuracy"])
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

Aligned by {spoken(recipe.align.method)}, averaged by {spoken(recipe.merge_method)}, statistics repaired by
{report["repair"] or "nothing"}. `recipe.yaml` holds every option; `isthmus merge recipe.yaml -o FOLDER` makes
this model again.
{note}
## How to load it

```python
{_loading(recipe, report)}
```

Open `report.html` for the figures and plots.
"""


def _loading(recipe: Recipe, report: Mapping[str, Any]) -> str:
    """The lines of Python that load the model of a run folder."""
    name = report.get("transformers_class")
    if name:
        return f'from transformers import {name}\n\nmodel = {name}.from_pretrained(".")'
    return (
        "from isthmus.checkpoint import load_module\nfrom isthmus.models import load_model\n\n"
        f'model = load_module("model.safetensors", load_model("{recipe.architecture}"))'
    )
