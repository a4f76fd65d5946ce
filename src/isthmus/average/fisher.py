"""Fisher averaging: every number counts by how much the model's predictions depend on it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.average.base import Average, Averaged, AveragingProblem
from isthmus.average.mean import weighted_mean
from isthmus.data.batches import read_batches
from isthmus.errors import InputError, ModelError
from isthmus.observe.score import class_scores
from isthmus.progress import progress


@dataclass(frozen=True)
class Fisher(Average):
    """Σ c_m F_m θ_m / Σ c_m F_m, F_m the diagonal of model m's Fisher information.

    F is the mean squared gradient of the log-probability of a class that is drawn from the model's own prediction,
    sample by sample. Numbers that no model's predictions depend on are plain means, and so are running statistics.

    Attributes:
        samples: Inputs to use, from the start of the data.
        floor: Share of a model's mean information that is added everywhere, so that no number is decided by noise.

    Source: Matena, Raffel, "Merging models with Fisher-weighted averaging", NeurIPS 2022.
    """

    samples: int = 256
    floor: float = 1e-6

    name: ClassVar[str] = "fisher"

    @property
    def needs(self) -> str:
        """Batches; targets are not used."""
        return "data"

    def __post_init__(self) -> None:
        if self.samples < 1 or not self.floor > 0:
            raise InputError(f"samples={self.samples}, floor={self.floor}: give at least 1, and a positive number")

    def __call__(self, aligned: AveragingProblem) -> Averaged:
        """The merged tensors.

        Raises:
            DataError: No data, or data that cannot be read.
            InputError: The models were moved by linear maps that change what they compute.
            ModelError: The model gives no class scores.
        """
        if not aligned.is_exact:
            raise InputError("fisher runs the moved models, which linear maps have changed: align by permutations")
        merged = weighted_mean(aligned)
        information = [self._information(aligned, index) for index in progress(range(len(aligned.states)), "fisher")]
        for name in information[0]:
            weights = aligned.weights(name)
            own = [c * found[name] for c, found in zip(weights, information, strict=True)]
            total = torch.stack(own).sum(dim=0)
            values = torch.stack([f * state[name].double() for f, state in zip(own, aligned.states, strict=True)])
            merged[name] = (values.sum(dim=0) / total).to(merged[name].dtype)
        return Averaged(merged)

    def _information(self, aligned: AveragingProblem, index: int) -> dict[str, Tensor]:
        """The floored diagonal of one model's Fisher information, by parameter."""
        model = aligned.network(aligned.states[index]).requires_grad_(True)
        parameters = dict(model.named_parameters())
        total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
        generator = torch.Generator().manual_seed(aligned.seed)
        count = 0
        for batch in read_batches(aligned.data):
            for row in range(min(batch.size, self.samples - count)):
                one = batch.mapped(lambda x, row=row: x[row : row + 1]).like(aligned.states[index]).clone()
                with torch.enable_grad():
                    scores = class_scores(model(*one.args, **one.kwargs))
                    if scores is None:
                        raise ModelError("the model gives no class scores: fisher draws classes from them")
                    chances = scores.detach().double().softmax(dim=-1).flatten(0, -2).cpu()
                    drawn = torch.multinomial(chances, 1, generator=generator).flatten().to(scores.device)
                    loss = F.cross_entropy(scores.flatten(0, -2), drawn, reduction="sum")
                    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                for name, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        total[name] += gradient.double().square()
                count += 1
            if count >= self.samples:
                break
        sizes = sum(f.numel() for f in total.values())
        mean = sum((f.sum() for f in total.values()), torch.zeros((), dtype=torch.float64)) / sizes
        floor = (self.floor * mean).clamp_min(torch.finfo(torch.float64).tiny)
        return {name: found + floor for name, found in total.items()}
