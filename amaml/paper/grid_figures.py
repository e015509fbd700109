"""Figures 2 and 3 and those of the appendix that are like them, drawn from their records.

Cells whose middle seed did not reach the threshold, or diverged, have no number (`thresholds`) and
are drawn as what they are.
"""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from amaml.paper.figures import LOOKS, METHODS, legend_key, loss_axis, plain_log_ticks, use_style
from amaml.paper.settings import Pair
from amaml.paper.thresholds import CELL, HYPER_RATES, best_start, middle_seeds, until_threshold

SYMBOLS = {"alpha_0": r"$\alpha_0$", "beta_0": r"$\beta_0$", "alpha": r"$\alpha$"}
SYMBOLS |= {"beta": r"$\beta$", "hyper_alpha": r"$h_\alpha$", "hyper_beta": r"$h_\beta$"}
SMALL_RATE, LARGE_RATE = 1e-4, 100.0  # of the axes of rates: linear below, ended at
COLOUR_MAP = "viridis"  # evenly from dark to light, also in grey and for the colour-blind


def heat_maps(table: pd.DataFrame, x: str = "alpha_0", y: str = "beta_0") -> Figure:
    """Iterations until the threshold over two rates, on one colour scale; the cells' middle seeds.

    A panel for each pair of the hyper rates that are not on the axes: MAML is the pair of zeros.
    """
    use_style()
    cells = middle_seeds(table)
    apart = [name for name in HYPER_RATES if name not in (x, y)]
    panels: list = list(cells.groupby(apart)) if apart else [((), cells)]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    size = (1.95 * columns + 1.15, 2.45 * rows + 0.5) if apart else (4.2, 3.6)
    figure = plt.figure(figsize=size)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    fastest, limit = cells["reached_at"].min(), cells["iterations"].max()
    norm = LogNorm(fastest if fastest < limit else 1, limit)
    for axis, (hyper_rates, panel) in zip(axes.flat, panels, strict=False):
        heat_map(axis, panel, x, y, norm)
        if apart:
            method = "Alpha MAML" if any(hyper_rates) else "MAML"
            axis.set_title(f"{method}\n{hyper_rates_label(hyper_rates)}")
    for axis in axes.flat[len(panels) - columns : len(panels)]:  # the lowest of each column
        axis.tick_params(labelbottom=True)
        axis.set_xlabel(SYMBOLS[x])
    for axis in axes[:, 0]:
        axis.set_ylabel(SYMBOLS[y])
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    shades = plt.cm.ScalarMappable(norm, COLOUR_MAP)
    bar = figure.colorbar(shades, ax=axes, label="iterations until the threshold", aspect=30)
    plain_log_ticks(bar.ax.yaxis)
    hatched = Patch(facecolor="white", edgecolor="0.5", hatch="////", label="not reached")
    cross = plt.Line2D([], [], color="black", marker="x", linestyle="", label="diverged")
    figure.legend(handles=[hatched, cross], loc="outside upper center", ncols=2)
    return figure


def heat_map(axis: Axes, cells: pd.DataFrame, x: str, y: str, norm: LogNorm) -> None:
    """One panel: shade and number where the threshold was reached, a sign where it was not."""
    sides = {name: sorted(cells[name].unique()) for name in (x, y)}
    for _, cell in cells.iterrows():
        column, row = sides[x].index(cell[x]), sides[y].index(cell[y])
        corner = (column - 0.5, row - 0.5)
        square = axis.add_patch(plt.Rectangle(corner, 1, 1, facecolor="white", edgecolor="white"))
        if cell["outcome"] == "reached":
            shade = plt.get_cmap(COLOUR_MAP)(norm(cell["reached_at"]))
            square.set_facecolor(shade)
            ink = "white" if np.dot(shade[:3], (0.299, 0.587, 0.114)) < 0.5 else "black"
            number = f"{cell['reached_at']:.0f}"
            axis.text(column, row, number, color=ink, size=6.5, ha="center", va="center")
        else:
            square.set(edgecolor="0.7", linewidth=0.5)
            if cell["outcome"] == "not reached":
                square.set_hatch("////")
            else:
                axis.plot(column, row, "x", color="black", markersize=5)
    axis.set(xlim=(-0.5, len(sides[x]) - 0.5), ylim=(-0.5, len(sides[y]) - 0.5), aspect="equal")
    axis.set_xticks(range(len(sides[x])), rate_labels(sides[x]), fontsize=8)
    axis.set_yticks(range(len(sides[y])), rate_labels(sides[y]), fontsize=8)
    axis.tick_params(length=2)


