"""Pictures of the experiments over random starts, drawn from their records."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from scipy import stats

from amaml.paper.claims import expected_best, interval, share_interval
from amaml.paper.figures import COLOURS, SCALE_FREE_COLOUR, plain_log_ticks, use_style

LOSSES = (0.5, 0.6, 0.8, 1, 1.5, 2, 3, 4, 6, 8, 12)  # ticks
TRIALS = (1, 2, 4, 8, 16, 32, 64)
# Starting rates up to 0.01, up to 1 and above
GROUPS = {"start below 0.01": "#882255", "from 0.01 to 1": "0.6", "above 1": "#DDAA33"}
# How a line of an experiment is named and drawn: MAML dashed, Alpha MAML solid, rivals dotted
LINES: dict[str, tuple[str, str, str]] = {
    "plain": ("MAML", COLOURS["MAML"], "--"),
    "null": ("MAML again (null)", "0.65", "-"),
    "h = 0.0001": ("Alpha MAML, h = 0.0001", "#7FB3D5", "-"),
    "h = 0.001": ("Alpha MAML, h = 0.001", COLOURS["Alpha MAML"], "-"),
    "h = 0.01": ("Alpha MAML, h = 0.01", "#1B2A6B", "-"),
    "h = 0.1": ("Alpha MAML, h = 0.1", "#8C6BB1", "-"),
    "h drawn": ("Alpha MAML, h drawn", "#56B4E9", "-"),
    "h drawn narrowly": ("Alpha MAML, h drawn within 100", "#56B4E9", "--"),
    "alpha alone": (r"only $\alpha$ adapted", "#009E73", "-."),
    "beta alone": (r"only $\beta$ adapted", "#CC79A7", "-."),
    "frozen": ("rates frozen after ten iterations", "0.3", "-."),
    "clipped": ("meta-gradient clipped", "#E69F00", "-."),
    "hyper-clipped": ("hypergradients clipped", "#A6761D", "-."),
    "learned alpha": (r"$\alpha$ learned by the meta-step", "#009E73", ":"),
    "Meta-SGD": ("Meta-SGD", "#CC79A7", ":"),
    "LSLR": ("LSLR", "#A6761D", ":"),
    "Adam": ("MAML with Adam", COLOURS["MAML"], ":"),
    "Adam, null": ("MAML with Adam again (null)", "0.65", ":"),
    "Adam, h drawn": ("Alpha MAML with Adam, h drawn", "#56B4E9", ":"),
    "Adam, adapted": ("Alpha MAML with Adam", COLOURS["Alpha MAML"], ":"),
    "scale-free": ("scale-free rule", SCALE_FREE_COLOUR, "-"),
    "scale-free, drawn": ("scale-free rule, constant drawn", "#66A61E", "-"),
}


def tuning(losses: pd.DataFrame, lines: list[str], guessing: float) -> Figure:
    """Performance profiles beside the expected best of k trials; bands are 95 % intervals.

    Args:
        losses: as from `claims.final_losses`, one column per line.
        lines: the columns that are drawn, names in LINES.
        guessing: the loss of a guess, a dotted line.
    """
    use_style()
    figure, (profiles, trials) = plt.subplots(1, 2, figsize=(7, 3.3))
    x = np.geomspace(0.95 * losses[lines].min().min(), 1.25 * guessing, 80)
    for line in lines:
        values = losses[line].dropna().to_numpy()
        label, colour, style = LINES[line]
        shade = min(0.15, 0.6 / len(lines))  # many bands lie on each other
        draw = partial(band, shade=shade, color=colour, linestyle=style, label=label)
        draw(profiles, x, [share_interval(values <= at) for at in x])
        shown = [k for k in TRIALS if k <= max(1, len(values) // 2)]  # of N starts at most half
        draw(trials, shown, [interval(partial(expected_best, k=k), values) for k in shown])
    profiles.axvline(guessing, color="0.6", linestyle=":", linewidth=0.8)
    profiles.set(
        xscale="log", xlabel="final loss x", ylabel="share of starts at most x", ylim=(0, 1)
    )
    plain_log_ticks(profiles.xaxis)
    trials.axhline(guessing, color="0.6", linestyle=":", linewidth=0.8)
    trials.set(xscale="log", yscale="log", xlabel="trials k, each from a random start")
    trials.set(ylabel="expected loss of the best of k")
    trials.set_xticks(shown, [str(k) for k in shown])
    low, high = trials.get_ylim()
    ticks = [tick for tick in LOSSES if low <= tick <= high]
    trials.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    trials.minorticks_off()
    handles = profiles.get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=min(3, len(lines)))
    return figure


def band(axis: Axes, x, intervals: list[tuple[float, float, float]], shade: float, **look) -> None:
    """A line through values with a band between the ends of their intervals."""
    value, low, high = np.transpose(intervals)
    axis.plot(x, value, **look)
    axis.fill_between(x, low, high, color=look["color"], alpha=shade, linewidth=0)


def maps(ends: pd.DataFrame, lines: list[str], guessing: float) -> Figure:
    """The starts in their plane, coloured by the final loss; a cross is a run that diverged.

    Args:
        ends: one row per run, with `variant`, `alpha_0`, `beta_0`, `status` and `validation_loss`.
        lines: the values of `variant` that are drawn, a panel each.
        guessing: the loss of a guess, where the colours end.
    """
    use_style()
    columns = min(4, len(lines))
    rows = -(-len(lines) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.75 * columns + 0.8, 1.95 * rows + 0.3), sharex=True, sharey=True,
        squeeze=False,
    )  # fmt: skip
    finite = ends["validation_loss"][np.isfinite(ends["validation_loss"])]
    look = {"cmap": "viridis", "norm": LogNorm(finite.min(), guessing), "s": 16, "linewidths": 0}
    for axis, line in zip(axes.flat, lines, strict=False):
        runs = ends[ends["variant"] == line]
        lost = runs[runs["status"] == "diverged"]
        dots = axis.scatter(runs["alpha_0"], runs["beta_0"], c=runs["validation_loss"], **look)
        axis.plot(lost["alpha_0"], lost["beta_0"], "x", color="black", markersize=4)
        axis.set(xscale="log", yscale="log", title=LINES[line][0])
        axis.set_xticks([1e-4, 1e-2, 1], ["$10^{-4}$", "$10^{-2}$", "1"])
        axis.set_yticks([1e-4, 1e-2, 1], ["$10^{-4}$", "$10^{-2}$", "1"])
        axis.minorticks_off()
    for axis in axes[-1]:
        axis.set_xlabel(r"$\alpha_0$")
    for axis in axes[:, 0]:
        axis.set_ylabel(r"$\beta_0$")
    for axis in axes.flat[len(lines) :]:
        axis.set_axis_off()
    bar = figure.colorbar(dots, ax=axes, label="final loss", extend="max", aspect=25)
    bar.set_ticks([tick for tick in LOSSES if finite.min() <= tick <= guessing])
    bar.ax.yaxis.set_major_formatter("{x:g}")
    bar.ax.minorticks_off()
    return figure


def jumps(table: pd.DataFrame, lines: list[str]) -> Figure:
    r"""Alpha at the end of each run against alpha after its first step, a panel per line.

    On the diagonal the first step has set alpha for good. Rates below zero are not shown.
    """
    use_style()
    figure, axes = plt.subplots(
        1, len(lines), figsize=(7, 7 / len(lines) + 0.4), sharex=True, sharey=True, squeeze=False
    )
    for axis, line in zip(axes[0], lines, strict=True):
        jumped = first_jump(table[table["variant"] == line])
        colours = group_colours(jumped["alpha_0"])
        axis.axline((0.1, 0.1), (1, 1), color="0.6", linestyle=":", linewidth=0.8)
        for colour in dict.fromkeys(colours):
            dots = jumped[colours == colour]
            axis.plot(dots["jumped"], dots["alpha"], "o", color=colour, ms=3, alpha=0.7, mew=0)
        axis.set(xscale="log", yscale="log", title=LINES[line][0])
        axis.set_xlabel(r"$\alpha$ after the first step")
    axes[0, 0].set_ylabel(r"$\alpha$ at the end")
    group_legend(figure)
    return figure


def first_jump(table: pd.DataFrame) -> pd.DataFrame:
    """One row per run, as in its first iteration, and what came of it.

    Returns:
        The first iteration's columns; `jumped`, that is alpha after its first step, alpha_0 minus
        hyper_alpha times d_alpha (equation 5); and the last `alpha` and `beta`, which are not a
        number where the run diverged.
    """
    runs = table.groupby("run", sort=False)
    first, last = runs.first(), runs.last()
    ends = last[["alpha", "beta"]].where(first["status"] != "diverged")
    jumped = first["alpha_0"] - first["hyper_alpha"] * first["d_alpha"]
    return first.assign(jumped=jumped, alpha=ends["alpha"], beta=ends["beta"])


def group_colours(rates: pd.Series) -> np.ndarray:
    """The colour of each starting rate, of GROUPS."""
    return np.array(list(GROUPS.values()))[np.digitize(rates, (0.01, 1))]


def group_legend(figure: Figure) -> None:
    keys = [plt.Line2D([], [], color=colour, label=name) for name, colour in GROUPS.items()]
    figure.legend(handles=keys, loc="outside upper center", ncols=len(keys))


def paths(table: pd.DataFrame, line: str) -> Figure:
    """Alpha and beta of each run of a line against the iteration.

    Alpha has its value of iteration 2 also where the records leave that iteration out.
    """
    use_style()
    figure, axes = plt.subplots(1, 2, figsize=(7, 3.5), sharey=True)
    runs = table[(table["variant"] == line) & (table["status"] != "diverged")]
    second = first_jump(runs)["jumped"]
    for axis, name in zip(axes, ("alpha", "beta"), strict=True):
        rates = runs.pivot(index="iteration", columns="run", values=name)
        if name == "alpha":
            rates.loc[2] = second
        rates = rates.sort_index()
        for run, colour in zip(rates, group_colours(rates.iloc[0]), strict=True):
            axis.plot(rates[run].dropna(), color=colour, linewidth=0.6, alpha=0.6)
        axis.set_xscale("log")
        axis.set_yscale("symlog", linthresh=1e-3, linscale=0.4)
        axis.set(xlabel="iteration t", title=rf"$\{name}$")
        plain_log_ticks(axis.xaxis)
    group_legend(figure)
    axes[0].set_ylabel("rate")
    return figure


def binned_shares(x: pd.Series, hits: pd.Series, edges: Sequence[float]) -> pd.DataFrame:
    """The share of `hits`, true or false, by bins of x: low < x <= high.

    Returns:
        `runs`, `share` and its 95 % interval, `low` to `high`, by each bin's geometric middle; no
        row for an empty bin.
    """
    rows = {}
    for low, high in pairwise(edges):
        inside = hits[(x > low) & (x <= high)]
        if len(inside):
            rows[(low * high) ** 0.5] = (len(inside), *share_interval(inside))
    columns = ["runs", "share", "low", "high"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def draw_shares(axis: Axes, binned: pd.DataFrame, **look) -> None:
    """A line through the shares of `binned_shares`, with their intervals."""
    errors = [binned["share"] - binned["low"], binned["high"] - binned["share"]]
    axis.errorbar(binned.index, binned["share"], yerr=errors, marker="o", ms=3, capsize=2, **look)
    axis.set(xscale="log", ylim=(-0.03, 1.03))


def rank_correlation(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
    """Spearman's rank correlation along an axis, for `claims.interval`; 0 for equal values."""
    ranks = [stats.rankdata(values, axis=axis) for values in (x, y)]
    x, y = (rank - rank.mean(axis=axis, keepdims=True) for rank in ranks)
    spread = np.sqrt((x**2).sum(axis) * (y**2).sum(axis))
    return (x * y).sum(axis) / np.where(spread == 0, 1, spread)
