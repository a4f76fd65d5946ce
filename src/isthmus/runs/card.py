"""The model card of a run folder, and sentences about a run."""

from collections.abc import Iterable

from isthmus.report.schema import RunReport, score_rows
from isthmus.runs.recipe import Recipe


def spoken(name: str) -> str:
    """A method's name in running text."""
    return name.replace("_", " ")


def _percent(value: float | None) -> str:
    """A share as text, a dash where it is not known."""
    return "–" if value is None else f"{100 * value:.1f} %"


def verdict(report: RunReport) -> str:
    """What the run found, in a sentence or two, from its own figures."""
    models, method = len(report.provenance.models), spoken(report.method.name)
    scores, data = report.scores, report.provenance.data
    if scores is None or scores.merged is None or data is None:
        return f"{models} models became one, aligned by {method}. No data was given, so its quality was not measured."
    if scores.merged.accuracy is None:
        return (
            f"{models} models with a mean loss of {_mean(score.loss for score in scores.parents):.3f} became one with "
            f"{scores.merged.loss:.3f} on {data.name} ({data.score_split}), aligned by {method}."
        )
    parents = [score.accuracy for score in scores.parents]
    merged, mean = scores.merged.accuracy, _mean(parents)
    naive = scores.naive_mended or scores.naive
    gap = 100 * (merged - mean)
    named = " and ".join(_percent(p) for p in parents) if models == 2 else f"{_percent(mean)} on average"
    text = (
        f"{models} models with {named} became one with {_percent(merged)} on {data.name} "
        f"({data.score_split}), {abs(gap):.1f} points {'above' if gap >= 0 else 'below'} their mean; "
        f"averaged without alignment it has {_percent(None if naive is None else naive.accuracy)}."
    )
    if report.curves:
        before, after = (_mean(pair[kind]["barrier"] for pair in report.curves) for kind in ("naive", "aligned"))
        between = (
            "the loss barrier between them falls" if models == 2 else "the mean loss barrier between two of them falls"
        )
        text += f" Aligned by {method}, {between} from {before:.2f} to {after:.2f}."
    return text


def _mean(values: Iterable[float | None]) -> float:
    """The mean of what is known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known)


def model_card(recipe: Recipe, report: RunReport) -> str:
    """A README for the run folder: what the model is, how it was made, how to load it."""
    lines = ["| model | what it is | accuracy | loss |", "| --- | --- | ---: | ---: |"]
    for row in score_rows(report):
        name = f"**{row.name}**" if row.kind == "merged" else row.name
        lines.append(f"| {name} | {row.note} | {_percent(row.score.accuracy)} | {row.score.loss:.4f} |")
    parents = "\n".join(f"- `{each.path}` (sha256 `{str(each.sha256)[:12]}…`)" for each in report.provenance.models)
    data, biases = report.provenance.data, report.gained_biases
    table = "\n".join(lines) + f"\n\nScored on {data.name}, split {data.score_split}.\n" if data is not None else ""
    note = f"\nThese layers gained a bias that the parents do not have: {', '.join(biases)}.\n" if biases else ""
    return f"""# A merged model

{report.verdict}

{table}
## How it was made

Parents, all of architecture `{recipe.architecture}`:

{parents}

Aligned by {spoken(recipe.align.method)}, averaged by {spoken(recipe.merge_method)}, statistics repaired by
{report.repair or "nothing"}. `recipe.yaml` holds every option; `isthmus merge recipe.yaml -o FOLDER` makes
this model again.
{note}
## How to load it

```python
{_loading(recipe, report)}
```

Open `report.html` for the figures and plots.
"""


def _loading(recipe: Recipe, report: RunReport) -> str:
    """The lines of Python that load the model of a run folder."""
    name = report.transformers_class
    if name:
        return f'from transformers import {name}\n\nmodel = {name}.from_pretrained(".")'
    return (
        "from isthmus.checkpoint import load_module\nfrom isthmus.models import load_model\n\n"
        f'model = load_module("model.safetensors", load_model("{recipe.architecture}"))'
    )
