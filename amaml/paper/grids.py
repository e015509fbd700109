"""Figures 2 and 3 and those of the appendix that are like them, drawn from their records.

They count iterations until the validation loss first reaches the runs' threshold. A run that never
does has no such number: it is "not reached", or "diverged", and is drawn as that.
"""

from __future__ import annotations

import math
import os

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from amaml.paper.figures import COLOURS, METHODS, loss_axis, use_style

OUTCOMES = ("reached", "not reached", "diverged")  # from the best to the worst
HYPER_RATES = ["hyper_alpha", "hyper_beta"]
CELL = ["alpha_0", "beta_0", *HYPER_RATES]
SYMBOLS = {"alpha_0": r"$\alpha_0$", "beta_0": r"$\beta_0$", "alpha": r"$\alpha$"}
SYMBOLS |= {"beta": r"$\beta$", "hyper_alpha": r"$h_\alpha$", "hyper_beta": r"$h_\beta$"}
SMALL_RATE, LARGE_RATE = 1e-4, 100.0  # of the axes of rates: linear below, ended at
COLOUR_MAP = "viridis"  # evenly from dark to light, also in grey and for the colour-blind


# -- counting ---------------------------------------------------------------------------------


def until_threshold(table: pd.DataFrame) -> pd.DataFrame:
    """A row a run: when its validation loss was first at most its threshold.

    The columns that are constant within a run (labels, config, status), `outcome` (one of
    OUTCOMES), and `reached_at`, an iteration where the outcome is "reached" and empty elsewhere.
    """
    runs = table.groupby("run", sort=False).first()
    below = table[table["validation_loss"] <= table["threshold"]]
    first = below.groupby("run")["iteration"].min().reindex(runs.index)
    missed = np.where(runs["status"] == "diverged", "diverged", "not reached")
    return runs.assign(reached_at=first, outcome=np.where(first.notna(), "reached", missed))


