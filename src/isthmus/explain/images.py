"""What images have in common: their range, their colours, and the power of their spatial frequencies."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils import _pytree as pytree

from isthmus.data.batches import Batch, read_batches
from isthmus.errors import DataError
from isthmus.progress import progress
from isthmus.wording.short import told_by_fields

# Square root of the covariance of red, green and blue over natural photographs (ImageNet), columns by falling variance.
# Source: the constant `color_correlation_svd_sqrt` of Lucid (github.com/tensorflow/lucid), which has two digits.
NATURAL_COLOURS = ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))

# The range of inputs where no data tells it: about the range of photographs normalised to mean 0 and deviation 1.
ASSUMED_RANGE = (-2.0, 2.0)

# How far the mean colour is kept from the ends of the range, where the sigmoid would have no slope left.
MARGIN = 0.02


@dataclass(frozen=True, eq=False)
class ImageStatistics:
    """What the pictures have to share with the data, in the units of the network's input.

    Attributes:
        low: The least value of every channel.
        high: The greatest value of every channel.
        mean: The mean colour.
        covariance: Covariance of the channels, over all pixels.
        magnitude: Mean absolute value of `rfft2` of the images less their mean colour, in the colour axes `axes`; None
            where no data was given.
    """

    low: Float[Tensor, " channels"]
    high: Float[Tensor, " channels"]
    mean: Float[Tensor, " channels"]
    covariance: Float[Tensor, "channels channels"]
    magnitude: Float[Tensor, "channels height frequencies"] | None = None

    __repr__ = told_by_fields

    @property
    def share(self) -> Float[Tensor, " channels"]:
        """Where the mean colour lies between the least and the greatest value, kept a little inside."""
        span = self.high - self.low
        share = torch.where(span > 0, (self.mean - self.low) / torch.where(span > 0, span, 1), 0.5)
        return share.clamp(MARGIN, 1 - MARGIN)

    @property
    def axes(self) -> Float[Tensor, "channels channels"]:
        """Orthonormal axes along which colours are uncorrelated, as columns, by falling variance."""
        return _colour_axes(self.covariance)[1]

    @property
    def colours(self) -> Float[Tensor, "channels channels"]:
        """A square root of the colours' covariance, scaled so that the longest column is 1."""
        variances, axes = _colour_axes(self.covariance)
        root = axes * variances.clamp_min(0).sqrt()
        longest = root.norm(dim=0).max()
        return root / longest if longest > 0 else torch.eye(len(root), dtype=root.dtype)


def _colour_axes(
    covariance: Float[Tensor, "channels channels"],
) -> tuple[Float[Tensor, " channels"], Float[Tensor, "channels channels"]]:
    """Variances and orthonormal axes of a covariance, by falling variance; an axis's largest entry is positive."""
    variances, axes = torch.linalg.eigh(covariance.double())
    variances, axes = variances.flip(0), axes.flip(1)
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
    return variances, axes * largest.sign()


def measure_images(data: Any, shape: tuple[int, int, int] | None = None) -> ImageStatistics:
    """Range, colours and spectrum of images, in float64; two passes over the data.

    Args:
        data: Re-iterable batches of images; labels are not used.
        shape: The channels, height and width that all must have; the first image's if None.

    Raises:
        DataError: No data, images of another shape, or NaN or infinite pixels.
    """
    if shape is None:
        first = next(read_batches(data))
        leaves = tensors_in(first.args, first.kwargs)
        if len(leaves) != 1 or leaves[0].ndim != 4:
            raise DataError("the data holds no images [batch, channels, height, width]")
        shape = (leaves[0].shape[1], leaves[0].shape[2], leaves[0].shape[3])
    channels = shape[0]
    low, high = torch.full((channels,), math.inf).double(), torch.full((channels,), -math.inf).double()
    count, total, products = 0, torch.zeros(channels).double(), torch.zeros(channels, channels).double()
    for batch in progress(read_batches(data), "measuring images", data):
        pixels = images_of(batch, shape).cpu().double().movedim(1, 0).flatten(1)
        low, high = torch.minimum(low, pixels.amin(dim=1)), torch.maximum(high, pixels.amax(dim=1))
        count += pixels.shape[1]
        total += pixels.sum(dim=1)
        products += pixels @ pixels.T
    mean = total / count
    covariance = products / count - torch.outer(mean, mean)
    axes = _colour_axes(covariance)[1]
    images, magnitude = 0, torch.zeros(rfft_shape(shape)).double()
    for batch in progress(read_batches(data), "measuring spectra", data):
        centred = images_of(batch, shape).cpu().double() - mean[:, None, None]
        turned = torch.einsum("cd,nchw->ndhw", axes, centred)
        magnitude += torch.fft.rfft2(turned).abs().sum(dim=0)
        images += len(centred)
    return ImageStatistics(low, high, mean, covariance, magnitude / images)