def rate_labels(rates: list[float]) -> list[str]:
    """Rates as short as they fit below the cells of a panel; of many only the powers of ten."""
    few = len(rates) <= 6
    return [rate_label(rate) if few or is_power_of_ten(rate) else "" for rate in rates]


def rate_label(rate: float) -> str:
    if is_power_of_ten(abs(rate)) and abs(rate) < 0.1:
        return f"${'-' if rate < 0 else ''}10^{{{math.log10(abs(rate)):.0f}}}$"
    return f"{rate:g}"


def is_power_of_ten(rate: float) -> bool:
    return rate > 0 and math.isclose(math.log10(rate), round(math.log10(rate)), abs_tol=1e-9)


def hyper_rates_label(hyper_rates: Pair) -> str:
    alpha, beta = hyper_rates
    if alpha == beta:
        return rf"$h_\alpha = h_\beta$ = {alpha:g}"
    return rf"$h_\alpha$ = {alpha:g}, $h_\beta$ = {beta:g}"


def slices(table: pd.DataFrame) -> Figure:
    """The grid along alpha_0 and along beta_0 through MAML's best cell, MAML beside each pair.

    Markers are the middle seeds, lines join those that reached the threshold, bands reach from the
    first seed to the last. What did not reach it, or diverged, stands in a grey strip of its own
    above the limit.
    """
    use_style()
    best, limit = best_start(table), table["iterations"].max()
    pairs = [pair for pair, _ in table.groupby(HYPER_RATES) if any(pair)]
    strip = {"not reached": 1.6 * limit, "diverged": 2.9 * limit}
    counts = [n for n in (5, 10, 20, 50, 100, 200, 500, 1000) if n <= limit]
    figure = plt.figure(figsize=(1.6 * len(pairs) + 1.0, 4.4))
    axes = figure.subplots(2, len(pairs), sharex="row", sharey=True, squeeze=False)
    for row, (along, fixed) in zip(axes, (CELL[:2], CELL[1::-1]), strict=True):
        through = table[table[fixed] == best[fixed]]
        for axis, pair in zip(row, pairs, strict=True):
            for method, rates in zip(METHODS, ((0.0, 0.0), pair), strict=True):
                shown = through[(through[HYPER_RATES] == list(rates)).all(axis=1)]
                one_slice(axis, shown, along, method, strip)
            axis.set(xscale="log", yscale="log", xlabel=SYMBOLS[along])
            axis.axhspan(1.2 * limit, 4.2 * limit, color="0.93", linewidth=0, zorder=0)
            axis.set_yticks([*counts, *strip.values()], [*map(str, counts), *strip])
            axis.set_ylim(top=4.2 * limit)
            axis.minorticks_off()
        row[0].set_ylabel(f"iterations\n({SYMBOLS[fixed]} = {best[fixed]:g})")
    for axis, pair in zip(axes[0], pairs, strict=True):
        axis.set_title(hyper_rates_label(pair))
    figure.legend(handles=[legend_key(m) for m in METHODS], loc="outside upper center", ncols=2)
    return figure


def one_slice(axis: Axes, table: pd.DataFrame, along: str, method: str, strip: dict) -> None:
    """The line, band and markers of a method; `strip` says where what has no number stands."""

    def heights(runs: pd.DataFrame) -> pd.Series:
        return runs["reached_at"].fillna(runs["outcome"].map(strip))

    runs, middle = until_threshold(table), middle_seeds(table).sort_values(along)
    band = heights(runs).groupby(runs[along]).agg(["min", "max"])
    look = LOOKS[method]
    colour = look["color"]
    axis.fill_between(band.index, band["min"], band["max"], color=colour, alpha=0.2, linewidth=0)
    axis.plot(middle[along], middle["reached_at"], **look | {"marker": ""})
    axis.plot(middle[along], heights(middle), **look | {"linestyle": "", "clip_on": False})


