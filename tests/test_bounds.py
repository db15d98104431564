"""How often a bound is called passed although the truth lies right at it: exact, by summing over every sample."""

import pytest
from scipy.stats import binom

from meansparse_cli.stats.paired import side_of_difference, side_of_rate

SIZES = [50, 201, 300, 401, 500, 1000, 2000]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("bound", [0.01, 0.1, 0.5])
def test_a_rate_at_its_bound_is_rarely_called_beyond_it(n: int, bound: float) -> None:
    sides = [side_of_rate(k, n, bound) for k in range(n + 1)]
    assert sides == sorted(sides)
    for side in (-1, 1):
        assert sum(binom.pmf(k, n, bound) for k in range(n + 1) if sides[k] == side) <= 0.025


@pytest.mark.parametrize("n", SIZES)
def test_half_a_point_lost_is_rarely_called_less(n: int) -> None:
    """Nothing gained, half a point lost in truth: where a standard error from the sample is often 0."""
    called = [side_of_difference(0, k, n, -0.005) for k in range(n + 1)]
    assert sum(binom.pmf(k, n, 0.005) for k in range(n + 1) if called[k] > 0) <= 0.026
    assert sum(binom.pmf(k, n, 0.005) for k in range(n + 1) if called[k] < 0) <= 0.05
    assert called == sorted(called, reverse=True)


def test_nothing_changed_sides() -> None:
    assert side_of_difference(0, 0, 700, -0.005) == 0
    assert side_of_difference(0, 0, 800, -0.005) == 1
    assert side_of_difference(0, 0, 800, 0.005) == -1


@pytest.mark.parametrize(
    ("gained", "lost", "n", "bound"), [(3, 9, 500, -0.005), (40, 10, 1000, 0.02), (0, 30, 900, -0.015)]
)
def test_which_model_comes_first_does_not_matter(gained: int, lost: int, n: int, bound: float) -> None:
    assert side_of_difference(gained, lost, n, bound) == -side_of_difference(lost, gained, n, -bound)


def test_clear_answers() -> None:
    assert side_of_difference(60, 10, 1000, 0.02) == 1
    assert side_of_difference(20, 10, 1000, 0.02) == 0
    assert side_of_difference(5, 40, 1000, 0.02) == -1
    assert side_of_rate(0, 1000, 0.01) == -1
    assert side_of_rate(30, 1000, 0.01) == 1
