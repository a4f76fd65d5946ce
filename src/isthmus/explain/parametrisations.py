"""How a picture is made of numbers that gradient ascent can change."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from isthmus.errors import InputError
from isthmus.explain.images import ImageStatistics, frequencies
from isthmus.registry import configure


@dataclass(frozen=True)
class Parametrisation(ABC):
    """How a picture is made of numbers that gradient ascent can change, and how it is shaken meanwhile.

    At every step every picture is moved, scaled and turned by a random amount, so that no picture lives off the exact
    place of single pixels. What is moved in from outside has the data's mean colour.

    Attributes:
        steps: Steps of gradient ascent.
        learning_rate: Adam's.
        jitter: Greatest shift, as a share of the height and of the width; 1/16 is 2 pixels of 32.
        scale: Greatest change of size, as a share.
        rotate: Greatest turn, in degrees.
    """

    steps: int = 128
    learning_rate: float = 0.05
    jitter: float = 0.0625
    scale: float = 0.05
    rotate: float = 5.0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.learning_rate <= 0:
            raise InputError(
                f"steps={self.steps} must be 0 or more and learning_rate={self.learning_rate} greater than 0"
            )
        if min(self.jitter, self.scale, self.rotate) < 0 or self.scale >= 1:
            raise InputError(
                f"jitter={self.jitter} and rotate={self.rotate} must be 0 or more, scale={self.scale} in [0, 1)"
            )

    @abstractmethod
    def start(self, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
        """The numbers that one picture of that shape (channels, height, width) starts from."""

    @abstractmethod
    def images(
        self, numbers: Tensor, statistics: ImageStatistics, shape: tuple[int, int, int]
    ) -> Float[Tensor, "images channels height width"]:
        """The pictures that the numbers of several stand for, within the data's range."""


