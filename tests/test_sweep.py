"""Many runs, published records, and the figure that is drawn from them."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from test_training import SMALL

import amaml
from amaml import sweep
from amaml.paper import claims, experiments, figures, records
from amaml.training import stream, train_together


def tiny(monkeypatch, profile="quick"):
    """Figure 1 at a size that takes seconds."""
    small = {name: SMALL[name] for name in ("data", "filters", "meta_batch_size")}
    small |= {"iterations": 12, "validation_every": 4, "validation_tasks": 3, "n_way": 3}
    monkeypatch.setitem(experiments.PROFILES, profile, small)
    monkeypatch.setitem(experiments.FIGURE_1_SEEDS, profile, (0, 1))


def test_all_runs_come_back_as_one_table_and_are_not_made_twice(tmp_path):
    configs = [amaml.RunConfig(**SMALL, iterations=5, seed=seed) for seed in (0, 1, 0)]
    table = amaml.run_all(configs, tmp_path, progress=False)
    assert len(table) == 10 and table["run"].nunique() == 2
    assert (table["alpha_0"] == 0.1).all() and table["alpha"].nunique() > 5
    alone = amaml.train(configs[1], tmp_path / "alone", progress=False)
    together = table[table["run"] == alone.id]["query_loss"]
    assert together.tolist() == pytest.approx(alone.metrics["query_loss"].tolist(), rel=1e-4)
    changed = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/result.json")}
    again = amaml.run_all(configs, tmp_path, progress=False)
    pd.testing.assert_frame_equal(again, table)
    assert changed == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/result.json")}


def test_batches_hold_runs_of_one_shape_and_leave_no_worker_idle():
    configs = [amaml.RunConfig(seed=seed) for seed in range(7)]
    others = [amaml.RunConfig(seed=seed, n_way=20) for seed in range(3)]
    mixed = [*others[:1], *configs, *others[1:]]
    sizes = [len(batch) for batch in sweep.batches_of(mixed, 3, 2)]
    assert sizes == [2, 1, 3, 3, 1]
    assert [len(batch) for batch in sweep.batches_of(configs, 100, 2)] == [4, 3]
    assert sweep.batches_of(configs, 1, 2) == [[config] for config in configs]
    assert sorted(c.seed for b in sweep.batches_of(configs, 3, 2) for c in b) == list(range(7))


def test_runs_in_batches_over_a_cluster_that_is_named(tmp_path, monkeypatch):
    from distributed import Client, LocalCluster

    configs = [amaml.RunConfig(**SMALL, iterations=5, seed=seed) for seed in range(3)]
    alone = amaml.run_all(configs, tmp_path / "alone", progress=False)
    with (
        LocalCluster(1, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        table = amaml.run_all(configs, tmp_path / "client", client, 3, progress=False)
        monkeypatch.setenv("AMAML_SCHEDULER", cluster.scheduler_address)
        named = amaml.run_all(configs, tmp_path / "named", runs_per_batch=2, progress=False)
    pd.testing.assert_frame_equal(named, table, rtol=1e-4)
    columns = ["run", "iteration", "query_loss", "alpha", "beta"]
    pd.testing.assert_frame_equal(table[columns], alone[columns], rtol=1e-4)


def test_a_scheduler_that_does_not_answer_is_named(tmp_path, monkeypatch):
    config = amaml.RunConfig(**SMALL, iterations=3)
    monkeypatch.setattr(sweep, "PATIENCE", "1s")
    with pytest.raises(ConnectionError, match=r"(?s)tcp://127.0.0.1:9.*dask worker"):
        amaml.run_all([config], tmp_path, "tcp://127.0.0.1:9", progress=False)
    monkeypatch.setenv("AMAML_SCHEDULER", "tcp://127.0.0.1:10")
    with pytest.raises(ConnectionError, match=r"tcp://127.0.0.1:10"):
        amaml.run_all([config], tmp_path, progress=False)


def test_a_failed_run_is_reported_with_its_config_and_stops_no_other(tmp_path):
    good, bad = (amaml.RunConfig(**(SMALL | {"iterations": 3, "n_way": n})) for n in (3, 999))
    finished = []
    with pytest.raises(RuntimeError, match=r"(?s)1 of 2 runs failed.*n_way=999.*needs 999 "):
        amaml.run_all([bad, good], tmp_path, progress=False, on_finish=finished.append)
    assert [run.config for run in finished] == [good]


def test_a_figure_trains_what_is_missing_and_is_drawn_from_its_records(tmp_path, monkeypatch):
    tiny(monkeypatch)
    places = {"out": tmp_path / "runs", "folder": tmp_path / "records", "progress": False}
    table = sweep.figure_records("figure_1", "quick", **places)
    assert table["run"].nunique() == len(experiments.figure_1("quick")) == 12
    assert table.groupby("case")["method"].nunique().tolist() == [2, 2, 2]
    read, made_by = records.read_records("figure_1", "quick", tmp_path / "records")
    pd.testing.assert_frame_equal(read, table.reset_index(drop=True))
    assert sum(len(batch["runs"]) for batch in made_by) == 12
    assert all(seconds > 0 for batch in made_by for seconds in batch["runs"].values())

    monkeypatch.setattr(sweep, "run_all", lambda *a, **k: pytest.fail("trained again"))
    pd.testing.assert_frame_equal(sweep.figure_records("figure_1", "quick", **places), read)
    monkeypatch.undo()
    tiny(monkeypatch)
    lost = read[read["run"] != read["run"].iloc[0]]
    records.write_records("figure_1", "quick", lost, made_by, tmp_path / "records")
    filled = sweep.figure_records("figure_1", "quick", **places)
    columns = ["run", "iteration"]
    pd.testing.assert_frame_equal(
        filled.sort_values(columns, ignore_index=True), read.sort_values(columns, ignore_index=True)
    )

    order = [config.id for _, config in experiments.figure_1("quick")]
    assert list(dict.fromkeys(filled["run"])) == order  # however the runs finished

    drawn = [
        [path.read_bytes() for path in figures.save(figures.figure_1(table), "f", folder, tmp_path)]
        for folder in ("first", "second")
    ]
    assert drawn[0] == drawn[1]  # the same records give the same bytes
    figure = figures.figure_1(table)
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert [title.split("\n")[0] for title in titles] == ["good", "too small", "too large"]
    line = figure.axes[0].lines[0]  # alpha, good case, MAML: constant
    assert line.get_ydata() == pytest.approx(0.4)


def test_a_figure_shows_runs_that_diverged(tmp_path, monkeypatch):
    tiny(monkeypatch)
    monkeypatch.setitem(experiments.CASES, "too large", (0.1, 3e38))
    places = {"out": tmp_path / "runs", "folder": tmp_path / "records", "progress": False}
    table = sweep.figure_records("figure_1", "quick", **places)
    diverged = table[table["status"] == "diverged"]
    assert set(diverged["case"]) == {"too large"} and diverged["iteration"].max() < 12
    figure = figures.figure_1(table)
    crosses = [line for line in figure.axes[2].lines if line.get_marker() == "x"]
    assert len(crosses) == diverged["run"].nunique()
    final = records.final_validation(table)
    assert np.isinf(final.loc[final["status"] == "diverged", "validation_loss"]).all()


def test_a_figure_of_the_paper_profile_is_made_piece_by_piece(tmp_path, monkeypatch, capsys):
    tiny(monkeypatch, "paper")
    undisturbed = sweep.figure_records(
        *("figure_1", "paper"),
        **{"out": tmp_path / "once", "folder": tmp_path / "other", "progress": False},
        minutes=60,
    )
    clock = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))  # a second a look at it
    command = ["--figure", "figure_1", "--profile", "paper", "--minutes", "0.03"]
    command += ["--out", str(tmp_path / "runs"), "--records", str(tmp_path / "records")]
    published = []
    while not published or published[-1] < 12:
        sweep.main(command)
        table, _ = records.read_records("figure_1", "paper", tmp_path / "records")
        published.append(table["run"].nunique())
        assert f"{published[-1]} of 12 runs published" in capsys.readouterr().out
        assert len(published) < 20
    assert published[0] == 0 and len(published) > 2
    columns = ["run", "iteration", "query_loss", "alpha", "beta", "validation_loss", "status"]
    pd.testing.assert_frame_equal(table[columns], undisturbed[columns], rtol=1e-4)


def test_a_profile_for_a_gpu_is_not_begun_on_a_cpu_by_itself(tmp_path, monkeypatch):
    tiny(monkeypatch, "paper")
    places = {"out": tmp_path, "folder": tmp_path, "progress": False}
    with pytest.raises(RuntimeError, match=r"12 of the 12 runs.*--device cuda"):
        sweep.figure_records("figure_1", "paper", **places)
    sweep.figure_records("figure_1", "paper", **places, minutes=60)
    assert sweep.figure_records("figure_1", "paper", **places)["run"].nunique() == 12


def test_the_accuracy_after_a_whole_training_is_measured_and_told(tmp_path, monkeypatch):
    tiny(monkeypatch, "paper")
    monkeypatch.setitem(experiments.SIZES["paper"], "accuracy", (2, 3, 2, (0, 1)))
    monkeypatch.setitem(experiments.TEST_TASKS, "paper", 8)
    places = {"out": tmp_path, "folder": tmp_path, "progress": False}
    table = sweep.figure_records("accuracy", "paper", **places, minutes=60)
    told = claims.accuracies(table).reset_index()
    assert len(told) == 6 and (told["seeds"] == 2).all() and (told["test_tasks"] == 8).all()
    row = told[(told["method"] == "MAML") & (told["meta_optimizer"] == "adam")].iloc[0]
    ends = table.dropna(subset="test_accuracy")
    ends = ends[(ends["method"] == "MAML") & (ends["meta_optimizer"] == "adam")]
    accuracy, ci95 = 100 * ends["test_accuracy"], 100 * ends["test_accuracy_ci95"]
    assert row["accuracy"] == pytest.approx(accuracy.sum() / 2)
    assert (row["lowest"], row["highest"]) == (accuracy.min(), accuracy.max())
    assert row["ci95"] == pytest.approx(math.hypot(*ci95) / 2)


def test_pieces_need_neither_dask_nor_what_draws(tmp_path):
    program = """