def middle_seeds(table: pd.DataFrame, cell: list[str] = CELL) -> pd.DataFrame:
    """A row a cell: its middle seed, and how many seeds it has and how many reached the threshold.

    The seeds of a cell are ordered from the first to reach the threshold to the last, then those
    that did not reach it, then those that diverged; of two in the middle the worse is taken.
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


# -- heat maps --------------------------------------------------------------------------------


def heat_maps(table: pd.DataFrame, x: str = "alpha_0", y: str = "beta_0") -> Figure:
    """Iterations until the threshold over two rates, on one colour scale; the cells' middle seeds.

    A panel for each pair of the hyper rates that are not on the axes: MAML is the pair of zeros.
    """
    use_style()
    cells = middle_seeds(table)
    apart = [name for name in HYPER_RATES if name not in (x, y)]
    panels = list(cells.groupby(apart)) if apart else [((), cells)]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    width, height = (1.95 * columns + 1.15, 2.45 * rows + 0.5) if apart else (4.2, 3.6)
    figure, axes = plt.subplots(
        rows, columns, figsize=(width, height), sharex=True, sharey=True, squeeze=False
    )
    fastest, limit = cells["reached_at"].min(), cells["iterations"].max()
    norm = LogNorm(fastest if fastest < limit else 1, limit)
    for axis, (hyper_rates, panel) in zip(axes.flat, panels, strict=False):
        heat_map(axis, panel, x, y, norm)
        axis.set_title(panel_title(hyper_rates) if apart else "")
    for axis in axes.flat[len(panels) - columns : len(panels)]:  # the lowest of each column
        axis.tick_params(labelbottom=True)
        axis.set_xlabel(SYMBOLS[x])
    for axis in axes[:, 0]:
        axis.set_ylabel(SYMBOLS[y])
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    shades = plt.cm.ScalarMappable(norm, COLOUR_MAP)
    bar = figure.colorbar(shades, ax=axes, label="iterations until the threshold", aspect=30)
    count_axis(bar.ax.yaxis)
    handles = [
        Patch(facecolor="white", edgecolor="0.5", hatch="////", label="not reached"),
        plt.Line2D([], [], color="black", marker="x", linestyle="", label="diverged"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return figure


def heat_map(axis, cells: pd.DataFrame, x: str, y: str, norm: LogNorm) -> None:
    """One panel: shade and number where the threshold was reached, a sign where it was not."""
    sides = {name: sorted(cells[name].unique()) for name in (x, y)}
    for _, cell in cells.iterrows():
        column, row = sides[x].index(cell[x]), sides[y].index(cell[y])
        square = {"xy": (column - 0.5, row - 0.5), "width": 1, "height": 1}
        if cell["outcome"] == "reached":
            shade = plt.get_cmap(COLOUR_MAP)(norm(cell["reached_at"]))
            axis.add_patch(plt.Rectangle(**square, facecolor=shade, edgecolor="white"))
            ink = "white" if np.dot(shade[:3], (0.299, 0.587, 0.114)) < 0.5 else "black"
            number = f"{cell['reached_at']:.0f}"
            axis.text(column, row, number, color=ink, size=6.5, ha="center", va="center")
        else:
            hatch = "////" if cell["outcome"] == "not reached" else None
            signs = {"facecolor": "white", "edgecolor": "0.7", "hatch": hatch, "linewidth": 0.5}
            axis.add_patch(plt.Rectangle(**square, **signs))
            if cell["outcome"] == "diverged":
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


def panel_title(hyper_rates: tuple[float, float]) -> str:
    """The method and, on a second line, its hyper rates; those of MAML are zero."""
    alpha, beta = (f"{rate:g}" for rate in hyper_rates)
    method = "Alpha MAML" if any(hyper_rates) else "MAML"
    if alpha == beta:
        return f"{method}\n" + rf"$h_\alpha = h_\beta$ = {alpha}"
    return f"{method}\n" + rf"$h_\alpha$ = {alpha}, $h_\beta$ = {beta}"


def count_axis(axis) -> None:
    """Ticks of a logarithmic axis of iterations."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


# -- slices -----------------------------------------------------------------------------------


def slices(table: pd.DataFrame) -> Figure:
    """The grid along alpha_0 and along beta_0 through MAML's best cell, MAML beside each pair.

    Markers are the middle seeds, lines join those that reached the threshold, bands reach from the
    first seed to the last. What did not reach it, or diverged, stands in a grey strip of its own
    above the limit.
    """
    use_style()
    best, runs, limit = best_start(table), until_threshold(table), table["iterations"].max()
    pairs = [pair for pair, _ in runs.groupby(HYPER_RATES) if any(pair)]
    strip = {"not reached": 1.6 * limit, "diverged": 2.9 * limit}
    figure, axes = plt.subplots(
        2, len(pairs), figsize=(1.6 * len(pairs) + 1.0, 4.4), sharey=True, sharex="row",
        squeeze=False,
    )  # fmt: skip
    for row, (along, fixed) in zip(axes, (CELL[:2], CELL[1::-1]), strict=True):
        through = table[table[fixed] == best[fixed]]
        for axis, pair in zip(row, pairs, strict=True):
            for method, rates in zip(METHODS, ((0.0, 0.0), pair), strict=True):
                shown = through[(through[HYPER_RATES] == list(rates)).all(axis=1)]
                one_slice(axis, shown, along, method, strip)
            axis.set(xscale="log", yscale="log", xlabel=SYMBOLS[along])
            axis.axhspan(1.2 * limit, 4.2 * limit, color="0.93", linewidth=0, zorder=0)
            counts = [n for n in (5, 10, 20, 50, 100, 200, 500, 1000) if n <= limit]
            axis.set_yticks([*counts, *strip.values()], [*map(str, counts), *strip])
            axis.set_ylim(top=4.2 * limit)
            axis.minorticks_off()
            if along == "alpha_0":
                axis.set_title(panel_title(pair).partition("\n")[2])
        row[0].set_ylabel(f"iterations\n({SYMBOLS[fixed]} = {best[fixed]:g})")
    figure.legend(handles=[key(method) for method in METHODS], loc="outside upper center", ncols=2)
    return figure


