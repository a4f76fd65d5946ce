"""Similarity of what two networks compute: linear CKA, SVCCA, PWCCA, Procrustes distance, correlations of units.

All of them but `debiased_cka` are functions of covariances, so that they can be read from
`isthmus.Moments` without another pass over the data. None but the correlations of units depends on the order of units:
they cannot tell a good matching from a bad one.

Suffixes: P units of the first network, Q units of the second.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from isthmus.errors import DataError, InputError
from isthmus.observe.moments import CHUNK, JointMoments, Moments, SpaceMoments
from isthmus.symmetry.alignment import Alignment
from isthmus.symmetry.transform import LinearMap, flat_indices
from isthmus.wording.short import told_by_fields

# Relative precision of moments that were summed from float32 products of `CHUNK` rows; rounding adds up as a random
# walk does.
MOMENTS_PRECISION = float(torch.finfo(torch.float32).eps) * math.sqrt(CHUNK)


# The unbiased estimator divides by n − 3.
FEWEST = 4


@dataclass(frozen=True, eq=False)
class Covariances:
    """Covariances of two networks' units on the same samples, within each and between both.

    Attributes:
        first: Covariance of the first network's units.
        second: Covariance of the second's units.
        between: Covariance of the first's units with the second's.
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
        """The covariances of activations, one row a sample, summed in float64.

        Raises:
            DataError: No samples, or NaN or infinite numbers.
        """
        x, y = centred_rows(x), centred_rows(y)
        count = len(x)
        size = max(count, x.shape[1], y.shape[1])
        precision = size * torch.finfo(torch.float64).eps
        return Covariances(x.T @ x / count, y.T @ y / count, x.T @ y / count, count, precision)

    @staticmethod
    def of_moments(moments: SpaceMoments | JointMoments, first: int = 0, second: int = 1) -> "Covariances":
        """The covariances of one space of two models, as `isthmus.collect` read them: `collect(…)["name"]`."""
        pairs = ((first, first), (second, second), (first, second))
        own, other, between = (moments.between(*pair).double() for pair in pairs)
        return Covariances(own, other, between, moments.count, MOMENTS_PRECISION)


def centred_rows(x: Float[Tensor, "samples units"]) -> Float[Tensor, "samples units"]:
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
    require_variance(scale)
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
    x, y = centred_rows(x), centred_rows(y)
    own, other, shared = _unbiased_hsic(x, x), _unbiased_hsic(y, y), _unbiased_hsic(x, y)
    require_variance(min(own, other))
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
        covariances: Covariances of both networks' units.
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
    require_variance(scale)
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
        require_variance(float(kept.sum()))
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
    require_variance(float(values.sum()))
    held = values.cumsum(dim=0) / values.sum()
    count = min(int((held < variance - precision).sum()) + 1, len(values))
    return vectors[:, :count]


def require_variance(scale: float) -> None:
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
