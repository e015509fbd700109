"""Counting iterations until a threshold, and the figures that show the counts."""

from __future__ import annotations

import math
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba

import amaml
from amaml.paper import figures, grids, records
from amaml.runs import provenance
from amaml.sweep import tabulate

LIMIT = 40


def one_run(status, losses, seed=0, alpha=0.1, beta=0.1, hyper=(0.0, 0.0)) -> pd.DataFrame:
    """A run of validations at iterations 5, 10, ... with the given losses, as `tabulate` has it."""
    config = amaml.RunConfig(
        alpha=alpha, beta=beta, hyper_alpha=hyper[0], hyper_beta=hyper[1], seed=seed,
        iterations=LIMIT, threshold=1.0, validation_every=5,
    )  # fmt: skip
    iteration = np.arange(1, 5 * len(losses) + 1)
    validation = np.full(len(iteration), np.nan)
    validation[4::5] = losses
    metrics = pd.DataFrame({
        "iteration": iteration, "query_loss": 1.5, "query_accuracy": 0.4, "gradient_norm": 1.0,
        "alpha": alpha - 0.002 * (iteration - 1), "beta": beta * iteration,
        "validation_loss": validation, "validation_accuracy": np.where(validation > 0, 0.5, np.nan),
    })  # fmt: skip
    run = SimpleNamespace(id=config.id, config=config, status=status, metrics=metrics)
    return tabulate(run, {"method": "Alpha MAML" if any(hyper) else "MAML"})