def assumed_statistics(channels: int) -> ImageStatistics:
    """What is taken of images without data: range [−2, 2], variance 1 and, of three channels, natural colours."""
    low, high = (torch.full((channels,), end).double() for end in ASSUMED_RANGE)
    root = torch.tensor(NATURAL_COLOURS).double() if channels == 3 else torch.eye(channels).double()
    covariance = root @ root.T
    covariance /= covariance.diagonal().mean()
    return ImageStatistics(low, high, torch.zeros(channels).double(), covariance)


def tensors_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """All tensors among a model's inputs."""
    return [leaf for leaf in pytree.tree_leaves((tuple(args), dict(kwargs))) if isinstance(leaf, Tensor)]


def images_of(batch: Batch, shape: tuple[int, int, int]) -> Float[Tensor, "images channels height width"]:
    """The images of a batch.

    Raises:
        DataError: They are not images of that shape, or hold NaN or infinite values.
    """
    tensors = tensors_in(batch.args, batch.kwargs)
    if len(tensors) != 1 or tuple(tensors[0].shape[1:]) != shape or not tensors[0].is_floating_point():
        told = ", ".join(f"{str(x.dtype).removeprefix('torch.')} {list(x.shape[1:])}" for x in tensors) or "no tensor"
        raise DataError(f"the data's samples are {told}: the model was traced on images of shape {list(shape)}")
    if not tensors[0].isfinite().all():
        raise DataError("the data holds NaN or infinite pixels: remove those images")
    return tensors[0].detach()


def rfft_shape(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Shape of the spectrum of real images of that shape."""
    return shape[0], shape[1], shape[2] // 2 + 1


def frequencies(height: int, width: int) -> Float[Tensor, "height _"]:
    """Radial frequency of every coefficient of `rfft2`, in cycles per pixel, in float64."""
    rows, columns = torch.fft.fftfreq(height, dtype=torch.float64), torch.fft.rfftfreq(width, dtype=torch.float64)
    return (rows[:, None] ** 2 + columns[None, :] ** 2).sqrt()


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Power of images by spatial frequency.

    Attributes:
        frequency: Cycles per pixel in the middle of every ring; 0.5 is the Nyquist frequency.
        power: Mean over images, channels and the coefficients of the ring; white noise of variance σ² has σ² in all.
    """

    frequency: Float[Tensor, " rings"]
    power: Float[Tensor, " rings"]

    __repr__ = told_by_fields


def spectrum_of(images: Float[Tensor, "images channels height width"]) -> Spectrum:
    """The radially averaged power spectrum of images, in float64, from the constant term to the Nyquist frequency.

    Rings are as wide as one cycle over the shorter side.

    Raises:
        DataError: No images.
    """
    power, radius = _powers(images)
    side = min(images.shape[2:])
    ring = (radius * side).round().long()
    rings = side // 2 + 1
    inside = ring < rings
    mean = power.mean(dim=(0, 1))[inside]
    total = torch.zeros(rings).double().index_add(0, ring[inside], mean)
    count = torch.zeros(rings).double().index_add(0, ring[inside], torch.ones_like(mean))
    return Spectrum(torch.arange(rings).double() / side, total / count)


def high_frequency_share(images: Float[Tensor, "images channels height width"]) -> Float[Tensor, " images"]:
    """For every image, the share of its power, less the constant term, above half the Nyquist frequency; in float64.

    A constant image has none: 0. White noise has 1 − π/16 ≈ 0.80, as corners count.

    Raises:
        DataError: No images.
    """
    power, radius = _powers(images)
    power = power.sum(dim=1)
    total, high = power[:, radius > 0].sum(dim=1), power[:, radius > 0.25].sum(dim=1)
    return torch.where(total > 0, high / torch.where(total > 0, total, 1), 0.0)


def _powers(
    images: Float[Tensor, "images channels height width"],
) -> tuple[Float[Tensor, "images channels height width"], Float[Tensor, "height width"]]:
    """Squared magnitude of every coefficient, for each pixel, and the coefficient's radial frequency."""
    if not images.numel():
        raise DataError("no images: give at least one")
    height, width = images.shape[2:]
    power = torch.fft.fft2(images.detach().cpu().double()).abs() ** 2 / (height * width)
    rows, columns = torch.fft.fftfreq(height, dtype=torch.float64), torch.fft.fftfreq(width, dtype=torch.float64)
    return power, (rows[:, None] ** 2 + columns[None, :] ** 2).sqrt()
