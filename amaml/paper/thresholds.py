"""Counting iterations until a run's validation loss is at most a threshold.

A run that never gets there has no such number: it is "not reached", or "diverged".
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from amaml.paper.settings import THRESHOLD

OUTCOMES = ("reached", "not reached", "diverged")  # from the best to the worst
HYPER_RATES = ["hyper_alpha", "hyper_beta"]
CELL = ["alpha_0", "beta_0", *HYPER_RATES]


def until_threshold(table: pd.DataFrame, threshold: float = THRESHOLD) -> pd.DataFrame:
    """When the validation loss of each run first crossed the threshold, and when for good.

    Args:
        table: A figure's records, one row per logged iteration.
        threshold: A loss; a validation at most as high has reached it.

    Returns:
        One row per run: the columns that are constant within a run (labels, config, status),
        `outcome` (one of OUTCOMES), the iterations `reached_at` of the first crossing and
        `stays_at` of the one that is for good: empty where there is none, the latter also where
        the run diverged.
    """
    runs = table.groupby("run", sort=False).first()
    below = table[table["validation_loss"] <= threshold]
    last_above = table[table["validation_loss"] > threshold].groupby("run")["iteration"].max()
    lasting = below[below["iteration"] > below["run"].map(last_above).fillna(0)]
    reached, stays = (
        rows.groupby("run")["iteration"].min().reindex(runs.index) for rows in (below, lasting)
    )
    stays = stays.where(runs["status"] != "diverged")
    missed = np.where(runs["status"] == "diverged", "diverged", "not reached")
    outcome = np.where(reached.notna(), "reached", missed)
    return runs.assign(reached_at=reached, stays_at=stays, outcome=outcome)


def middle_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """The middle seed of each cell, and how the cell's other seeds did.

    The seeds of a cell are ordered from the first to reach the threshold to the last, then those
    that did not reach it, then those that diverged; of two in the middle the worse is taken.

    Returns:
        One row per cell, as from `until_threshold`, with the numbers `seeds`, `seeds_reached` and
        `seeds_diverged` (sooner or later), `spread`, the iterations between the first seed and the
        last (infinite where some did not reach it), and `order`, the outcome's place in OUTCOMES.
    """
    runs = until_threshold(table)
    runs["order"] = runs["outcome"].map(OUTCOMES.index)
    times, lost = runs["reached_at"].fillna(np.inf), runs["status"] == "diverged"
    cells = runs.assign(time=times, lost=lost).sort_values(["order", "reached_at"]).groupby(CELL)
    runs["seeds"] = cells["seed"].transform("size")
    runs["seeds_reached"] = cells["reached_at"].transform("count")
    runs["seeds_diverged"] = cells["lost"].transform("sum")
    runs["spread"] = cells["time"].transform("max") - cells["time"].transform("min")
    return runs[cells.cumcount().reindex(runs.index) == runs["seeds"] // 2]


def best_start(table: pd.DataFrame) -> pd.Series:
    """MAML's best cell: the one whose middle seed reaches the threshold first."""
    cells = middle_seeds(table[table["method"] == "MAML"])
    return cells.sort_values(["order", "reached_at", "alpha_0", "beta_0"]).iloc[0]
