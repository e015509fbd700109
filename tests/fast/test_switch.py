"""`amaml.fast` changes no number: with it switched off everything comes out the same."""

import os
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch
from helpers import ROOT, SMALL, batches, relative_error, small_model

import amaml
from amaml import fast
from amaml.fast import cuda_graph
from amaml.training import train_together

CONFIG = amaml.RunConfig(**SMALL | {"iterations": 5, "inner_steps": 2})


@pytest.fixture(params=[True, False], ids=["on", "off"])
def switch(request, monkeypatch):
    """The switch, and a list of the fast functions that have been called."""
    monkeypatch.setattr(fast, "ON", request.param)
    called = []
    for name in ("meta_gradient", "query_metrics"):
        real = getattr(fast, name)

        def spy(*arguments, real=real, name=name):
            called.append(name)
            return real(*arguments)

        monkeypatch.setattr(fast, name, spy)
    return request.param, called


@pytest.fixture(scope="module")
def results() -> dict:
    """What the tests got with the switch on, by test."""
    return {}


class InFloat64:
    """A sampler. In float32 rounding moves units over ReLU's kink, and the runs apart."""

    def __init__(self, characters: amaml.Characters):
        self.sampler = amaml.TaskSampler(characters, n_way=3)

    def sample(self, meta_batch_size, generator):
        return self.sampler.sample(meta_batch_size, generator).double()


def check_calls(switch) -> None:
    on, called = switch
    assert set(called) == ({"meta_gradient", "query_metrics"} if on else set())


@pytest.mark.parametrize("options", [{}, {"first_order": True}, {"recompute": True}])
def test_steps_and_evaluations(switch, results, options):
    model, rates = small_model(), {"hyper_alpha": 1e-2, "hyper_beta": 1e-2}
    state = amaml.init_state(model, 0.1, 0.05)
    for tasks in batches(3):
        state, metrics = amaml.meta_step(model, state, tasks, inner_steps=2, **rates, **options)
    numbers = amaml.evaluate(model, state, batches(1, batch=5)[0], inner_steps=2)
    check_calls(switch)
    key = str(options)
    first_state, first_metrics, first_numbers = results.setdefault(key, (state, metrics, numbers))
    assert relative_error(state.theta, first_state.theta) < 1e-9
    assert relative_error(state.direction, first_state.direction) < 1e-9
    assert relative_error(metrics, first_metrics) < 1e-9
    assert numbers == pytest.approx(first_numbers, rel=1e-9)


def test_runs_alone_and_together(switch, results, tmp_path, glyphs):
    parts = {"name": "float64", "model": small_model(), "sampler": InFloat64(glyphs)}
    configs = [CONFIG, replace(CONFIG, seed=1), replace(CONFIG, alpha=0.3, hyper_beta=0.0)]
    alone = amaml.train(configs[0], tmp_path / "alone", progress=False, **parts)
    together = train_together(configs, tmp_path / "together", **parts)
    check_calls(switch)
    tables = [run.metrics for run in (alone, *together)]
    for table, first in zip(tables, results.setdefault("runs", tables), strict=True):
        pd.testing.assert_frame_equal(table, first, rtol=1e-9)


def test_iterations_are_replayed_on_a_gpu(switch, monkeypatch):
    gpu = torch.device("cuda")
    assert cuda_graph.available(gpu) == switch[0]
    assert not cuda_graph.available(torch.device("cpu"))
    monkeypatch.setenv("AMAML_CUDA_GRAPHS", "0")
    assert not cuda_graph.available(gpu)


@pytest.mark.parametrize(("value", "on"), [("0", False), ("1", True), (None, True)])
def test_the_environment_variable(value, on):
    given = {name: v for name, v in os.environ.items() if name != "AMAML_FAST"}
    given |= {} if value is None else {"AMAML_FAST": value}
    code = "from amaml import fast; print(fast.ON)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=given, capture_output=True)
    assert run.stdout.decode().strip() == str(on)
