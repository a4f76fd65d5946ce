"""CKA of every layer of one network with every layer of another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, fx, nn

from isthmus.data.batches import check_data
from isthmus.errors import DataError, InputError, SymmetryError
from isthmus.explain.similarity import FEWEST, centred_rows, require_variance
from isthmus.graph.reader import Observer, observe_batch
from isthmus.observe.given import as_modules, symmetry_of
from isthmus.observe.layers import take
from isthmus.progress import progress
from isthmus.symmetry.symmetry import Symmetry
from isthmus.wording.short import told_by_fields

# Why a layer has no row in the matrix.
NO_VARIANCE = "its units do not vary on this data"
NO_BATCH_DIMENSION = "its value has no dimension of the batch in front"


@dataclass(frozen=True, eq=False)
class CKAMatrix:
    """CKA of every layer of one network with every layer of another.

    Attributes:
        layers: State-dict names of the layers' weights, in the order in which the graph runs them; with the graph's
            node where several products share a weight.
        values: Unbiased linear CKA, the first network's layers down and the second's across.
        samples: Inputs read.
        batches: In how many batches.
        skipped: Layers without a row, with the reason.
    """

    layers: tuple[str, ...]
    values: Float[np.ndarray, "layers layers"]
    samples: int
    batches: int
    skipped: Mapping[str, str] = field(default_factory=dict)

    __repr__ = told_by_fields

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain JSON values."""
        return {
            "layers": list(self.layers),
            "values": self.values.tolist(),
            "samples": self.samples,
            "batches": self.batches,
            "skipped": dict(self.skipped),
        }


def cka_matrix(
    models: Sequence[nn.Module], symmetry: Symmetry | None = None, data: Any = None, *, samples: int = 2000
) -> CKAMatrix:
    """CKA between all layers of two models, from what every product with a weight gives out.

    A layer's value is read before its normalisation and nonlinearity; one sample is one input, all positions and units
    side by side as its features. HSIC is estimated without bias in every batch, from matrices of batch × batch, and
    averaged over batches, so that the batch size moves the result by chance alone and memory stays small; kernels are
    float32 products of centred features, everything behind them float64.

    Args:
        models: Two modules or state dicts of one architecture.
        symmetry: What `trace` returned; found from the data's first batch if left out.
        data: Re-iterable batches of four inputs or more; targets are not used.
        samples: Inputs to use, from the start of the data; a last batch of fewer than four is left out.

    Raises:
        DataError: No data, fewer than four inputs, a batch of fewer, or no layer that varies; NaN in a layer.
        InputError: Not two models.
        ModelError: The models are not of one architecture, or hold NaN or infinite weights.
        SymmetryError: The symmetry is of another architecture, or no layer can be read.

    Source: Nguyen, Raghu, Kornblith, "Do wide and deep networks learn the same things?", ICLR 2021.
    """
    if len(models) != 2:
        raise InputError(f"{len(models)} models: the matrix compares the layers of two")
    check_data(data)
    modules = as_modules(models)
    symmetry = symmetry_of(modules[0], symmetry, None, data)
    nodes = _layer_nodes(symmetry)
    states = [dict(model.state_dict()) for model in modules]
    batches = take(data, samples, states[0])
    if len(batches) > 1 and batches[-1].size < FEWEST <= batches[0].size:
        batches = batches[:-1]
    if min(batch.size for batch in batches) < FEWEST:
        raise DataError(f"a batch of fewer than {FEWEST} inputs: an unbiased CKA needs {FEWEST} in every batch")
    skipped: dict[str, str] = {}
    own, other, shared = 0.0, 0.0, 0.0
    for batch in progress(batches, "comparing layers"):
        kernels: list[dict[str, Tensor]] = []
        for state in states:
            found: dict[str, Tensor] = {}
            observers = {node: _kernel_of(found, node, batch.size) for node in nodes}
            observe_batch(symmetry.traced.program, state, batch, observers)
            kernels.append(found)
        skipped |= {nodes[node]: NO_BATCH_DIMENSION for node in nodes if node not in kernels[0]}
        if not kernels[0]:
            raise SymmetryError("no layer's value has the batch in front: nothing can be compared")
        x, y = (torch.stack(list(each.values())) for each in kernels)
        scale = batch.size * (batch.size - 3)
        own = own + x.square().sum(dim=1) / scale
        other = other + y.square().sum(dim=1) / scale
        shared = shared + x @ y.T / scale
    assert isinstance(own, Tensor)
    assert isinstance(other, Tensor)
    assert isinstance(shared, Tensor)
    names = [name for name in nodes.values() if name not in skipped]
    varies = ((own > 0) & (other > 0)).tolist()
    skipped |= {name: NO_VARIANCE for name, known in zip(names, varies, strict=True) if not known}
    require_variance(float(any(varies)))
    values = (shared / torch.outer(own.sqrt(), other.sqrt()))[varies][:, varies]
    layers = tuple(name for name, known in zip(names, varies, strict=True) if known)
    return CKAMatrix(layers, values.numpy(), sum(batch.size for batch in batches), len(batches), skipped)


def _layer_nodes(symmetry: Symmetry) -> dict[str, str]:
    """The nodes of all products with a weight, in the graph's order, with what to call them.

    Raises:
        SymmetryError: The graph has none.
    """
    graph = symmetry.graph
    if graph is None or not graph.contractions:
        raise SymmetryError("the graph has no product with a weight: there is no layer to compare")
    nodes: list[fx.Node] = list(graph.program.graph.nodes)
    weight = {contraction.node: contraction.weight for contraction in graph.contractions}
    names = list(weight.values())
    return {
        node.name: weight[node.name] if names.count(weight[node.name]) == 1 else f"{weight[node.name]} ({node.name})"
        for node in nodes
        if node.name in weight
    }


def _kernel_of(found: dict[str, Tensor], node: str, size: int) -> Observer:
    """An observer that keeps the U-centred linear kernel of a node's value, flattened, if the batch lies in front."""

    def keep(value: Tensor) -> None:
        if value.ndim < 2 or len(value) != size:
            return
        rows = value.detach().flatten(1)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        rows = centred_rows(rows).to(rows.dtype)
        found[node] = _u_centred((rows @ rows.T).double().cpu()).flatten()

    return keep


def _u_centred(kernel: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """A kernel matrix with rows and columns centred as if its diagonal were unknown, and zero there.

    The sum of the elementwise product of two such matrices, over n(n − 3), is HSIC₁.

    Source: Székely, Rizzo, Annals of Statistics 2014.
    """
    n = len(kernel)
    kernel = kernel - torch.diag(kernel.diagonal())
    sums = kernel.sum(dim=1) / (n - 2)
    kernel = kernel - sums - sums.unsqueeze(1) + kernel.sum() / ((n - 1) * (n - 2))
    return kernel - torch.diag(kernel.diagonal())
