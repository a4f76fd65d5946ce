"""Singular directions: which of two networks' weight matrices a matching aligns, and what the loss makes of it.

A weight matrix is the C_out × C_in weight of a linear layer, and a convolution's weight reshaped to C_out × (C_in·k·k).
A convolution with g groups is g matrices, one a group: the blocks of one block-diagonal matrix, whose singular values
are those of all blocks. A transposed convolution's weight is turned so that its outputs are the rows. BatchNorm is not
folded in.

Suffixes: B blocks, M rows of a block, N columns of a block, K singular values of a block, min(M, N).
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from scipy.stats import spearmanr
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from isthmus.average.pleas import chunked_product, take
from isthmus.average.regmean import seen_by
from isthmus.batches import Batch, check_data, read_batches
from isthmus.connect import connect, interpolate
from isthmus.errors import InputError, ModelError, TransformError
from isthmus.layers import Layer, input_rows, layers_of, sample_positions
from isthmus.match import WeightMatching, align
from isthmus.members import as_modules
from isthmus.merge import upcast
from isthmus.moments import symmetry_of
from isthmus.progress import progress
from isthmus.score import IGNORED, Loss, are_classes, class_scores, cross_entropy, evaluate
from isthmus.symmetry import Symmetry
from isthmus.trace.reader import Reader, first_float, program_for
from isthmus.transform import Alignment, apply, move_state

State = Mapping[str, Tensor]

# Shares of a layer's largest singular value; the paper reports 0 and 0.3.
THRESHOLDS = tuple(index / 10 for index in range(10))

PARTS = ("top", "rest")

# Alignments of directions nearer than this are ties: they are sums of some 10³ products of float64 numbers up to one.
TIE = 1e-9


@dataclass(frozen=True)
class Weight:
    """A weight matrix of the graph.

    Attributes:
        name: State-dict name of the parameter.
        output: The parameter's dimension of produced units.
        groups: Blocks of the matrix: groups of a convolution.
    """

    name: str
    output: int
    groups: int

    def blocks(self, state: State) -> Float[Tensor, "blocks rows columns"]:
        """The matrix of a state, in float64 on the CPU."""
        tensor = state[self.name].detach().cpu().double().movedim(self.output, 0)
        return tensor.reshape(self.groups, tensor.shape[0] // self.groups, -1)

    def restored(self, blocks: Float[Tensor, "blocks rows columns"], like: Tensor) -> Tensor:
        """The parameter that `blocks` were taken from, in the dtype and on the device of `like`."""
        turned = like.movedim(self.output, 0)
        return blocks.reshape(turned.shape).movedim(0, self.output).to(like.device, like.dtype).contiguous()


@dataclass(frozen=True, eq=False)
class Factors:
    """The singular value decomposition of a weight matrix, block by block; values fall within each block."""

    left: Float[Tensor, "blocks rows ranks"]
    values: Float[Tensor, "blocks ranks"]
    right: Float[Tensor, "blocks ranks columns"]

    @property
    def precision(self) -> float:
        """What singular values are computed to: the spacing of float64 at the largest, times the matrix's size."""
        size = max(self.left.shape[1], self.right.shape[2])
        return size * torch.finfo(torch.float64).eps * float(self.values.max())

    def kept(self, threshold: float) -> Float[Tensor, "blocks ranks"]:
        """1 for singular values of at least `threshold` times the layer's largest that are not zero, else 0."""
        known = (self.values >= threshold * self.values.max()) & (self.values > self.precision)
        return known.double()

    def ordered(self, numbers: Float[Tensor, "blocks ranks"]) -> Float[Tensor, " kept"]:
        """One number a direction, those of the largest singular values first; directions of value zero left out."""
        order = self.values.flatten().argsort(descending=True, stable=True)
        return numbers.flatten()[order[self.kept(0.0).flatten()[order] > 0]]


