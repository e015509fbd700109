"""Runs: validated, repeatable, resumable, and ending as they should."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict, replace

import numpy as np
import pandas as pd
import pytest
import torch

import amaml
from amaml.config import digest
from amaml.paper import records
from amaml.runs import checkpoints, files
from amaml.training import stream, train_together

SMALL = {
    "data": "glyphs",
    "n_way": 3,
    "filters": 4,
    "meta_batch_size": 2,
    "validation_every": 4,
    "validation_tasks": 3,
    "alpha": 0.1,
    "beta": 0.05,
    "hyper_alpha": 1e-3,
    "hyper_beta": 1e-3,
}


def train(out, iterations=9, **fields) -> amaml.Run:
    config = amaml.RunConfig(**(SMALL | {"iterations": iterations} | fields))
    return amaml.train(config, out, progress=False, checkpoint_every=3)


def same(a: amaml.Run, b: amaml.Run) -> bool:
    """Metrics and state bit for bit."""
    states = [checkpoints.flatten(run.state._asdict()) for run in (a, b)]
    return a.metrics.equals(b.metrics) and all(
        value.numpy().tobytes() == states[1][name].numpy().tobytes()
        for name, value in states[0].items()
    )


def test_a_run_logs_each_iteration_and_validates_at_intervals(tmp_path):
    run = train(tmp_path)
    assert (run.status, run.iteration) == ("done", 9)
    assert run.metrics["iteration"].tolist() == list(range(1, 10))
    assert run.metrics.dropna()["iteration"].tolist() == [4, 8, 9]
    assert run.metrics["alpha"].iloc[0] == np.float32(0.1)
    expected = {
        "iteration", "support_loss", "query_loss", "query_accuracy", "alpha", "beta",
        "gradient_norm", "d_alpha", "d_beta", "validation_loss", "validation_accuracy",
    }  # fmt: skip
    assert set(run.metrics) == expected


def test_a_run_is_meta_step_after_meta_step(tmp_path):
    run = train(tmp_path, iterations=5)
    split = amaml.split_characters(amaml.load_glyphs())
    sampler = amaml.TaskSampler(split.train, n_way=3)
    model = amaml.OmniglotCNN(3, stream(0, "initialisation"), filters=4)
    state, generator = amaml.init_state(model, 0.1, 0.05), stream(0, "training tasks")
    for row in run.metrics.itertuples():
        tasks = sampler.sample(2, generator)
        state, metrics = amaml.meta_step(model, state, tasks, hyper_alpha=1e-3, hyper_beta=1e-3)
        for name, value in metrics.items():
            assert getattr(row, name) == value.item()
    validation = amaml.TaskSampler(split.validation, n_way=3).sample(
        3, stream(0, "validation tasks")
    )
    measured = amaml.evaluate(model, state, validation)
    assert run.metrics["validation_loss"].iloc[-1] == measured["query_loss"]
    assert torch.equal(run.state.alpha, state.alpha)


def test_equal_configs_give_equal_runs_and_other_rates_the_same_tasks(tmp_path):
    run = train(tmp_path / "a")
    assert same(run, train(tmp_path / "b"))
    other = train(tmp_path / "a", alpha=0.2)
    assert not same(run, other) and run.id != other.id
    # The first support loss is taken at the initialisation, before any rate has an effect.
    assert run.metrics["support_loss"].iloc[0] == other.metrics["support_loss"].iloc[0]
    assert not same(run, train(tmp_path / "a", seed=1))


def test_a_finished_run_is_read_not_made_again(tmp_path):
    run = train(tmp_path)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / run.id).iterdir()}
    assert same(run, train(tmp_path))
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / run.id).iterdir()}


KILLED = """
import os, signal, sys
import amaml, amaml.loop

step, count = amaml.loop.meta_step, 0

def deadly_step(*args, **kwargs):
    global count
    count += 1
    if count == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*args, **kwargs)

