"""Counting iterations until a run's validation loss is first at most the threshold.

A run that never gets there has no such number: it is "not reached", or "diverged".
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from amaml.paper.settings import THRESHOLD

OUTCOMES = ("reached", "not reached", "diverged")  # from the best to the worst
HYPER_RATES = ["hyper_alpha", "hyper_beta"]
CELL = ["alpha_0", "beta_0", *HYPER_RATES]


def until_threshold(table: pd.DataFrame) -> pd.DataFrame:
    """When the validation loss of each run was first at most THRESHOLD.

    Args:
        table: A figure's records, one row per logged iteration.

    Returns:
        One row per run: the columns that are constant within a run (labels, config, status),
        `outcome` (one of OUTCOMES), and `reached_at`, an iteration where the outcome is "reached"
        and empty elsewhere.
    """
    runs = table.groupby("run", sort=False).first()
    below = table[table["validation_loss"] <= THRESHOLD]
    first = below.groupby("run")["iteration"].min().reindex(runs.index)
    missed = np.where(runs["status"] == "diverged", "diverged", "not reached")
    return runs.assign(reached_at=first, outcome=np.where(first.notna(), "reached", missed))


def middle_seeds(table: pd.DataFrame, cell: list[str] = CELL) -> pd.DataFrame:
    """The middle seed of each cell, and how many seeds the cell has and how many got there.

    The seeds of a cell are ordered from the first to reach the threshold to the last, then those
    that did not reach it, then those that diverged; of two in the middle the worse is taken.

    Returns:
        One row per cell, as from `until_threshold`, with `seeds`, `seeds_reached` and `order`, the
        outcome's place in OUTCOMES.
    """
    runs = until_threshold(table)
    runs = runs.assign(order=runs["outcome"].map(OUTCOMES.index))
    seeds = runs.sort_values(["order", "reached_at"]).groupby(cell)
    size, reached = seeds["seed"].transform("size"), seeds["reached_at"].transform("count")
    runs = runs.assign(seeds=size, seeds_reached=reached)
    return runs[(seeds.cumcount() == size // 2).reindex(runs.index)]


def best_start(table: pd.DataFrame) -> pd.Series:
    """MAML's best cell: the one whose middle seed reaches the threshold first."""
    cells = middle_seeds(table[table["method"] == "MAML"])
    return cells.sort_values(["order", "reached_at", "alpha_0", "beta_0"]).iloc[0]
