"""Singular directions: which of two networks' weight matrices a matching aligns, and what the loss makes of it.

A weight matrix is the C_out × C_in weight of a linear layer, and a convolution's weight reshaped to C_out × (C_in·k·k).
A convolution with g groups is g matrices, one a group: the blocks of one block-diagonal matrix, whose singular values
are all blocks' together. A transposed convolution's weight is turned so that its outputs are the rows. BatchNorm is not
folded in.

Suffixes: B blocks, M rows of a block, N columns of a block, K singular values of a block, min(M, N).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import spearmanr
from torch import Tensor, nn

from isthmus.errors import InputError, TransformError
from isthmus.explain.layer_inputs import input_grams
from isthmus.explain.weights import Factors, Weight, as_pair, factorise, weights_of, with_graph
from isthmus.observe.given import as_modules
from isthmus.progress import progress
from isthmus.state import State, upcast
from isthmus.symmetry.alignment import Alignment
from isthmus.symmetry.symmetry import Symmetry
from isthmus.symmetry.transform import move_state
from isthmus.wording.short import counted, figure, shortened, told, told_by_fields

# Shares of a layer's largest singular value; the paper reports 0 and 0.3.
THRESHOLDS = tuple(index / 10 for index in range(10))

# Alignments of directions nearer than this are ties: they are sums of some 10³ products of float64 numbers up to one.
TIE = 1e-9


@dataclass(frozen=True)
class Overlap:
    """R at one threshold: how far the singular directions of two matrices, or of all, agree.

    Attributes:
        threshold: γ: singular values of at least γ times the layer's largest are kept.
        sum_before: Σ_ij (u_i^a · u_j^b)(v_i^a · v_j^b) over the kept directions of A and of B as it is.
        sum_after: The same sum with B in the common frame.
        kept_a: Kept directions of A.
        kept_b: Kept directions of B.
    """

    threshold: float
    sum_before: float
    sum_after: float
    kept_a: int
    kept_b: int

    __repr__ = told_by_fields

    @property
    def count(self) -> float:
        """n, what R is divided by: the mean of both numbers of kept directions, so that R is never above 1."""
        return (self.kept_a + self.kept_b) / 2

    @property
    def before(self) -> float:
        """R before matching; NaN where nothing was kept."""
        return self.sum_before / self.count if self.count else float("nan")

    @property
    def after(self) -> float:
        """R after matching; NaN where nothing was kept."""
        return self.sum_after / self.count if self.count else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain JSON values."""
        return {**asdict(self), "before": plain(self.before), "after": plain(self.after)}