amaml.loop.meta_step = deadly_step
config = amaml.RunConfig(**eval(sys.argv[3]))
amaml.train(config, sys.argv[1], progress=False, checkpoint_every=3)
"""


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    whole = train(tmp_path / "whole", iterations=20)
    moments = np.random.default_rng(7).choice(np.arange(2, 10), 2, replace=False)
    config = SMALL | {"iterations": 20}
    for moment in moments:  # each process goes on where the one before was killed
        words = [sys.executable, "-c", KILLED, str(tmp_path / "torn"), str(moment), repr(config)]
        assert subprocess.run(words, check=False).returncode == -signal.SIGKILL
    folder = tmp_path / "torn" / whole.id
    assert not (folder / "result.json").exists()
    with (folder / "metrics.csv").open("a") as file:
        file.write("17,0.5,0.2")  # a line torn by the kill
    resumed = amaml.train(
        amaml.RunConfig(**config), tmp_path / "torn", progress=False, checkpoint_every=3
    )
    assert same(whole, resumed)


@pytest.mark.parametrize(
    ("fields", "status"),
    [({}, "done"), ({"beta": 1e38}, "diverged"), ({"threshold": 9.0}, "reached")],
)
def test_a_run_killed_just_before_its_result_ends_as_it_did(tmp_path, fields, status):
    whole = train(tmp_path, **fields)
    path = tmp_path / whole.id / "result.json"
    result = files.read_json(path)
    for make in (
        lambda: train(tmp_path, **fields),
        lambda: train_together([whole.config], tmp_path)[0],
    ):
        path.unlink()
        again = make()
        assert same(whole, again) and (again.status, again.iteration) == (status, whole.iteration)
        assert files.read_json(path) == result


def test_the_threshold_ends_a_run(tmp_path):
    whole = train(tmp_path, iterations=40, alpha=0.4, beta=0.3)
    losses = whole.metrics.dropna(subset="validation_loss").set_index("iteration")
    threshold = losses["validation_loss"].iloc[3]
    first = losses.index[losses["validation_loss"] <= threshold][0]
    run = train(tmp_path, iterations=40, alpha=0.4, beta=0.3, threshold=threshold)
    assert (run.status, run.iteration) == ("reached", first)
    assert run.metrics.equals(whole.metrics[: len(run.metrics)])


def test_divergence_is_a_result(tmp_path):
    run = train(tmp_path, iterations=40, beta=1e38)
    assert run.status == "diverged" and 1 <= run.iteration < 40
    assert run.metrics["iteration"].iloc[-1] == run.iteration == len(run.metrics)
    watched = ["query_loss", "alpha", "beta", "gradient_norm"]
    finite = np.isfinite(run.metrics[watched]).all(axis=1)
    assert finite.iloc[:-1].all() and not finite.iloc[-1]
    assert same(run, train(tmp_path, iterations=40, beta=1e38))


def test_rates_may_turn_negative_and_are_recorded(tmp_path):
    run = train(tmp_path, iterations=12, alpha=0.0, hyper_alpha=3.0)
    assert (run.metrics["alpha"] < 0).any()


class Lines:
    """Tasks of one's own: straight lines through the origin."""

    def sample(self, meta_batch_size, generator):
        slope = torch.randn(meta_batch_size, 1, 1, generator=generator)
        x = torch.randn(meta_batch_size, 10, 1, generator=generator)
        return amaml.Tasks(x[:, :5], slope * x[:, :5], x[:, 5:], slope * x[:, 5:])


def squared_error(prediction, y):
    return (prediction - y).square().mean()


def test_ones_own_model_sampler_and_loss(tmp_path):
    def run(std: float, folder="own") -> amaml.Run:
        model = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(model.weight, std)
        torch.nn.init.zeros_(model.bias)
        config = amaml.RunConfig(
            iterations=60, alpha=0.01, beta=0.1, hyper_alpha=1e-3, hyper_beta=1e-3
        )
        return amaml.train(
            config, tmp_path / folder, model=model, sampler=Lines(), loss=squared_error,
            progress=False,
        )  # fmt: skip

    first, again = run(0.5), run(0.5, "again")
    assert same(first, again) and run(0.7).id != first.id
    assert "query_accuracy" not in first.metrics
    assert first.metrics["alpha"].iloc[-1] > 0.02  # the tasks differ: adapting more helps
    assert first.metrics["validation_loss"].iloc[-1] < first.metrics["query_loss"].iloc[0]


