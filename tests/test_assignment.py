import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from helpers.refusals import refuses
from isthmus.errors import InputError
from isthmus.match.assignment import SMALL, assignment_value, solve_lap, solve_laps


def optimum(similarity: np.ndarray) -> float:
    rows, columns = linear_sum_assignment(similarity.astype(np.float64), maximize=True)
    return float(similarity[rows, columns].sum(dtype=np.float64))


def is_permutation(indices: np.ndarray) -> bool:
    return np.array_equal(np.sort(indices), np.arange(len(indices)))


EPS = float(np.finfo(np.float32).eps)
SIZES = (1, 2, 5, SMALL - 1, SMALL, SMALL + 1, 150)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", SIZES)
def test_it_reaches_scipys_value_on_random_matrices(size, dtype):
    for seed in range(3):
        similarity = np.random.default_rng(seed).normal(size=(size, size)).astype(dtype)
        indices = solve_lap(similarity)
        assert is_permutation(indices)
        # A solver in float32 may take another assignment that is equal within its rounding: eps · size · max.
        slack = 1e-12 if dtype is np.float64 else EPS * size * 4
        assert assignment_value(similarity, indices) == pytest.approx(optimum(similarity), rel=slack, abs=slack)


@given(st.integers(1, 2 * SMALL), st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_it_reaches_scipys_value_where_many_entries_tie(size, seed, levels):
    similarity = np.random.default_rng(seed).integers(0, levels, size=(size, size)).astype(np.float64)
    indices = solve_lap(similarity)
    assert is_permutation(indices)
    assert assignment_value(similarity, indices) == optimum(similarity)  # sums of small integers are exact


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("value", [0.0, -3.5, 1e30])
def test_a_constant_matrix_gives_some_permutation(size, value):
    assert is_permutation(solve_lap(np.full((size, size), value)))


@pytest.mark.parametrize("size", SIZES)
def test_rows_that_choose_different_units_get_them(size):
    rng = np.random.default_rng(0)
    chosen = rng.permutation(size)
    similarity = rng.uniform(size=(size, size))
    similarity[np.arange(size), chosen] += 1
    assert np.array_equal(solve_lap(similarity), chosen)
    assert assignment_value(similarity, chosen) == pytest.approx(optimum(similarity), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_large_and_small_numbers_are_as_good_as_any(scale):
    similarity = (np.random.default_rng(1).normal(size=(150, 150)) * scale).astype(np.float32)
    slack = EPS * 150 * 4  # as above
    assert assignment_value(similarity, solve_lap(similarity)) == pytest.approx(optimum(similarity), rel=slack)


def test_low_rank_similarities_of_correlated_units_are_solved():
    rng = np.random.default_rng(2)
    features = rng.normal(size=(200, 3))
    similarity = (features @ features[rng.permutation(200)].T).astype(np.float32)
    slack = EPS * 200 * 4  # as above
    assert assignment_value(similarity, solve_lap(similarity)) == pytest.approx(optimum(similarity), rel=slack)


def test_the_matrix_is_left_as_it_was():
    similarity = np.random.default_rng(0).normal(size=(100, 100)).astype(np.float32)
    before = similarity.copy()
    solve_lap(similarity)
    assert np.array_equal(similarity, before)


def test_every_copy_is_solved_alone():
    similarities = np.random.default_rng(0).normal(size=(3, 7, 7))
    assert np.array_equal(solve_laps(similarities), np.stack([solve_lap(each) for each in similarities]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [1, 5, 100])
def test_numbers_that_are_not_finite_are_refused(size, bad):
    similarity = np.zeros((size, size))
    similarity[-1, 0] = bad
    with refuses(InputError, "finite"):
        solve_lap(similarity)


def test_a_matrix_that_is_not_square_is_refused():
    with refuses(InputError, "square"):
        solve_lap(np.zeros((3, 4)))
