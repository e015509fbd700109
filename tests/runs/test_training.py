"""Runs: validated, repeatable, read when they are finished, of one's own parts, ending as they
should."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import OWN, SMALL, Cut, bits, cut_short

import amaml
from amaml.runs import store
from amaml.runs.parts import seeded_generator
from amaml.training import train_together

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = amaml.RunConfig(**SMALL, iterations=9)


def train(out, config=CONFIG, **more) -> amaml.Run:
    return amaml.train(config, out, checkpoint_every=3, progress=False, **more)


def test_a_run_logs_each_iteration_and_validates_at_intervals(tmp_path):
    run = train(tmp_path)
    assert (run.status, run.iteration, run.read) == ("done", 9, False)
    assert run.metrics["iteration"].tolist() == list(range(1, 10))
    assert run.metrics.dropna()["iteration"].tolist() == [4, 8, 9]
    assert run.metrics["alpha"].iloc[0] == np.float32(0.1)
    assert set(run.metrics) == {
        "iteration", "support_loss", "query_loss", "query_accuracy", "alpha", "beta",
        "gradient_norm", "d_alpha", "d_beta", "validation_loss", "validation_accuracy",
    }  # fmt: skip
    assert run.seconds > 0 and run.maker["threads"] == 1
    assert {path.name for path in (tmp_path / run.id).iterdir()} == {store.NAME, ".lock"}


def test_a_run_names_every_commit_that_had_a_part_in_it(tmp_path):
    train_together([CONFIG], tmp_path, checkpoint_every=3, deadline=0)
    folder = tmp_path / CONFIG.id
    tensors, metrics, about = store.read_run(folder)
    here = about["maker"]["commit"]
    about["maker"] |= {"commit": "a b", "clean": False}
    store.write_run(folder, tensors, metrics, about)
    run = train(tmp_path)
    assert run.status == "done" and run.maker["commit"].split() == ["a", "b", here]
    assert run.maker["clean"] is False and train(tmp_path).maker == run.maker


def test_a_run_is_meta_step_after_meta_step(tmp_path):
    run = train(tmp_path)
    split = amaml.split_characters(amaml.load_glyphs())
    sampler = amaml.TaskSampler(split.train, n_way=3)
    model = amaml.OmniglotCNN(3, seeded_generator(0, "initialisation"), filters=4)
    state, generator = amaml.init_state(model, 0.1, 0.05), seeded_generator(0, "training tasks")
    for row in run.metrics.itertuples():
        tasks = sampler.sample(2, generator)
        state, metrics = amaml.meta_step(model, state, tasks, hyper_alpha=1e-3, hyper_beta=1e-3)
        for name, value in metrics.items():
            assert getattr(row, name) == value.item()
    sampler = amaml.TaskSampler(split.validation, n_way=3)
    validation = sampler.sample(3, seeded_generator(0, "validation tasks"))
    measured = amaml.evaluate(model, state, validation)
    assert run.metrics["validation_loss"].iloc[-1] == measured["query_loss"]
    assert torch.equal(run.state.alpha, state.alpha)


def test_equal_configs_give_equal_runs_and_other_rates_the_same_tasks(tmp_path):
    run, again = train(tmp_path / "a"), train(tmp_path / "b")
    assert bits(tmp_path / "a" / run.id) == bits(tmp_path / "b" / again.id)
    other, seed = (train(tmp_path, replace(CONFIG, **c)) for c in ({"alpha": 0.2}, {"seed": 1}))
    # The first support loss is taken at the initialisation, before any rate has an effect.
    first = [some.metrics["support_loss"].iloc[0] for some in (run, other, seed)]
    assert first[0] == first[1] != first[2]
    assert not run.metrics["query_loss"].equals(other.metrics["query_loss"])


def test_a_finished_run_is_read_and_left_as_it_is_also_among_others(tmp_path):
    run = train(tmp_path)
    written = (tmp_path / run.id / store.NAME).stat().st_mtime_ns
    again = train(tmp_path)
    assert again.read and (tmp_path / run.id / store.NAME).stat().st_mtime_ns == written
    assert again.metrics.equals(run.metrics) and torch.equal(again.state.alpha, run.state.alpha)
    configs = [replace(CONFIG, seed=seed) for seed in (1, 0)]
    assert [run.read for run in train_together(configs, tmp_path)] == [False, True]


def test_the_threshold_ends_a_run(tmp_path):
    config = replace(CONFIG, iterations=40, alpha=0.4, beta=0.3)
    whole = train(tmp_path, config)
    losses = whole.metrics.dropna(subset="validation_loss").set_index("iteration")
    threshold = losses["validation_loss"].iloc[3]
    first = losses.index[losses["validation_loss"] <= threshold][0]
    run = train(tmp_path, replace(config, threshold=threshold))
    assert (run.status, run.iteration) == ("reached", first)
    assert run.metrics.equals(whole.metrics[: len(run.metrics)])


def test_the_test_accuracy_is_that_of_the_finished_parameters(tmp_path):
    config = replace(CONFIG, test_tasks=6, test_inner_steps=2)
    for run in train_together([config, replace(config, seed=1)], tmp_path):
        sampler = amaml.TaskSampler(amaml.split_characters(amaml.load_glyphs()).test, 3)
        tasks = sampler.sample(6, seeded_generator(run.config.seed, "test tasks"))
        network = amaml.OmniglotCNN(3, filters=run.config.filters)
        for steps, suffix in ((2, ""), (1, "_1_step")):
            expected = amaml.evaluate(network, run.state, tasks, inner_steps=steps)
            for name in ("accuracy", "accuracy_ci95", "loss", "loss_ci95"):
                assert run.metrics[f"test_{name}{suffix}"].iloc[-1] == expected[f"query_{name}"]
        assert run.metrics["test_accuracy"].notna().sum() == 1


@pytest.mark.parametrize(
    ("fields", "status"),
    [({}, "done"), ({"beta": 1e38}, "diverged"), ({"threshold": 9.0}, "reached")],
)
def test_a_run_whose_end_is_not_on_the_disk_ends_as_it_did(tmp_path, monkeypatch, fields, status):
    config = replace(CONFIG, **fields)
    whole = train(tmp_path / "whole", config)
    assert whole.status == status
    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_short(patch, (whole.iteration - 1) // 3, "amaml.training.save")
        train(tmp_path, config)
    assert not train(tmp_path, config).read
    assert bits(tmp_path / config.id) == bits(tmp_path / "whole" / config.id)


def test_a_run_that_was_begun_on_another_kind_of_device_is_left_alone(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_short(patch, 5, "amaml.alpha_maml.meta_gradient")
        train(tmp_path)
    folder = tmp_path / CONFIG.id
    tensors, metrics, about = store.read_run(folder)
    tensors["generator"] = tensors["generator"][:16].clone()  # as large as a GPU's
    store.write_run(folder, tensors, metrics, about)
    with pytest.raises(ValueError, match=f"{CONFIG.id}.*another kind of device than cpu"):
        train(tmp_path)


def test_a_folder_of_another_config_is_refused_and_kept_but_a_field_may_come_later(tmp_path):
    run = train(tmp_path)
    tensors, metrics, about = store.read_run(tmp_path / run.id)
    for field, value in (("test_tasks", 0), ("test_inner_steps", 1)):
        assert about["config"].pop(field) == value
    store.write_run(tmp_path / run.id, tensors, metrics, about)
    pd.testing.assert_frame_equal(train(tmp_path).metrics, run.metrics)
    about["config"]["alpha"] = 7.0
    store.write_run(tmp_path / run.id, tensors, metrics, about)
    before = bits(tmp_path / run.id)
    with pytest.raises(ValueError, match="holds another config.*another out"):
        train(tmp_path)
    assert bits(tmp_path / run.id) == before


def test_ones_own_model_sampler_and_loss(tmp_path):
    config = amaml.RunConfig(iterations=60, beta=0.1, hyper_alpha=1e-3, hyper_beta=1e-3)
    run = train(tmp_path, config, **OWN)
    assert run.id.startswith("lines-") and "query_accuracy" not in run.metrics
    assert run.metrics["alpha"].iloc[-1] > 0.02  # the tasks differ: adapting more helps
    assert run.metrics["validation_loss"].iloc[-1] < run.metrics["query_loss"].iloc[0]
    train(tmp_path / "again", config, **OWN)
    assert bits(tmp_path / run.id) == bits(tmp_path / "again" / run.id)


def without_alpha(model, state, tasks, **options):
    """A step of one's own: only beta is adapted."""
    return amaml.meta_step(model, state, tasks, **options | {"hyper_alpha": 0.0})


def test_ones_own_step_takes_the_place_of_meta_step(tmp_path):
    parts = {"name": "beta", "step": without_alpha}
    run, usual = train(tmp_path, **parts), train(tmp_path, replace(CONFIG, hyper_alpha=0.0))
    assert run.metrics.equals(usual.metrics) and run.id.startswith("beta-")
