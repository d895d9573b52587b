"""Statistics against hand-computed numbers, scipy's own test, and tables of power."""

import math

import numpy as np
import pytest
from scipy import stats

from goat_ds.compare.paired import holm, paired_difference, pairs_needed, power_of, spread

OURS = {1: 1.0, 2: 2.0, 3: 4.0}
THEIRS = {3: 3.0, 2: 3.0, 1: 3.0, 4: 9.0}


def test_a_difference_is_that_of_the_seeds_that_both_have_by_hand() -> None:
    found = paired_difference(OURS, THEIRS)
    assert found is not None
    # -2, -1, 1: mean -2/3, deviation sqrt(7/3), and t with two degrees of freedom at 0.975 is 4.302653.
    assert found.mean == pytest.approx(-2 / 3)
    assert found.deviation == pytest.approx(math.sqrt(7 / 3))
    half = 4.302653 * math.sqrt(7 / 3) / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((-2 / 3 - half, -2 / 3 + half), rel=1e-6)
    assert (found.num_pairs, found.num_wins, found.excludes_zero) == (3, 2, False)


def test_interval_and_p_are_those_of_scipys_paired_test() -> None:
    generator = np.random.default_rng(0)
    for size in (2, 3, 7):
        ours, theirs = generator.normal(1, 1, size), generator.normal(0, 1, size)
        found = paired_difference(dict(enumerate(ours)), dict(enumerate(theirs)))
        judge = stats.ttest_rel(ours, theirs)
        interval = judge.confidence_interval(0.95)
        assert found is not None
        assert (found.p, found.low, found.high) == pytest.approx((judge.pvalue, interval.low, interval.high))


def test_one_pair_has_a_difference_and_nothing_more() -> None:
    found = paired_difference({0: 1.0}, {0: 3.0, 1: 5.0})
    assert found is not None and found.mean == -2 and found.num_wins == 1
    assert (found.deviation, found.low, found.high, found.p) == (None, None, None, None)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize(("apart", "p"), [(0.5, 0.0), (0.0, 1.0)])
def test_pairs_that_all_differ_by_the_same_leave_no_doubt(apart: float, p: float) -> None:
    found = paired_difference({0: 1.0 + apart, 1: 2.0 + apart}, {0: 1.0, 1: 2.0})
    assert found is not None and found.p == p and (found.low, found.high) == (apart, apart)


def test_a_spread_divides_by_one_less_than_the_values() -> None:
    assert spread([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, np.std([1, 2, 4], ddof=1)))
    assert spread([2.0]) == (2.0, None)


def test_holms_correction_by_hand() -> None:
    # Smallest first: 0.01 x 4, 0.02 x 3, then 0.03 x 2 which is not below the one before, 0.04 x 1 likewise.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


# Pairs for a power of 80 % at 5 %, two-sided, by the size of the effect: the figures of every table of power.
@pytest.mark.parametrize(("effect", "pairs"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)])
def test_the_pairs_that_an_effect_needs_are_those_of_the_tables(effect: float, pairs: int) -> None:
    assert pairs_needed(effect, 1.0) == pairs_needed(-3 * effect, 3.0) == pairs


def test_no_number_of_pairs_shows_what_is_not_there() -> None:
    assert pairs_needed(0.0, 1.0) is None
    assert pairs_needed(0.001, 1.0) is None
    assert pairs_needed(0.1, 0.0) == 2


def test_power_is_the_share_of_drawn_samples_whose_test_sees_the_effect() -> None:
    generator = np.random.default_rng(0)
    for effect, size in ((0.0, 5), (1.0, 5), (3.0, 3), (40.0, 2)):
        samples = generator.normal(effect, 1.0, (4000, size))
        seen = np.mean(stats.ttest_1samp(samples, 0.0, axis=1).pvalue < 0.05)
        assert power_of(effect, 1.0, size) == pytest.approx(seen, abs=0.03)
    # Far beyond where the noncentral distribution can be computed.
    assert power_of(1e6, 1.0, 3) == 1.0
