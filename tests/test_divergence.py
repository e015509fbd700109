"""A run that diverges is a result: it ends there, is recorded, and every figure shows it."""

from __future__ import annotations

import math
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex

import amaml
from amaml.paper import figures, grids, records
from amaml.sweep import tabulate

ITERATIONS = 14


class Lines:
    """Straight lines through the origin; in one meta-batch the targets are of a given value."""

    def __init__(self, at: int = 0, value: float = 0.0):
        self.at, self.value, self.asked = at, value, 0

    def sample(self, meta_batch_size, generator):
        self.asked += 1
        x = torch.randn(meta_batch_size, 10, 1, generator=generator)
        y = torch.full_like(x, self.value) if self.asked == self.at else 2 * x
        return amaml.Tasks(x[:, :5], y[:, :5], x[:, 5:], y[:, 5:])


def squared_error(prediction, y):
    return (prediction - y).square().mean()


def train(out, sampler=None, validation_sampler=None, **fields) -> amaml.Run:
    model = torch.nn.Linear(1, 1)
    for value in model.parameters():
        torch.nn.init.constant_(value, 0.5)
    rates = {"alpha": 0.1, "beta": 0.1, "hyper_alpha": 1e-3, "hyper_beta": 1e-3}
    sizes = {"iterations": ITERATIONS, "meta_batch_size": 2, "validation_every": 5}
    return amaml.train(
        amaml.RunConfig(**(rates | sizes | fields)), out, model=model, loss=squared_error,
        sampler=sampler or Lines(), validation_sampler=validation_sampler or Lines(),
        checkpoint_every=4, progress=False,
    )  # fmt: skip


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [1, 4, 7, 10, 11, ITERATIONS])
def test_a_loss_that_is_not_finite_ends_the_run_at_that_iteration(tmp_path, at, value):
    whole = train(tmp_path)
    run = train(tmp_path, Lines(at, value))
    assert (whole.status, run.status, run.iteration) == ("done", "diverged", at)
    assert run.metrics["iteration"].tolist() == list(range(1, at + 1))
    assert not np.isfinite(run.metrics["query_loss"].iloc[-1])
    logged = ["iteration", "query_loss", "alpha", "beta", "gradient_norm"]
    pd.testing.assert_frame_equal(
        run.metrics[logged].iloc[:-1], whole.metrics[logged].iloc[: at - 1], check_exact=True
    )
    again = train(tmp_path, Lines(at, value))  # is read
    assert (again.status, again.iteration) == ("diverged", at)
    pd.testing.assert_frame_equal(again.metrics, run.metrics, check_exact=True)
    after = train(tmp_path, seed=1)  # and touches no run that is made after it
    apart = train(tmp_path / "apart", seed=1)
    pd.testing.assert_frame_equal(after.metrics, apart.metrics, check_exact=True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_validation_that_is_not_finite_ends_the_run(tmp_path, value):
    run = train(tmp_path, validation_sampler=Lines(1, value))
    assert (run.status, run.iteration) == ("diverged", 5)
    assert np.isfinite(run.metrics["query_loss"]).all()
    assert not np.isfinite(run.metrics["validation_loss"].iloc[-1])


@pytest.mark.parametrize(
    "rates", [{"alpha": 1e30}, {"beta": 1e30}, {"hyper_alpha": 1e38}, {"hyper_beta": 1e38}]
)
def test_rates_that_blow_up_end_the_run_and_stand_in_its_record(tmp_path, rates):
    run = train(tmp_path, **rates)
    assert run.status == "diverged" and 1 <= run.iteration == len(run.metrics) < ITERATIONS
    watched = run.metrics[["query_loss", "alpha", "beta", "gradient_norm"]]
    finite = np.isfinite(watched).all(axis=1).tolist()
    assert finite == [True] * (run.iteration - 1) + [False]
    records.write_records("figure_9", "small", tabulate(run), [], tmp_path)
    table, _ = records.read_records("figure_9", "small", tmp_path)
    assert table["status"].unique().tolist() == ["diverged"]
    for name in watched:
        assert table[name].to_numpy().tobytes() == run.metrics[name].to_numpy().tobytes()


def test_negative_rates_are_no_divergence(tmp_path):
    rates = {"alpha": 0.3, "beta": 1.5, "hyper_alpha": 0.03, "hyper_beta": 0.03}
    run = train(tmp_path, **rates, iterations=4)
    assert run.status == "done" and len(run.metrics) == 4
    assert (run.metrics[["alpha", "beta"]] < 0).any().all()


STARTS = (0.01, 0.1)
PAIRS = ((0.0, 0.0), (0.001, 0.001))


def one_run(last: int | None, seed: int, start: tuple, hyper: tuple) -> pd.DataFrame:
    """A run that diverged at iteration `last`, or (None) never did, as it is published."""
    config = amaml.RunConfig(
        alpha=start[0], beta=start[1], hyper_alpha=hyper[0], hyper_beta=hyper[1], seed=seed,
        iterations=ITERATIONS, threshold=1.0, validation_every=5,
    )  # fmt: skip
    iteration = np.arange(1, (last or ITERATIONS) + 1)
    metrics = pd.DataFrame({
        "iteration": iteration, "query_loss": 1.5, "gradient_norm": 1.0,
        "alpha": config.alpha + 0.001 * (iteration - 1), "beta": config.beta,
        "validation_loss": np.where(iteration % 5 == 0, 1.5 - iteration / 20, np.nan),
    })  # fmt: skip
    if last:
        metrics.loc[metrics.index[-1], ["query_loss", "gradient_norm"]] = [math.inf, math.nan]
    method = "Alpha MAML" if any(hyper) else "MAML"
    status = "diverged" if last else "done"
    run = SimpleNamespace(id=config.id, config=config, status=status, metrics=metrics)
    return tabulate(
        run, {"case": "good" if start[0] == STARTS[0] else "too large", "method": method}
    )


def table_of(at: dict) -> pd.DataFrame:
    """Two starts, MAML and Alpha MAML, two seeds; `at` says which diverged, and where."""
    runs = [
        one_run(at.get((alpha, pair[0])), seed, (alpha, 0.1), pair)
        for seed in range(2)
        for alpha in STARTS
        for pair in PAIRS
    ]
    return pd.concat(runs, ignore_index=True)


SOME = {(0.01, 0.001): 1, (0.1, 0.0): 7}
ALL = {(alpha, pair[0]): at for (alpha, at) in zip(STARTS, (1, 7), strict=True) for pair in PAIRS}


def crosses(axes) -> list[tuple]:
    """Colour and end of each line that ends in a cross; only what can be seen."""
    return [
        (to_hex(line.get_color()).upper(), *line.get_xydata()[-1])
        for axis in axes
        for line in axis.lines
        if line.get_marker() == "x" and len(line.get_xydata())
    ]


AT_ONCE = dict.fromkeys(ALL, 1)


@pytest.fixture(params=[SOME, ALL, AT_ONCE], ids=["some", "all", "all at once"])
def table(request):
    yield table_of(request.param)
    plt.close("all")


def expected(table: pd.DataFrame, column: str) -> list[tuple]:
    """Colour and place of the end of each run that diverged."""
    ends = table[table["status"] == "diverged"].groupby("run").last()
    return sorted(
        zip(ends["method"].map(figures.COLOURS), ends["iteration"], ends[column], strict=True)
    )


def test_figure_1_marks_each_run_that_diverged(table):
    figure = figures.figure_1(table)
    figure.canvas.draw()
    columns = table["case"].nunique()
    for row, rate in enumerate(("alpha", "beta")):
        axes = figure.axes[row * columns : (row + 1) * columns]
        assert sorted(crosses(axes)) == expected(table, rate)


def test_heat_maps_mark_each_cell_that_diverged(table):
    figure = grids.heat_maps(table)
    figure.canvas.draw()
    diverged = table[table["status"] == "diverged"].groupby(grids.CELL).size()
    assert len(crosses(figure.axes)) == len(diverged) >= 2


def test_slices_show_what_diverged_in_its_strip(table):
    figure = grids.slices(table)
    figure.canvas.draw()
    axis = figure.axes[0]  # along alpha
    ticks = [tick.get_text() for tick in axis.get_yticklabels()]
    height = axis.get_yticks()[ticks.index("diverged")]
    shown = [
        (x, y) for line in axis.lines for x, y in line.get_xydata() if line.get_marker() in "so"
    ]
    diverged = table[table["status"] == "diverged"].groupby(["method", "alpha_0"]).size()
    assert sum(y == height for _, y in shown) == len(diverged)


def test_paths_end_in_crosses(table):
    figure = grids.paths(table)
    figure.canvas.draw()
    ends = table[table["status"] == "diverged"].groupby("run").last()
    assert sorted((x, y) for _, x, y in crosses(figure.axes[:1])) == sorted(
        zip(ends["alpha"], ends["beta"], strict=True)
    )


@pytest.mark.parametrize("alpha", STARTS)
def test_the_curves_of_a_cell_end_in_crosses(table, alpha):
    figure = grids.curves(table, (alpha, 0.1), PAIRS[1])
    figure.canvas.draw()
    cell = table[table["alpha_0"] == alpha]
    shown = [(colour, x) for colour, x, _ in crosses(figure.axes[:1])]
    assert sorted(shown) == [(colour, x) for colour, x, _ in expected(cell, "alpha")]