TOGETHER = (
    {"seed": 0},
    {"seed": 0, "hyper_alpha": 0.0, "hyper_beta": 0.0},
    {"seed": 1, "alpha": 0.3, "beta": 0.2},
    {"seed": 1, "beta": 1e30},  # diverges
)


@pytest.mark.parametrize(
    "fields", [{}, {"meta_optimizer": "adam"}, {"inner_steps": 2, "first_order": True}]
)
def test_runs_made_together_are_those_made_alone(tmp_path, fields):
    configs = [
        amaml.RunConfig(**(SMALL | {"iterations": 9} | fields | varied)) for varied in TOGETHER
    ]
    together = train_together(configs, tmp_path / "together", checkpoint_every=3)
    for config, run in zip(configs, together, strict=True):
        alone = amaml.train(config, tmp_path / "alone", progress=False, checkpoint_every=3)
        assert (run.status, run.iteration, run.config) == (alone.status, alone.iteration, config)
        first = [r.metrics.head(5).drop(columns="iteration") for r in (run, alone)]
        pd.testing.assert_frame_equal(*first, rtol=1e-4)
    assert [run.status for run in together] == ["done", "done", "done", "diverged"]


def test_runs_that_a_kill_left_apart_go_on_together(tmp_path):
    configs = [amaml.RunConfig(**(SMALL | {"iterations": 12} | varied)) for varied in TOGETHER[:3]]
    undisturbed = train_together(configs, tmp_path / "undisturbed", checkpoint_every=3)
    for config, stop in zip(configs, (3, 6, 0), strict=True):  # as a kill would leave them
        if stop:
            shorter = replace(config, iterations=stop)
            amaml.train(shorter, tmp_path, progress=False, checkpoint_every=3)
            (tmp_path / shorter.id / "result.json").unlink()
            (tmp_path / shorter.id).rename(tmp_path / config.id)
            identity = {"config": asdict(config), "own": {}}
            files.write_json(tmp_path / config.id / "config.json", identity)
    resumed = train_together(configs, tmp_path, checkpoint_every=3)
    for run, expected in zip(resumed, undisturbed, strict=True):
        assert run.metrics["iteration"].tolist() == list(range(1, 13))
        logged = [r.metrics.filter(["query_loss", "alpha", "beta"]) for r in (run, expected)]
        pd.testing.assert_frame_equal(*logged, rtol=1e-3)
    again = train_together(configs, tmp_path)
    assert all(same(a, b) for a, b in zip(resumed, again, strict=True))


def test_runs_of_other_shapes_are_not_made_together(tmp_path):
    configs = [amaml.RunConfig(**SMALL, iterations=3, k_query=k) for k in (1, 2)]
    with pytest.raises(ValueError, match="alpha, beta, hyper_alpha, hyper_beta, seed alone"):
        train_together(configs, tmp_path)
    with pytest.raises(ValueError, match="must differ from each other"):
        train_together(configs[:1] * 2, tmp_path)


def test_metrics_are_detached_and_memory_does_not_grow(tmp_path):
    import gc

    model = amaml.OmniglotCNN(3, torch.Generator().manual_seed(0), filters=4)
    sampler = amaml.TaskSampler(amaml.load_glyphs(), n_way=3)
    generator, counts = torch.Generator().manual_seed(0), []
    state = amaml.init_state(model, 0.1, 0.1)

    def living() -> tuple[int, int]:
        gc.collect()
        tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
        return len(tensors), sum(t.numel() for t in tensors)

    for iteration in range(200):
        state, _ = amaml.meta_step(
            model, state, sampler.sample(2, generator), hyper_alpha=1e-3, hyper_beta=1e-3
        )
        if iteration in (20, 199):
            counts.append(living())
    assert counts[0] == counts[1]


def test_runs_with_other_parts_of_ones_own_are_other_runs():
    def scaled(factor):
        return lambda prediction, y: factor * (prediction - y).square().mean()

    model, frozen = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    frozen.load_state_dict(model.state_dict())
    same = digest(frozen)
    frozen.weight.requires_grad_(False)
    glyphs = amaml.load_glyphs()
    parts = [
        squared_error, scaled(1.0), scaled(2.0), model, frozen, Lines(),
        amaml.TaskSampler(glyphs, k_shot=1), amaml.TaskSampler(glyphs, k_shot=2),
        amaml.TaskSampler(glyphs[:50], k_shot=1),
    ]  # fmt: skip
    assert len({digest(part) for part in parts}) == len(parts)
    assert same == digest(model) and digest(scaled(2.0)) == digest(scaled(2.0))


