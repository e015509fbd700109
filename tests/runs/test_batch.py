"""Runs side by side: looked at seldom, replayed as a graph or resumed apart, they come out as one
by one."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from helpers import SMALL, Cut, bits, cut_short

import amaml
from amaml.fast import cuda_graph
from amaml.runs import batch, store
from amaml.training import train_together

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = amaml.RunConfig(**SMALL, iterations=23)
VARIED = [
    CONFIG,
    replace(CONFIG, seed=1),
    replace(CONFIG, hyper_alpha=0.0, hyper_beta=0.0),
    replace(CONFIG, beta=1e38),  # diverges
]


def written(out, configs, **more) -> list[tuple]:
    """What runs that are made together leave behind."""
    return [bits(out / run.id) for run in train_together(configs, out, **more)]


def seldom(batch, checkpoint_every) -> int:
    """As on a GPU: past several validations."""
    return min((batch.runs[0].iteration // 10 + 1) * 10, batch.config.iterations)


@pytest.mark.parametrize("threshold", [None, 1.0])
def test_runs_that_are_looked_at_seldom_end_where_they_should(tmp_path, monkeypatch, threshold):
    configs = [replace(config, threshold=threshold, alpha=0.3) for config in VARIED]
    often = written(tmp_path / "often", configs)
    monkeypatch.setattr(batch, "next_look", seldom)
    assert written(tmp_path / "seldom", configs) == often
    if threshold is not None:  # within a look, at a validation that is not its end
        assert any(told["status"] == "reached" and told["iteration"] % 10 for told, *_ in often)


def test_a_run_that_ended_within_a_look_goes_on_as_the_whole_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "next_look", seldom)
    whole = amaml.train(CONFIG, tmp_path, progress=False)
    short = amaml.train(replace(CONFIG, threshold=9.0), tmp_path, progress=False)
    assert (short.status, short.iteration) == ("reached", 4)
    run = amaml.train(CONFIG, tmp_path, start=short, progress=False)
    assert run.id != whole.id and run.metrics.equals(whole.metrics)


def test_runs_that_a_kill_left_apart_go_on_together(tmp_path, monkeypatch):
    configs = [*VARIED[:3], replace(CONFIG, seed=1, alpha=0.3)]
    whole = written(tmp_path / "whole", configs)
    for config, after in zip(configs, (14, 7, 2), strict=False):
        with monkeypatch.context() as patch, pytest.raises(Cut):
            cut_short(patch, after, "amaml.alpha_maml.meta_gradient")
            amaml.train(config, tmp_path, checkpoint_every=3, progress=False)
    left = [store.read_run(path.parent)[2] for path in tmp_path.glob("*/run.safetensors")]
    assert {about["iteration"] for about in left} == {12, 6}
    assert written(tmp_path, configs, checkpoint_every=3) == whole


def test_runs_of_other_shapes_are_not_made_together(tmp_path):
    for configs in ([CONFIG, replace(CONFIG, k_query=2)], [CONFIG, CONFIG]):
        words = "must differ from each other, and in alpha, beta, hyper_alpha, hyper_beta, seed"
        with pytest.raises(ValueError, match=words):
            train_together(configs, tmp_path)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_replayed_iterations_are_the_iterations(tmp_path, monkeypatch, optimizer):
    captured, replays = [], []

    def capture(work, generators):
        """Stands for a CUDA graph on the CPU: does the captured work again, on the same tensors."""
        captured.append(work)
        work()  # a capture computes nothing that counts, so what this does must not either
        return lambda: replays.append(work())

    configs = [replace(config, meta_optimizer=optimizer) for config in VARIED]
    plain = written(tmp_path / "plain", configs)
    monkeypatch.setitem(cuda_graph.CAPTURES, "cpu", capture)
    assert written(tmp_path / "many", configs) == plain
    assert len(captured) == 2  # once more when one of the runs has diverged
    assert written(tmp_path / "one", configs[1:2]) == plain[1:2]
    assert len(replays) >= 2 * CONFIG.iterations
    monkeypatch.setenv("AMAML_CUDA_GRAPHS", "0")
    assert written(tmp_path / "without", configs[1:2]) == plain[1:2]
    assert len(captured) == 3


def test_a_replay_that_gives_other_numbers_is_refused(tmp_path, monkeypatch):
    def drawing_the_same_tasks_again(work, generators):
        states = [generator.get_state() for generator in generators]

        def replay():
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
            work()

        return replay

    monkeypatch.setitem(cuda_graph.CAPTURES, "cpu", drawing_the_same_tasks_again)
    with pytest.raises(RuntimeError, match="AMAML_CUDA_GRAPHS=0"):
        amaml.train(CONFIG, tmp_path, progress=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("n", [1, 3])
def test_on_a_gpu_graphs_give_the_iterations_one_by_one(tmp_path, monkeypatch, n):
    runs = train_together(VARIED[:n], tmp_path / "graph", device="cuda")
    monkeypatch.setenv("AMAML_CUDA_GRAPHS", "0")
    plain = train_together(VARIED[:n], tmp_path / "plain", device="cuda")
    for run, one_by_one in zip(runs, plain, strict=True):
        pd.testing.assert_frame_equal(run.metrics, one_by_one.metrics, rtol=1e-4)
