"""What the paper's claims are judged by: MAML and Alpha MAML compared, and intervals over seeds."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pandas as pd

COMPARED = ("won", "faster", "same", "slower", "lost", "neither")
START = ["alpha_0", "beta_0"]
RESAMPLES = 10_000  # where all resamples of the seeds would be more


def compare(counted: pd.DataFrame, on: list[str] = START) -> pd.DataFrame:
    """Alpha MAML's rows beside MAML's of the same start, with a column `compared`.

    Counts are the same where they differ by at most one validation or a tenth, else faster or
    slower; where only Alpha MAML reaches the threshold it is won, where only MAML does lost. MAML's
    count and outcome are in `reached_at_maml` and `outcome_maml`.

    Args:
        counted: One row per run (`until_threshold`) or per cell (`middle_seeds`).
        on: What pairs the rows; `[*START, "seed"]` for runs.
    """
    maml = counted.loc[counted["method"] == "MAML", [*on, "reached_at", "outcome"]]
    pairs = counted[counted["method"] == "Alpha MAML"].merge(
        maml, on=on, suffixes=("", "_maml"), validate="many_to_one"
    )
    more = pairs["reached_at"] - pairs["reached_at_maml"]
    ours, theirs = pairs["reached_at"].notna(), pairs["reached_at_maml"].notna()
    step = np.maximum(pairs["validation_every"], 0.1 * pairs["reached_at_maml"])
    cases = [ours & ~theirs, more < -step, more.abs() <= step, more > step, ~ours & theirs]
    return pairs.assign(compared=np.select(cases, COMPARED[:-1], COMPARED[-1]))


def bootstrap_interval(
    by_seed: pd.DataFrame | pd.Series, statistic: Callable = np.mean
) -> tuple[float, float, float]:
    """A statistic over the seeds, and its 95 % bootstrap interval: (value, low, high).

    `by_seed` has one row per seed. All resamples are taken where they are few, which leaves nothing
    to chance. For one seed, or a statistic that some resample does not have, the interval is NaN.
    """
    n, value = len(by_seed), float(statistic(by_seed))
    if n**n <= RESAMPLES:
        drawn = list(product(range(n), repeat=n))
    else:
        drawn = np.random.default_rng(0).integers(n, size=(RESAMPLES, n)).tolist()
    resampled = [float(statistic(by_seed.iloc[list(rows)])) for rows in drawn]
    if n < 2 or np.isnan(resampled).any():
        return value, np.nan, np.nan
    # An observed value each, since a loss can be infinite
    low, high = np.percentile(resampled, (2.5, 97.5), method="inverted_cdf")
    return value, float(low), float(high)


def format_interval(value: float, low: float, high: float, form: str = "{:.2f}") -> str:
    """A number with its interval, as it stands in a table."""
    if np.isnan(low):
        return form.format(value) + " (no interval)"
    return f"{form.format(value)} ({form.format(low)} to {form.format(high)})"


def longest_streak(good: pd.Series) -> list[float]:
    """The longest stretch of neighbouring rates for which `good`, booleans by rate, is true."""
    streaks: list[list[float]] = [[]]
    for rate, is_good in good.items():
        streaks.append([*streaks[-1], rate] if is_good else [])
    return max(streaks, key=len)


def powers_of_ten(rates: list[float]) -> float:
    """How many powers of ten rates span, from the first to the last; NaN where there are none."""
    return round(float(np.log10(rates[-1] / rates[0])), 1) if rates else np.nan


def accuracies(table: pd.DataFrame) -> pd.DataFrame:
    """Test accuracy (%) after a whole training, by setting, method, meta-optimiser and case.

    `accuracy` is the mean over the seeds, `ci95` the half width of its 95 % interval over all their
    test tasks, `lowest` and `highest` are those of a seed; all empty where a run diverged.
    """
    ends = table.groupby("run", sort=False).tail(1)
    ends = ends.assign(accuracy=100 * ends["test_accuracy"], ci95=100 * ends["test_accuracy_ci95"])
    rows = ends.groupby(["n_way", "k_shot", "method", "meta_optimizer", "case"], sort=False)
    return rows.agg(
        accuracy=("accuracy", lambda seeds: seeds.mean(skipna=False)),
        ci95=("ci95", lambda seeds: (seeds**2).sum(skipna=False) ** 0.5 / len(seeds)),
        lowest=("accuracy", lambda seeds: seeds.min(skipna=False)),
        highest=("accuracy", lambda seeds: seeds.max(skipna=False)),
        seeds=("seed", "nunique"),
        test_tasks=("test_tasks", "first"),
    )
