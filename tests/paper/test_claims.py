"""Comparisons and intervals that the paper's claims are judged by, against counts by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from amaml.paper import claims


def counted(rows):
    """Rows (method, alpha_0, seed, reached_at), as `until_threshold` gives them."""
    table = pd.DataFrame(rows, columns=["method", "alpha_0", "seed", "reached_at"])
    reached = np.where(table["reached_at"].notna(), "reached", "not reached")
    return table.assign(
        outcome=reached, beta_0=1.0, validation_every=5, hyper_alpha=0.0, hyper_beta=0.0
    )


def test_each_way_that_two_runs_compare():
    nan = np.nan
    pairs = [  # (MAML, Alpha MAML, what that is)
        (nan, 40, "won"),
        (40, 30, "faster"),
        (40, 35, "same"),
        (40, 45, "same"),
        (40, 50, "slower"),
        (150, 165, "same"),
        (150, 170, "slower"),
        (40, nan, "lost"),
        (nan, nan, "neither"),
    ]
    rows = [("MAML", i, 0, maml) for i, (maml, _, _) in enumerate(pairs)]
    rows += [("Alpha MAML", i, 0, ours) for i, (_, ours, _) in enumerate(pairs)]
    compared = claims.compare(counted(rows))
    assert compared["compared"].tolist() == [expected for *_, expected in pairs]
    assert set(compared["compared"]) <= set(claims.COMPARED)


def test_runs_are_paired_by_seed_and_two_candidates_are_an_error():
    rows = [("MAML", 1, 0, 20), ("MAML", 1, 1, 60), ("Alpha MAML", 1, 0, 40)]
    rows += [("Alpha MAML", 1, 1, 40)]
    compared = claims.compare(counted(rows), on=[*claims.START, "seed"])
    assert compared.set_index("seed")["compared"].to_dict() == {0: "slower", 1: "faster"}
    with pytest.raises(pd.errors.MergeError):
        claims.compare(counted(rows))


def test_the_interval_of_three_seeds_by_hand():
    # Of the 27 resamples of 0, 3 and 6 the means 0 and 6 come once each (3.7 % together), so that
    # the 2.5 % of each end lie within them.
    assert claims.bootstrap_interval(pd.Series([0.0, 3.0, 6.0])) == (3.0, 0.0, 6.0)
    # Of the 3,125 of five seeds with one 1 among 0s: the mean is binomial(5, 1/5) / 5.
    value, low, high = claims.bootstrap_interval(pd.Series([0.0, 0, 0, 0, 1]))
    assert (value, low, high) == (0.2, 0.0, 0.6)  # P(at most 2) = 0.942, P(at most 3) = 0.993
    value, low, high = claims.bootstrap_interval(pd.Series([4.0]))
    assert value == 4 and np.isnan(low) and np.isnan(high)
    _, low, high = claims.bootstrap_interval(
        pd.Series([0.0, 1.0]), lambda x: 1.0 if x.any() else np.nan
    )
    assert np.isnan(low) and np.isnan(high)


def test_the_interval_of_a_ratio_keeps_seeds_together_and_infinity():
    table = pd.DataFrame({"a": [2.0, 4.0, 6.0], "b": [1.0, 2.0, 3.0]})
    ratio = claims.bootstrap_interval(table, lambda rows: rows["a"].mean() / rows["b"].mean())
    assert ratio == (2.0, 2.0, 2.0)  # each seed has the same one
    value, low, high = claims.bootstrap_interval(pd.Series([1.0, 1.0, np.inf]))
    assert (value, low, high) == (np.inf, 1.0, np.inf)


def test_many_seeds_are_drawn_and_drawn_alike():
    values = pd.Series(np.arange(20.0))
    value, low, high = claims.bootstrap_interval(values)
    assert (value, low, high) == claims.bootstrap_interval(values)
    error = 1.96 * np.arange(20).std() / np.sqrt(20)
    assert low == pytest.approx(value - error, abs=0.3)
    assert high == pytest.approx(value + error, abs=0.3)


def test_how_an_interval_is_shown():
    assert claims.format_interval(0.5, 0.25, 1.0) == "0.50 (0.25 to 1.00)"
    assert claims.format_interval(0.5, np.nan, np.nan, "{:.0%}") == "50% (no interval)"


def test_the_range_of_rates_that_serve_is_the_longest_without_a_hole():
    rates = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]
    good = pd.Series([True, False, True, True, False], index=rates)
    assert claims.longest_streak(good) == [1e-2, 1e-1]
    assert claims.powers_of_ten(claims.longest_streak(good)) == 1
    assert claims.longest_streak(~good) == [1e-3] and claims.powers_of_ten([1e-3]) == 0
    assert claims.longest_streak(good & False) == [] and np.isnan(claims.powers_of_ten([]))
