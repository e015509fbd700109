"""Runs side by side: looked at seldom, or replayed as a graph, they come out as one by one."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch
from test_training import SMALL

import amaml
from amaml.fast import cuda_graph
from amaml.runs import batch
from amaml.training import train_together

CONFIG = amaml.RunConfig(**SMALL | {"iterations": 23, "validation_every": 4})
VARIED = [
    CONFIG,
    replace(CONFIG, seed=1),
    replace(CONFIG, hyper_alpha=0.0, hyper_beta=0.0),
    replace(CONFIG, beta=1e38),  # diverges
]


def same(run: amaml.Run, other: amaml.Run) -> bool:
    states = zip(run.state.theta.values(), other.state.theta.values(), strict=True)
    finished = run.status == "diverged" or all(torch.equal(a, b) for a, b in states)
    return finished and run.status == other.status and run.metrics.equals(other.metrics)


def seldom(program, checkpoint_every):
    """As on a GPU: past several validations."""
    return min((program.runs[0].iteration // 10 + 1) * 10, program.config.iterations)


@pytest.mark.parametrize("threshold", [None, 1.0])
def test_runs_that_are_looked_at_seldom_end_where_they_should(
    tmp_path, monkeypatch, one_thread, threshold
):
    configs = [replace(config, threshold=threshold, alpha=0.3) for config in VARIED]
    often = train_together(configs, tmp_path / "often")
    monkeypatch.setattr(batch, "next_look", seldom)
    for run, expected in zip(train_together(configs, tmp_path / "seldom"), often, strict=True):
        assert same(run, expected)
    alone = amaml.train(configs[1], tmp_path / "alone", progress=False)
    assert same(alone, often[1])
    if threshold is not None:  # within a look, at a validation that is not its end
        assert any(run.status == "reached" and run.iteration % 10 for run in often)


class Replays:
    """Stands for a CUDA graph on the CPU: does the captured work again, on the same tensors."""

    def __init__(self):
        self.captured = self.replays = 0

    def __call__(self, work, generators):
        self.captured += 1
        work()  # a capture computes nothing that counts, so what this does must not either

        def replay():
            self.replays += 1
            work()

        return replay


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_replayed_iterations_are_the_iterations(tmp_path, monkeypatch, one_thread, optimizer):
    configs = [replace(config, meta_optimizer=optimizer) for config in VARIED]
    plain = train_together(configs, tmp_path / "plain")
    monkeypatch.setitem(cuda_graph.CAPTURES, "cpu", replays := Replays())
    for run, expected in zip(train_together(configs, tmp_path / "many"), plain, strict=True):
        assert same(run, expected)
    assert replays.captured == 2  # once more when one of the runs has diverged
    alone = amaml.train(configs[1], tmp_path / "one", progress=False)
    pd.testing.assert_frame_equal(alone.metrics, plain[1].metrics, check_exact=True)
    assert replays.replays >= 2 * CONFIG.iterations
    monkeypatch.setenv("AMAML_CUDA_GRAPHS", "0")
    amaml.train(replace(CONFIG, seed=9), tmp_path / "one", progress=False)
    assert replays.captured == 3


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
@pytest.mark.parametrize("together", [False, True])
def test_on_a_gpu_graphs_give_the_iterations_one_by_one(tmp_path, monkeypatch, together):
    configs = VARIED[:3] if together else VARIED[:1]
    runs = train_together(configs, tmp_path / "graph", device="cuda")
    monkeypatch.setenv("AMAML_CUDA_GRAPHS", "0")
    for run, plain in zip(
        runs, train_together(configs, tmp_path / "plain", device="cuda"), strict=True
    ):
        pd.testing.assert_frame_equal(run.metrics, plain.metrics, rtol=1e-4)
