"""The statistics that the paper's claims are held against, on cases worked out by hand."""

import math
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from amaml.paper import claims


def test_final_losses_are_capped_and_a_diverged_run_counts_as_the_cap():
    table = pd.DataFrame(
        [
            ("a", "plain", 0, 100, 2.0, "finished"),
            ("a", "plain", 0, 160, 0.5, "finished"),
            ("a", "plain", 0, 200, 0.7, "finished"),
            ("b", "plain", 1, 200, 9.0, "finished"),
            ("c", "h", 0, 40, 0.1, "diverged"),
            ("d", "h", 1, 200, 0.3, "finished"),
        ],
        columns=["run", "variant", "start", "iteration", "validation_loss", "status"],
    ).assign(alpha=0.1, beta=0.1)
    losses = claims.final_losses(table, guessing=1.0)
    assert losses["plain"].tolist() == pytest.approx([0.6, 3.0])  # the mean of the last 50; capped
    assert losses["h"].tolist() == [3.0, 0.3]


def test_the_effects_of_pairs_by_hand():
    ours, theirs = np.array([1.0, 2.0, 4.0, 3.0]), np.array([2.0, 2.0, 2.0, 6.0])
    assert claims.ends_lower(ours, theirs).tolist() == [1, 0.5, 0, 1]
    assert claims.loss_ratio(ours, theirs) == pytest.approx((0.5 * 1 * 2 * 0.5) ** 0.25)
    assert claims.tail_ratio(ours, theirs) == pytest.approx(1.7)  # 0.5, 0.5, 1, 2 at place 2.7
    assert claims.loss_ratio(ours, ours) == 1


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_expected_best_is_the_mean_over_all_draws(k):
    losses = np.array([0.7, 2.0, 0.9, 1.6])
    draws = combinations(losses, k)  # each as likely as any other
    assert claims.expected_best(losses, k) == pytest.approx(np.mean([min(draw) for draw in draws]))


def test_how_many_trials_a_run_is_worth_by_hand():
    theirs = np.array([1.0, 2.0, 3.0, 4.0])  # best of one 2.5, of two (3 * 1 + 2 * 2 + 3) / 6
    # The first of 4, 3, 2 and 1 that is drawn: of 1.5 trials with 3/8, 5/8 * 1/2, ... and the rest
    between, below = (24 + 2 * 20 + 3 * 15 + 4 * 5) / 64, (24 + 2 * 28 + 3 * 35 + 4 * 105) / 192
    for ours, trials in ((2.5, 1), (between, 1.5), (5 / 3, 2), (1.0, 2), (below, 0.5)):
        assert claims.trials_worth(np.array([ours]), theirs) == pytest.approx(trials, rel=1e-3)
    both = claims.trials_worth(np.array([[2.5], [1.6]]), theirs[None])
    assert both.tolist() == pytest.approx([1, 2], rel=1e-3)  # of four starts at most two
    told = claims.format_trials(np.full(4, 0.5), theirs)
    assert told == "over 2 (over 2\N{NBSP}to\N{NBSP}over 2)"
    own = np.random.default_rng(0).lognormal(size=(50, 128))
    assert claims.trials_worth(own, own) == pytest.approx(1, rel=1e-3)


def test_an_interval_covers_as_often_as_it_says_and_is_the_same_each_time():
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        value, low, high = claims.interval(np.mean, generator.normal(size=40))
        assert low <= value <= high
        inside += low <= 0 <= high
    assert 0.88 <= inside / 200 <= 0.99
    sample = generator.normal(size=12)
    assert claims.interval(np.mean, sample) == claims.interval(np.mean, sample)
    assert claims.interval(np.mean, sample[:1])[0] == sample[0]
    assert math.isnan(claims.interval(np.mean, sample[:1])[1])


def test_a_share_has_the_binomial_interval_also_where_none_or_all_hit():
    none, every = claims.share_interval(np.zeros(10)), claims.share_interval(np.ones(10))
    assert none == (0, 0, pytest.approx(1 - 0.025**0.1))  # of n runs none: (1 - p)^n = 0.025
    assert every == (1, pytest.approx(0.025**0.1), 1)
    exact = stats.binomtest(3, 20).proportion_ci(method="exact")
    expected = pytest.approx((0.15, exact.low, exact.high))
    assert claims.share_interval(np.array([True] * 3 + [False] * 17)) == expected
    assert claims.share_interval(np.array([0.5, 0.5, 1.0]))[0] == pytest.approx(2 / 3)
    assert all(map(math.isnan, claims.share_interval(np.array([]))))


def test_pairs_are_resampled_together():
    theirs = np.geomspace(0.1, 10, 30)  # vary by far more than the ratio, which is always 2
    value, low, high = claims.interval(claims.loss_ratio, 2 * theirs, theirs)
    assert (value, low, high) == pytest.approx((2, 2, 2))


def test_effects_compare_each_line_over_the_starts_that_both_have():
    losses = pd.DataFrame({"plain": [2.0, 1.0, 3.0], "h": [0.5, 0.5, np.nan]})
    effects = claims.effects(losses)
    assert effects["starts"].to_dict() == {"plain": 3, "h": 2}
    assert effects.loc["h", "ends lower"] == "1.00 (0.16\N{NBSP}to\N{NBSP}1.00)"
    assert effects.loc["plain", "loss ratio"] == ""
    assert effects.loc["h", "trials"] == "over 1 (over 1\N{NBSP}to\N{NBSP}over 1)"
    assert effects.loc["h", "loss ratio"].startswith(f"{math.sqrt(0.125):.2f} ")


def test_regions_by_hand():
    alpha_0, beta_0 = pd.Series([0.1, 1e-3, 1e-3, 5.0]), pd.Series([0.1, 0.1, 5.0, 0.1])
    expected = ["between", "too small", "too large", "too large"]
    assert claims.region(alpha_0, beta_0).tolist() == expected


def test_an_interval_is_told_with_its_ends_or_as_missing():
    assert claims.format_interval(0.5, 0.25, 0.75) == "0.50 (0.25\N{NBSP}to\N{NBSP}0.75)"
    assert claims.format_interval(0.5, math.nan, math.nan) == "0.50 (no interval)"


def test_accuracies_over_seeds_by_hand():
    rows = [
        ("a", 0, 0.9, 0.02, 0.7, 0.04),
        ("b", 1, 0.8, 0.02, 0.6, 0.03),
        ("c", 2, *4 * [math.nan]),
    ]
    names = ["test_accuracy", "test_accuracy_ci95"]
    names += [f"{name}_1_step" for name in names]
    table = pd.DataFrame(rows, columns=["run", "seed", *names])
    line = {"method": "MAML", "rule": "additive", "meta_optimizer": "adam", "case": "published"}
    table = table.assign(n_way=5, k_shot=1, test_tasks=600, status="done", **line)
    of_two = claims.accuracies(table[:2]).iloc[0]
    assert of_two["accuracy"] == pytest.approx(85) and of_two["seeds"] == 2
    assert of_two["ci95"] == pytest.approx(math.sqrt(2 * 2.0**2) / 2)
    assert (of_two["lowest"], of_two["highest"]) == pytest.approx((80, 90))
    assert of_two["accuracy_1_step"] == pytest.approx(65)
    assert of_two["ci95_1_step"] == pytest.approx(2.5)  # sqrt(4^2 + 3^2) / 2
    assert math.isnan(claims.accuracies(table).iloc[0]["accuracy"])
