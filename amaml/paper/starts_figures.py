"""Pictures of the experiments over random starts, drawn from their records."""

from __future__ import annotations

from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from amaml.paper.claims import expected_best, interval, share_below
from amaml.paper.figures import COLOURS, plain_log_ticks, use_style

LOSSES = (0.5, 0.6, 0.8, 1, 1.5, 2, 3, 4, 6, 8, 12)  # ticks
TRIALS = (1, 2, 4, 8, 16, 32, 64)
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
    "learned alpha": (r"$\alpha$ learned by the meta-step", "#009E73", ":"),
    "Meta-SGD": ("Meta-SGD", "#CC79A7", ":"),
    "LSLR": ("LSLR", "#A6761D", ":"),
    "scale-free": ("scale-free rule", "#117733", "-"),
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
        draw = partial(band, color=colour, linestyle=style, label=label)
        draw(profiles, x, [interval(partial(share_below, x=at), values) for at in x])
        draw(trials, TRIALS, [interval(partial(expected_best, k=k), values) for k in TRIALS])
    profiles.axvline(guessing, color="0.6", linestyle=":", linewidth=0.8)
    profiles.set(
        xscale="log", xlabel="final loss x", ylabel="share of starts at most x", ylim=(0, 1)
    )
    plain_log_ticks(profiles.xaxis)
    trials.axhline(guessing, color="0.6", linestyle=":", linewidth=0.8)
    trials.set(xscale="log", yscale="log", xlabel="trials k, each from a random start")
    trials.set(ylabel="expected loss of the best of k")
    trials.set_xticks(TRIALS, [str(k) for k in TRIALS])
    low, high = trials.get_ylim()
    ticks = [tick for tick in LOSSES if low <= tick <= high]
    trials.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    trials.minorticks_off()
    handles = profiles.get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=min(3, len(lines)))
    return figure


def band(axis: Axes, x, intervals: list[tuple[float, float, float]], **look) -> None:
    """A line through values with a band between the ends of their intervals."""
    value, low, high = np.transpose(intervals)
    axis.plot(x, value, **look)
    axis.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)


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
    plain_log_ticks(bar.ax.yaxis)
    return figure


def jumps(table: pd.DataFrame, lines: list[str]) -> Figure:
    r"""Alpha at the end of each run against alpha_0 + h |d_alpha(1)|, a panel per line.

    On the diagonal one jump, that of the first iteration, has set alpha for good.
    """
    use_style()
    figure, axes = plt.subplots(1, len(lines), figsize=(7, 7 / len(lines) + 0.4), sharey=True)
    for axis, line in zip(np.atleast_1d(axes), lines, strict=True):
        jumped = first_jump(table[table["variant"] == line])
        ends = np.array([jumped["jumped"].min() / 2, jumped["jumped"].max() * 2])
        axis.plot(ends, ends, color="0.6", linestyle=":", linewidth=0.8)
        colour = LINES[line][1]
        axis.plot(jumped["jumped"], jumped["alpha"], "o", color=colour, ms=3, alpha=0.6, mew=0)
        axis.set(xscale="log", yscale="log", title=LINES[line][0])
        axis.set_xlabel(r"$\alpha_0 + h\,|d_\alpha(1)|$")
    np.atleast_1d(axes)[0].set_ylabel(r"$\alpha$ at the end")
    return figure


def first_jump(table: pd.DataFrame) -> pd.DataFrame:
    """One row per run that did not diverge: `jumped`, that is alpha_0 + h |d_alpha(1)|, and the
    last `alpha`."""
    runs = table[table["status"] != "diverged"].groupby("run", sort=False)
    first, last = runs.first(), runs.last()
    jumped = first["alpha_0"] + first["hyper_alpha"] * first["d_alpha"].abs()
    return pd.DataFrame({"jumped": jumped, "alpha": last["alpha"], "alpha_0": first["alpha_0"]})