@dataclass(frozen=True)
class Overlap:
    """R at one threshold: how far the singular directions of two matrices, or of all, agree.

    Attributes:
        threshold: γ: singular values of at least γ times the layer's largest are kept.
        sum_before: Σ_ij (u_i^a · u_j^b)(v_i^a · v_j^b) over the kept directions of A and of B as it is.
        sum_after: The same for B in the common frame.
        kept_a: Kept directions of A.
        kept_b: Of B.
    """

    threshold: float
    sum_before: float
    sum_after: float
    kept_a: int
    kept_b: int

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
        values_b: Of B.
        values_moved: Of B in the common frame.
        values_merged: Of the merged model; None if there was none.
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
        note: Why `input_shares` is None, or "".
        distance_before: ‖W_A − W_B‖, Frobenius.
        distance_after: The same in the common frame.
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
        distance_after: The same in the common frame.
        exact: Whether every transform is a permutation.
        method: Name of the matching method.
    """

    layers: tuple[LayerSpectrum, ...]
    skipped: Mapping[str, str]
    distance_before: float
    distance_after: float
    exact: bool
    method: str

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
    values change; `unchanged` says by how much.

    Args:
        models: Two models of one architecture.
        alignment: What `align` returned for them; None leaves both where they are.
        merged: What `merge` made of them, for `values_merged` and `gains`.
        data: Re-iterable batches, for `input_shares`; targets are not used.
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
    framed = carried(states, alignment)
    merged_state = None if merged is None else upcast(as_modules([modules[0], merged])[1].state_dict())
    grams = input_grams(modules[0], symmetry, data, samples, rows, seed) if data is not None else {}
    exact = alignment is None or alignment.is_exact
    why = "no data was given" if data is None else "its input rows cannot be gathered: a shared or transposed weight"
    layers = tuple(
        measure_layer(weight, states, framed, merged_state, grams.get(weight.name), thresholds, exact, why)
        for weight in progress(weights, "decomposing weights")
    )
    trained = [name for name, p in modules[0].named_parameters() if p.is_floating_point()]
    return Spectra(
        layers,
        skipped,
        distance(states[0], states[1], trained),
        distance(framed[0], framed[1], trained),
        exact,
        "identity" if alignment is None else alignment.method,
    )


def as_pair(models: Sequence[nn.Module | State], module: nn.Module | None = None) -> list[nn.Module]:
    """Two models as modules in `eval()`.

    Raises:
        InputError: Not two models.
        ModelError: They are not of one architecture.
    """
    if len(models) != 2:
        raise InputError(
            f"{len(models)} models: singular directions are compared between two, with an alignment of two"
        )
    return as_modules(models, module)


def with_graph(model: nn.Module, symmetry: Symmetry | None, data: Any) -> Symmetry:
    """A symmetry of the model that has its graph.

    Raises:
        InputError: There is none, and no data to trace with.
        SymmetryError: The symmetry is not the model's.
    """
    if symmetry is None and data is None:
        raise InputError("no symmetry: give symmetry=isthmus.trace(model, inputs), an alignment, or data=")
    found = symmetry_of(model, symmetry, None, data)
    if found.program is None:
        raise InputError(
            "the symmetry has no graph, in which weight matrices are found: trace the model, or give data="
        )
    return found


def weights_of(symmetry: Symmetry, model: nn.Module) -> tuple[list[Weight], dict[str, str]]:
    """Every weight matrix of the graph in the order of its first use, and the other trained tensors with the reason."""
    graph = symmetry.program
    nodes: dict[str, fx.Node] = {node.name: node for node in graph.program.graph.nodes}
    order = {name: index for index, name in enumerate(nodes)}
    found: dict[str, Weight] = {}
    for contraction in sorted(graph.contractions, key=lambda each: order[each.node]):
        shape = symmetry.shapes[contraction.weight]
        groups = 1
        if len(shape) > 2 and contraction.output == 0:
            groups = nodes[contraction.source].meta["val"].shape[contraction.channel] // shape[1]
        found.setdefault(contraction.weight, Weight(contraction.weight, contraction.output, groups))
    skipped = {
        symmetry.tied.get(name, name): "no linear layer or plain convolution multiplies its input by this tensor itself"
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and parameter.ndim > 1 and symmetry.tied.get(name, name) not in found
    }
    skipped |= {name: "never read" for name in symmetry.untouched if name in skipped}
    return list(found.values()), skipped


def carried(states: Sequence[State], alignment: Alignment | None) -> list[State]:
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
    pairs = zip(states, alignment.transforms, strict=True)
    return [move_state(state, transforms, alignment.symmetry, reset_variances=True) for state, transforms in pairs]


def distance(a: State, b: State, names: Sequence[str]) -> float:
    """L2 distance over some tensors, summed in float64."""
    return math.sqrt(math.fsum(float((a[name].double() - b[name].double()).square().sum()) for name in names))


def measure_layer(
    weight: Weight,
    states: Sequence[State],
    framed: Sequence[State],
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
        framed: A and B in the common frame.
        merged: The merged model, or None.
        gram: Second moment of what A's layer reads, or None.
        thresholds: Values of γ.
        exact: Whether both were moved by permutations.
        why: What to say where there is no `gram`.

    Raises:
        TransformError: Permutations changed singular values.
    """
    a, b = (factorise(weight.blocks(state)) for state in states)
    still = [before[weight.name] is after[weight.name] for before, after in zip(states, framed, strict=True)]
    framed_a = a if still[0] else factorise(weight.blocks(framed[0]))
    moved = b if still[1] else factorise(weight.blocks(framed[1]))
    largest = float(b.values.max())
    change = float((descending(b) - descending(moved)).abs().max()) / largest if largest else 0.0
    # Weyl: singular values move by no more than the norm of a backward error, which for Householder bidiagonalisation
    # grows with the matrix's longer side.
    tolerance = 10 * max(a.left.shape[1], a.right.shape[2]) * torch.finfo(torch.float64).eps
    if exact and change > tolerance:
        raise TransformError(
            f"{weight.name}: the permutations change its singular values by {change:.1e}, more than {tolerance:.1e}: "
            "the alignment is not one of this model's"
        )
    before, after = pairing(a, b), pairing(framed_a, moved)
    directions = framed_a.ordered((after * moved.kept(0.0).unsqueeze(1)).sum(dim=2))
    blocks = [weight.blocks(state) for state in (*states, *framed)]
    merged_blocks = None if merged is None else weight.blocks(merged)
    return LayerSpectrum(
        name=weight.name,
        shape=(a.left.shape[0], a.left.shape[1], a.right.shape[2]),
        values_a=floats(descending(a)),
        values_b=floats(descending(b)),
        values_moved=floats(descending(moved)),
        values_merged=None if merged_blocks is None else floats(descending(factorise(merged_blocks))),
        unchanged=change,
        tolerance=tolerance,
        overlaps=tuple(
            Overlap(
                threshold,
                summed(before, a.kept(threshold), b.kept(threshold)),
                summed(after, framed_a.kept(threshold), moved.kept(threshold)),
                int(a.kept(threshold).sum()),
                int(b.kept(threshold).sum()),
            )
            for threshold in thresholds
        ),
        directions=floats(directions),
        rank_correlation=rank_correlation(framed_a.ordered(framed_a.values), directions),
        gains=None if merged_blocks is None else gains(framed_a, merged_blocks),
        input_shares=None if gram is None else input_shares(a, gram),
        note=why if gram is None else "",
        distance_before=float((blocks[0] - blocks[1]).norm()),
        distance_after=float((blocks[2] - blocks[3]).norm()),
    )