def paths(table: pd.DataFrame) -> Figure:
    """The paths of alpha and beta from many starts: in their plane, and against the iteration.

    A path goes from a circle to a dot, or to a cross where its run diverged. Rates can be negative,
    so their axes are logarithmic beyond +-SMALL_RATE and linear between; at +-LARGE_RATE they end.
    """
    use_style()
    figure = plt.figure(figsize=(7, 3.7))
    axes = figure.subplot_mosaic([["plane", "alpha"], ["plane", "beta"]], width_ratios=(1.25, 1))
    colour = LOOKS["Alpha MAML"]["color"]
    panels = ((axes["plane"], "alpha", "beta"), (axes["alpha"], "iteration", "alpha"))
    for axis, x, y in (*panels, (axes["beta"], "iteration", "beta")):
        for _, run in table.groupby("run"):
            path = run[np.isfinite(run[[x, y]]).all(axis=1)]
            axis.plot(path[x], path[y], color=colour, linewidth=0.8, alpha=0.6)
            end = "x" if (run["status"] == "diverged").any() else "o"
            axis.plot(path[x].iloc[-1:], path[y].iloc[-1:], end, color=colour, ms=4, zorder=3)
            axis.plot(path[x].iloc[:1], path[y].iloc[:1], "o", color="0.2", ms=4.5, mfc="white")
        axis.set(xlabel=SYMBOLS.get(x, "iteration t"), ylabel=SYMBOLS[y])
        rate_axis(axis, "y", table[y])
    rate_axis(axes["plane"], "x", table["alpha"])
    dot: dict = {"color": colour, "marker": "o", "markersize": 4.5}
    start = plt.Line2D([], [], **dot, mfc="white", mec="0.2", ls="", label="start")
    path_and_end = plt.Line2D([], [], **dot, label="path and end")
    figure.legend(handles=[start, path_and_end], loc="outside upper center", ncols=2)
    return figure


def rate_axis(axis: Axes, side: str, rates: pd.Series) -> None:
    """Make a side ("x" or "y") logarithmic, for rates of either sign."""
    rates = rates[np.isfinite(rates)]
    low = max(-LARGE_RATE, 2 * rates.min()) if rates.min() < 0 else 0
    high = min(LARGE_RATE, 2 * rates.max())
    decades = 10.0 ** np.arange(-4, 3)  # from SMALL_RATE to LARGE_RATE
    signed = (*-decades[2::2], 0.0, *decades[2::2]) if low else (0.0, *decades[1:])
    ticks = [tick for tick in signed if low <= tick <= high]
    getattr(axis, f"set_{side}scale")("symlog", linthresh=SMALL_RATE, linscale=0.4)
    getattr(axis, f"set_{side}ticks")(ticks, [rate_label(tick) for tick in ticks])
    axis.set(**{f"{side}lim": (low, high)})
    axis.minorticks_off()


def curves(table: pd.DataFrame, start: Pair, hyper_rates: Pair) -> Figure:
    """One cell of a grid: alpha, beta and validation loss of MAML and Alpha MAML, a line per seed.

    `start` is (alpha_0, beta_0), `hyper_rates` is (h_alpha, h_beta). A line ends in a dot where its
    run reached the threshold (dotted, like the loss of guessing), in a cross where it diverged.
    """
    use_style()
    figure, axes = plt.subplots(1, 3, figsize=(7, 2.7))
    labels = {"alpha": r"$\alpha$", "beta": r"$\beta$", "validation_loss": "validation loss"}
    in_cell = (table[CELL[:2]] == list(start)).all(axis=1)
    cells = {
        method: table[in_cell & (table[HYPER_RATES] == list(rates)).all(axis=1)]
        for method, rates in zip(METHODS, ((0.0, 0.0), hyper_rates), strict=True)
    }
    for axis, (quantity, label) in zip(axes, labels.items(), strict=True):
        for method, cell in cells.items():
            for _, run in cell.groupby("run"):
                line = run[np.isfinite(run[quantity])]
                marker = {"reached": "o", "diverged": "x"}.get(run["status"].iloc[0])
                end = {"marker": marker, "markevery": [-1], "markersize": 4, "fillstyle": "full"}
                look = LOOKS[method] | end | {"linewidth": 1}
                axis.plot(line["iteration"], line[quantity], **look)
        axis.set(xlabel="iteration t", ylabel=label)
    for axis, rate in zip(axes, ("alpha", "beta"), strict=False):
        rate_axis(axis, "y", pd.concat(cells.values())[rate])
    loss_axis(axes[-1], table["validation_loss"], math.log(table["n_way"].max()))
    axes[-1].axhline(table["threshold"].max(), color="0.4", linestyle=":", linewidth=0.8)
    rates = zip(CELL, (*start, *hyper_rates), strict=True)
    figure.suptitle(", ".join(f"{SYMBOLS[name]} = {rate:g}" for name, rate in rates), fontsize=9)
    handles = [legend_key(method, marker="") for method in METHODS]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure
