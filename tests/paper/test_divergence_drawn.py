"""Every figure shows each run that diverged, in its colour, where it ended."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from amaml.paper import figures, grid_figures
from amaml.paper.thresholds import CELL

ITERATIONS = 14
STARTS = (0.01, 0.1)
PAIRS = ((0.0, 0.0), (0.001, 0.001))


def one_run(last: int | None, seed: int, alpha: float, pair: tuple) -> pd.DataFrame:
    """A run that diverged at iteration `last`, or (None) never did, as it is published."""
    iteration = np.arange(1, (last or ITERATIONS) + 1)
    table = pd.DataFrame({
        "run": f"{alpha} {pair} {seed}", "seed": seed, "status": "diverged" if last else "done",
        "case": "good" if alpha == STARTS[0] else "too large", "n_way": 5,
        "data": "omniglot", "k_shot": 1, "inner_steps": 1, "meta_batch_size": 8,
        "method": "Alpha MAML" if any(pair) else "MAML", "alpha_0": alpha, "beta_0": 0.1,
        "hyper_alpha": pair[0], "hyper_beta": pair[1], "threshold": 1.0, "validation_every": 5,
        "iterations": ITERATIONS, "iteration": iteration, "query_loss": 1.5, "gradient_norm": 1.0,
        "alpha": alpha + 0.001 * (iteration - 1), "beta": 0.1,
        "validation_loss": np.where(iteration % 5 == 0, 1.5 - iteration / 20, np.nan),
    })  # fmt: skip
    if last:
        table.loc[table.index[-1], ["query_loss", "gradient_norm"]] = [math.inf, math.nan]
    return table


SOME = {(0.01, 0.001): 1, (0.1, 0.0): 7}
ALL = {(alpha, pair[0]): at for (alpha, at) in zip(STARTS, (1, 7), strict=True) for pair in PAIRS}
AT_ONCE = dict.fromkeys(ALL, 1)


@pytest.fixture(params=[SOME, ALL, AT_ONCE], ids=["some", "all", "all at once"])
def table(request):
    """Two starts, MAML and Alpha MAML, two seeds; the parameter says which diverged, and where."""
    runs = [
        one_run(request.param.get((alpha, pair[0])), seed, alpha, pair)
        for seed in range(2)
        for alpha in STARTS
        for pair in PAIRS
    ]
    yield pd.concat(runs, ignore_index=True)
    plt.close("all")


def diverged(table: pd.DataFrame, *columns: str) -> list[tuple]:
    """These columns of the last row of each run that diverged."""
    ends = table[table["status"] == "diverged"].groupby("run").last()
    ends["colour"] = ends["method"].map(figures.COLOURS)
    return sorted(ends[list(columns)].itertuples(index=False, name=None))


def crosses(figure, *axes) -> list[tuple]:
    """Colour and end of each line that ends in a cross; only what can be seen."""
    figure.canvas.draw()
    lines = [line for axis in axes for line in axis.lines if line.get_marker() == "x"]
    seen = [line for line in lines if len(line.get_xydata())]
    return sorted((to_hex(line.get_color()).upper(), *line.get_xydata()[-1]) for line in seen)


def test_figure_1_marks_each_run_that_diverged(table):
    figure = figures.figure_1(table)
    columns = table["case"].nunique()
    for row, rate in enumerate(("alpha", "beta")):
        axes = figure.axes[row * columns : (row + 1) * columns]
        assert crosses(figure, *axes) == diverged(table, "colour", "iteration", rate)


def test_heat_maps_mark_each_cell_that_diverged(table):
    figure = grid_figures.heat_maps(table)
    assert len(crosses(figure, *figure.axes)) == len(set(diverged(table, *CELL))) >= 2


def test_slices_show_what_diverged_as_not_reached(table):
    axis = grid_figures.slices(table).axes[0]  # along alpha
    ticks = [tick.get_text() for tick in axis.get_yticklabels()]
    height = axis.get_yticks()[ticks.index("not reached")]
    lines = [line for line in axis.lines if line.get_marker() in "so"]
    shown = [y for line in lines for y in line.get_ydata()]
    assert shown.count(height) == len(set(diverged(table, "method", "alpha_0")))


def test_paths_end_in_crosses(table):
    figure = grid_figures.paths(table)
    for axis, rate in zip(figure.axes, ("alpha", "beta"), strict=True):
        ends = [(x, y) for _, x, y in crosses(figure, axis)]
        assert sorted(ends) == diverged(table, "iteration", rate)
