"""What several tests share: small tasks, and an independent computation of everything by hand."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import pytest
import torch

import amaml

OMNIGLOT = os.environ.get("AMAML_DATA") and Path(os.environ["AMAML_DATA"])
needs_omniglot = pytest.mark.skipif(
    not OMNIGLOT,
    reason="AMAML_DATA is not set: give the folder that holds Omniglot's two zips to run this test",
)


@pytest.fixture(scope="session")
def glyphs() -> amaml.Characters:
    return amaml.load_glyphs()


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def torchvision_datasets(monkeypatch):
    """torchvision's data sets, also beside a torch whose build torchvision does not match.

    Its compiled operators then cannot be loaded, and the data sets need none of them.
    """
    try:
        import torchvision.datasets
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            monkeypatch.delitem(sys.modules, name)
        stand_in = types.ModuleType("torchvision._meta_registrations")
        monkeypatch.setitem(sys.modules, "torchvision._meta_registrations", stand_in)
    import torchvision.datasets

    return torchvision.datasets


def random_tasks(
    shape: tuple[int, ...], n_way: int = 3, k: int = 2, batch: int = 2, seed: int = 0
) -> amaml.Tasks:
    """Float64 tasks of noise, `shape` for one example: enough to test derivatives on."""
    generator = torch.Generator().manual_seed(seed)

    def noise() -> torch.Tensor:
        return torch.randn(batch, n_way * k, *shape, dtype=torch.float64, generator=generator)

    labels = torch.arange(n_way).repeat_interleave(k).repeat(batch, 1)
    return amaml.Tasks(support_x=noise(), support_y=labels, query_x=noise(), query_y=labels)


def loop_losses(
    forward, theta, alpha, tasks, inner_steps=1, first_order=False, fixed=(), loss=None
):
    """Query losses of the tasks one by one, by torch.autograd and without torch.func.

    `forward(theta, x)` gives the predictions. Returns the list of query losses, differentiable in
    theta and alpha (whose tensors must require gradients for the inner loop to work).
    """
    loss = loss or torch.nn.functional.cross_entropy
    losses = []
    for i in range(len(tasks)):
        adapted = dict(theta)
        moving = [name for name in theta if name not in fixed]
        for _ in range(inner_steps):
            value = loss(forward(adapted, tasks.support_x[i]), tasks.support_y[i])
            gradients = torch.autograd.grad(
                value, [adapted[name] for name in moving], create_graph=not first_order
            )
            for name, gradient in zip(moving, gradients, strict=True):
                adapted[name] = adapted[name] - alpha * gradient
        losses.append(loss(forward(adapted, tasks.query_x[i]), tasks.query_y[i]))
    return losses


def leaves(theta) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone().requires_grad_() for name, value in theta.items()}


def relative_error(a, b) -> float:
    """|a - b| / |b| over dicts of tensors or single tensors."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = (torch.cat([d[name].reshape(-1) for name in sorted(d)]) for d in (a, b))
    a, b = a.detach(), b.detach()
    return float((a - b).norm() / b.norm())