import sys
for name in ("dask", "distributed", "matplotlib", "seaborn", "torchvision", "PIL", "papermill"):
    sys.modules[name] = None  # importing it is an error
from amaml import sweep
from amaml.paper import experiments
experiments.PROFILES["paper"] = experiments.PROFILES["quick"] | {"filters": 2, "iterations": 2}
sweep.main(["--figure", "figure_1", "--profile", "paper", "--minutes", "5", *sys.argv[1:]])
"""
    places = ["--out", str(tmp_path / "runs"), "--records", str(tmp_path / "records")]
    command = [sys.executable, "-c", program, *places]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert "30 of 30 runs published" in done.stdout, done.stderr


def test_wrong_minutes_are_named(tmp_path):
    config = amaml.RunConfig(**SMALL, iterations=3)
    for minutes in (-1, float("nan")):
        with pytest.raises(ValueError, match=f"minutes={minutes}"):
            sweep.run_here([config], tmp_path, minutes=minutes)
    with pytest.raises(TypeError, match="minutes='8'"):
        sweep.run_here([config], tmp_path, minutes="8")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"device='cuda'"):
            sweep.run_here([config], tmp_path, device="cuda")
    assert not list(tmp_path.iterdir())


def test_the_test_accuracy_is_that_of_the_finished_parameters(tmp_path):
    fields = SMALL | {
        "iterations": 4,
        "validation_every": 2,
        "test_tasks": 6,
        "test_inner_steps": 2,
    }
    configs = [amaml.RunConfig(**fields, seed=seed) for seed in (0, 1)]
    for run in train_together(configs, tmp_path):
        sampler = amaml.TaskSampler(amaml.split_characters(amaml.load_glyphs()).test, 3)
        tasks = sampler.sample(6, stream(run.config.seed, "test tasks"))
        network = amaml.OmniglotCNN(3, filters=run.config.filters)
        expected = amaml.evaluate(network, run.state, tasks, inner_steps=2)
        last = run.metrics.iloc[-1]
        for name in ("accuracy", "accuracy_ci95", "loss", "loss_ci95"):
            assert last[f"test_{name}"] == pytest.approx(expected[f"query_{name}"], rel=1e-4)
        assert run.metrics["test_accuracy"].notna().sum() == 1
    plain = amaml.train(amaml.RunConfig(**SMALL, iterations=2), tmp_path, progress=False)
    assert "test_accuracy" not in plain.metrics


def test_unknown_figures_and_profiles_are_named():
    with pytest.raises(ValueError, match="figure='figure_7'.*figure_1"):
        sweep.figure_records("figure_7", "quick")
    with pytest.raises(ValueError, match="profile='huge'.*quick, medium"):
        sweep.figure_records("figure_1", "huge")
    with pytest.raises(SystemExit):
        sweep.main(["--figure", "figure_1", "--profile", "huge"])


def test_configs_of_a_figure_are_paired_by_seed():
    labelled = experiments.figure_1("medium")
    assert len({config.id for _, config in labelled}) == len(labelled) == 18
    assert len({(config.hyper_alpha, config.hyper_beta) for _, config in labelled}) == 2
    for label, config in labelled:
        assert (label["method"] == "MAML") == (config.hyper_alpha == config.hyper_beta == 0)
    assert {c.seed for _, c in experiments.hyper_rates("medium")}.isdisjoint(
        c.seed for _, c in labelled
    )
