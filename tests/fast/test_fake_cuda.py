"""What runs on a GPU stays there, shown by tensors without data on any machine.

They know their shape, dtype and device, and refuse an operation between a CPU and a GPU, and any
look at a number, which on a GPU would wait for all that is under way. FakeTensors of CUDA need a
torch that was built for it; with any other, tensors on the device "meta" say nearly as much.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import vmap
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import amaml
from amaml import fast
from amaml.maml import query_metrics


@pytest.fixture(params=["cuda", "meta"], autouse=True)
def device(request):
    """The device of all tensors that a test makes."""
    if request.param == "cuda" and not torch.cuda._is_compiled():
        pytest.skip(f"torch {torch.__version__} is not built for CUDA")
    if request.param == "cuda":
        torch._C._ensureCUDADeviceGuardSet()  # it is set by the first real tensor, and there is none
    with FakeTensorMode() if request.param == "cuda" else nullcontext():
        with torch.device(request.param):
            yield request.param


@pytest.fixture(params=["fast", "plain"])
def setting(request, monkeypatch, device):
    """A model, its state and tasks, with the written-out passes and without them."""
    monkeypatch.setattr(fast, "ON", request.param == "fast")
    model = amaml.OmniglotCNN(5, filters=8)
    theta = {name: p.detach() for name, p in model.named_parameters()}
    assert fast.serves(model, theta, torch.rand(())) == fast.ON
    state = amaml.MetaState(theta, torch.rand(()), torch.rand(()), theta, {})
    x, y = torch.rand(3, 5, 1, 28, 28), torch.arange(5).repeat(3, 1)
    return model, state, amaml.Tasks(x, y, x, y)


def devices(*results) -> set[str]:
    return {value.device.type for value in tree_leaves(results)}


@pytest.mark.parametrize(
    "options",
    [{}, {"inner_steps": 3}, {"first_order": True}, {"inner_steps": 3, "recompute": True}],
)
def test_a_meta_step(setting, device, options):
    model, state, tasks = setting
    state, metrics = amaml.meta_step(model, state, tasks, hyper_alpha=0.1, **options)
    assert devices(state, metrics) == {device} and metrics["query_accuracy"].shape == ()


def test_an_evaluation(setting, device):
    model, state, tasks = setting
    metrics = query_metrics(model, state.theta, state.alpha, tasks, 2, F.cross_entropy)
    assert devices(metrics) == {device} and {value.shape for value in metrics.values()} == {(3,)}


def test_many_runs_at_once(setting, device):
    model, state, tasks = setting

    def step(alpha):
        return amaml.meta_step(model, state._replace(alpha=alpha), tasks, hyper_beta=0.1)

    state, metrics = vmap(step)(torch.rand(4))
    assert devices(state, metrics) == {device}
    assert state.theta["linear.weight"].shape == (4, 5, 8)


def test_drawing_tasks(device):
    images = torch.zeros(9, 20, 28, 28, dtype=torch.uint8)
    sampler = amaml.TaskSampler(amaml.Characters(images, list("abcdefghi")), n_way=5)
    tasks = sampler.sample(3, torch.Generator("cpu"))
    assert devices(vars(tasks)) == {device} and tasks.query_x.shape == (3, 5, 1, 28, 28)


def test_what_these_tests_would_find(setting):
    model, state, tasks = setting
    with pytest.raises(RuntimeError, match="(?i)meta|cpu"):
        amaml.meta_step(model, state._replace(alpha=torch.rand(2, device="cpu")[0]), tasks)
    with pytest.raises(RuntimeError):
        float(state.alpha)
