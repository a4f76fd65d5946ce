"""Pictures made of numbers: against naive sums of waves, and laws of their spectra and ranges."""

import math

import numpy as np
import pytest
import torch

from helpers.coloured import coloured
from isthmus.explain.images import measure_images
from isthmus.explain.parametrisations import FourierImages, Maco


def naive_fourier(numbers: np.ndarray, weights: np.ndarray, height: int, width: int) -> np.ndarray:
    """A real image from its coefficients, as the sum of waves that `irfft2` is the fast form of."""
    rows, columns = np.arange(height)[:, None], np.arange(width)[None, :]
    image = np.zeros((height, width))
    for u in range(height):
        for v in range(width // 2 + 1):
            a, b = numbers[u, v] * weights[u, v]
            angle = 2 * np.pi * (u * rows / height + v * columns / width)
            twice = 1 if v in (0, width / 2) else 2  # the other half of the plane holds the conjugates
            image += twice * (a * np.cos(angle) - b * np.sin(angle))
    return image / math.sqrt(height * width)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (6, 9)])
def test_fourier_images_are_the_waves_of_their_coefficients_in_the_datas_range(height, width):
    statistics = measure_images(coloured(height=height, width=width))
    method = FourierImages(contrast=None, decay=1.0)
    numbers = method.start((3, height, width), torch.Generator().manual_seed(0)) * 20
    found = method.images(numbers[None], statistics, (3, height, width))[0].double()
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :]
    weights = 1 / np.maximum(np.sqrt(rows**2 + columns**2), 1 / max(height, width)) / 4
    waves = np.stack([naive_fourier(each, weights, height, width) for each in numbers.double().numpy()])
    z = np.einsum("cd,dhw->chw", statistics.colours.numpy(), waves)
    low, high, mean = (x.numpy()[:, None, None] for x in (statistics.low, statistics.high, statistics.mean))
    share = (mean - low) / (high - low)
    expected = low + (high - low) / (1 + np.exp(-(np.log(share / (1 - share)) + z)))
    # float32 sums of 48 waves of amplitude below 1
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 7, 10), (3, 9, 6), (4, 8, 8)])
def test_macos_spectrum_has_the_datas_mean_magnitude_before_clamping(shape):
    channels = shape[0]
    data = coloured(40, *shape)
    statistics = measure_images(data)
    method = Maco()
    phases = torch.stack([method.start(shape, torch.Generator().manual_seed(seed)) for seed in range(3)])
    images = method.unclamped(phases, statistics, shape).double()
    centred = images - statistics.mean[:, None, None]
    turned = torch.einsum("cd,nchw->ndhw", statistics.axes, centred)
    found = torch.fft.rfft2(turned).abs()
    # Straight from the definition, on all images at once.
    x = torch.cat(data).double()
    natural = torch.einsum("cd,nchw->ndhw", statistics.axes, x - x.mean(dim=(0, 2, 3), keepdim=True)[0])
    expected = torch.fft.rfft2(natural).abs().mean(dim=0)
    expected[:, 0, 0] = 0  # the constant term is the mean colour
    # float32 sums of up to 80 coefficients
    torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(images.mean(dim=(0, 2, 3)), statistics.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(statistics.axes @ statistics.axes.T, torch.eye(channels).double())
    clamped = method.images(phases, statistics, shape)
    assert (clamped >= statistics.low[:, None, None].float()).all()
    assert (clamped <= statistics.high[:, None, None].float()).all()
    inside = (images > statistics.low[:, None, None]) & (images < statistics.high[:, None, None])
    torch.testing.assert_close(clamped[inside].double(), images[inside])


def test_contrast_is_a_limit_and_keeps_small_pictures():
    statistics = measure_images(coloured())
    generator = torch.Generator().manual_seed(0)
    numbers = FourierImages().start((3, 8, 8), generator)[None] * torch.tensor([1e-2, 1e4])[:, None, None, None, None]
    limited = FourierImages(contrast=0.1).images(numbers, statistics, (3, 8, 8)).double()
    free = FourierImages(contrast=None).images(numbers, statistics, (3, 8, 8)).double()
    torch.testing.assert_close(limited[0], free[0])
    # At a tenth of the data's deviation, the sigmoid's slope changes by a few per cent only.
    away = (limited[1] - statistics.mean[:, None, None]).square().mean(dim=(1, 2))
    ratio = (away / statistics.covariance.diagonal()).mean().sqrt()
    assert 0.08 < ratio < 0.12
    assert (free[1] - statistics.mean[:, None, None]).square().mean() > 10 * away.mean()
