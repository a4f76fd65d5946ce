"""Similarity of what two networks compute: linear CKA, SVCCA, PWCCA, Procrustes distance, correlations of units.

All of them but `debiased_cka` and `cka_matrix` are functions of covariances, so that they can be read from
`isthmus.Moments` without another pass over the data. None but the correlations of units depends on the order of units:
they cannot tell a good matching from a bad one.

Suffixes: P units of the first network, Q units of the second.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, fx, nn

from isthmus.data.batches import check_data
from isthmus.errors import DataError, InputError, SymmetryError
from isthmus.graph.reader import Reader, program_for
from isthmus.observe.given import as_modules, symmetry_of
from isthmus.observe.layers import take
from isthmus.observe.moments import CHUNK, JointMoments, Moments, SpaceMoments
from isthmus.progress import progress
from isthmus.state import first_float
from isthmus.symmetry.alignment import Alignment
from isthmus.symmetry.symmetry import Symmetry
from isthmus.symmetry.transform import LinearMap, flat_indices
from isthmus.wording import told_by_fields

# Relative precision of moments that were summed from float32 products of `CHUNK` rows; rounding adds up as a random
# walk does.
MOMENTS_PRECISION = float(torch.finfo(torch.float32).eps) * math.sqrt(CHUNK)

# Why a layer has no row in the matrix.
NO_VARIANCE = "its units do not vary on this data"
NO_BATCH_DIMENSION = "its value has no dimension of the batch in front"

# The unbiased estimator divides by n − 3.
FEWEST = 4


@dataclass(frozen=True, eq=False)
class Covariances:
    """Covariances of two networks' units on the same samples, within each and between both.

    Attributes:
        first: Covariance of the first network's units.
        second: Of the second's.
        between: Of the first's with the second's.
        count: Samples.
        precision: To what share of its largest number `first` and `second` are known: directions of less variance are
            rounding and are left out where covariances are inverted.
    """

    first: Float[Tensor, "p p"]
    second: Float[Tensor, "q q"]
    between: Float[Tensor, "p q"]
    count: int
    precision: float

    __repr__ = told_by_fields

    @staticmethod
    def of_rows(x: Float[Tensor, "samples p"], y: Float[Tensor, "samples q"]) -> "Covariances":
        """Those of activations, one row a sample, summed in float64.

        Raises:
            DataError: No samples, or NaN or infinite numbers.
        """
        x, y = _centred(x), _centred(y)
        count = len(x)
        size = max(count, x.shape[1], y.shape[1])
        precision = size * torch.finfo(torch.float64).eps
        return Covariances(x.T @ x / count, y.T @ y / count, x.T @ y / count, count, precision)

    @staticmethod
    def of_moments(moments: SpaceMoments | JointMoments, first: int = 0, second: int = 1) -> "Covariances":
        """Those of one space of two models, as `isthmus.collect` read them: `collect(…)["name"]`."""
        pairs = ((first, first), (second, second), (first, second))
        own, other, between = (moments.between(*pair).double() for pair in pairs)
        return Covariances(own, other, between, moments.count, MOMENTS_PRECISION)


def _centred(x: Float[Tensor, "samples units"]) -> Float[Tensor, "samples units"]:
    """Rows in float64 without their mean.

    Raises:
        DataError: No samples, or NaN or infinite numbers.
    """
    if not len(x) or not bool(x.isfinite().all()):
        raise DataError(f"activations of shape {tuple(x.shape)}: give finite numbers of one sample or more")
    x = x.double()
    # The mean of equal numbers may differ from them by rounding, which is no variance.
    rounding = len(x) * torch.finfo(torch.float64).eps * x.abs().amax(dim=0)
    x = x - x.mean(dim=0)
    return torch.where(x.abs().amax(dim=0) > rounding, x, 0.0)


def cka(covariances: Covariances) -> float:
    """Linear centred kernel alignment, ‖S_xy‖² / (‖S_xx‖ ‖S_yy‖): from 0 to 1.

    It is the same after any rotation, reflection or common scaling of either network's units. With fewer samples than
    units it is biased upwards: see `debiased_cka`.

    Raises:
        DataError: A network's units do not vary.

    Source: Kornblith, Norouzi, Lee, Hinton, "Similarity of neural network representations revisited", ICML 2019.
    """
    scale = float(covariances.first.norm() * covariances.second.norm())
    _require_variance(scale)
    return float(covariances.between.square().sum()) / scale


def debiased_cka(x: Float[Tensor, "samples p"], y: Float[Tensor, "samples q"]) -> float:
    """Linear CKA from the unbiased estimator of HSIC, which may be slightly negative where nothing is shared.

    Needs the activations themselves: the length of every sample enters.

    Raises:
        DataError: Fewer than four samples, unequal numbers of them, or units that do not vary.

    Source: Song, Smola, Gretton, Bedo, Borgwardt, JMLR 2012 (HSIC₁); used for CKA by Nguyen, Raghu, Kornblith, ICLR
        2021. With linear kernels it needs no samples × samples matrix.
    """
    _require_rows(x, y, FEWEST)
    x, y = _centred(x), _centred(y)
    own, other, shared = _unbiased_hsic(x, x), _unbiased_hsic(y, y), _unbiased_hsic(x, y)
    _require_variance(min(own, other))
    return shared / math.sqrt(own * other)


def _unbiased_hsic(x: Float[Tensor, "samples p"], y: Float[Tensor, "samples q"]) -> float:
    """HSIC₁ of linear kernels on centred rows."""
    n = len(x)
    a, b = x.square().sum(dim=1), y.square().sum(dim=1)
    total = (x.T @ y).square().sum() - n / (n - 2) * (a @ b) + a.sum() * b.sum() / ((n - 1) * (n - 2))
    return float(total) / (n * (n - 3))


def _canonical_correlations(covariances: Covariances) -> Float[Tensor, " ranks"]:
    """The canonical correlations of both networks' units, falling: min(rank, rank) numbers from 0 to 1.

    They are the same after any invertible linear map of either network's units.

    Raises:
        DataError: Units that do not vary, or no more samples than directions: then correlations of 1 are no finding.

    Source: Hotelling 1936.
    """
    _, _, values, _ = _whitened(covariances)
    return values


def _mean_cca(covariances: Covariances) -> float:
    """The mean of the canonical correlations.

    Raises:
        DataError: As for `_canonical_correlations`.
    """
    return float(_canonical_correlations(covariances).mean())


def svcca(covariances: Covariances, variance: float = 0.99) -> float:
    """The mean canonical correlation between the directions of most variance of both networks.

    It is the same after any rotation, reflection or common scaling of either network's units.

    Args:
        covariances: Those of both networks.
        variance: Share of each network's variance that its kept principal directions hold.

    Raises:
        DataError: As for `_canonical_correlations`.
        InputError: A share out of range.

    Source: Raghu, Gilmer, Yosinski, Sohl-Dickstein, "SVCCA", NeurIPS 2017.
    """
    if not 0 < variance <= 1:
        raise InputError(f"variance={variance}: give a share above 0 and up to 1")
    x = _principal_directions(covariances.first, variance, covariances.precision)
    y = _principal_directions(covariances.second, variance, covariances.precision)
    first, second = x.T @ covariances.first @ x, y.T @ covariances.second @ y
    return _mean_cca(
        Covariances(first, second, x.T @ covariances.between @ y, covariances.count, covariances.precision)
    )


def pwcca(covariances: Covariances) -> float:
    """The canonical correlations, each weighted by how much of the first network's units its direction accounts for.

    The weights are Σ_j |⟨h_i, x_j⟩| over the first network's units x_j, with its canonical variates h_i. The two
    networks are not alike in it: it is the same after any invertible map of the *second* network's units, and of the
    first's only if units are exchanged, reflected or scaled in common.

    Raises:
        DataError: As for `_canonical_correlations`.

    Source: Morcos, Raghu, Bengio, "Insights on representational similarity with canonical correlation", NeurIPS 2018.
        Where the second network has fewer directions, only as many of the first's take part.
    """
    root, left, values, _ = _whitened(covariances)
    weights = (root @ left).abs().sum(dim=0)
    return float((weights * values).sum() / weights.sum())


def procrustes_distance(covariances: Covariances) -> float:
    """The squared distance of both networks' activations, each scaled to norm 1, after the best rotation: 0 to 2.

    2 − 2 ‖S_xy‖_* / √(tr S_xx · tr S_yy). It is the same after any rotation, reflection or common scaling of either
    network's units; unequal numbers of units are made equal by units that are zero.

    Raises:
        DataError: A network's units do not vary.

    Source: Ding, Denain, Steinhardt, "Grounding representation similarity through statistical testing", NeurIPS 2021.
    """
    scale = math.sqrt(float(covariances.first.trace() * covariances.second.trace()))
    _require_variance(scale)
    # Rounding must not make the distance of a network to itself negative.
    return max(0.0, 2 - 2 * float(torch.linalg.svdvals(covariances.between).sum()) / scale)


def unit_correlations(covariances: Covariances) -> Float[Tensor, "p q"]:
    """The correlation of every unit of the first network with every unit of the second; 0 for one that never varies."""
    x, y = (matrix.diagonal().clamp_min(0).sqrt() for matrix in (covariances.first, covariances.second))
    scale = torch.outer(x, y)
    return torch.where(scale > 0, covariances.between / scale.clamp_min(torch.finfo(torch.float64).tiny), 0.0)


def matched_correlations(
    moments: Moments, alignment: Alignment, first: int = 0, second: int = 1
) -> dict[str, Float[Tensor, " units"]]:
    """For each space, the correlation of every unit of one model with the unit of another that was matched to it.

    Args:
        moments: What `collect` returned for the models as they are, not moved.
        alignment: What `align` returned for them.
        first: The model whose units are listed.
        second: The model that is moved.

    Raises:
        InputError: The alignment holds no such models, or linear maps, which match no single units.
    """
    if not max(first, second) < len(alignment) or min(first, second) < 0:
        raise InputError(f"models {first} and {second}: the alignment holds models 0 … {len(alignment) - 1}")
    moves = [alignment.transforms[index] for index in (first, second)]
    if any(isinstance(transform, LinearMap) for each in moves for transform in each.values()):
        raise InputError("the alignment holds linear maps, which match no single units: use a permutation method")
    symmetry = alignment.symmetry
    if alignment.symmetries:
        raise InputError("models of several widths have no unit for every unit: compare them by cka")
    found: dict[str, Tensor] = {}
    between = alignment.between(first, second)
    for space in symmetry:
        if space.name in moments.spaces:
            order = torch.from_numpy(flat_indices(between, symmetry, space))
            correlation = unit_correlations(Covariances.of_moments(moments[space.name], first, second))
            found[space.name] = correlation.gather(1, order.unsqueeze(1)).squeeze(1)
    return found


def _whitened(covariances: Covariances) -> tuple[Tensor, Tensor, Float[Tensor, " ranks"], Tensor]:
    """The root of the first covariance on its range [P, rank], left vectors, canonical correlations, right vectors.

    Raises:
        DataError: Units that do not vary, or no more samples than directions.
    """
    roots, inverses = [], []
    for matrix in (covariances.first, covariances.second):
        values, vectors = torch.linalg.eigh(matrix)
        kept = values > covariances.precision * values.max().clamp_min(0)
        _require_variance(float(kept.sum()))
        scale = values[kept].sqrt()
        roots.append(vectors[:, kept] * scale)
        inverses.append(vectors[:, kept] / scale)
    directions = inverses[0].shape[1] + inverses[1].shape[1]
    if covariances.count <= directions:
        raise DataError(
            f"{covariances.count} samples for {directions} directions of both networks: canonical correlations are "
            "then 1 whatever the networks do; give more data, or use svcca with less variance, or cka"
        )
    left, values, right = torch.linalg.svd(inverses[0].T @ covariances.between @ inverses[1], full_matrices=False)
    return roots[0], left, values.clamp(0, 1), right


def _principal_directions(
    matrix: Float[Tensor, "units units"], variance: float, precision: float
) -> Float[Tensor, "units kept"]:
    """The fewest principal directions that hold a share of the variance, largest first.

    Raises:
        DataError: The units do not vary.
    """
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    _require_variance(float(values.sum()))
    held = values.cumsum(dim=0) / values.sum()
    count = min(int((held < variance - precision).sum()) + 1, len(values))
    return vectors[:, :count]


def _require_variance(scale: float) -> None:
    """Refuses units that are constant.

    Raises:
        DataError: They are.
    """
    if not scale > 0:
        raise DataError("the units of a network do not vary on this data: there is nothing to compare")


def _require_rows(x: Tensor, y: Tensor, fewest: int) -> None:
    """Refuses samples that do not go together, or too few.

    Raises:
        DataError: They do not, or are.
    """
    if len(x) != len(y) or len(x) < fewest:
        raise DataError(f"{len(x)} and {len(y)} samples: give the same {fewest} or more of both networks")


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
    batches = take(data, samples, first_float(states[0]))
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
            Reader(program_for(symmetry.traced.program, batch), observers).read(state, batch.clone())
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
    _require_variance(float(any(varies)))
    values = (shared / torch.outer(own.sqrt(), other.sqrt()))[varies][:, varies]
    layers = tuple(name for name, known in zip(names, varies, strict=True) if known)
    return CKAMatrix(layers, values.numpy(), sum(batch.size for batch in batches), len(batches), skipped)


def _layer_nodes(symmetry: Symmetry) -> dict[str, str]:
    """The nodes of all products with a weight, in the graph's order, with what to call them.

    Raises:
        SymmetryError: The graph has none.
    """
    graph = symmetry.traced
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


def _kernel_of(found: dict[str, Tensor], node: str, size: int) -> Any:
    """An observer that keeps the U-centred linear kernel of a node's value, flattened, if the batch lies in front."""

    def keep(value: Tensor) -> None:
        if value.ndim < 2 or len(value) != size:
            return
        rows = value.detach().flatten(1)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        rows = _centred(rows).to(rows.dtype)
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
