"""Matching methods by name, and `align`, which runs one.

A method is one file with a frozen dataclass, and one line in `METHODS`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from isthmus.batches import Batch, check_data
from isthmus.errors import InputError
from isthmus.match.activation_matching import ActivationMatching
from isthmus.match.auto import Auto
from isthmus.match.base import Match, Problem, solve
from isthmus.match.c2m3 import C2M3
from isthmus.match.cca import CCA
from isthmus.match.identity import Identity
from isthmus.match.learned import Learned
from isthmus.match.mudsc import MuDSC
from isthmus.match.orthogonal_matching import OrthogonalMatching
from isthmus.match.ot_fusion import OTFusion
from isthmus.match.procrustes import Procrustes
from isthmus.match.sinkhorn import Sinkhorn
from isthmus.match.straight_through import StraightThrough
from isthmus.match.subset_selection import SubsetSelection
from isthmus.match.weight_matching import WeightMatching
from isthmus.match.zipit import ZipIt
from isthmus.members import as_modules, as_own_modules, differ_in_width
from isthmus.moments import symmetry_of
from isthmus.registry import configure
from isthmus.symmetry import Symmetry, check_counterpart
from isthmus.trace import trace
from isthmus.trace.capture import Program
from isthmus.trace.reader import first_float
from isthmus.transform import Alignment

__all__ = [
    "C2M3",
    "CCA",
    "METHODS",
    "ActivationMatching",
    "Identity",
    "Learned",
    "Match",
    "MuDSC",
    "OTFusion",
    "OrthogonalMatching",
    "Problem",
    "Procrustes",
    "Sinkhorn",
    "StraightThrough",
    "SubsetSelection",
    "WeightMatching",
    "ZipIt",
    "align",
]

METHODS: dict[str, type[Match]] = {
    "auto": Auto,
    "identity": Identity,
    "weight_matching": WeightMatching,
    "activation_matching": ActivationMatching,
    "cca": CCA,
    "procrustes": Procrustes,
    "orthogonal_matching": OrthogonalMatching,
    "mudsc": MuDSC,
    "subset_selection": SubsetSelection,
    "c2m3": C2M3,
    "ste": StraightThrough,
    "sinkhorn": Sinkhorn,
    "learned": Learned,
    "ot_fusion": OTFusion,
    "zipit": ZipIt,
}


def align(
    models: Sequence[nn.Module | Mapping[str, Tensor]],
    symmetry: Symmetry | None = None,
    method: str | Match = "weight_matching",
    data: Any = None,
    seed: int = 0,
    *,
    inputs: tuple[Any, ...] | None = None,
    module: nn.Module | None = None,
) -> Alignment:
    """One transform per space and model that carries all models into a common frame, that of the first.

    Args:
        models: Modules or state dicts of one architecture; at least one must be a module, or `module` given. Methods
            that resize (`ot_fusion`) also take modules whose spaces correspond but are of other sizes.
        symmetry: What `trace` returned; found from `inputs` or the data's first batch if left out.
        method: A name in `METHODS`, or a configured method such as `isthmus.match.WeightMatching(restarts=10)`.
        data: Re-iterable batches, for methods that need them.
        seed: The same inputs and seed give the same alignment.
        inputs: Example inputs for tracing.
        module: The architecture, where all models are state dicts.

    Raises:
        DataError: The method needs data and got none it can use.
        InputError: No models, an unknown method, or no way to find the symmetry.
        ModelError: The models are not of one architecture, hold NaN or infinite weights, or have a norm whose gain
            cannot be folded, which a method that uses linear maps needs.
        SymmetryError: The symmetry is of another architecture.
    """
    configured = configure("matching method", method, METHODS) if isinstance(method, str) else method
    if isinstance(configured, type) or not isinstance(configured, Match):
        raise InputError(f"method={method!r}: give a name in METHODS or a configured method, such as WeightMatching()")
    if seed < 0:
        raise InputError(f"seed={seed}: give 0 or more")
    if data is not None:
        check_data(data)
    unequal = models and module is None and getattr(configured, "resizes", False) and differ_in_width(models)
    modules = as_own_modules(models) if unequal else as_modules(models, module)
    Problem(modules, Symmetry((), (), {}), data, seed).require(configured.needs, configured.name)
    symmetry = symmetry_of(modules[0], symmetry, inputs, data)
    symmetries = trace_counterparts(modules, symmetry) if unequal else ()
    return solve(configured, Problem(modules, symmetry, data, seed, symmetries))


def trace_counterparts(models: Sequence[nn.Module], symmetry: Symmetry) -> tuple[Symmetry, ...]:
    """Every model's own symmetry, where spaces correspond to those of the first but may be of other sizes.

    Raises:
        InputError: The first model's symmetry has no graph, and so no example inputs.
        SymmetryError: A model's spaces do not correspond to those of the first.
    """
    if symmetry.program is None:
        raise InputError("models of several widths are traced one by one: give inputs=(x,), or data=")
    program: Program = symmetry.program.program
    found = [symmetry]
    for index, model in enumerate(models[1:], start=1):
        own = first_float(model.state_dict())
        example = Batch(program.args, program.kwargs).to(own.device, own.dtype)
        found.append(trace(model, *example.args, kwargs=example.kwargs))
        check_counterpart(symmetry, found[-1], f"model {index}")
    return tuple(found)
