"""Layerwise least squares: every layer of the merged network is fitted to what its parents' layers compute."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from isthmus.average.base import Average, Averaged, AveragingProblem
from isthmus.average.mean import weighted_mean
from isthmus.data.batches import Batch
from isthmus.errors import InputError
from isthmus.graph.sweep import Sweep
from isthmus.observe.given import find_symmetry
from isthmus.observe.layers import (
    Layer,
    carries_outputs,
    chunked_product,
    folded,
    input_rows,
    layers_of,
    move_folded,
    move_value,
    output_rows,
    sample_positions,
    take,
    unfold_layer,
)
from isthmus.progress import progress
from isthmus.state import first_float
from isthmus.symmetry.symmetry import Symmetry
from isthmus.symmetry.traced_graph import BatchNorm
from isthmus.symmetry.transform import Permutation, Transforms

# Numbers that the gathered inputs of one layer may hold; more units make fewer rows.
LARGEST = 250_000_000


# Smallest variance that a running statistic is set to.
TINY = 1e-12


@dataclass(frozen=True)
class PLeaS(Average):
    """Fits each layer, in the order of the graph, to the weighted mean of the aligned parents' outputs.

    The merged layer is regressed, from what the *merged* network computes below it, onto Σ c_m T_m z_m, where z_m is
    what parent m's layer computes with its BatchNorm; a layer that ends a residual branch onto the mean of the streams
    minus the merged network's own shortcut. Rows are drawn over samples and positions, the ridge pulls towards the
    plain mean of the (folded) weights. Where only ReLU reads the result, what lies below zero on both sides is no
    error: `rectified_steps` further solves, with the same factorisation, leave it out. A BatchNorm behind a fitted
    layer gets the measured statistics and the gain and shift that make it and the product one affine map; every other
    BatchNorm is measured in passing. All other tensors, and the weights that several products share, are plain means.

    Attributes:
        samples: Inputs to use, from the start of the data.
        rows: Rows a layer, drawn over samples and positions.
        ridge: Share of the mean diagonal of the inputs' covariance that pulls towards the plain mean.
        rectified_steps: Further solves for layers that only ReLU reads.

    Source: Nasery, Hayase, Koh, Oh, PLeaS, CVPR 2025, for permutation and then layerwise least squares. Regressing from
        the merged network's own activations, the treatment of BatchNorm and of residual branches, and the steps for
        ReLU are this project's own.
    """

    samples: int = 4000
    rows: int = 50_000
    ridge: float = 1e-4
    rectified_steps: int = 3

    name: ClassVar[str] = "pleas"
    fits: ClassVar[bool] = True

    @property
    def needs(self) -> str:
        """Batches; targets are not used."""
        return "data"

    def __post_init__(self) -> None:
        if self.samples < 1 or self.rows < 1 or self.rectified_steps < 0:
            raise InputError(
                f"samples={self.samples}, rows={self.rows}, rectified_steps={self.rectified_steps}: "
                "give at least 1, 1 and 0"
            )
        if not (math.isfinite(self.ridge) and self.ridge > 0):
            raise InputError(f"ridge={self.ridge}: give a positive number, such as 1e-4")

    def __call__(self, aligned: AveragingProblem) -> Averaged:
        """The fitted tensors.

        Raises:
            DataError: No data, or data that cannot be read.
        """
        merged = weighted_mean(aligned)
        alive = aligned.coefficients.counting
        if len(alive) == 1 and aligned.is_exact:
            return Averaged(merged)  # one parent alone: nothing to fit
        alignment = aligned.alignment
        symmetry = find_symmetry(aligned.models[0], alignment.symmetry if alignment else None, None, aligned.data)
        batches = take(aligned.data, self.samples, merged)
        fitting = Fitting(self, aligned, symmetry, batches, alive)
        integers = {name: t for name, t in aligned.states[0].items() if name not in merged}
        fitted = fitting.run(merged | integers)
        state = {name: fitted[name].to(tensor.dtype) for name, tensor in merged.items()}
        return Averaged(state, frozenset(fitting.measured))


@dataclass(eq=False)
class Fitting:
    """One run of layerwise least squares.

    Attributes:
        options: The configured average.
        aligned: The models.
        symmetry: Their symmetry, with its graph.
        batches: The inputs.
        alive: Numbers of the models whose coefficient is not zero.
        measured: Names of the running statistics that were measured on the merged network.
    """

    options: PLeaS
    aligned: AveragingProblem
    symmetry: Symmetry
    batches: Sequence[Batch]
    alive: Sequence[int]
    measured: set[str] = field(default_factory=set)

    def run(self, start: dict[str, Tensor]) -> dict[str, Tensor]:
        """The merged state, every layer fitted, from a start that holds the plain mean."""
        graph = self.symmetry.traced
        program = graph.program
        layers = [layer for layer in layers_of(self.symmetry) if carries_outputs(self.symmetry, layer)]
        targets = {layer.target for layer in layers}
        sources = {layer.contraction.source for layer in layers} | {each.shortcut for each in layers if each.shortcut}
        absorbed = {layer.norm.node for layer in layers if layer.norm}
        others = [norm for norm in graph.batch_norms if norm.node not in absorbed and norm.mean and norm.variance]
        merged = Sweep(program, start, self.batches, sources | {norm.source for norm in others})
        # Moved parents compute the aligned values; where a map is not exact, parents are run as they are, and what they
        # compute is moved.
        exact = self.aligned.is_exact
        states = self.aligned.states if exact else [model.state_dict() for model in self.aligned.models]
        dtype = first_float(start).dtype
        parents = [Sweep(program, _upcast(states[index], dtype), self.batches, targets) for index in self.alive]
        generator = torch.Generator().manual_seed(self.aligned.seed)
        steps: list[tuple[int, Layer | BatchNorm]] = [(merged.order[layer.contraction.node], layer) for layer in layers]
        steps += [(merged.order[norm.node], norm) for norm in others]
        for _, step in progress(sorted(steps, key=lambda each: each[0]), "fitting layers"):
            if not isinstance(step, Layer):
                self._measure(merged, step)
                continue
            for parent in parents:
                parent.advance(step.target)
            merged.advance(step.contraction.node, before=True)
            self._fit(step, merged, parents, generator)
            for parent in parents:
                if sum(step.target == layer.target for layer in layers) == 1:
                    parent.forget(step.target)
        return merged.state

    def _measure(self, merged: Sweep, norm: BatchNorm) -> None:
        """Sets a BatchNorm's statistics to the mean and variance of what reaches it in the merged network."""
        assert norm.mean is not None
        assert norm.variance is not None
        merged.advance(norm.node, before=True)
        values = torch.cat([v.movedim(1, 0).flatten(1) for v in merged.values(norm.source)], dim=1)
        merged.set(norm.mean, values.mean(dim=1, dtype=torch.float64).to(values.dtype))
        merged.set(norm.variance, values.double().var(dim=1, correction=0).clamp_min(TINY).to(values.dtype))
        self.measured |= {norm.mean, norm.variance}

    def _fit(self, layer: Layer, merged: Sweep, parents: Sequence[Sweep], generator: torch.Generator) -> None:
        """Solves one layer and puts it into the merged network."""
        old = merged.state[layer.contraction.weight]
        kernel = old.shape[2:]
        sources = merged.values(layer.contraction.source)
        shortcuts = merged.values(layer.shortcut) if layer.shortcut else [None] * len(sources)
        weights = self.aligned.weights(layer.contraction.weight)
        coefficients = [weights[index] for index in self.alive]
        inputs = sum(len(source) for source in sources)
        rows = max(1, min(self.options.rows, LARGEST // old[0].numel()))
        gathered: list[Rows] = []
        for number, (source, shortcut) in enumerate(zip(sources, shortcuts, strict=True)):
            wanted = torch.zeros((), dtype=source.dtype)
            for index, parent, weight in zip(self.alive, parents, coefficients, strict=True):
                value = parent.values(layer.target)[number]
                if not self.aligned.is_exact:
                    value = move_value(self.symmetry, layer.target, value, self._transforms(index))
                wanted = wanted + weight * value
            shape = wanted.shape
            count = math.ceil(rows / inputs)
            positions = sample_positions(layer, shape, count, generator)
            beside = None if shortcut is None else output_rows(layer, shortcut, positions)
            target = output_rows(layer, wanted, positions)
            target = target if beside is None else target - beside
            gathered.append(Rows(input_rows(layer, source, positions, kernel, shape), target, beside))
        prior = sum(
            weight
            * move_folded(self.symmetry, layer, folded(layer, self._own_state(index))[0], self._transforms(index))
            for index, weight in zip(self.alive, coefficients, strict=True)
        )
        assert isinstance(prior, Tensor)
        free = layer.norm is not None or layer.contraction.bias is not None
        solved = [
            self._solve(layer, gathered, group, block, free)
            for group, block in enumerate(prior.flatten(1).chunk(len(gathered[0].inputs)))
        ]
        weight, bias, mean, variance = (torch.cat(parts) for parts in zip(*solved, strict=True))
        for name, tensor in unfold_layer(layer, weight.view(prior.shape), bias, mean, variance).items():
            merged.set(name, tensor.to(old.dtype))
        if layer.norm:
            self.measured |= {name for name in (layer.norm.mean, layer.norm.variance) if name}

    def _solve(
        self, layer: Layer, gathered: Sequence["Rows"], group: int, prior: Float[Tensor, "units inputs"], free: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight, bias, and mean and variance of the product, for one group of channels, in float64."""
        units = slice(group * len(prior), (group + 1) * len(prior))
        x = torch.cat([rows.inputs[group] for rows in gathered])
        y = torch.cat([rows.target[:, units] for rows in gathered])
        besides = [rows.beside[:, units] for rows in gathered if rows.beside is not None]
        beside = torch.cat(besides) if besides else None
        # Shifted by a float32 mean, products keep their digits; without a bias nothing may be shifted.
        mean_x = x.mean(dim=0) if free else torch.zeros_like(x[0])
        mean_y = y.mean(dim=0) if free else torch.zeros_like(y[0])
        x, y = x - mean_x, y - mean_y
        gram = chunked_product(x, x) / len(x)
        ridge = self.options.ridge * gram.diagonal().mean().clamp_min(TINY)
        factor = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
        cross = chunked_product(x, y) / len(x)
        weight = torch.cholesky_solve(cross + ridge * prior.T, factor).T
        shift = torch.zeros_like(mean_y, dtype=torch.float64)
        for _ in range(self.options.rectified_steps if layer.rectified else 0):
            base = mean_y if beside is None else mean_y + beside
            reached = x @ weight.T.to(x.dtype) + shift.to(x.dtype) + base
            wanted = y + base
            wanted = torch.where(wanted <= 0, reached.clamp_max(0), wanted) - base
            shift = wanted.mean(dim=0, dtype=torch.float64) if free else shift
            cross = chunked_product(x, wanted - shift.to(x.dtype)) / len(x)
            weight = torch.cholesky_solve(cross + ridge * prior.T, factor).T
        mean = weight @ mean_x.double()
        variance = ((weight @ gram) * weight).sum(dim=1).clamp_min(TINY)
        return weight, mean_y.double() + shift - mean, mean, variance

    def _own_state(self, index: int) -> dict[str, Tensor]:
        return dict(self.aligned.models[index].state_dict())

    def _transforms(self, index: int) -> Transforms:
        if self.aligned.alignment is None:
            return {space.name: Permutation.identity(space) for space in self.symmetry}
        return self.aligned.alignment.transforms[index]


@dataclass(frozen=True, eq=False)
class Rows:
    """A batch's rows for one layer: inputs by group, wanted outputs, and the shortcut's values."""

    inputs: list[Float[Tensor, "rows inputs"]]
    target: Float[Tensor, "rows units"]
    beside: Float[Tensor, "rows units"] | None


def _upcast(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A state in the precision of the fit."""
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