def one_slice(axis, table: pd.DataFrame, along: str, method: str, strip: dict) -> None:
    """The line, band and markers of a method; `strip` says where what has no number stands."""

    def heights(runs: pd.DataFrame) -> pd.Series:
        return runs["reached_at"].fillna(runs["outcome"].map(strip))

    runs, middle = until_threshold(table), middle_seeds(table).sort_values(along)
    band = heights(runs).groupby(runs[along]).agg(["min", "max"])
    colour = COLOURS[method]
    axis.fill_between(band.index, band["min"], band["max"], color=colour, alpha=0.2, linewidth=0)
    line = key(method)
    axis.plot(middle[along], middle["reached_at"], color=colour, linestyle=line.get_linestyle())
    axis.plot(
        middle[along], heights(middle), color=colour, linestyle="", clip_on=False,
        marker=line.get_marker(), markersize=line.get_markersize(), fillstyle=line.get_fillstyle(),
    )  # fmt: skip


def key(method: str, **changes) -> plt.Line2D:
    """How a method is drawn: MAML's open square is seen around Alpha MAML's dot."""
    marks = {"marker": "s", "markersize": 6.5, "fillstyle": "none", "linestyle": "--"}
    if method == "Alpha MAML":
        marks = {"marker": "o", "markersize": 3.5, "linestyle": "-"}
    return plt.Line2D([], [], color=COLOURS[method], label=method, **marks | changes)


# -- paths and single runs --------------------------------------------------------------------


