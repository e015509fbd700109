"""The figures that show counts until a threshold, and paths and curves of the same runs."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba

from amaml.paper import figures, grid_figures

LIMIT = 40


def run(until, status, alpha, beta, hyper_rate, seed) -> pd.DataFrame:
    """A run whose only validation below the threshold, if it is "reached", is its last."""
    iteration = np.arange(1, until + 1)
    losses = np.where(iteration % 5 == 0, 1.5, np.nan)
    losses[-1] = {"reached": 0.9, "done": 1.5, "diverged": np.inf}[status]
    return pd.DataFrame({
        "run": f"{alpha} {beta} {hyper_rate} {seed}", "seed": seed, "status": status, "n_way": 5,
        "method": "Alpha MAML" if hyper_rate else "MAML", "alpha_0": alpha, "beta_0": beta,
        "hyper_alpha": hyper_rate, "hyper_beta": hyper_rate, "threshold": 1.0, "iterations": LIMIT,
        "iteration": iteration, "validation_loss": losses,
        "alpha": alpha - 0.002 * (iteration - 1), "beta": beta * iteration,
    })  # fmt: skip


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """Two by two cells, MAML and two pairs, three seeds."""
    runs = []
    for seed in range(3):
        for hyper_rate in (0.0, 0.001, 0.01):
            for alpha in (0.01, 0.1):
                for beta in (0.01, 0.1):
                    if hyper_rate == 0.01 and alpha == beta == 0.1:
                        end = (10, "diverged")
                    elif hyper_rate or alpha == 0.1:
                        end = (10 + 5 * seed + (5 if beta == 0.01 else 0), "reached")
                    else:
                        end = (LIMIT, "done")
                    runs.append(run(*end, alpha, beta, hyper_rate, seed))
    return pd.concat(runs, ignore_index=True)


def test_heat_maps_number_the_cells_that_reached_it_and_no_others(table):
    figure = grid_figures.heat_maps(table)
    panels = [axis for axis in figure.axes if axis.get_title()]
    assert [axis.get_title().split("\n")[0] for axis in panels] == ["MAML"] + 2 * ["Alpha MAML"]
    numbers = [sorted(text.get_text() for text in axis.texts) for axis in panels]
    assert numbers == [["15", "20"], ["15", "15", "20", "20"], ["15", "20", "20"]]
    crosses = [[tuple(line.get_xydata()[0]) for line in axis.lines] for axis in panels]
    assert crosses == [[], [], [(1, 1)]]
    hatched = [sum(patch.get_hatch() is not None for patch in axis.patches) for axis in panels]
    assert hatched == [2, 0, 0]
    shades = {}  # one colour scale: the same number has the same shade in all panels
    for axis in panels:
        where = {text.get_position(): text.get_text() for text in axis.texts}
        for patch in axis.patches:
            centre = (patch.get_x() + 0.5, patch.get_y() + 0.5)
            if centre in where:
                shades.setdefault(where[centre], set()).add(patch.get_facecolor())
            else:
                assert patch.get_facecolor() == to_rgba("white")
    assert [len(shade) for shade in shades.values()] == [1, 1]
    plt.close(figure)


def test_slices_go_through_the_best_cell_of_maml_and_leave_out_what_has_no_number(table):
    figure = grid_figures.slices(table)
    first, last = figure.axes[0], figure.axes[3]  # along alpha, first pair; along beta, second
    line, marks = first.lines[:2]  # of MAML
    assert line.get_ydata()[1] == 15 and math.isnan(line.get_ydata()[0])
    labels = [tick.get_text() for tick in first.get_yticklabels()]
    strip = dict(zip(labels, first.get_yticks(), strict=True))
    assert marks.get_ydata().tolist() == [strip["not reached"], 15] and strip["not reached"] > LIMIT
    marks = last.lines[3]  # of Alpha MAML at alpha_0 = 0.1
    assert marks.get_ydata().tolist() == [20, strip["diverged"]]
    plt.close(figure)


def test_paths_start_at_the_starting_rates_and_hold_negative_rates(table):
    figure = grid_figures.paths(table)
    plane = figure.axes[0]
    starts = {tuple(line.get_xydata()[0]) for line in plane.lines if line.get_mfc() == "white"}
    assert starts == {(alpha, beta) for alpha in (0.01, 0.1) for beta in (0.01, 0.1)}
    assert plane.get_xlim()[0] < table["alpha"].min() < 0
    crosses = [line for line in plane.lines if line.get_marker() == "x"]
    assert len(crosses) == table[table["status"] == "diverged"]["run"].nunique()
    plt.close(figure)


def test_curves_show_both_methods_of_a_cell_a_line_per_seed(table):
    figure = grid_figures.curves(table, (0.1, 0.1), (0.01, 0.01))
    name = r"$\alpha_0$ = 0.1, $\beta_0$ = 0.1, $h_\alpha$ = 0.01, $h_\beta$ = 0.01"
    assert figure.get_suptitle() == name
    lines = [(line.get_color(), line.get_marker()) for line in figure.axes[0].lines]
    maml, ours = figures.COLOURS["MAML"], figures.COLOURS["Alpha MAML"]
    assert lines == [(maml, "o")] * 3 + [(ours, "x")] * 3
    plt.close(figure)


@pytest.mark.parametrize("draw", [grid_figures.heat_maps, grid_figures.slices, grid_figures.paths])
def test_equal_tables_give_equal_bytes(table, tmp_path, draw):
    drawn = []
    for folder in ("first", "second"):
        figure = draw(table.copy())
        drawn.append([path.read_bytes() for path in figures.save(figure, "f", folder, tmp_path)])
        plt.close(figure)
    assert drawn[0] == drawn[1]
