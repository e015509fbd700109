"""Figures 2 and 3 and those of the appendix that are like them, drawn from their records."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from amaml.paper.figures import (
    LOOKS,
    METHODS,
    hyper_rates_label,
    legend_key,
    plain_log_ticks,
    setting,
    use_style,
)
from amaml.paper.settings import HYPER_RATE
from amaml.paper.thresholds import CELL, HYPER_RATES, best_start, middle_seeds, until_threshold

SYMBOLS = {"alpha_0": r"$\alpha_0$", "beta_0": r"$\beta_0$", "alpha": r"$\alpha$"}
SYMBOLS |= {"beta": r"$\beta$", "hyper_alpha": r"$h_\alpha$", "hyper_beta": r"$h_\beta$"}
SMALL_RATE, LARGE_RATE = 1e-4, 100.0  # of the axes of rates: linear below, ended at
COLOUR_MAP = "viridis"  # evenly from dark to light, also in grey and for the colour-blind
NEVER = "0.91"  # the grey of what did not reach the threshold


def heat_maps(table: pd.DataFrame, x: str = "alpha_0", y: str = "beta_0") -> Figure:
    """Iterations until the threshold over two rates, on one colour scale; the cells' middle seeds.

    A panel for each pair of the hyper rates that are not on the axes: MAML is the pair of zeros.
    """
    use_style()
    cells = middle_seeds(table)
    apart = [name for name in HYPER_RATES if name not in (x, y)]
    panels: list = list(cells.groupby(apart)) if apart else [((), cells)]
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    side = {1: 3.4, 2: 3.1, 3: 2.15}[columns]
    figure = plt.figure(figsize=(side * columns + 0.8, side * rows + 0.9))
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    fastest, limit = cells["reached_at"].min(), cells["iterations"].max()
    norm = LogNorm(fastest if fastest < limit else 1, limit)
    for axis, (hyper_rates, panel) in zip(axes.flat, panels, strict=False):
        heat_map(axis, panel, x, y, norm)
        if apart:
            label = f"Alpha MAML, {hyper_rates_label(hyper_rates)}" if any(hyper_rates) else "MAML"
            axis.set_title(label.replace(", $", "\n$") if columns == 3 else label)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    plt.setp(axes[-1], xlabel=SYMBOLS[x])
    plt.setp(axes[:, 0], ylabel=SYMBOLS[y])
    shades = plt.cm.ScalarMappable(norm, COLOUR_MAP)
    bar = figure.colorbar(shades, ax=axes, label="iterations until the threshold", aspect=30)
    plain_log_ticks(bar.ax.yaxis)
    never = Patch(facecolor=NEVER, label="not reached by most seeds")
    cross = plt.Line2D([], [], color="black", marker="x", ms=4, ls="", label="a seed diverged")
    figure.legend(handles=[never, cross], loc="outside upper center", ncols=2)
    figure.supxlabel(setting(table), fontsize=8, color="0.3")
    return figure


def heat_map(axis: Axes, cells: pd.DataFrame, x: str, y: str, norm: LogNorm) -> None:
    """One panel: shade and number where most seeds reached the threshold, quiet grey elsewhere.

    Below the number stands how many seeds reached it, where some but not all did.
    """
    grid = cells.pivot(index=y, columns=x, values="reached_at")
    colours = plt.get_cmap(COLOUR_MAP).with_extremes(bad=NEVER)
    axis.pcolormesh(grid, norm=norm, cmap=colours, edgecolors="white", linewidth=1)
    for _, cell in cells.iterrows():
        across, up = grid.columns.get_loc(cell[x]) + 0.5, grid.index.get_loc(cell[y]) + 0.5
        shade = colours(norm(cell["reached_at"]))
        ink = "white" if np.dot(shade[:3], (0.299, 0.587, 0.114)) < 0.5 else "0.2"
        some = 0 < cell["seeds_reached"] < cell["seeds"]
        look: dict = {"color": ink, "ha": "center", "va": "center"}
        axis.text(across, up + 0.14 * some, cell_number(cell), size=7, **look)
        if some:
            axis.text(across, up - 0.26, f"{cell['seeds_reached']}/{cell['seeds']}", size=5, **look)
        if cell["seeds_diverged"]:
            axis.plot(across + 0.32, up + 0.32, "x", color=ink, ms=3.5, mew=0.9)
    axis.set(aspect="equal")
    axis.set_xticks(np.arange(len(grid.columns)) + 0.5, rate_labels(grid.columns), fontsize=8)
    axis.set_yticks(np.arange(len(grid.index)) + 0.5, rate_labels(grid.index), fontsize=8)
    axis.tick_params(length=2)


def cell_number(cell: pd.Series) -> str:
    """The middle seed's iterations, rounded to what the seeds agree on; "" where not reached.

    That is to the power of ten of their spread, at most that of the number: 35 is 35 where the
    seeds lie less than ten iterations apart, and 40 where they do not.
    """
    count, spread = cell["reached_at"], cell["spread"]
    if math.isnan(count):
        return ""
    unit = 10 ** math.floor(math.log10(max(1, min(count, spread))))
    return f"{math.floor(count / unit + 0.5) * unit:.0f}"


def rate_labels(rates: pd.Index) -> list[str]:
    """Rates below the cells of a panel; of many every second."""
    skip = 1 if len(rates) <= 6 else 2
    return ["" if i % skip else rate_label(rate) for i, rate in enumerate(rates)]


def rate_label(rate: float) -> str:
    exponent = math.log10(abs(rate)) if rate else 0.0
    if exponent > -2 or exponent != round(exponent):
        return f"{rate:g}"
    return f"${'-' if rate < 0 else ''}10^{{{exponent:.0f}}}$"


def slices(table: pd.DataFrame, hyper_rate: float = HYPER_RATE) -> Figure:
    """The grid along alpha_0 and along beta_0 through MAML's best cell, MAML beside Alpha MAML.

    Lines join the middle seeds that reached the threshold, bands reach from the first seed to the
    last. What did not reach it stands in a grey strip above the limit.
    """
    use_style()
    best, limit = best_start(table), table["iterations"].max()
    shown = table[table[HYPER_RATES].isin([0.0, hyper_rate]).all(axis=1)]
    counts = [n for n in (5, 10, 20, 50, 100, 200, 500, 1000) if n <= limit]
    figure, axes = plt.subplots(1, 2, figsize=(7, 3.2), sharey=True)
    for axis, (along, fixed) in zip(axes, (CELL[:2], CELL[1::-1]), strict=True):
        for method in METHODS:
            through = (shown[fixed] == best[fixed]) & (shown["method"] == method)
            one_slice(axis, shown[through], along, LOOKS[method], 1.6 * limit)
        axis.set(xscale="log", yscale="log", xlabel=SYMBOLS[along])
        axis.set_title(f"{SYMBOLS[fixed]} = {best[fixed]:g}, as in MAML's best cell")
        axis.axhspan(1.25 * limit, 2 * limit, color="0.93", linewidth=0, zorder=0)
        axis.set_yticks([*counts, 1.6 * limit], [*map(str, counts), "not reached"])
        axis.set_ylim(top=2 * limit)
        axis.minorticks_off()
    axes[0].set_ylabel("iterations until the threshold")
    figure.legend(handles=[legend_key(m) for m in METHODS], loc="outside upper center", ncols=2)
    figure.supxlabel(setting(shown), fontsize=8, color="0.3")
    return figure


def one_slice(axis: Axes, table: pd.DataFrame, along: str, look: dict, never: float) -> None:
    """The line, band and markers of a method; `never` is the height of what has no number."""
    runs, middle = until_threshold(table), middle_seeds(table).sort_values(along)
    band = runs["reached_at"].fillna(never).groupby(runs[along]).agg(["min", "max"])
    axis.fill_between(band.index, band["min"], band["max"], color=look["color"], alpha=0.2, lw=0)
    axis.plot(middle[along], middle["reached_at"], **look | {"marker": ""})
    axis.plot(middle[along], middle["reached_at"].fillna(never), **look | {"linestyle": ""})


def paths(table: pd.DataFrame) -> Figure:
    """Alpha and beta against the iteration from a grid of starts, a line per run.

    A column per beta_0, a colour per alpha_0; a cross where a run diverged. Rates can be negative,
    so their axes are logarithmic beyond +-SMALL_RATE and linear between; at +-LARGE_RATE they end.
    """
    use_style()
    starts, columns = (sorted(table[name].unique()) for name in CELL[:2])
    shape, size = (2, len(columns)), (1.6 * len(columns) + 0.8, 4.4)
    figure, axes = plt.subplots(*shape, figsize=size, sharex=True, sharey="row", squeeze=False)
    shades = plt.get_cmap(COLOUR_MAP)(np.linspace(0, 0.85, len(starts)))
    colours = dict(zip(starts, shades, strict=True))
    for column, beta in zip(axes.T, columns, strict=True):
        for axis, rate in zip(column, ("alpha", "beta"), strict=True):
            for _, run in table[table["beta_0"] == beta].groupby("run"):
                path = run[np.isfinite(run[rate])]
                look = {"color": colours[run["alpha_0"].iloc[0]], "lw": 0.9, "ms": 4}
                look["marker"] = "x" if run["status"].iloc[0] == "diverged" else ""
                value = path[rate].clip(-LARGE_RATE, LARGE_RATE)
                axis.plot(path["iteration"], value, markevery=[-1], **look)
            axis.set(xscale="log")
        column[0].set_title(f"{SYMBOLS['beta_0']} = {beta:g}")
        column[1].set_xlabel("iteration t")
        plain_log_ticks(column[1].xaxis, subs=(1,))
    for axis, rate in zip(axes[:, 0], ("alpha", "beta"), strict=True):
        axis.set_ylabel(SYMBOLS[rate])
        rate_axis(axis, table[rate])
    for alpha, colour in colours.items():
        axes[0, 0].plot([], [], color=colour, label=f"{SYMBOLS['alpha_0']} = {alpha:g}")
    figure.legend(loc="outside upper center", ncols=len(colours))
    figure.supxlabel(setting(table), fontsize=8, color="0.3")
    return figure


def rate_axis(axis: Axes, rates: pd.Series) -> None:
    """Make the y axis logarithmic, for rates of either sign."""
    rates = rates[np.isfinite(rates)]
    low = max(-LARGE_RATE, 2 * rates.min()) if rates.min() < 0 else 0
    high = min(LARGE_RATE, 2 * rates.max())
    decades = 10.0 ** np.arange(-4, 3)  # from SMALL_RATE to LARGE_RATE
    signed = (*-decades[2::2], 0.0, *decades[2::2]) if low else (0.0, *decades[1:])
    ticks = [tick for tick in signed if low <= tick <= high]
    axis.set_yscale("symlog", linthresh=SMALL_RATE, linscale=0.4)
    axis.set_yticks(ticks, [rate_label(tick) for tick in ticks])
    axis.set_ylim(low, high)
    axis.minorticks_off()
