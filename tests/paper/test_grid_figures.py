"""The figures that show counts until a threshold, and the paths of the rates."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from amaml.paper import figures, grid_figures

LIMIT = 40


def run(until, status, alpha, beta, hyper_rate, seed) -> pd.DataFrame:
    """A run whose only validation below the threshold, if it is "reached", is its last."""
    iteration = np.arange(1, until + 1)
    losses = np.where(iteration % 5 == 0, 1.5, np.nan)
    losses[-1] = {"reached": 0.9, "done": 1.5, "diverged": np.inf}[status]
    return pd.DataFrame({
        "run": f"{alpha} {beta} {hyper_rate} {seed}", "seed": seed, "status": status, "n_way": 5,
        "data": "omniglot", "k_shot": 1, "inner_steps": 1, "meta_batch_size": 8,
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


def test_heat_maps_number_the_cells_that_most_seeds_reached_and_no_others(table):
    late = (table["seed"] == 2) & (table["run"] == "0.1 0.1 0.0 2")
    table = table[~(late & (table["validation_loss"] < 1))]  # this seed of MAML does not get there
    figure = grid_figures.heat_maps(table)
    panels = [axis for axis in figure.axes if axis.get_title()]
    assert [axis.get_title().split("\n")[0] for axis in panels] == ["MAML"] + 2 * ["Alpha MAML"]
    texts = [{t.get_position(): t.get_text() for t in axis.texts} for axis in panels]
    numbers = [sorted(number for number in shown.values() if number) for shown in texts]
    # Seeds that lie ten iterations apart agree on tens; two of three are said
    assert numbers == [["2/3", "20", "20"], ["20"] * 4, ["20"] * 3]
    crosses = [[tuple(np.floor(line.get_xydata()[0])) for line in axis.lines] for axis in panels]
    assert crosses == [[], [], [(1, 1)]]
    shades = [axis.collections[0].get_array() for axis in panels]
    assert [int(np.isnan(np.ma.filled(shade, np.nan)).sum()) for shade in shades] == [2, 0, 1]
    assert len({axis.collections[0].norm for axis in panels}) == 1  # one colour scale
    plt.close(figure)


@pytest.mark.parametrize(
    "count, spread, number",
    [
        (35, 0, "35"),
        (35, 5, "35"),
        (35, 10, "40"),
        (45, 300, "50"),  # one digit stays
        (185, 30, "190"),
        (185, math.inf, "200"),
        (math.nan, math.nan, ""),
    ],
)
def test_a_cells_number_is_rounded_to_what_its_seeds_agree_on(count, spread, number):
    assert grid_figures.cell_number(pd.Series({"reached_at": count, "spread": spread})) == number


def test_slices_go_through_the_best_cell_of_maml_and_leave_out_what_has_no_number(table):
    along_alpha, along_beta = grid_figures.slices(table, 0.01).axes
    line, marks = along_alpha.lines[:2]  # of MAML
    assert line.get_ydata()[1] == 15 and math.isnan(line.get_ydata()[0])
    labels = [tick.get_text() for tick in along_alpha.get_yticklabels()]
    never = along_alpha.get_yticks()[labels.index("not reached")]
    assert marks.get_ydata().tolist() == [never, 15] and never > LIMIT
    marks = along_beta.lines[3]  # of Alpha MAML at alpha_0 = 0.1
    assert marks.get_ydata().tolist() == [20, never]
    plt.close("all")


def test_paths_are_coloured_by_their_start_and_hold_negative_rates(table):
    figure = grid_figures.paths(table)
    panels = np.reshape(figure.axes, (2, 2))
    assert [axis.get_title() for axis in panels[0]] == [r"$\beta_0$ = 0.01", r"$\beta_0$ = 0.1"]
    for axis in panels[0]:
        lines = [line for line in axis.lines if len(line.get_xdata())]
        starts = {(line.get_ydata()[0], to_hex(line.get_color())) for line in lines}
        assert sorted(start for start, _ in starts) == [0.01, 0.1]
        assert axis.get_ylim()[0] < table["alpha"].min() < 0
    crosses = [line for axis in panels[0] for line in axis.lines if line.get_marker() == "x"]
    assert len(crosses) == table[table["status"] == "diverged"]["run"].nunique()
    plt.close(figure)


@pytest.mark.parametrize("draw", [grid_figures.heat_maps, grid_figures.slices, grid_figures.paths])
def test_equal_tables_give_equal_bytes(table, tmp_path, draw):
    drawn = []
    for folder in ("first", "second"):
        figure = draw(table.copy())
        drawn.append([path.read_bytes() for path in figures.save(figure, "f", folder, tmp_path)])
        plt.close(figure)
    assert drawn[0] == drawn[1]
