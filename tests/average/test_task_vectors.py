"""Averages of task vectors against their papers, number by number."""

import numpy as np
import pytest
import torch

import isthmus
from helpers.pairs import MLP, lively
from isthmus.average.dare import Dare
from isthmus.average.slerp import Slerp, _along_arc
from isthmus.average.task_arithmetic import TaskArithmetic
from isthmus.average.ties import Ties
from isthmus.errors import InputError


def flat(model: torch.nn.Module) -> np.ndarray:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()]).numpy()


def models_of(count: int) -> tuple[list[torch.nn.Module], torch.nn.Module]:
    return [lively(MLP, seed) for seed in range(count)], lively(MLP, 9)


def test_task_arithmetic_is_the_base_plus_the_sum():
    models, base = models_of(3)
    merged = isthmus.merge(models, None, TaskArithmetic(scale=3.0), base=base)
    expected = flat(base) + sum(flat(model) - flat(base) for model in models)
    np.testing.assert_allclose(flat(merged), expected, rtol=1e-5, atol=1e-6)  # stored in float32


def test_at_scale_one_it_is_the_mean():
    models, base = models_of(2)
    np.testing.assert_allclose(
        flat(isthmus.merge(models, None, "task_arithmetic", base=base)),
        flat(isthmus.merge(models)),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_ties_trims_elects_and_averages(density):
    models, base = models_of(3)
    merged = flat(isthmus.merge(models, None, Ties(density=density, scale=0.7), base=base))
    vectors = [flat(model) - flat(base) for model in models]
    trimmed = []
    for vector in vectors:
        kept = max(1, round(density * len(vector)))
        edge = np.sort(np.abs(vector))[-kept]
        trimmed.append([x if abs(x) >= edge else 0.0 for x in vector])
    for place, value in enumerate(merged):
        steps = [vector[place] for vector in trimmed]
        sign = np.sign(sum(steps))
        agree = [x for x in steps if x != 0 and np.sign(x) == sign]
        expected = flat(base)[place] + 0.7 * (sum(agree) / len(agree) if agree else 0.0) if place % 97 == 0 else None
        if expected is not None:  # every 97th number: the base is flattened anew each time
            assert value == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_dare_drops_its_share_and_keeps_the_expectation():
    models, base = models_of(1)
    step = flat(models[0]) - flat(base)
    moved = [
        flat(isthmus.merge(models, None, Dare(drop=0.6), base=base, seed=seed)) - flat(base) for seed in range(200)
    ]
    dropped = np.mean([np.abs(each) < 1e-6 for each in moved])
    assert dropped == pytest.approx(0.6, abs=0.01)
    large = np.abs(step) > 0.05
    # Each number is 0 or 2.5 steps: a mean of 200 deviates by sqrt(0.6 · 0.4) · 2.5 / sqrt(200) = 0.087.
    ratio = np.mean(moved, axis=0)[large] / step[large]
    assert np.abs(ratio - 1).mean() < 0.09


def test_slerp_keeps_the_length_of_unit_vectors():
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.nn.functional.normalize(torch.randn(20, generator=generator, dtype=torch.float64), dim=0) for _ in "ab"
    )
    angle = torch.acos(a @ b)
    for share in (0.0, 0.3, 0.5, 1.0):
        found = _along_arc(a, b, share)
        assert found.norm() == pytest.approx(1.0)
        assert torch.acos((found @ a).clamp(max=1)) == pytest.approx(float(share * angle), abs=1e-6)
    torch.testing.assert_close(_along_arc(a, 1.0001 * a, 0.5), 1.00005 * a)
    torch.testing.assert_close(_along_arc(a, -a, 0.25), 0.5 * a)
    torch.testing.assert_close(_along_arc(torch.zeros(3), torch.ones(3), 0.5), torch.full((3,), 0.5))


def test_what_is_missing_or_out_of_range_is_refused():
    models, _ = models_of(3)
    for name in ("task_arithmetic", "ties", "dare"):
        with pytest.raises(InputError, match="base"):
            isthmus.merge(models, None, name)
    with pytest.raises(InputError, match="two models"):
        isthmus.merge(models, None, Slerp())
    for build, options in (
        (Ties, {"density": 0.0}), (Ties, {"density": 1.5}), (Dare, {"drop": 1.0}), (Dare, {"then": "mean"}),
        (TaskArithmetic, {"scale": float("nan")}),
    ):  # fmt: skip
        with pytest.raises(InputError):
            build(**options)