def paths(table: pd.DataFrame) -> Figure:
    """The paths of alpha and beta from many starts: in their plane, and against the iteration.

    A path goes from a circle to a dot, or to a cross where its run diverged. Rates can be negative,
    so their axes are logarithmic beyond +-SMALL_RATE and linear between; at +-LARGE_RATE they end.
    """
    use_style()
    figure = plt.figure(figsize=(7, 3.7))
    plane = figure.subplot_mosaic([["plane", "alpha"], ["plane", "beta"]], width_ratios=(1.25, 1))
    panels = ((plane["plane"], "alpha", "beta"), (plane["alpha"], "iteration", "alpha"))
    colour = COLOURS["Alpha MAML"]
    for axis, x, y in (*panels, (plane["beta"], "iteration", "beta")):
        for _, run in table.groupby("run"):
            path = run[np.isfinite(run[[x, y]]).all(axis=1)]
            axis.plot(path[x], path[y], color=colour, linewidth=0.8, alpha=0.6)
            end = "x" if (run["status"] == "diverged").any() else "o"
            axis.plot(path[x].iloc[-1:], path[y].iloc[-1:], end, color=colour, ms=4, zorder=3)
            axis.plot(path[x].iloc[:1], path[y].iloc[:1], "o", color="0.2", ms=4.5, mfc="white")
        axis.set(xlabel=SYMBOLS.get(x, "iteration t"), ylabel=SYMBOLS[y])
        rate_axis(axis, "y", table[y])
        if x == "alpha":
            rate_axis(axis, "x", table[x])
    ends = ({"marker": "o", "mfc": "white", "mec": "0.2", "ls": ""}, {"marker": "o"})
    handles = [
        plt.Line2D([], [], color=colour, label=label, ms=4.5, **end)
        for label, end in zip(("start", "path and end"), ends, strict=True)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return figure


def rate_axis(axis, side: str, rates: pd.Series) -> None:
    """Make a side ("x" or "y") logarithmic, for rates of either sign."""
    rates = rates[np.isfinite(rates)]
    low = max(-LARGE_RATE, 2 * rates.min()) if rates.min() < 0 else 0
    high = min(LARGE_RATE, 2 * rates.max())
    decades = 10.0 ** np.arange(round(math.log10(SMALL_RATE)), round(math.log10(LARGE_RATE)) + 1)
    signed = (*-decades[2::2], 0, *decades[2::2]) if low else (0, *decades[1:])
    ticks = [tick for tick in signed if low <= tick <= high]
    getattr(axis, f"set_{side}scale")("symlog", linthresh=SMALL_RATE, linscale=0.4)
    getattr(axis, f"set_{side}ticks")(ticks, [rate_label(tick) for tick in ticks])
    axis.set(**{f"{side}lim": (low, high)})
    axis.minorticks_off()


def curves(table: pd.DataFrame, start: tuple, hyper_rates: tuple) -> Figure:
    """One cell of a grid: alpha, beta and validation loss of MAML and Alpha MAML, a line a seed.

    `start` is (alpha_0, beta_0), `hyper_rates` is (h_alpha, h_beta). A line ends in a dot where its
    run reached the threshold (dotted, like the loss of guessing), in a cross where it diverged.
    """
    use_style()
    quantities = {"alpha": r"$\alpha$", "beta": r"$\beta$", "validation_loss": "validation loss"}
    figure, axes = plt.subplots(1, len(quantities), figsize=(7, 2.7))
    cells = {
        method: table[(table[CELL] == [*start, *rates]).all(axis=1)]
        for method, rates in zip(METHODS, ((0.0, 0.0), hyper_rates), strict=True)
    }
    for axis, (quantity, label) in zip(axes, quantities.items(), strict=True):
        for method, cell in cells.items():
            for _, run in cell.groupby("run"):
                line = run[np.isfinite(run[quantity])]
                axis.plot(
                    line["iteration"], line[quantity], color=COLOURS[method], linewidth=1,
                    linestyle=key(method).get_linestyle(), markevery=[-1], markersize=4,
                    marker={"reached": "o", "diverged": "x"}.get(run["status"].iloc[0]),
                )  # fmt: skip
        axis.set(xlabel="iteration t", ylabel=label)
        if quantity in ("alpha", "beta"):
            rate_axis(axis, "y", pd.concat(cells.values())[quantity])
    loss_axis(axes[-1], table["validation_loss"], table["n_way"].max())
    axes[-1].axhline(table["threshold"].max(), color="0.4", linestyle=":", linewidth=0.8)
    rates = zip(CELL, (*start, *hyper_rates), strict=True)
    figure.suptitle(", ".join(f"{SYMBOLS[name]} = {rate:g}" for name, rate in rates), fontsize=9)
    handles = [key(method, marker="") for method in METHODS]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def explore(table: pd.DataFrame, start: tuple, hyper_rates: tuple) -> None:
    """Show the `curves` of a cell; in a live JupyterLab with widgets that choose the cell.

    Where a notebook is executed in batch nobody chooses and no kernel would answer: the picture
    of the given cell alone. Jupyter's server tells its kernels by JPY_SESSION_NAME.
    """

    def show(alpha_0, beta_0, hyper_rates):
        curves(table, (alpha_0, beta_0), hyper_rates)
        plt.show()

    if "JPY_SESSION_NAME" not in os.environ:
        show(*start, hyper_rates)
        return
    from ipywidgets import Dropdown, SelectionSlider, interact

    sides = {
        name: SelectionSlider(
            options=[(f"{rate:g}", rate) for rate in sorted(table[name].unique())],
            value=value, description=SYMBOLS[name], continuous_update=False,
        )
        for name, value in zip(CELL[:2], start, strict=True)
    }  # fmt: skip
    pairs = [pair for pair, _ in table.groupby(HYPER_RATES) if any(pair)]
    options = [(" and ".join(f"{rate:g}" for rate in pair), pair) for pair in pairs]
    wide = {"description": r"$h_\alpha$ and $h_\beta$", "style": {"description_width": "initial"}}
    interact(show, **sides, hyper_rates=Dropdown(options=options, value=hyper_rates, **wide))
