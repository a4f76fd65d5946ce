"""RegMean: the linear layer that on average answers every parent's inputs as that parent does."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from isthmus.average.base import Average, Averaged, AveragingProblem
from isthmus.average.mean import weighted_mean
from isthmus.errors import InputError
from isthmus.graph.reader import node_shapes, observe_batch, program_for
from isthmus.observe.given import find_symmetry
from isthmus.observe.layers import Layer, chunked_product, input_rows, layers_of, sample_positions, seen_by, take
from isthmus.progress import progress
from isthmus.symmetry.symmetry import Symmetry


@dataclass(frozen=True)
class RegMean(Average):
    """W = (Σ c_m W_m G_m) (Σ c_m G_m)⁻¹ for every linear layer and convolution; all other tensors are plain means.

    G_m is the uncentred Gram matrix of what parent m's layer reads, in the common frame, its off-diagonal numbers times
    `shrink`. A convolution is a linear layer on patches; `rows` of them are drawn for each layer. Where one parent
    alone counts in a layer, the layer is exactly that parent's: W_m G_m G_m⁻¹ is not computed.

    Attributes:
        samples: Inputs to use, from the start of the data.
        rows: Rows a layer, drawn over samples and positions.
        shrink: Factor of the off-diagonal numbers.

    Source: Jin, Ren, Preotiuc-Pietro, Cheng, "Dataless knowledge fusion by merging weights of language models", ICLR
        2023. Convolutions are this project's own.
    """

    samples: int = 4000
    rows: int = 50_000
    shrink: float = 0.9

    name: ClassVar[str] = "regmean"
    fits: ClassVar[bool] = True

    @property
    def needs(self) -> str:
        """Batches; targets are not used."""
        return "data"

    def __post_init__(self) -> None:
        if self.samples < 1 or self.rows < 1 or not 0 <= self.shrink < 1:
            raise InputError(
                f"samples={self.samples}, rows={self.rows}, shrink={self.shrink}: give 1 or more, and a share"
            )

    def __call__(self, aligned: AveragingProblem) -> Averaged:
        """The merged tensors.

        Raises:
            DataError: No data, or data that cannot be read.
            InputError: The models were moved by linear maps that change what they compute.
        """
        if not aligned.is_exact:
            raise InputError("regmean runs the moved models, which linear maps have changed: use average='pleas'")
        merged = weighted_mean(aligned)
        alignment = aligned.alignment
        symmetry = find_symmetry(aligned.models[0], alignment.symmetry if alignment else None, None, aligned.data)
        layers = [
            layer for layer in layers_of(symmetry) if sum(c != 0 for c in aligned.weights(layer.contraction.weight)) > 1
        ]
        if not layers:
            return Averaged(merged)
        grams = [
            self._grams(aligned, index, symmetry, layers) for index in progress(range(len(aligned.states)), "regmean")
        ]
        for layer in layers:
            name = layer.contraction.weight
            weights = aligned.weights(name)
            blocks = []
            for group, _ in enumerate(grams[0][name]):
                gram = sum(c * each[name][group] for c, each in zip(weights, grams, strict=True))
                assert isinstance(gram, Tensor)
                answer = sum(
                    c * (state[name].double().flatten(1).chunk(len(each[name]))[group] @ each[name][group])
                    for c, state, each in zip(weights, aligned.states, grams, strict=True)
                )
                # What no parent ever reads leaves the Gram matrix singular: there the plain mean stays.
                ridge = 1e-9 * gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
                prior = merged[name].double().flatten(1).chunk(len(grams[0][name]))[group]
                steady = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
                blocks.append(torch.linalg.solve(steady, (answer + ridge * prior).T).T)
            merged[name] = torch.cat(blocks).view(merged[name].shape).to(merged[name].dtype)
        return Averaged(merged)

    def _grams(
        self, aligned: AveragingProblem, index: int, symmetry: Symmetry, layers: list[Layer]
    ) -> dict[str, list[Tensor]]:
        """One moved parent's shrunk Gram matrices, by weight and group of channels."""
        state = aligned.states[index]
        batches = take(aligned.data, self.samples, state)
        count = max(1, -(-self.rows // sum(batch.size for batch in batches)))
        generator = torch.Generator().manual_seed(aligned.seed)
        totals: dict[str, list[Tensor]] = {}
        rows = 0
        for batch in batches:
            program = program_for(symmetry.traced.program, batch)
            shapes = node_shapes(program)
            seen: dict[str, Tensor] = {}
            observers = {layer.contraction.source: seen_by(seen, layer.contraction.source) for layer in layers}
            observe_batch(program, state, batch, observers)
            for layer in layers:
                name, shape = layer.contraction.weight, shapes[layer.contraction.node]
                positions = sample_positions(layer, shape, count, generator)
                found = input_rows(layer, seen[layer.contraction.source], positions, state[name].shape[2:], shape)
                products = [chunked_product(part, part) / len(part) for part in found]
                old = totals.get(name)
                weighted = [batch.size * each for each in products]
                totals[name] = weighted if old is None else [a + b for a, b in zip(old, weighted, strict=True)]
            rows += batch.size
        return {name: [_shrunk(each / rows, self.shrink) for each in found] for name, found in totals.items()}


def _shrunk(gram: Tensor, factor: float) -> Tensor:
    """The matrix with its off-diagonal numbers times `factor`."""
    return factor * gram + (1 - factor) * torch.diag(gram.diagonal())
