"""On a GPU everything stays there: tensors without data say so on any machine.

A FakeTensor knows its shape, dtype and device. It refuses an operation between a CPU and a GPU, and
any look at a number, which on a GPU would wait for all that is under way.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.func import vmap
from torch.utils._pytree import tree_leaves

import amaml
from amaml import fast
from amaml.maml import query_metrics


@pytest.fixture(autouse=True)
def fake():
    torch._C._ensureCUDADeviceGuardSet()  # else it is set by the first tensor of a real GPU
    with FakeTensorMode(), torch.device("cuda"):
        try:
            torch.ones(1) + 1
        except (RuntimeError, AssertionError) as error:
            pytest.skip(f"torch {torch.__version__} has no fake CUDA tensors: {error}")
        yield


@pytest.fixture(params=[True, False], ids=["fast", "plain"])
def setting(request, monkeypatch):
    """A model, its state and tasks, by the written-out passes and without them."""
    monkeypatch.setattr(fast, "ON", request.param)
    model = amaml.OmniglotCNN(5, filters=8)
    theta = {name: p.detach() for name, p in model.named_parameters()}
    assert fast.serves(model, theta, torch.tensor(0.1)) == request.param
    state = amaml.MetaState(theta, torch.rand(()), torch.rand(()), theta, {})
    x, y = torch.rand(3, 5, 1, 28, 28), torch.arange(5).repeat(3, 1)
    return model, state, amaml.Tasks(x, y, x, y)


def on_gpu(*results) -> bool:
    return {value.device.type for value in tree_leaves(results)} == {"cuda"}


@pytest.mark.parametrize(
    "options",
    [{}, {"inner_steps": 3}, {"first_order": True}, {"inner_steps": 3, "recompute": True}],
)
def test_a_meta_step(setting, options):
    model, state, tasks = setting
    state, metrics = amaml.meta_step(model, state, tasks, hyper_alpha=0.1, **options)
    assert on_gpu(state, metrics) and metrics["query_accuracy"].shape == ()


def test_an_evaluation(setting):
    model, state, tasks = setting
    loss = torch.nn.functional.cross_entropy
    metrics = query_metrics(model, state.theta, state.alpha, tasks, 2, loss)
    assert on_gpu(metrics) and {value.shape for value in metrics.values()} == {(3,)}


def test_many_runs_at_once(setting):
    model, state, tasks = setting

    def step(alpha):
        return amaml.meta_step(model, state._replace(alpha=alpha), tasks, hyper_beta=0.1)

    state, metrics = vmap(step)(torch.rand(4))
    assert on_gpu(state, metrics) and state.theta["linear.weight"].shape == (4, 5, 8)


def test_drawing_tasks():
    characters = amaml.Characters(torch.zeros(9, 20, 28, 28, dtype=torch.uint8), tuple("abcdefghi"))
    tasks = amaml.TaskSampler(characters, n_way=5).sample(3, torch.Generator("cpu"))
    assert on_gpu(vars(tasks)) and tasks.query_x.shape == (3, 5, 1, 28, 28)


def test_what_these_tests_would_find(setting):
    model, state, tasks = setting
    with pytest.raises(RuntimeError, match="cpu"):
        amaml.meta_step(model, state._replace(alpha=torch.rand(2, device="cpu")[0]), tasks)
    with pytest.raises(DataDependentOutputException):
        float(state.alpha)
