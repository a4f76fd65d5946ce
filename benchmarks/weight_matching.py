"""Times weight matching against the plain algorithm of Git Re-Basin, in one process on the same pairs of networks.

Run by hand: `python benchmarks/weight_matching.py [--runs 5] [--threads 1]`. Both start where the models are and visit
the spaces in the same order, so they take the same steps; the table says whether they end at the same permutations. The
plain algorithm is `tests/oracles/git_rebasin.py`, on float64 and on float32 arrays. Ratios are medians over the runs of
plain time over ours, each run on another pair; times are medians too.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import isthmus
from isthmus.match.base import identity_transforms
from isthmus.match.coordinate_ascent import coordinate_ascent
from isthmus.match.weight_matching import WeightMatching
from isthmus.match.weight_objective import WeightObjective
from isthmus.models import load_model, sample_shape
from oracles import git_rebasin as plain

CASES = {
    "MLP 3×512": ("mlp?width=512&depth=3", plain.mlp_spec(3)),
    "VGG11 ×1": ("vgg11?width=1", plain.vgg11_spec(bn=False)),
    "ResNet20 ×4": ("resnet20?width=4", plain.resnet20_spec()),
}


def ordered(spec: plain.Spec, symmetry: isthmus.Symmetry, trained: set[str]) -> plain.Spec:
    """The specification in the order and with the names of the traced spaces."""
    named = {frozenset(places): places for places in spec.values()}
    return {
        space.name: named[frozenset((s.parameter, s.dims[0]) for s in space.sites if s.parameter in trained)]
        for space in symmetry
    }


def timed(work: Callable[[], object]) -> tuple[float, object]:
    """Seconds and result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def run(name: str, spec: plain.Spec, symmetry: isthmus.Symmetry, seed: int) -> dict[str, float | bool]:
    """Times of one pair of networks."""
    torch.manual_seed(seed)
    models = [load_model(name).eval() for _ in range(2)]
    trained = {key for key, _ in models[0].named_parameters()}
    spec = ordered(spec, symmetry, trained)
    wide = [plain.as_arrays(model) for model in models]
    narrow = [{key: array.astype(np.float32) for key, array in state.items()} for state in wide]
    states = [model.state_dict() for model in models]

    def order() -> np.random.Generator:
        return np.random.default_rng([seed, 0])

    def ours() -> object:
        objective = WeightObjective(symmetry, *states, frozenset(trained))
        return coordinate_ascent(objective, identity_transforms(symmetry), 100, order())

    seconds: dict[str, float | bool] = {}
    seconds["float64"], expected = timed(lambda: plain.weight_matching(spec, *wide, order()))
    seconds["float32"], _ = timed(lambda: plain.weight_matching(spec, *narrow, order()))
    seconds["ours"], (found, _) = timed(ours)  # type: ignore[misc]
    seconds["align, one start"], _ = timed(
        lambda: isthmus.align(models, symmetry, WeightMatching(restarts=1), seed=seed)
    )
    seconds["align"], _ = timed(lambda: isthmus.align(models, symmetry, seed=seed))
    seconds["same"] = all(np.array_equal(found[space.name].indices[0], expected[space.name]) for space in symmetry)
    return seconds


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    columns = ("plain f64", "plain f32", "ours", "f64/ours", "f32/ours", "align, 1 start", "align, 3 starts", "same")
    print(f"{'':14}" + "".join(f"{column:>17}" for column in columns))
    for title, (name, spec) in CASES.items():
        model = load_model(name).eval()
        shape = sample_shape(model)
        assert shape is not None
        symmetry = isthmus.trace(model, torch.randn(2, *shape))
        runs = [run(name, spec, symmetry, seed) for seed in range(options.runs)]
        middle = {key: statistics.median(float(each[key]) for each in runs) for key in runs[0]}
        ratios = [statistics.median(each[key] / each["ours"] for each in runs) for key in ("float64", "float32")]
        cells = [f"{middle[key]:.2f} s" for key in ("float64", "float32", "ours")]
        cells += [f"×{ratio:.1f}" for ratio in ratios]
        cells += [f"{middle[key]:.2f} s" for key in ("align, one start", "align")]
        cells += [f"{sum(bool(each['same']) for each in runs)} of {len(runs)}"]
        print(f"{title:14}" + "".join(f"{cell:>17}" for cell in cells))


if __name__ == "__main__":
    main()
