"""`align`: what the caller gave is checked once, and a method matches it."""

from collections.abc import Sequence

from torch import nn

from isthmus.data.batches import Batch, Data, check_data
from isthmus.errors import InputError, check_seed, kind_of
from isthmus.graph.capture import Program
from isthmus.match.auto import Auto
from isthmus.match.base import Match, MatchingProblem, match_folded
from isthmus.match.methods import CANDIDATES
from isthmus.observe.given import (
    Inputs,
    ModelLike,
    as_modules,
    as_own_modules,
    check_models,
    differ_in_width,
    symmetry_of,
)
from isthmus.registry import configure
from isthmus.symmetry.alignment import Alignment
from isthmus.symmetry.symmetry import Symmetry, check_counterpart
from isthmus.tracing.trace import trace

METHODS: dict[str, type[Match]] = {Auto.name: Auto, **CANDIDATES}


def align(
    models: Sequence[ModelLike],
    symmetry: Symmetry | None = None,
    method: str | Match = "weight_matching",
    data: Data | None = None,
    seed: int = 0,
    *,
    inputs: Inputs | None = None,
    module: nn.Module | None = None,
) -> Alignment:
    """One transform per space and model, which moves that model into one common frame, the first model's.

    Args:
        models: Modules or state dicts of one architecture; at least one must be a module, or `module` given. Methods
            that resize (`ot_fusion`) also take modules whose spaces correspond but are of other sizes.
        symmetry: What `trace` returned; found from `inputs` or the data's first batch if left out.
        method: A name in `METHODS`, or a configured method such as `isthmus.match.WeightMatching(restarts=10)`.
        data: Re-iterable batches, for methods that need them.
        seed: The same inputs and seed give the same alignment.
        inputs: Example inputs for tracing, `(x,)` or `x`.
        module: The architecture, where all models are state dicts.

    Raises:
        DataError: The method needs data and got none it can use.
        InputError: No models, an unknown method, no way to find the symmetry, or an argument of the wrong kind.
        ModelError: The models are not of one architecture, hold NaN or infinite weights, or have a norm whose gain
            cannot be folded, which a method that uses linear maps needs.
        SymmetryError: The symmetry is of another architecture.
    """
    check_models(models)
    configured = configured_method(method)
    check_seed(seed)
    if data is not None:
        check_data(data)
    unequal = module is None and configured.resizes and differ_in_width(models)
    modules = as_own_modules(models) if unequal else as_modules(models, module)
    MatchingProblem(modules, Symmetry((), (), {}), data, seed).require(configured.needs, configured.name)
    symmetry = symmetry_of(modules[0], symmetry, inputs, data)
    symmetries = _trace_counterparts(modules, symmetry) if unequal else ()
    return match_folded(configured, MatchingProblem(modules, symmetry, data, seed, symmetries))


def configured_method(method: str | Match) -> Match:
    """The matching method that a name, or a configured object, stands for.

    Raises:
        InputError: An unknown name, or something else.
    """
    if isinstance(method, str):
        return configure("matching method", method, METHODS)
    if not isinstance(method, Match):
        advice = "give a name in METHODS or a configured method, such as WeightMatching()"
        raise InputError(f"method is {kind_of(method)}: {advice}")
    return method


def _trace_counterparts(models: Sequence[nn.Module], symmetry: Symmetry) -> tuple[Symmetry, ...]:
    """Every model's own symmetry, where spaces correspond to the first model's but may be of other sizes.

    Raises:
        InputError: The first model's symmetry has no graph, and so no example inputs.
        SymmetryError: A model's spaces do not correspond to the first model's.
    """
    if symmetry.graph is None:
        raise InputError("models of several widths are traced one by one: give inputs=x, or data=")
    program: Program = symmetry.traced.program
    found = [symmetry]
    for index, model in enumerate(models[1:], start=1):
        example = Batch(program.args, program.kwargs).like(model.state_dict())
        found.append(trace(model, *example.args, kwargs=example.kwargs))
        check_counterpart(symmetry, found[-1], f"model {index}")
    return tuple(found)
