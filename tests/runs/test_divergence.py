"""A run that diverges is a result: it ends there, is recorded, and disturbs no other."""

import math

import numpy as np
import pandas as pd
import pytest
from helpers import OWN, Lines, bits

import amaml
from amaml.paper import records
from amaml.sweep import tabulate

pytestmark = pytest.mark.usefixtures("one_thread")
ITERATIONS = 14
WATCHED = ["query_loss", "alpha", "beta", "gradient_norm"]


def train(out, sampler=None, validation_sampler=None, **fields) -> amaml.Run:
    rates = {"alpha": 0.1, "beta": 0.1, "hyper_alpha": 1e-3, "hyper_beta": 1e-3}
    sizes = {"iterations": ITERATIONS, "meta_batch_size": 2, "validation_every": 5}
    samplers = {"sampler": sampler or Lines(), "validation_sampler": validation_sampler or Lines()}
    config = amaml.RunConfig(**(rates | sizes | fields))
    return amaml.train(config, out, checkpoint_every=4, progress=False, **OWN | samplers)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> pd.DataFrame:
    run = train(tmp_path_factory.mktemp("whole"))
    assert run.status == "done"
    return run.metrics[["iteration", *WATCHED]]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [1, 4, 7, 10, 11, ITERATIONS])
def test_a_loss_that_is_not_finite_ends_the_run_at_that_iteration(tmp_path, whole, at, value):
    run = train(tmp_path, Lines(at, value))
    assert (run.status, run.iteration) == ("diverged", at)
    assert run.metrics["iteration"].tolist() == list(range(1, at + 1))
    assert not np.isfinite(run.metrics["query_loss"].iloc[-1])
    before = run.metrics[["iteration", *WATCHED]].iloc[:-1]
    pd.testing.assert_frame_equal(before, whole.iloc[: at - 1], check_exact=True)


def test_a_run_that_diverged_is_read_again_and_touches_none_that_is_made_after_it(tmp_path):
    run = train(tmp_path, Lines(7, math.nan))
    again = train(tmp_path, Lines(7, math.nan))
    assert (again.read, again.status, again.iteration) == (True, "diverged", 7)
    pd.testing.assert_frame_equal(again.metrics, run.metrics, check_exact=True)
    after = train(tmp_path, seed=1)
    train(tmp_path / "apart", seed=1)
    assert bits(tmp_path / after.id) == bits(tmp_path / "apart" / after.id)


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
    finite = np.isfinite(run.metrics[WATCHED]).all(axis=1).tolist()
    assert finite == [True] * (run.iteration - 1) + [False]
    records.write_records("figure_9", "small", tabulate(run), [], tmp_path)
    table, _ = records.read_records("figure_9", "small", tmp_path)
    assert table["status"].unique().tolist() == ["diverged"]
    pd.testing.assert_frame_equal(table[WATCHED], run.metrics[WATCHED], check_exact=True)


def test_negative_rates_are_recorded_and_no_divergence(tmp_path):
    rates = {"alpha": 0.3, "beta": 1.5, "hyper_alpha": 0.5, "hyper_beta": 0.2}
    run = train(tmp_path, **rates, iterations=4)
    assert run.status == "done" and len(run.metrics) == 4
    assert (run.metrics[["alpha", "beta"]] < 0).any().all()
