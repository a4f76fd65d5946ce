"""The symmetry of a model that has no checkpoint yet, and its proof."""

import contextlib
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from isthmus.data.batches import Batch
from isthmus.errors import IsthmusError, ModelError
from isthmus.models import load_model
from isthmus.models.structure import parameters_on_meta
from isthmus.runs.example import example_input, sample_shapes
from isthmus.runs.facts import describe_proof, describe_symmetry
from isthmus.runs.inputs import load_data_of
from isthmus.runs.recipe import DataOptions
from isthmus.tracing.proof import verify
from isthmus.tracing.trace import trace


def _build_example(
    architecture: str, shape: Sequence[int] | str | None, data: DataOptions | None, *, weights: bool
) -> tuple[nn.Module, Batch, str]:
    """A model, inputs on which it runs, and what was assumed to make these.

    Args:
        architecture: What `load_model` builds.
        shape: Shape of one sample, or None.
        data: The data set that the model is to run on, or None.
        weights: Whether the parameters need numbers. Without, the model is built with them only if it cannot be built
            or run otherwise: some networks compute something from their parameters' numbers while they are built.

    Raises:
        DataError: The data cannot be read, or the model does not run on it.
        InputError: No input is known on which the model runs.
        ModelError: The model cannot be built, or has no parameters.
    """
    torch.manual_seed(0)
    try:
        with contextlib.nullcontext() if weights else parameters_on_meta():
            model = load_model(architecture).eval()
        if not model.state_dict():
            raise ModelError(f"{architecture} has no parameters: there is nothing to inspect")
        return model, *example_input(model, shape, None if data is None else load_data_of(data, model))
    except IsthmusError:
        if weights:
            raise
        return _build_example(architecture, shape, data, weights=True)


def inspect_model(
    architecture: str, shape: Sequence[int] | str | None, data: DataOptions | None, *, prove: bool = True
) -> dict[str, Any]:
    """A model's spaces and frozen axes, and the proof that they are right.

    Without a proof no weights are needed: parameters are then made on the meta device, where the model allows it, so
    that one of any size can be inspected.

    Raises:
        DataError: The data cannot be read, or the model does not run on it.
        InputError: No input is known on which the model runs.
        ModelError: The model cannot be built.
        TraceError: The model cannot be captured.
    """
    model, example, assumed = _build_example(architecture, shape, data, weights=prove)
    start = time.perf_counter()
    symmetry = trace(model, *example.args, kwargs=example.kwargs)
    traced = time.perf_counter() - start
    proof = verify(model, symmetry, *example.args, kwargs=example.kwargs) if prove else None
    return {
        "isthmus": version("isthmus"),
        "model": architecture,
        "input": sample_shapes(example),
        "assumed": assumed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": traced,
        "symmetry": describe_symmetry(symmetry),
        "proof": describe_proof(proof),
    }