def test_metrics_that_a_checkpoint_counts_on_are_missed(tmp_path):
    whole = train(tmp_path, iterations=9)
    folder = tmp_path / whole.id
    (folder / "result.json").unlink()
    lines = (folder / "metrics.csv").read_text().splitlines(keepends=True)
    (folder / "metrics.csv").write_text("".join(lines[:5]))
    with pytest.raises(ValueError, match=r"metrics.csv holds 4 of the 9 iterations.*anew"):
        train(tmp_path, iterations=9)


def test_a_run_that_was_begun_on_another_kind_of_device_is_left_alone(tmp_path):
    whole = train(tmp_path, iterations=6)
    folder = tmp_path / whole.id
    (folder / "result.json").unlink()
    path = folder / "checkpoint.safetensors"
    saved, iteration, seconds = checkpoints.load_checkpoint(path)
    saved["generator"] = saved["generator"][:16].clone()  # as large as a GPU's
    checkpoints.save_checkpoint(path, saved, iteration, seconds)
    with pytest.raises(ValueError, match=f"{whole.id}.*another kind of device than cpu"):
        train(tmp_path, iterations=6)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"alpha": math.nan}, ValueError, "alpha=nan.*finite"),
        ({"beta": -0.5}, ValueError, "beta=-0.5.*at least 0"),
        ({"hyper_alpha": math.inf}, ValueError, "hyper_alpha=inf"),
        ({"iterations": 0}, ValueError, "iterations=0.*at least 1"),
        ({"meta_batch_size": 0}, ValueError, "meta_batch_size=0.*at least 1"),
        ({"meta_batch_size": 2.5}, TypeError, "meta_batch_size=2.5.*whole number"),
        ({"n_way": 1}, ValueError, "n_way=1.*at least 2"),
        ({"data": "mnist"}, ValueError, "data='mnist'.*omniglot.*glyphs"),
        ({"meta_optimizer": "lion"}, ValueError, "'lion'.*sgd.*adam"),
        ({"first_order": 1}, TypeError, "first_order=1.*True or False"),
        ({"alpha": "0.1"}, TypeError, "alpha='0.1'.*a number"),
        ({"threshold": -1.0}, ValueError, "threshold=-1.0"),
        ({"learning_rate": 0.1}, TypeError, "unknown field 'learning_rate'.*alpha"),
    ],
)
def test_wrong_fields_are_named(fields, error, words):
    with pytest.raises(error, match=words):
        amaml.RunConfig(**fields)


def test_a_config_is_frozen_and_equal_numbers_make_equal_configs():
    config = amaml.RunConfig(alpha=1, iterations=np.int64(5))
    assert config == amaml.RunConfig(alpha=1.0, iterations=5)
    assert config.id == amaml.RunConfig(alpha=1.0, iterations=5).id
    assert amaml.RunConfig(alpha=-0.0).id == amaml.RunConfig(alpha=0.0).id
    with pytest.raises(FrozenInstanceError):
        config.alpha = 2.0
    assert amaml.RunConfig(**asdict(config)) == config


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="cannot be written.*another out"):
        train(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_run_from_before_a_field_was_added_is_taken_up(tmp_path):
    config = amaml.RunConfig(**SMALL, iterations=4)
    run = amaml.train(config, tmp_path, progress=False)
    path = tmp_path / run.id / "config.json"
    identity = files.read_json(path)
    for field, value in (("test_tasks", 0), ("test_inner_steps", 1)):
        assert identity["config"].pop(field) == value
    files.write_json(path, identity)
    again = amaml.train(config, tmp_path, progress=False)
    pd.testing.assert_frame_equal(again.metrics, run.metrics)
    identity["config"]["alpha"] = 0.2
    files.write_json(path, identity)
    with pytest.raises(ValueError, match="another config"):
        amaml.train(config, tmp_path, progress=False)


def test_a_folder_of_another_config_is_refused_and_kept(tmp_path):
    run = train(tmp_path)
    folder = tmp_path / run.id
    written = files.read_json(folder / "config.json")
    written["config"]["alpha"] = 7.0
    files.write_json(folder / "config.json", written)
    before = (folder / "metrics.csv").read_bytes()
    with pytest.raises(ValueError, match="holds another config.*another out"):
        train(tmp_path)
    assert (folder / "metrics.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"config": {"alpha": 1}}, TypeError, "config must be an amaml.RunConfig, not dict"),
        ({"sampler": 3}, TypeError, "sampler must have a method sample"),
        ({"model": "cnn"}, TypeError, "model must be a torch.nn.Module, not str"),
        ({"loss": 3}, TypeError, "loss must be a function"),
        ({"checkpoint_every": 0}, ValueError, "checkpoint_every=0"),
    ],
)
def test_wrong_arguments_of_train_are_named(tmp_path, arguments, error, words):
    with pytest.raises(error, match=words):
        amaml.train(**({"config": amaml.RunConfig(**SMALL), "out": tmp_path} | arguments))
    assert not any(tmp_path.iterdir())