def reached(iteration, **where) -> pd.DataFrame:
    return one_run("reached", [1.5] * (iteration // 5 - 1) + [0.9], **where)


def not_reached(**where) -> pd.DataFrame:
    return one_run("done", [1.5] * (LIMIT // 5), **where)


def diverged(**where) -> pd.DataFrame:
    return one_run("diverged", [9.0, np.inf], **where)


def test_iterations_until_the_threshold_worked_out_by_hand():
    table = pd.concat([
        one_run("reached", [1.7, 1.2, 1.0], seed=0),  # at most the threshold: the third validation
        one_run("done", [1.7, 0.8, 1.4, 0.7], seed=1),  # the first time counts
        one_run("done", [1.7, 1.01, 1.2], seed=2),
        one_run("diverged", [1.7, math.nan], seed=3),
        one_run("diverged", [1.7, math.inf], seed=4),
    ])  # fmt: skip
    runs = grids.until_threshold(table).set_index("seed")
    assert runs["reached_at"].iloc[:2].tolist() == [15, 10]
    assert runs["reached_at"].iloc[2:].isna().all()
    assert runs["outcome"].tolist() == ["reached", "reached", "not reached", "diverged", "diverged"]


@pytest.mark.parametrize(
    "seeds, outcome, reached_at, count",
    [
        ((reached(30), reached(10), reached(20)), "reached", 20, 3),
        ((not_reached(), reached(10), reached(35)), "reached", 35, 2),
        ((diverged(), reached(10), not_reached()), "not reached", None, 1),
        ((diverged(), diverged(), reached(10)), "diverged", None, 1),
        ((reached(10), reached(20)), "reached", 20, 2),
        ((reached(10), not_reached()), "not reached", None, 1),
        ((diverged(),), "diverged", None, 0),
    ],
)
def test_a_cell_is_its_middle_seed_and_what_is_no_number_stays_none(
    seeds, outcome, reached_at, count
):
    seeds = [run.assign(run=f"run {i}", seed=i) for i, run in enumerate(seeds)]
    (cell,) = grids.middle_seeds(pd.concat(seeds)).to_dict("records")
    assert cell["outcome"] == outcome
    assert cell["reached_at"] == reached_at if reached_at else math.isnan(cell["reached_at"])
    assert (cell["seeds"], cell["seeds_reached"]) == (len(seeds), count)


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """Two by two cells, MAML and two pairs, three seeds."""
    runs = []
    for seed in range(3):
        for pair in ((0.0, 0.0), (0.001, 0.001), (0.01, 0.01)):
            for alpha in (0.01, 0.1):
                for beta in (0.01, 0.1):
                    where = {"seed": seed, "alpha": alpha, "beta": beta, "hyper": pair}
                    if pair[0] == 0.01 and alpha == beta == 0.1:
                        runs.append(diverged(**where))
                    elif pair[0] or alpha == 0.1:
                        count = 10 + 5 * seed + (5 if beta == 0.01 else 0)
                        runs.append(reached(count, **where))
                    else:
                        runs.append(not_reached(**where))
    return pd.concat(runs, ignore_index=True)


def test_heat_maps_number_the_cells_that_reached_it_and_no_others(table):
    figure = grids.heat_maps(table)
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
        where = {(text.get_position()): text.get_text() for text in axis.texts}
        for patch in axis.patches:
            centre = (patch.get_x() + 0.5, patch.get_y() + 0.5)
            if centre in where:
                shades.setdefault(where[centre], set()).add(patch.get_facecolor())
            else:
                assert patch.get_facecolor() == to_rgba("white")
    assert [len(shade) for shade in shades.values()] == [1, 1]
    plt.close(figure)


def test_slices_go_through_the_best_cell_of_maml_and_leave_out_what_has_no_number(table):
    best = grids.best_start(table)
    assert (best["alpha_0"], best["beta_0"], best["reached_at"]) == (0.1, 0.1, 15)
    figure = grids.slices(table)
    first, last = figure.axes[0], figure.axes[3]  # along alpha, first pair; along beta, second
    line, marks = first.lines[:2]  # of MAML
    assert line.get_ydata()[1] == 15 and math.isnan(line.get_ydata()[0])
    strip = dict(
        zip((t.get_text() for t in first.get_yticklabels()), first.get_yticks(), strict=True)
    )
    assert marks.get_ydata().tolist() == [strip["not reached"], 15] and strip["not reached"] > LIMIT
    marks = last.lines[3]  # of Alpha MAML at alpha_0 = 0.1
    assert marks.get_ydata().tolist() == [20, strip["diverged"]]
    plt.close(figure)


def test_equal_tables_give_equal_bytes(table, tmp_path):
    for name, draw in (("maps", grids.heat_maps), ("slices", grids.slices), ("paths", grids.paths)):
        drawn = []
        for folder in ("first", "second"):
            figure = draw(table.copy())
            drawn.append([p.read_bytes() for p in figures.save(figure, name, folder, tmp_path)])
            plt.close(figure)
        assert drawn[0] == drawn[1]


def test_paths_start_at_the_starting_rates_and_hold_negative_rates(table):
    figure = grids.paths(table)
    plane = figure.axes[0]
    starts = {tuple(line.get_xydata()[0]) for line in plane.lines if line.get_mfc() == "white"}
    assert starts == {(alpha, beta) for alpha in (0.01, 0.1) for beta in (0.01, 0.1)}
    assert plane.get_xlim()[0] < table["alpha"].min() < 0
    crosses = [line for line in plane.lines if line.get_marker() == "x"]
    assert len(crosses) == table[table["status"] == "diverged"]["run"].nunique()
    plt.close(figure)


def test_the_view_is_a_picture_in_batch_and_widgets_in_jupyterlab(table, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf()._suptitle.get_text()))
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    grids.explore(table, (0.01, 0.1), (0.001, 0.001))
    assert shown == [r"$\alpha_0$ = 0.01, $\beta_0$ = 0.1, $h_\alpha$ = 0.001, $h_\beta$ = 0.001"]

    import ipywidgets

    made = []
    interact = ipywidgets.interact
    monkeypatch.setattr(ipywidgets, "interact", lambda f, **w: made.append(w) or interact(f, **w))
    monkeypatch.setenv("JPY_SESSION_NAME", "book/06_figures_2_3.ipynb")
    grids.explore(table, (0.01, 0.1), (0.001, 0.001))
    made[0]["alpha_0"].value = 0.1
    made[0]["hyper_rates"].value = (0.01, 0.01)
    assert shown[-1] == r"$\alpha_0$ = 0.1, $\beta_0$ = 0.1, $h_\alpha$ = 0.01, $h_\beta$ = 0.01"
    plt.close("all")


def test_the_source_of_a_figure_names_data_seeds_and_commit(table, tmp_path):
    maker = provenance.here() | {
        "commit": "0123456789abcdef",
        "clean": False,
        "runs": {table["run"].iloc[0]: 7200, "of another figure": 3600},
    }
    records.write_records("figures_2_3", "medium", table, [maker], tmp_path)
    text = figures.source(table, "figures_2_3", "medium", tmp_path)
    assert text.startswith(
        "Omniglot, profile medium, seeds 0, 1, 2\n1 runs at commit 0123456789 and"
    )
    assert text.endswith("2.0 h")
