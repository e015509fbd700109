"""Counting iterations until a threshold, against counts by hand."""

import math

import numpy as np
import pandas as pd
import pytest

from amaml.paper import thresholds


def run(status, losses, seed=0, alpha=0.1, method="MAML") -> pd.DataFrame:
    """A run with the given validation losses at iterations 5, 10, ..."""
    iteration = np.arange(1, 5 * len(losses) + 1)
    validation = np.full(len(iteration), np.nan)
    validation[4::5] = losses
    return pd.DataFrame({
        "run": f"{method} {alpha} {seed}", "method": method, "alpha_0": alpha, "beta_0": 0.1,
        "hyper_alpha": 0.0, "hyper_beta": 0.0, "threshold": 1.0, "seed": seed, "status": status,
        "iteration": iteration, "validation_loss": validation,
    })  # fmt: skip


def reached(iteration, **where) -> pd.DataFrame:
    return run("reached", [1.5] * (iteration // 5 - 1) + [0.9], **where)


def not_reached(**where) -> pd.DataFrame:
    return run("done", [1.5] * 8, **where)


def diverged(**where) -> pd.DataFrame:
    return run("diverged", [9.0, np.inf], **where)


def test_iterations_until_the_threshold_worked_out_by_hand():
    table = pd.concat([
        run("reached", [1.7, 1.2, 1.0], seed=0),  # at most the threshold: the third validation
        run("done", [1.7, 0.8, 1.4, 0.7], seed=1),  # the first time counts
        run("done", [1.7, 1.01, 1.2], seed=2),
        run("diverged", [1.7, math.nan], seed=3),
        run("diverged", [1.7, math.inf], seed=4),
        run("done", [1.7, 0.9, 0.8, 0.7], seed=5),
        run("diverged", [0.9, 0.8, math.nan], seed=6),
        run("done", [0.9, 0.8, 1.1], seed=7),
    ])  # fmt: skip
    runs = thresholds.until_threshold(table).set_index("seed")
    empty = 0  # in place of "not a number"
    assert runs["reached_at"].fillna(empty).tolist() == [15, 10, 0, 0, 0, 10, 5, 5]
    assert runs["stays_at"].fillna(empty).tolist() == [15, 20, 0, 0, 0, 10, 0, 0]
    missed = ["not reached", "diverged", "diverged"]
    assert runs["outcome"].tolist() == 2 * ["reached"] + missed + 3 * ["reached"]
    lower = thresholds.until_threshold(table, 0.75).set_index("seed")["reached_at"]
    assert lower.dropna().to_dict() == {1: 20, 5: 20}


@pytest.mark.parametrize(
    "seeds, outcome, reached_at, count",
    [
        ((reached(30), reached(10), reached(20)), "reached", 20, 3),
        ((not_reached(), reached(10), reached(35)), "reached", 35, 2),
        ((diverged(), reached(10), not_reached()), "not reached", None, 1),
        ((diverged(), diverged(), reached(10)), "diverged", None, 1),
        ((reached(10), reached(20)), "reached", 20, 2),
        ((reached(10), not_reached()), "not reached", None, 1),
        ((diverged(),), "diverged", None, 0),
    ],
)
def test_a_cell_is_its_middle_seed_and_what_is_no_number_stays_none(
    seeds, outcome, reached_at, count
):
    seeds = [rows.assign(run=f"run {i}", seed=i) for i, rows in enumerate(seeds)]
    (cell,) = thresholds.middle_seeds(pd.concat(seeds)).to_dict("records")
    assert cell["outcome"] == outcome
    assert cell["reached_at"] == reached_at if reached_at else math.isnan(cell["reached_at"])
    assert (cell["seeds"], cell["seeds_reached"]) == (len(seeds), count)
    assert cell["seeds_diverged"] == sum(rows["status"].iloc[0] == "diverged" for rows in seeds)
    times = thresholds.until_threshold(pd.concat(seeds))["reached_at"]
    if count:
        assert cell["spread"] == (np.ptp(times) if count == len(seeds) else math.inf)


def test_the_best_start_is_that_of_maml_whose_middle_seed_is_first():
    slow_but_one = [reached(count, seed=i, alpha=0.5) for i, count in enumerate((5, 30, 30))]
    best = [reached(count, seed=i, alpha=0.2) for i, count in enumerate((20, 20, 35))]
    lost = [diverged(seed=i, alpha=0.9) for i in range(3)]
    ours = [reached(5, seed=i, alpha=0.1, method="Alpha MAML") for i in range(3)]
    start = thresholds.best_start(pd.concat([*slow_but_one, *best, *lost, *ours]))
    assert (start["alpha_0"], start["reached_at"]) == (0.2, 20)
