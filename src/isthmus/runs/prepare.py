"""The steps that runs share: trace, prove, align."""

from isthmus.match import METHODS, align
from isthmus.registry import configure
from isthmus.runs.inputs import Inputs
from isthmus.runs.recipe import Recipe
from isthmus.symmetry.alignment import Alignment
from isthmus.symmetry.symmetry import Symmetry
from isthmus.tracing.proof import Proof, verify
from isthmus.tracing.trace import trace


def trace_inputs(recipe: Recipe, inputs: Inputs) -> tuple[Symmetry, Proof | None]:
    """The symmetry of the first model, and its proof unless the recipe leaves it out."""
    model, example = inputs.models[0], inputs.example
    symmetry = trace(model, *example.args, kwargs=example.kwargs)
    if not recipe.verify:
        return symmetry, None
    return symmetry, verify(model, symmetry, *example.args, kwargs=example.kwargs, seed=recipe.seed)


def prepare(recipe: Recipe, inputs: Inputs) -> tuple[Symmetry, Proof | None, Alignment]:
    """The symmetry, its proof unless the recipe leaves it out, and the alignment."""
    symmetry, proof = trace_inputs(recipe, inputs)
    method = configure("matching method", recipe.align.method, METHODS, recipe.align.options)
    data = inputs.calibration if method.needs or method.name == "auto" else None
    return symmetry, proof, align(inputs.models, symmetry, method, data=data, seed=recipe.seed)
