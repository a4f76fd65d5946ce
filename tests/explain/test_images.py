"""Statistics of images against plain formulas, and known spectra."""

import math

import numpy as np
import pytest
import torch

from helpers.coloured import coloured
from isthmus.explain.images import high_frequency_share, measure_images, spectrum_of


def test_statistics_are_those_of_all_pixels():
    data = coloured()
    x = torch.cat(data).double()
    found = measure_images([(each, torch.zeros(len(each))) for each in data])
    pixels = x.movedim(1, 0).flatten(1)
    torch.testing.assert_close(found.mean, pixels.mean(dim=1))
    torch.testing.assert_close(found.covariance, torch.cov(pixels, correction=0))
    torch.testing.assert_close(found.low, pixels.amin(dim=1))
    torch.testing.assert_close(found.high, pixels.amax(dim=1))
    square = found.colours @ found.colours.T
    torch.testing.assert_close(square / square[0, 0], found.covariance / found.covariance[0, 0])


def test_white_noise_has_a_flat_spectrum_and_a_wave_has_its_own_ring():
    generator = torch.Generator().manual_seed(0)
    noise = 3 * torch.randn(200, 2, 32, 32, generator=generator)
    spectrum = spectrum_of(noise)
    assert spectrum.power.dtype == torch.float64
    assert len(spectrum.frequency) == 17
    assert spectrum.frequency[-1] == 0.5
    # The constant term alone averages 400 values of relative deviation √2: 5 deviations are 0.36.
    torch.testing.assert_close(spectrum.power, torch.full((17,), 9.0).double(), rtol=0.36, atol=0)
    torch.testing.assert_close(spectrum.power[3:].mean(), torch.tensor(9.0).double(), rtol=0.02, atol=0)
    share = high_frequency_share(noise)
    # 1 − π/16 of the plane; the grid's own count differs by the circle's rim, 2π · 8 of 1,024 points.
    assert share.mean() == pytest.approx(1 - math.pi / 16, abs=0.03)
    columns = torch.arange(32)
    for cycles in (3, 12):
        wave = torch.cos(2 * math.pi * cycles * columns / 32).expand(1, 1, 32, 32)
        power = spectrum_of(wave).power
        assert power.argmax() == cycles
        assert power[cycles] > 1e6 * power.sum().sub(power[cycles])  # one wave, rounded in float32
        assert high_frequency_share(wave).item() == pytest.approx(float(cycles > 8), abs=1e-9)
    assert high_frequency_share(torch.ones(1, 3, 8, 8)).item() == 0


def test_parseval_on_images_that_are_not_square():
    x = torch.randn(4, 2, 6, 10, generator=torch.Generator().manual_seed(0))
    low = 1 - high_frequency_share(x)
    power = torch.fft.fft2(x.double()).abs() ** 2
    power[..., 0, 0] = 0
    rows, columns = np.fft.fftfreq(6)[:, None], np.fft.fftfreq(10)[None, :]
    inside = torch.from_numpy(rows**2 + columns**2 <= 1 / 16)
    torch.testing.assert_close(low, power[..., inside].sum(dim=(1, 2)) / power.sum(dim=(1, 2, 3)))