def floats(values: Float[Tensor, " n"]) -> tuple[float, ...]:
    """A vector as a tuple of numbers."""
    return tuple(values.tolist())


def factorise(blocks: Float[Tensor, "blocks rows columns"]) -> Factors:
    """The singular value decomposition of every block."""
    left, values, right = torch.linalg.svd(blocks, full_matrices=False)
    return Factors(left, values, right)


def descending(factors: Factors) -> Float[Tensor, " values"]:
    """Singular values of all blocks, falling."""
    return factors.values.flatten().sort(descending=True).values


def pairing(a: Factors, b: Factors) -> Float[Tensor, "blocks ranks_a ranks_b"]:
    """(u_i^a · u_j^b)(v_i^a · v_j^b) for every pair of directions within a block; between blocks it is zero."""
    return (a.left.mT @ b.left) * (a.right @ b.right.mT)


def summed(
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


def gains(factors: Factors, merged: Float[Tensor, "blocks rows columns"]) -> tuple[float, ...]:
    """u_iᵀ W v_i / s_i for every direction."""
    through = ((factors.left.mT @ merged) * factors.right).sum(dim=2)
    return floats(factors.ordered(through) / factors.ordered(factors.values))


def input_shares(factors: Factors, gram: Float[Tensor, "blocks columns columns"]) -> tuple[float, ...] | None:
    """The share of the input's second moment in the span of the top k right directions, for every k."""
    total = float(gram.diagonal(dim1=1, dim2=2).sum())
    along = ((factors.right @ gram) * factors.right).sum(dim=2)
    return floats(factors.ordered(along).cumsum(dim=0) / total) if total else None


def input_grams(
    model: nn.Module, symmetry: Symmetry, data: Any, samples: int, rows: int, seed: int
) -> dict[str, Float[Tensor, "blocks columns columns"]]:
    """The uncentred second moment of what each layer's product reads, a matrix a group of channels, by weight."""
    check_data(data)
    state = model.state_dict()
    batches = take(data, samples, first_float(state))
    layers = layers_of(symmetry)
    count = max(1, -(-rows // sum(batch.size for batch in batches)))
    generator = torch.Generator().manual_seed(seed)
    totals: dict[str, Tensor] = {}
    seen_rows: dict[str, int] = {}
    for batch in batches:
        program = program_for(symmetry.program.program, batch)
        shapes = {node.name: node.meta["val"].shape for node in program.graph.nodes if "val" in node.meta}
        seen: dict[str, Tensor] = {}
        observers = {layer.contraction.source: seen_by(seen, layer.contraction.source) for layer in layers}
        Reader(program, observers).read(state, batch.clone())
        for layer in layers:
            name, found = layer.contraction.weight, layer_rows(layer, seen, shapes, state, count, generator)
            products = torch.stack([chunked_product(part, part) for part in found]).cpu()
            totals[name] = totals[name] + products if name in totals else products
            seen_rows[name] = seen_rows.get(name, 0) + len(found[0])
    return {name: total / seen_rows[name] for name, total in totals.items()}


def layer_rows(
    layer: Layer,
    seen: Mapping[str, Tensor],
    shapes: Mapping[str, Sequence[int]],
    state: State,
    count: int,
    generator: torch.Generator,
) -> list[Float[Tensor, "rows inputs"]]:
    """What a layer reads at up to `count` positions of every sample, in float32 at least, a matrix a group."""
    shape = shapes[layer.contraction.node]
    positions = sample_positions(layer, shape, count, generator)
    value = seen[layer.contraction.source]
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    return input_rows(layer, value, positions, state[layer.contraction.weight].shape[2:], shape)


@dataclass(frozen=True)
class TaylorBarrier:
    """The barrier at λ = ½ as a second-order expansion around both ends sees it, and as it is.

    Attributes:
        first_order: ¼ μᵀ(∇L(θ_a) − ∇L(θ_b)) with μ = θ_b − θ_a.
        second_order: 1/16 μᵀ(H_a + H_b) μ.
        real: L at the midpoint minus the mean of L at both ends.
        count: Targets that the loss is the mean of.
    """

    first_order: float
    second_order: float
    real: float
    count: int

    @property
    def estimate(self) -> float:
        """The barrier that the expansion foretells; exact for a quadratic loss."""
        return self.first_order + self.second_order

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain JSON values."""
        return {**asdict(self), "estimate": self.estimate}


def taylor_barrier(model_a: nn.Module, model_b: nn.Module, data: Any, *, loss: Loss | None = None) -> TaylorBarrier:
    """The second-order estimate of the loss barrier at the midpoint of two models, beside the real one.

    Each end is expanded along the line: half of the way costs L + ½ φ' + ⅛ φ'', with φ', φ'' the first two derivatives
    at that end along the whole of it, μ. The mean of both ends' expansions minus the mean of both losses is the
    estimate. Derivatives are taken by automatic differentiation twice, in float32 at least, and summed over batches in
    float64.

    The second derivative of ReLU is zero wherever it exists: the bends between its pieces are not in the estimate.

    The networks run in `eval()`. The running statistics of BatchNorm belong to θ: they are interpolated at the midpoint
    as they are, not measured anew, and the derivatives include them.

    Args:
        model_a: The model at λ = 0.
        model_b: The model at λ = 1, in the frame of the first.
        data: Re-iterable labelled batches.
        loss: Mean loss from outputs and targets; cross-entropy by default.

    Raises:
        DataError: Data without targets, empty, or readable only once.
        ModelError: The models are not of one architecture, or a buffer moves through which no derivative passes.

    Source: Ito, Yamada, Kumagai, ICLR 2025, report that such an estimate fails; the formula is this project's own
        derivation, since theirs could not be read.
    """
    check_data(data)
    modules = [in_float(model) for model in as_modules([model_a, model_b])]
    middle = interpolate(modules[0], modules[1], 0.5)
    scores = [evaluate(model, data, loss=loss) for model in (*modules, middle)]
    states = [model.state_dict() for model in modules]
    steps = {
        name: states[1][name].detach() - tensor.detach()
        for name, tensor in states[0].items()
        if tensor.is_floating_point()
    }
    first_a, second_a = slopes(modules[0], steps, data, loss)
    first_b, second_b = slopes(modules[1], steps, data, loss)
    return TaylorBarrier(
        first_order=(first_a - first_b) / 4,
        second_order=(second_a + second_b) / 16,
        real=scores[2].loss - (scores[0].loss + scores[1].loss) / 2,
        count=scores[0].count,
    )


def in_float(model: nn.Module) -> nn.Module:
    """A copy of a model in float32 at least, whose parameters ask for no gradient."""
    dtype = torch.promote_types(first_float(model.state_dict()).dtype, torch.float32)
    return copy.deepcopy(model).to(dtype).eval().requires_grad_(False)


class DifferentiableStatistics(TorchFunctionMode):
    """Writes BatchNorm in `eval()` out, so that derivatives pass through its running statistics too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The function's result, by elementary operations where it is a BatchNorm that measures nothing."""
        kwargs = kwargs or {}
        if func is not F.batch_norm:
            return func(*args, **kwargs)
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        given = dict(zip(names, args, strict=False)) | kwargs
        mean, variance = given["running_mean"], given["running_var"]
        if given.get("training", False) or mean is None or variance is None:
            return func(*args, **kwargs)
        shape = (1, -1, *[1] * (given["input"].ndim - 2))
        scale = (variance + given.get("eps", 1e-5)).rsqrt()
        scale = scale if given.get("weight") is None else scale * given["weight"]
        shift = -mean * scale if given.get("bias") is None else given["bias"] - mean * scale
        return given["input"] * scale.view(shape) + shift.view(shape)


def slopes(model: nn.Module, steps: State, data: Any, loss: Loss | None) -> tuple[float, float]:
    """The first and second derivative of the mean loss along `steps`, at the model: μᵀ∇L and μᵀHμ.

    Raises:
        ModelError: A buffer moves, and no derivative passes through it.
    """
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = [name for name, step in steps.items() if name not in parameters and bool(step.any())]
    reference = first_float(state)
    first, second, count = [], [], 0
    for batch in read_batches(data):
        batch = batch.to(reference.device, reference.dtype).clone()
        place = torch.zeros((), dtype=reference.dtype, device=reference.device, requires_grad=True)
        moved = {name: tensor + place * steps[name] if name in steps else tensor for name, tensor in state.items()}
        with DifferentiableStatistics(), sdpa_kernel(SDPBackend.MATH):  # the faster kernels have no second derivative
            output = functional_call(model, moved, batch.args, dict(batch.kwargs))
            mean = cross_entropy(output, batch.targets) if loss is None else loss(output, batch.targets)
        size = targets_of(output, batch)
        if not size:
            continue
        if not count:
            check_passed(mean, moved, buffers)
        if mean.requires_grad:
            (slope,) = torch.autograd.grad(mean, place, create_graph=True)
            first.append(float(slope.detach()) * size)
            if slope.requires_grad:
                (bend,) = torch.autograd.grad(slope, place, allow_unused=True)
                second.append(float(bend) * size if bend is not None else 0.0)
        count += size
    return math.fsum(first) / count, math.fsum(second) / count


def check_passed(mean: Tensor, moved: State, buffers: Sequence[str]) -> None:
    """Refuses buffers that move while no derivative passes through them.

    Raises:
        ModelError: There is one.
    """
    if not buffers:
        return
    passed = torch.autograd.grad(mean, [moved[name] for name in buffers], retain_graph=True, allow_unused=True)
    for name, gradient in zip(buffers, passed, strict=True):
        if gradient is None:
            raise ModelError(f"{name} differs between the models, and no derivative of the loss passes through it")


def targets_of(output: Any, batch: Batch) -> int:
    """How many targets a batch's mean loss is the mean of."""
    size = batch.targets.numel() if isinstance(batch.targets, Tensor) else batch.size
    scores = class_scores(output)
    if scores is not None and are_classes(batch.targets, scores):
        size -= int((batch.targets == IGNORED).sum())
    return size


def match_directions(
    models: Sequence[nn.Module | State],
    symmetry: Symmetry | None,
    keep: int | float,
    part: str = "top",
    *,
    others: bool = False,
    restarts: int = 3,
    seed: int = 0,
    data: Any = None,
    module: nn.Module | None = None,
) -> Alignment:
    """Weight matching that sees only some singular directions of every weight matrix.

    Every weight is replaced by the sum of its singular directions in `part`; weight matching runs on these, and the
    alignment it finds holds for the true models.

    Args:
        models: Two models or more of one architecture.
        symmetry: What `trace` returned; None finds it from `data`.
        keep: How many directions the top part has: a number (a matrix of fewer has no rest), or a share of the matrix's
            directions (rounded, at least one).
        part: `"top"`, the directions of the largest singular values, or `"rest"`, all others.
        others: Whether trained tensors that are no weight matrix (biases, norms, embeddings) are seen as they are; else
            they are not seen at all.
        restarts: Starts of weight matching.
        seed: Seeds weight matching.
        data: Re-iterable batches, to trace with where there is no symmetry.
        module: The architecture, where all models are state dicts.

    Returns:
        The alignment; its objective is that of the filtered weights. `details` holds `part`, `keep`, and `energy`, the
        share of the weight matrices' squared norm in the part, one number a model.

    Raises:
        InputError: An unknown part, `keep` out of range, or a part that holds no direction.
        ModelError: The models are not of one architecture, or hold NaN or infinite weights.
        SymmetryError: The symmetry is of another architecture.

    Source: this project's own intervention, on the claim of Ito, Yamada, Kumagai, ICLR 2025, that weight matching works
        by aligning the largest singular directions.
    """
    check_part(keep, part)
    modules = as_modules(models, module)
    symmetry = with_graph(modules[0], symmetry, data)
    weights, _ = weights_of(symmetry, modules[0])
    trained = {name for name, _ in modules[0].named_parameters(remove_duplicate=False)}
    filtered, energy = [], []
    for model in modules:
        state = upcast(model.state_dict())
        if not others:
            state = {name: torch.zeros_like(tensor) if name in trained else tensor for name, tensor in state.items()}
        part_norm = whole_norm = 0.0
        for weight in weights:
            factors = factorise(weight.blocks(model.state_dict()))
            chosen = chosen_directions(factors, keep, part)
            blocks = (factors.left * (factors.values * chosen).unsqueeze(1)) @ factors.right
            state[weight.name] = weight.restored(blocks, upcast(model.state_dict())[weight.name])
            part_norm += float((factors.values * chosen).square().sum())
            whole_norm += float(factors.values.square().sum())
        for alias, name in symmetry.tied.items():
            if alias in state:
                state[alias] = state[name]
        filtered.append(state)
        energy.append(part_norm / whole_norm if whole_norm else 0.0)
    if not any(energy):
        raise InputError(f"keep={keep}, part={part!r}: no singular direction is left to match; keep fewer")
    architecture = in_float(modules[0])
    found = align(filtered, symmetry, WeightMatching(restarts=restarts), seed=seed, module=architecture)
    told = {"part": part, "keep": keep, "others": others, "energy": energy}
    return replace(found, method="match_directions", details={**found.details, **told})


def check_part(keep: int | float, part: str) -> None:
    """Refuses an unknown part or a number of directions that no matrix has.

    Raises:
        InputError: It is one.
    """
    if part not in PARTS:
        raise InputError(f"part={part!r}: choose from {', '.join(PARTS)}")
    fits = 0 < keep <= 1 if isinstance(keep, float) else keep >= 1
    if isinstance(keep, bool) or not fits:
        raise InputError(f"keep={keep!r}: give a number of directions, 1 or more, or a share above 0 and up to 1.0")


def chosen_directions(factors: Factors, keep: int | float, part: str) -> Float[Tensor, "blocks ranks"]:
    """1 for each direction in the part, else 0; over all blocks of a matrix together."""
    count = factors.values.numel()
    top = max(1, round(keep * count)) if isinstance(keep, float) else min(keep, count)
    order = factors.values.flatten().argsort(descending=True, stable=True)
    chosen = torch.zeros(count, dtype=torch.float64)
    chosen[order[:top] if part == "top" else order[top:]] = 1
    return chosen.view_as(factors.values)


@dataclass(frozen=True)
class MatchedPart:
    """What matching by a part of the singular directions led to.

    Attributes:
        part: `"top"`, `"rest"`, `"all"` (plain weight matching) or `"none"` (no matching).
        keep: Directions of the top part, a number or a share; None for `"all"` and `"none"`.
        energy: Share of the weight matrices' squared norm in the part, the mean of both models.
        distance: L2 distance after matching, over all trained tensors.
        distance_ratio: That over the distance before.
        barrier: Rise of the loss at λ = ½ above the mean of both ends.
        error_barrier: The same of the error; NaN where targets are no classes.
        overlaps: R of the whole network at each threshold, after matching.
    """

    part: str
    keep: int | float | None
    energy: float
    distance: float
    distance_ratio: float
    barrier: float
    error_barrier: float
    overlaps: Mapping[float, float]


@dataclass(frozen=True)
class EqualDistance:
    """The barriers that both parts lead to at one L2 distance, read off straight lines between measured points."""

    distance: float
    top: float
    rest: float


@dataclass(frozen=True)
class Intervention:
    """Matching by top or by remaining singular directions, for several sizes of the top part.

    Attributes:
        rows: No matching, plain weight matching, then every size and part.
        repair: How running statistics were mended at the midpoint: `"reset"` or None.
    """

    rows: tuple[MatchedPart, ...]
    repair: str | None

    def part(self, part: str) -> tuple[MatchedPart, ...]:
        """The rows of one part, nearest first."""
        return tuple(sorted((row for row in self.rows if row.part == part), key=lambda row: row.distance))

    @property
    def at_equal_distance(self) -> tuple[EqualDistance, ...]:
        """Both parts' barriers at every measured distance that lies within what both parts reached.

        Empty where the distances that the two parts reach do not meet: then no barrier can be compared.
        """
        lines = {name: self.part(name) for name in PARTS}
        if not all(lines.values()):
            return ()
        low = max(line[0].distance for line in lines.values())
        high = min(line[-1].distance for line in lines.values())
        places = sorted({row.distance for line in lines.values() for row in line if low <= row.distance <= high})
        read = {name: ([row.distance for row in line], [row.barrier for row in line]) for name, line in lines.items()}
        return tuple(
            EqualDistance(place, float(np.interp(place, *read["top"])), float(np.interp(place, *read["rest"])))
            for place in places
        )

    @property
    def nearest(self) -> tuple[MatchedPart, MatchedPart] | None:
        """The measured top and rest whose distances are nearest to each other; None where a part was not measured."""
        pairs = [(top, rest) for top in self.part("top") for rest in self.part("rest")]
        return min(pairs, key=lambda pair: abs(pair[0].distance - pair[1].distance), default=None)

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain JSON values."""
        rows = [
            {
                **asdict(row),
                "barrier": plain(row.barrier),
                "error_barrier": plain(row.error_barrier),
                "distance_ratio": plain(row.distance_ratio),
                "overlaps": {str(key): plain(value) for key, value in row.overlaps.items()},
            }
            for row in self.rows
        ]
        equal = [asdict(each) for each in self.at_equal_distance]
        return {"repair": self.repair, "rows": rows, "at_equal_distance": equal}


@dataclass(frozen=True, eq=False)
class Bench:
    """What every row of an intervention is measured with."""

    models: Sequence[nn.Module]
    symmetry: Symmetry
    data: Any
    repair: str | None
    calibration: Any
    loss: Loss | None = None
    thresholds: Sequence[float] = field(default=(0.0, 0.3))

    def row(self, alignment: Alignment | None, part: str, keep: int | float | None, energy: float) -> MatchedPart:
        """Distance, barrier and R of one alignment."""
        a, b = self.models
        spectra = measure_spectra(self.models, alignment, symmetry=self.symmetry, thresholds=self.thresholds)
        if alignment is not None:
            a, b = apply(alignment, a, 0), apply(alignment, b, 1)
        curve = connect(a, b, self.data, 3, self.repair, self.calibration, loss=self.loss)
        return MatchedPart(
            part,
            keep,
            energy,
            spectra.distance_after,
            spectra.distance_ratio,
            curve.midpoint_barrier,
            curve.midpoint_error_barrier,
            {overlap.threshold: overlap.after for overlap in spectra.overlaps},
        )


def intervene(
    models: Sequence[nn.Module],
    symmetry: Symmetry | None,
    keeps: Sequence[int | float],
    data: Any,
    *,
    repair: str | None = "reset",
    calibration: Any = None,
    others: bool = False,
    restarts: int = 3,
    seed: int = 0,
    loss: Loss | None = None,
) -> Intervention:
    """Matches two models by their top singular directions, or by all others, and compares distances and barriers.

    If alignment of the large directions is what lowers the barrier, and not distance as such, then the top part has the
    lower barrier at an equal distance.

    Args:
        models: Two modules of one architecture.
        symmetry: What `trace` returned; None finds it from `data`.
        keeps: Sizes of the top part, as in `match_directions`.
        data: Re-iterable labelled batches to score on.
        repair: `"reset"` re-estimates BatchNorm statistics at the midpoint; None leaves the interpolated ones.
        calibration: Training data for `"reset"`, never the data that is scored on.
        others: As in `match_directions`.
        restarts: Starts of weight matching.
        seed: Seeds weight matching.
        loss: Mean loss from outputs and targets; cross-entropy by default.

    Raises:
        DataError: Data without targets, empty, or readable only once; or no `calibration` for a network with BatchNorm.
        InputError: Not two models, no sizes, or one that leaves a part without directions.
        ModelError: The models are not of one architecture, or hold NaN or infinite weights.

    Source: this project's own; see `match_directions`.
    """
    if not keeps:
        raise InputError("keeps is empty: give at least one size of the top part")
    for keep in keeps:
        check_part(keep, "top")
    check_data(data)
    modules = as_pair(models)
    symmetry = with_graph(modules[0], symmetry, data)
    bench = Bench(modules, symmetry, data, repair, calibration, loss)
    whole = align(modules, symmetry, WeightMatching(restarts=restarts), seed=seed)
    rows = [bench.row(None, "none", None, 0.0), bench.row(whole, "all", None, 1.0)]
    for keep in progress(keeps, "matching parts"):
        for part in PARTS:
            found = match_directions(modules, symmetry, keep, part, others=others, restarts=restarts, seed=seed)
            energy: Any = found.details["energy"]
            rows.append(bench.row(found, part, keep, sum(energy) / len(energy)))
    return Intervention(tuple(rows), repair)