def test_a_read_record_is_what_was_written(tmp_path):
    run = train(tmp_path)
    table = pd.concat([run.metrics, run.metrics], ignore_index=True).assign(run=run.id)
    table.loc[3, "query_loss"] = math.inf
    maker = [{"runs": [run.id], "seconds": 1.5, "commit": "abc"}]
    records.write_records("figure_9", "small", table, maker, tmp_path / "records")
    read, made_by = records.read_records("figure_9", "small", tmp_path / "records")
    pd.testing.assert_frame_equal(read, table, check_exact=True)
    assert made_by == maker
    path = tmp_path / "records" / "figure_9-small.csv.gz"
    before = path.read_bytes()
    records.write_records("figure_9", "small", table, maker, tmp_path / "records")
    assert path.read_bytes() == before
    path.write_bytes(before[:-20])
    with pytest.raises(ValueError, match=r"figure_9-small.csv.gz is damaged.*train again"):
        records.read_records("figure_9", "small", tmp_path / "records")
    empty, makers = records.read_records("figure_8", "small", tmp_path / "records")
    assert len(empty) == 0 and makers == []


def test_thinning_keeps_the_ends_the_spacing_and_the_validations():
    metrics = pd.DataFrame({"iteration": range(1, 1202)})
    metrics["validation_loss"] = (metrics["iteration"] % 10 == 0).replace(False, np.nan)
    thin = records.thin(metrics, 500)["iteration"]
    assert 400 < len(thin) <= 500 and thin.iloc[0] == 1 and thin.iloc[-1] == 1201
    assert set(range(10, 1201, 10)) <= set(thin) and set(range(3, 1201, 3)) <= set(thin)
    assert len(records.thin(metrics[:300], 500)) == 300


def test_final_validation_by_hand():
    table = pd.DataFrame({
        "run": ["a"] * 4 + ["b"] * 2,
        "status": ["done"] * 4 + ["diverged"] * 2,
        "iteration": [1, 100, 101, 200, 1, 2],
        "validation_loss": [9.0, 5.0, 1.0, 2.0, 0.5, np.nan],
        "validation_accuracy": [0.1, 0.2, 0.3, 0.5, 0.2, np.nan],
        "alpha": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        "beta": [0.1] * 6,
    })  # fmt: skip
    final = records.final_validation(table)
    assert final.loc["a", ["validation_loss", "validation_accuracy", "alpha"]].tolist() == [
        1.5, 0.4, 4.0,
    ]  # fmt: skip
    assert final.loc["b", "validation_loss"] == math.inf


def test_checkpoints_of_another_layout_or_damaged_are_refused_by_name(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    nested = {"theta": {"a.weight": torch.randn(3)}, "alpha": torch.tensor(0.1)}
    checkpoints.save_checkpoint(path, nested, 7, 1.5)
    read, iteration, seconds = checkpoints.load_checkpoint(path)
    assert torch.equal(read["theta"]["a.weight"], nested["theta"]["a.weight"])
    assert (iteration, seconds) == (7, 1.5)
    os.truncate(path, 40)
    with pytest.raises(ValueError, match="checkpoint.safetensors is damaged.*anew"):
        checkpoints.load_checkpoint(path)
