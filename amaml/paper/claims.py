"""The statistics that the paper's claims are held against: shares, best of k, paired effects.

Each statistic takes the final losses of the runs as arrays whose last axis is the starts, so that
`interval` can resample them. A loss is capped at `CAP` times that of guessing, and a run that
diverged counts as the cap.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy import stats

from amaml.paper.records import final_validation, finished
from amaml.paper.settings import THRESHOLD

CAP = 3.0  # in units of the loss of guessing
WINDOW = 50  # iterations at the end of a run whose validations are its final loss
RESAMPLES = 2000  # of the starts
LINE = ["method", "rule", "meta_optimizer", "case"]  # of the runs of full length
Interval = tuple[float, float, float]  # a value and its 95 % interval: (value, low, high)


def final_losses(table: pd.DataFrame, guessing: float, by: str = "variant") -> pd.DataFrame:
    """One row per start and one column per line of an experiment: the capped final losses.

    Args:
        table: records with the columns `start` and `by`.
        guessing: the loss of a guess: ln N for N-way tasks.
        by: the column that tells the lines apart.

    Returns:
        The losses; not a number where a line has no run from that start.
    """
    ends = final_validation(table, WINDOW)
    ends["loss"] = ends["validation_loss"].clip(upper=CAP * guessing)
    return ends.pivot(index="start", columns=by, values="loss")


def expected_best(losses: np.ndarray, k: int | np.ndarray, axis: int = -1) -> np.ndarray:
    """The expected least loss of k different runs drawn from these, exactly.

    Dodge et al. (2019), "Show Your Work", drawn without replacement, which leaves it without bias
    (Tang et al. 2020): all k lie above the i-th of N sorted losses with probability
    (1 - k/N) (1 - k/(N-1)) ... (1 - k/(N-i+1)), which also says what lies between whole numbers.
    Several k are the last axis of what it returns.
    """
    losses = np.sort(np.moveaxis(np.asarray(losses, dtype=float), axis, -1), axis=-1)
    passed_over = 1 - np.expand_dims(k, -1) / np.arange(losses.shape[-1], 0, -1)
    above = np.cumprod(passed_over.clip(0), axis=-1)
    above[..., -1] = 0  # none lies above the largest
    return losses @ -np.diff(above, prepend=1).T


def ends_lower(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Where `ours` is below `theirs`, for `share_interval`: 1 or 0, and 0.5 for equal losses."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return (ours < theirs) + 0.5 * (ours == theirs)


def loss_ratio(ours: np.ndarray, theirs: np.ndarray, axis: int = -1) -> np.ndarray:
    """The geometric mean over the starts of the ratio of two final losses."""
    return np.exp(np.mean(np.log(ours) - np.log(theirs), axis=axis))


def tail_ratio(ours: np.ndarray, theirs: np.ndarray, axis: int = -1) -> np.ndarray:
    """The ratio of paired final losses that one start in ten exceeds: how bad it gets."""
    return np.quantile(np.asarray(ours) / np.asarray(theirs), 0.9, axis=axis)


def trials_worth(ours: np.ndarray, theirs: np.ndarray, axis: int = -1) -> np.ndarray:
    """How many trials of `theirs` one run of `ours` is worth: the k, also between whole numbers,
    whose expected best is the expected loss of one run. A run that is worse than one of theirs is
    worth less than 1; half the starts stands for that many and more."""
    k = np.geomspace(0.05, np.shape(theirs)[axis] / 2, 300)
    best = expected_best(theirs, k, axis)  # falls with k
    goal = np.expand_dims(np.mean(ours, axis=axis), -1)
    right = (best > goal).sum(-1, keepdims=True).clip(1, len(k) - 1)
    above, below = (np.take_along_axis(best, place, -1) for place in (right - 1, right))
    part = ((above - goal) / np.maximum(above - below, 1e-12)).clip(0, 1)
    return (k[right - 1] ** (1 - part) * k[right] ** part)[..., 0]


def interval(statistic: Callable, *losses: np.ndarray | pd.Series) -> Interval:
    """A statistic of paired losses with its 95 % percentile bootstrap interval over the starts.

    The starts are resampled together for all arguments. For fewer than two starts the interval is
    not a number; where all resamples agree it is that one value.
    """
    samples = [np.asarray(values, dtype=float) for values in losses]
    value = float(statistic(*samples))
    if len(samples[0]) < 2:
        return value, np.nan, np.nan
    result = stats.bootstrap(
        samples, statistic, n_resamples=RESAMPLES, paired=True, vectorized=True,
        method="percentile", rng=np.random.default_rng(0),
    )  # fmt: skip
    low, high = result.confidence_interval
    return value, float(low), float(high)


def share_interval(hits: np.ndarray | pd.Series) -> Interval:
    """A share with its 95 % binomial interval (Clopper and Pearson), also where none or all hit.

    Args:
        hits: one per run, true or false; 0.5 for a tie.
    """
    n, k = len(hits), float(np.sum(hits))
    low = stats.beta.ppf(0.025, k, n - k + 1) if k else 0.0
    high = stats.beta.ppf(0.975, k + 1, n - k) if k < n else 1.0
    return (k / n, float(low), float(high)) if n else (np.nan, np.nan, np.nan)


def format_interval(
    value: float, low: float, high: float, form: str | Callable[[float], str] = "{:.2f}"
) -> str:
    """A number with its interval, as it stands in a table; a line breaks between the two."""
    form = form.format if isinstance(form, str) else form
    if np.isnan(low):
        return f"{form(value)} (no interval)"
    return f"{form(value)} ({form(low)}\N{NBSP}to\N{NBSP}{form(high)})"


def format_trials(ours: np.ndarray | pd.Series, theirs: np.ndarray | pd.Series) -> str:
    """`trials_worth` with its interval, as it stands in a table."""
    most = len(ours) / 2

    def form(k: float) -> str:
        return f"over {most:.0f}" if k > 0.999 * most else f"{k:.1f}" if k < 10 else f"{k:.0f}"

    return format_interval(*interval(trials_worth, ours, theirs), form)


def effects(losses: pd.DataFrame, against: str = "plain") -> pd.DataFrame:
    """Every line of an experiment beside one of them, paired by start, as text with intervals.

    Args:
        losses: as from `final_losses`; the starts of the frame, so select a region's rows first.
        against: the column that the others are compared with.

    Returns:
        One row per line: the number of `starts` that both have, `share <= 1.0`, `expected loss`,
        `ends lower` than `against`, `loss ratio` to it, the `trials` of it that one run is worth.
    """
    rows = {}
    for line in losses:
        pair = losses[list(dict.fromkeys([line, against]))].dropna()
        ours, theirs = pair[line], pair[against]
        row = {
            "starts": len(pair),
            f"share <= {THRESHOLD}": format_interval(*share_interval(ours <= THRESHOLD)),
            "expected loss": format_interval(*interval(np.mean, ours)),
        }
        if line != against and len(pair):
            row["ends lower"] = format_interval(*share_interval(ends_lower(ours, theirs)))
            row["loss ratio"] = format_interval(*interval(loss_ratio, ours, theirs))
            row["trials"] = format_trials(ours, theirs)
        rows[line] = row
    return pd.DataFrame.from_dict(rows, orient="index").fillna("")


def region(alpha_0: pd.Series, beta_0: pd.Series) -> pd.Series:
    """Where a start lies: "too large" with a rate above 1, else "too small" with one below 0.01,
    else "between"."""
    largest, smallest = np.maximum(alpha_0, beta_0), np.minimum(alpha_0, beta_0)
    places = np.select([largest > 1, smallest < 0.01], ["too large", "too small"], "between")
    return pd.Series(places, index=alpha_0.index)


def accuracies(table: pd.DataFrame) -> pd.DataFrame:
    """Test accuracy (%) after a whole training, by setting, method, rule, meta-optimiser and case.

    `accuracy` is the mean over the seeds, `ci95` the half width of its 95 % interval over all their
    test tasks, `lowest` and `highest` are those of a seed; `accuracy_1_step` and `ci95_1_step` are
    after one inner step. All empty where a run diverged. Runs under way are left out.
    """
    ends = finished(table).groupby("run", sort=False).tail(1)
    names = {"accuracy": "", "ci95": "_ci95"}
    names |= {f"{name}_1_step": f"{end}_1_step" for name, end in names.items()}
    ends = ends.assign(**{name: 100 * ends[f"test_accuracy{end}"] for name, end in names.items()})
    rows = ends.groupby(["n_way", "k_shot", *LINE], sort=False)

    def mean(seeds):
        return seeds.mean(skipna=False)

    def half_width(seeds):
        return (seeds**2).sum(skipna=False) ** 0.5 / len(seeds)

    return rows.agg(
        accuracy=("accuracy", mean),
        ci95=("ci95", half_width),
        lowest=("accuracy", lambda seeds: seeds.min(skipna=False)),
        highest=("accuracy", lambda seeds: seeds.max(skipna=False)),
        accuracy_1_step=("accuracy_1_step", mean),
        ci95_1_step=("ci95_1_step", half_width),
        seeds=("seed", "nunique"),
        test_tasks=("test_tasks", "first"),
    )