@dataclass(frozen=True)
class FourierImages(Parametrisation):
    """Pictures by their spectrum, in uncorrelated colours.

    The numbers are Fourier coefficients divided by a power of their frequency, so that a step changes coarse structure
    more than fine; a sigmoid around the data's mean colour keeps every channel between the data's least and greatest
    value. Colours are uncorrelated with the covariance of the data's pixels, or, for three channels and no data, with
    that of natural photographs as published with Lucid.

    Attributes:
        decay: Power of the frequency by which coefficients are divided.
        deviation: Standard deviation of the numbers at the start.
        decorrelate: Whether to use uncorrelated colours.
        contrast: How far a picture's root mean square before the sigmoid may go, in multiples of what gives the data's
            own deviation; larger pictures are scaled down to it. None is no limit: units that are nearly linear in the
            image, as those of a first layer, then end in black and white, whatever their weights.

    Source: Olah, Mordvintsev, Schubert, Feature Visualization, Distill 2017 (doi 10.23915/distill.00007); the scale of
        the coefficients follows Lucid's code, with orthonormal transforms.
    """

    decay: float = 1.0
    deviation: float = 0.01
    decorrelate: bool = True
    contrast: float | None = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.decay) or self.deviation <= 0 or (self.contrast is not None and self.contrast <= 0):
            raise InputError(
                f"deviation={self.deviation} and contrast={self.contrast} must be greater than 0 (contrast=None is no "
                f"limit), decay={self.decay} a number"
            )

    def start(self, shape: tuple[int, int, int], generator: torch.Generator) -> Float[Tensor, "channels height _ 2"]:
        """Normal numbers, a real and an imaginary one for every coefficient."""
        channels, height, width = shape
        return torch.randn(channels, height, width // 2 + 1, 2, generator=generator) * self.deviation

    def images(
        self,
        numbers: Float[Tensor, "images channels height _ 2"],
        statistics: ImageStatistics,
        shape: tuple[int, int, int],
    ) -> Float[Tensor, "images channels height width"]:
        """The pictures."""
        like = {"device": numbers.device, "dtype": numbers.dtype}
        _, height, width = shape
        radius = frequencies(height, width).clamp_min(1 / max(height, width))
        weights = (radius**-self.decay / 4).to(**like)
        z = torch.fft.irfft2(torch.view_as_complex(numbers) * weights, s=(height, width), norm="ortho")
        if self.decorrelate:
            z = torch.einsum("cd,ndhw->nchw", statistics.colours.to(**like), z)
        low, high = statistics.low.to(**like)[:, None, None], statistics.high.to(**like)[:, None, None]
        share = statistics.share
        if self.contrast is not None:
            # To first order, the sigmoid turns a deviation of z into one of pixels by its slope at the mean colour.
            span = (statistics.high - statistics.low) * share * (1 - share)
            varies = span > 0
            ratios = statistics.covariance.diagonal()[varies] / span[varies] ** 2
            limit = self.contrast * float(ratios.mean().clamp_min(0).sqrt()) if len(ratios) else 0.0
            size = z.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
            z = z * (limit / size.clamp_min(max(limit, torch.finfo(numbers.dtype).tiny)))
        return low + (high - low) * torch.sigmoid(torch.logit(share).to(**like)[:, None, None] + z)


@dataclass(frozen=True)
class Maco(Parametrisation):
    """Pictures whose spectrum has the magnitude of the data's: only the phases are free.

    The magnitude is the mean absolute value of `rfft2` over the data, measured along uncorrelated colour axes (an
    orthonormal change of colours, which keeps the power). The constant term has no phase: it is the data's mean colour.
    Coefficients that a real image has twice get opposite phases, so that every magnitude is kept exactly. Values beyond
    the data's least and greatest of a channel are clamped; this alone changes the spectrum.

    Source: Fel, Boissin, Boutin, Picard, Novello, Colin, Linsley, Rousseau, Cadène, Gardes, Serre, Unlocking Feature
        Visualization for Deeper Networks with MAgnitude Constrained Optimization (MACO), NeurIPS 2023
        (arXiv 2306.06805). The paper takes the magnitude from ImageNet and squashes by a sigmoid; its random crops and
        noise are replaced by the small shifts, scales and turns that small images bear.
    """

    learning_rate: float = 0.1

    def start(self, shape: tuple[int, int, int], generator: torch.Generator) -> Float[Tensor, "channels height _"]:
        """Phases, uniform over the circle."""
        channels, height, width = shape
        return (torch.rand(channels, height, width // 2 + 1, generator=generator) * 2 - 1) * math.pi

    def images(
        self,
        numbers: Float[Tensor, "images channels height _"],
        statistics: ImageStatistics,
        shape: tuple[int, int, int],
    ) -> Float[Tensor, "images channels height width"]:
        """The pictures."""
        like = {"device": numbers.device, "dtype": numbers.dtype}
        low, high = (each.to(**like)[:, None, None] for each in (statistics.low, statistics.high))
        return torch.minimum(torch.maximum(self.unclamped(numbers, statistics, shape), low), high)

    def unclamped(
        self,
        phases: Float[Tensor, "images channels height _"],
        statistics: ImageStatistics,
        shape: tuple[int, int, int],
    ) -> Float[Tensor, "images channels height width"]:
        """The pictures before values are clamped to the data's range.

        Raises:
            InputError: The statistics hold no magnitude.
        """
        if statistics.magnitude is None:
            raise InputError("method 'maco' takes its spectrum's magnitude from data: give data=, or use 'fourier'")
        like = {"device": phases.device, "dtype": phases.dtype}
        _, height, width = shape
        twice = torch.zeros(width // 2 + 1, dtype=torch.bool, device=phases.device)
        twice[0] = True
        twice[-1] |= width % 2 == 0
        mirrored = phases.flip(2).roll(1, 2)
        phases = torch.where(twice, (phases - mirrored) / 2, phases)
        magnitude = statistics.magnitude.to(**like).clone()
        magnitude[:, 0, 0] = 0
        spectrum = torch.polar(magnitude.expand_as(phases).contiguous(), phases)
        z = torch.fft.irfft2(spectrum, s=(height, width))
        return statistics.mean.to(**like)[:, None, None] + torch.einsum("cd,ndhw->nchw", statistics.axes.to(**like), z)


# Every parametrisation by its name.
PARAMETRISATIONS: dict[str, type[Parametrisation]] = {
    "fourier": FourierImages,
    "maco": Maco,
}


def chosen_method(method: str | Parametrisation) -> Parametrisation:
    """The parametrisation of that name, or the one that was given.

    Raises:
        InputError: No such name, or no parametrisation.
    """
    if isinstance(method, Parametrisation):
        return method
    if not isinstance(method, str):
        raise InputError(f"method is a {type(method).__name__}: give one of {', '.join(PARAMETRISATIONS)}")
    return configure("parametrisation", method, PARAMETRISATIONS)