@dataclass(frozen=True)
class LayerSpectrum:
    """One weight matrix of two networks, before and after one of them was moved. Directions are sorted by their value.

    Attributes:
        name: State-dict name of the weight.
        shape: Blocks, rows and columns of the matrix.
        values_a: Singular values of A, falling.
        values_b: Singular values of B, falling.
        values_moved: Singular values of B in the common frame.
        values_merged: Singular values of the merged model; None if there was none.
        unchanged: Largest difference between B's singular values before and after, as a share of the largest one.
        tolerance: What rounding may make of it: ten times the matrix's longer side times the spacing of float64.
        overlaps: R at every threshold.
        directions: For each direction i of A, u_i^aᵀ (Σ_j u_j^b v_j^bᵀ) v_i^a with B in the common frame: its own share
            of the sum that R at γ = 0 is, from −1 to 1.
        rank_correlation: Spearman's correlation of `directions` with A's singular values; None where either is constant
            or there are fewer than three.
        gains: For each direction i of A in the common frame, u_iᵀ W v_i / s_i of the merged model's W: 1 where it does
            what A does, ½ where averaging two models halved it. None if there was no merged model.
        input_shares: Entry k − 1 is the share of the uncentred second moment of what A's layer reads that lies in the
            span of A's top k right singular directions; None if it was not measured.
        note: Why `_input_shares` is None, or "".
        distance_before: ‖W_A − W_B‖, Frobenius.
        distance_after: The same distance in the common frame.
    """

    name: str
    shape: tuple[int, int, int]
    values_a: tuple[float, ...]
    values_b: tuple[float, ...]
    values_moved: tuple[float, ...]
    values_merged: tuple[float, ...] | None
    unchanged: float
    tolerance: float
    overlaps: tuple[Overlap, ...]
    directions: tuple[float, ...]
    rank_correlation: float | None
    gains: tuple[float, ...] | None
    input_shares: tuple[float, ...] | None
    note: str
    distance_before: float
    distance_after: float

    def __repr__(self) -> str:
        blocks, rows, columns = self.shape
        size = f"{rows} × {columns}" if blocks == 1 else f"{blocks} × {rows} × {columns}"
        distances = f"distance {figure(self.distance_before)} → {figure(self.distance_after)}"
        return told(self, shortened(self.name), size, distances)

    @property
    def difference(self) -> float:
        """‖s^a − s^b‖ over the mean of ‖s^a‖ and ‖s^b‖: how far the spectra of A and B differ."""
        a, b = np.array(self.values_a), np.array(self.values_b)
        scale = float(np.linalg.norm(a) + np.linalg.norm(b)) / 2
        return float(np.linalg.norm(a - b)) / scale if scale else 0.0

    @property
    def distance_ratio(self) -> float:
        """Distance after matching over that before; NaN where the two weights were equal."""
        return self.distance_after / self.distance_before if self.distance_before else float("nan")

    def chance(self, k: int) -> float:
        """What share of the input k directions would hold if all were alike: k over the number of inputs."""
        return k / (self.shape[0] * self.shape[2])

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain JSON values."""
        return {
            **asdict(self),
            "overlaps": [overlap.to_dict() for overlap in self.overlaps],
            "difference": self.difference,
            "distance_ratio": plain(self.distance_ratio),
        }


@dataclass(frozen=True)
class Spectra:
    """The weight matrices of two networks, before and after matching.

    Attributes:
        layers: One entry a weight matrix, in the order in which the graph runs them.
        skipped: Every other trained tensor of two or more dimensions, with the reason.
        distance_before: L2 distance over all trained tensors, biases and gains of norms among them.
        distance_after: The same distance in the common frame.
        exact: Whether every transform is a permutation.
        method: Name of the matching method.
    """

    layers: tuple[LayerSpectrum, ...]
    skipped: Mapping[str, str]
    distance_before: float
    distance_after: float
    exact: bool
    method: str

    def __repr__(self) -> str:
        distances = f"distance {figure(self.distance_before)} → {figure(self.distance_after)}"
        return told(self, self.method, counted(len(self.layers), "layer"), distances)

    @property
    def overlaps(self) -> tuple[Overlap, ...]:
        """R of the whole network at every threshold: sums over layers, divided by the sum of the layers' n."""
        return tuple(
            Overlap(
                each[0].threshold,
                math.fsum(o.sum_before for o in each),
                math.fsum(o.sum_after for o in each),
                sum(o.kept_a for o in each),
                sum(o.kept_b for o in each),
            )
            for each in zip(*(layer.overlaps for layer in self.layers), strict=True)
        )

    def at(self, threshold: float) -> Overlap:
        """R of the whole network at one threshold.

        Raises:
            InputError: It was not measured.
        """
        for overlap in self.overlaps:
            if math.isclose(overlap.threshold, threshold, abs_tol=1e-12):
                return overlap
        known = ", ".join(str(overlap.threshold) for overlap in self.overlaps)
        raise InputError(f"R was not measured at γ={threshold}: choose from {known}")

    @property
    def distance_ratio(self) -> float:
        """Distance after matching over that before; NaN where the models were equal."""
        return self.distance_after / self.distance_before if self.distance_before else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain JSON values."""
        return {
            "method": self.method,
            "exact": self.exact,
            "layers": [layer.to_dict() for layer in self.layers],
            "skipped": dict(self.skipped),
            "overlaps": [overlap.to_dict() for overlap in self.overlaps],
            "distance_before": self.distance_before,
            "distance_after": self.distance_after,
            "distance_ratio": plain(self.distance_ratio),
        }


def plain(value: float) -> float | None:
    """A number as JSON can hold it: None for NaN and infinity."""
    return value if math.isfinite(value) else None


def measure_spectra(
    models: Sequence[nn.Module | State],
    alignment: Alignment | None = None,
    merged: nn.Module | State | None = None,
    data: Any = None,
    symmetry: Symmetry | None = None,
    thresholds: Sequence[float] = THRESHOLDS,
    *,
    samples: int = 2000,
    rows: int = 20_000,
    seed: int = 0,
    module: nn.Module | None = None,
) -> Spectra:
    """Singular values and directions of every weight matrix of two models, before and after matching.

    Σ_ij (u_i^a·u_j^b)(v_i^a·v_j^b) is the trace of the product of both matrices' polar factors, the kept directions
    alone: computed as the sum of (U_aᵀ U_b) ∘ (V_aᵀ V_b), two products that serve every threshold. Directions whose
    singular value is zero in float64 are not defined and never kept. Where a transform is no permutation, singular
    values may change; `unchanged` says by how much. Models that are folded before they are moved are folded on both
    sides.

    Args:
        models: Two models of one architecture.
        alignment: What `align` returned for them; None leaves both where they are.
        merged: What `merge` made of them, for `values_merged` and `_gains`.
        data: Re-iterable batches, for `_input_shares`; targets are not used.
        symmetry: What `trace` returned; the alignment's by default, or found from the data.
        thresholds: Values of γ, from 0 to 1.
        samples: Inputs to use, from the start of the data.
        rows: Rows a layer, drawn over samples and positions of a convolution.
        seed: Seeds the draw of positions.
        module: The architecture, where all models are state dicts.

    Raises:
        DataError: Data that cannot be read.
        InputError: Not two models, thresholds out of range, or no graph to find the weight matrices in.
        ModelError: The models are not of one architecture, or hold NaN or infinite weights.
        SymmetryError: The symmetry is of another architecture.
        TransformError: The alignment does not fit, or its permutations change singular values.

    Source: Ito, Yamada, Kumagai, "Analysis of linear mode connectivity via permutation-based weight matching", ICLR
        2025 (arXiv 2402.04051). How the paper reshapes convolutions, and what it divides by where the two models keep
        different numbers of directions, could not be read: both are this project's choice.
    """
    if not thresholds or not all(0 <= threshold <= 1 for threshold in thresholds):
        raise InputError(f"thresholds={list(thresholds)}: give shares of the largest singular value, from 0 to 1")
    if samples < 1 or rows < 1 or seed < 0:
        raise InputError(f"samples={samples}, rows={rows}, seed={seed}: give 1 or more of both, and 0 or more as seed")
    modules = as_pair(models, module)
    known = alignment.symmetry if symmetry is None and alignment is not None else symmetry
    symmetry = with_graph(modules[0], known, data)
    weights, skipped = weights_of(symmetry, modules[0])
    states = [upcast(model.state_dict()) for model in modules]
    if alignment is not None and alignment.folded:  # folding changes singular values: it belongs to both sides
        states = [dict(alignment.folded_state(state, index)) for index, state in enumerate(states)]
    moved = _moved(states, alignment)
    merged_state = None if merged is None else upcast(as_modules([modules[0], merged])[1].state_dict())
    grams = input_grams(states[0], symmetry, data, samples, rows, seed) if data is not None else {}
    exact = alignment is None or alignment.is_exact
    why = "no data was given" if data is None else "its input rows cannot be gathered: a shared or transposed weight"
    layers = tuple(
        _measure_layer(weight, states, moved, merged_state, grams.get(weight.name), thresholds, exact, why)
        for weight in progress(weights, "decomposing weights")
    )
    trained = [name for name, p in modules[0].named_parameters() if p.is_floating_point()]
    return Spectra(
        layers,
        skipped,
        _distance(states[0], states[1], trained),
        _distance(moved[0], moved[1], trained),
        exact,
        "identity" if alignment is None else alignment.method,
    )


def _moved(states: Sequence[State], alignment: Alignment | None) -> list[State]:
    """The states in the common frame.

    Raises:
        InputError: The alignment is not of two models, or they are of several widths.
    """
    if alignment is None:
        return list(states)
    if len(alignment) != 2:
        raise InputError(f"an alignment of {len(alignment)} models: give one of the two models that are compared")
    if alignment.symmetries:
        raise InputError("models of several widths: singular directions are compared between matrices of one size")
    prepared = [alignment.folded_state(state, index) for index, state in enumerate(states)]
    pairs = zip(prepared, alignment.transforms, strict=True)
    return [move_state(state, transforms, alignment.symmetry, reset_variances=True) for state, transforms in pairs]


def _distance(a: State, b: State, names: Sequence[str]) -> float:
    """L2 distance over some tensors, summed in float64."""
    return math.sqrt(math.fsum(float((a[name].double() - b[name].double()).square().sum()) for name in names))


def _measure_layer(
    weight: Weight,
    states: Sequence[State],
    moved: Sequence[State],
    merged: State | None,
    gram: Float[Tensor, "blocks columns columns"] | None,
    thresholds: Sequence[float],
    exact: bool,
    why: str,
) -> LayerSpectrum:
    """One weight matrix of two models.

    Args:
        weight: Which matrix.
        states: A and B as they are.
        moved: A and B in the common frame.
        merged: The merged model, or None.
        gram: Second moment of what A's layer reads, or None.
        thresholds: Values of γ.
        exact: Whether both were moved by permutations.
        why: What to say where there is no `gram`.

    Raises:
        TransformError: Permutations changed singular values.
    """
    a, b = (factorise(weight.blocks(state)) for state in states)
    still = [before[weight.name] is after[weight.name] for before, after in zip(states, moved, strict=True)]
    moved_a = a if still[0] else factorise(weight.blocks(moved[0]))
    moved_b = b if still[1] else factorise(weight.blocks(moved[1]))
    largest = float(b.values.max())
    change = float((_descending(b) - _descending(moved_b)).abs().max()) / largest if largest else 0.0
    # Weyl: singular values move by no more than the norm of a backward error, which for Householder bidiagonalisation
    # grows with the matrix's longer side.
    tolerance = 10 * max(a.left.shape[1], a.right.shape[2]) * torch.finfo(torch.float64).eps
    if exact and change > tolerance:
        raise TransformError(
            f"{weight.name}: the permutations change its singular values by {change:.1e}, more than {tolerance:.1e}: "
            "the alignment is not one of this model's"
        )
    before, after = _pairing(a, b), _pairing(moved_a, moved_b)
    directions = moved_a.ordered((after * moved_b.kept(0.0).unsqueeze(1)).sum(dim=2))
    blocks = [weight.blocks(state) for state in (*states, *moved)]
    merged_blocks = None if merged is None else weight.blocks(merged)
    return LayerSpectrum(
        name=weight.name,
        shape=(a.left.shape[0], a.left.shape[1], a.right.shape[2]),
        values_a=_floats(_descending(a)),
        values_b=_floats(_descending(b)),
        values_moved=_floats(_descending(moved_b)),
        values_merged=None if merged_blocks is None else _floats(_descending(factorise(merged_blocks))),
        unchanged=change,
        tolerance=tolerance,
        overlaps=tuple(
            Overlap(
                threshold,
                _summed(before, a.kept(threshold), b.kept(threshold)),
                _summed(after, moved_a.kept(threshold), moved_b.kept(threshold)),
                int(a.kept(threshold).sum()),
                int(b.kept(threshold).sum()),
            )
            for threshold in thresholds
        ),
        directions=_floats(directions),
        rank_correlation=rank_correlation(moved_a.ordered(moved_a.values), directions),
        gains=None if merged_blocks is None else _gains(moved_a, merged_blocks),
        input_shares=None if gram is None else _input_shares(a, gram),
        note=why if gram is None else "",
        distance_before=float((blocks[0] - blocks[1]).norm()),
        distance_after=float((blocks[2] - blocks[3]).norm()),
    )


def _floats(values: Float[Tensor, " n"]) -> tuple[float, ...]:
    """A vector as a tuple of numbers."""
    return tuple(values.tolist())


def _descending(factors: Factors) -> Float[Tensor, " values"]:
    """Singular values of all blocks, falling."""
    return factors.values.flatten().sort(descending=True).values


def _pairing(a: Factors, b: Factors) -> Float[Tensor, "blocks ranks_a ranks_b"]:
    """(u_i^a · u_j^b)(v_i^a · v_j^b) for every pair of directions within a block; between blocks it is zero."""
    return (a.left.mT @ b.left) * (a.right @ b.right.mT)


def _summed(
    pairs: Float[Tensor, "blocks ranks_a ranks_b"],
    kept_a: Float[Tensor, "blocks ranks_a"],
    kept_b: Float[Tensor, "blocks ranks_b"],
) -> float:
    """The sum over the kept directions of both."""
    return float((kept_a.unsqueeze(1) @ pairs @ kept_b.unsqueeze(2)).sum())


def rank_correlation(values: Float[Tensor, " n"], directions: Float[Tensor, " n"]) -> float | None:
    """Spearman's correlation; None for fewer than three numbers, or where either does not vary."""
    rounded = (directions / TIE).round().numpy()
    if len(rounded) < 3 or np.ptp(rounded) == 0 or np.ptp(values.numpy()) == 0:
        return None
    return float(np.asarray(spearmanr(values.numpy(), rounded))[0])


def _gains(factors: Factors, merged: Float[Tensor, "blocks rows columns"]) -> tuple[float, ...]:
    """u_iᵀ W v_i / s_i for every direction."""
    through = ((factors.left.mT @ merged) * factors.right).sum(dim=2)
    return _floats(factors.ordered(through) / factors.ordered(factors.values))


def _input_shares(factors: Factors, gram: Float[Tensor, "blocks columns columns"]) -> tuple[float, ...] | None:
    """The share of the input's second moment in the span of the top k right directions, for every k."""
    total = float(gram.diagonal(dim1=1, dim2=2).sum())
    along = ((factors.right @ gram) * factors.right).sum(dim=2)
    return _floats(factors.ordered(along).cumsum(dim=0) / total) if total else None
