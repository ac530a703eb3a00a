"""Intervals against values worked by hand or known in closed form."""

import pytest

from medtune.measuring.intervals import bootstrap_interval, paired_bootstrap, wilson_interval


def test_wilson_interval():
    # (0.5 + z2/200 +- z sqrt(0.25/100 + z2/40000)) / (1 + z2/100) with z = 1.96
    assert wilson_interval(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_bootstrap_interval_is_the_normal_one_for_many_items():
    # The standard error of a mean of 400 zeros and ones, half each, is 0.025.
    assert bootstrap_interval([0.0, 1.0] * 200, [1.0] * 400) == pytest.approx((0.451, 0.549), abs=0.01)
    assert bootstrap_interval([0.5] * 7, [1.0] * 7) == (0.5, 0.5)


def test_a_ratio_weighs_items_by_their_counts():
    low, high = bootstrap_interval([2.0, 20.0], [1.0, 10.0])
    assert low == high == 2.0


def test_paired_bootstrap_sees_a_small_difference_that_all_items_share():
    first = [n / 100 for n in range(100)]
    second = [value + 0.01 for value in first]
    difference = paired_bootstrap((first, [1.0] * 100), (second, [1.0] * 100))
    # In none of 2,000 resamples is the difference 0 or less.
    assert difference == pytest.approx((0.01, 0.01, 0.01, 2 / 2001))


def test_paired_bootstrap_sees_none_between_a_model_and_itself():
    values = ([0.1, 0.9, 0.4], [1.0] * 3)
    assert paired_bootstrap(values, values) == (0.0, 0.0, 0.0, 1.0)


def test_paired_bootstrap_of_noise_includes_zero():
    first, second = [0.0, 1.0] * 20, [1.0, 0.0] * 20
    difference = paired_bootstrap((first, [1.0] * 40), (second, [1.0] * 40))
    assert difference.low < 0 < difference.high
    assert difference.p_value > 0.5
