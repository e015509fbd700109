"""What runs on a GPU stays there, shown by tensors without data on any machine.

They know their shape, dtype and device, and refuse an operation between a CPU and a GPU, and any
look at a number, which on a GPU would wait for all that is under way. FakeTensors of CUDA need a
torch that was built for it; with any other, tensors on the device "meta" say nearly as much.
"""

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

MODEL = amaml.OmniglotCNN(5, filters=8)  # real, on the CPU: its parameters are not looked at


@pytest.fixture(params=["cuda", "meta"], autouse=True)
def device(request):
    """The device of all tensors that a test makes."""
    mode = nullcontext()
    if request.param == "cuda":
        if not torch.cuda._is_compiled():
            pytest.skip(f"torch {torch.__version__} is not built for CUDA")
        mode = FakeTensorMode()
        torch._C._ensureCUDADeviceGuardSet()  # as the first tensor on a real GPU does
    with mode, torch.device(request.param):
        yield request.param


@pytest.fixture(params=["fast", "plain"])
def setting(request, monkeypatch, device):
    """A state and tasks, with the written-out passes and without them."""
    if (request.param, device) == ("plain", "cuda") and not torch.cuda.is_available():
        pytest.skip("torch's automatic differentiation asks for a real GPU")
    monkeypatch.setattr(fast, "ON", request.param == "fast")
    theta = {name: torch.rand(p.shape) for name, p in MODEL.named_parameters()}
    assert fast.serves(MODEL, theta, torch.rand(())) == fast.ON
    state = amaml.MetaState(theta, torch.rand(()), torch.rand(()), theta, {})
    x, y = torch.rand(3, 5, 1, 28, 28), torch.arange(5).repeat(3, 1)
    return state, amaml.Tasks(x, y, x, y)


def devices(*results) -> set[str]:
    return {value.device.type for value in tree_leaves(results)}


@pytest.mark.parametrize("options", [{}, {"first_order": True}, {"recompute": True}])
def test_a_meta_step(setting, device, options):
    state, tasks = setting
    state, metrics = amaml.meta_step(MODEL, state, tasks, hyper_alpha=0.1, inner_steps=3, **options)
    assert devices(state, metrics) == {device} and metrics["query_accuracy"].shape == ()


def test_an_evaluation(setting, device):
    state, tasks = setting
    metrics = query_metrics(MODEL, state.theta, state.alpha, tasks, 2, F.cross_entropy)
    assert devices(metrics) == {device} and {value.shape for value in metrics.values()} == {(3,)}


def test_many_runs_at_once(setting, device):
    state, tasks = setting

    def step(alpha):
        return amaml.meta_step(MODEL, state._replace(alpha=alpha), tasks, hyper_beta=0.1)

    state, metrics = vmap(step)(torch.rand(4))
    assert devices(state, metrics) == {device}
    assert state.theta["linear.weight"].shape == (4, 5, 8)


def test_drawing_tasks(device):
    images = torch.zeros(9, 20, 28, 28, dtype=torch.uint8)
    sampler = amaml.TaskSampler(amaml.Characters(images, tuple("abcdefghi")), n_way=5)
    tasks = sampler.sample(3, torch.Generator("cpu"))
    assert devices(vars(tasks)) == {device} and tasks.query_x.shape == (3, 5, 1, 28, 28)


def test_what_these_tests_would_find(setting):
    state, tasks = setting
    theta = state.theta | {"linear.weight": torch.rand(5, 8, device="cpu")}
    with pytest.raises(RuntimeError, match="cpu"):
        amaml.meta_step(MODEL, state._replace(theta=theta), tasks)
    with pytest.raises(RuntimeError):
        float(state.alpha)
