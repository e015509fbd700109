"""What several tests share: small tasks, and an independent computation of everything by hand."""

import multiprocessing
import os
from contextlib import redirect_stdout
from functools import partial
from itertools import count
from pathlib import Path
from pkgutil import resolve_name
from typing import TextIO

import pytest
import torch
from torch.nn import functional as F

import amaml
from amaml.runs import store

OMNIGLOT = os.environ.get("AMAML_DATA") and Path(os.environ["AMAML_DATA"])
needs_omniglot = pytest.mark.skipif(
    not OMNIGLOT,
    reason="AMAML_DATA is not set: give the folder that holds Omniglot's two zips to run this test",
)
ROOT = Path(__file__).resolve().parents[1]

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
}  # a run of seconds


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


def omniglot_forward(theta, x):
    """OmniglotCNN written once more, with torch's own convolution and batch normalisation."""
    for i, before in enumerate((0, 0, 1, 0)):  # maps of 28, 14, 7 and 4 pixels
        x = F.pad(x, (before, 1, before, 1))
        x = F.conv2d(x, theta[f"blocks.{i}.weight"].permute(3, 2, 0, 1), stride=2)
        x = F.batch_norm(x, None, None, bias=theta[f"blocks.{i}.offset"], training=True, eps=1e-3)
        x = x.clamp(min=0)
    return F.linear(x.mean((2, 3)), theta["linear.weight"], theta["linear.bias"])


def small_model() -> amaml.OmniglotCNN:
    return amaml.OmniglotCNN(3, torch.Generator().manual_seed(0), filters=4).double()


def batches(n: int, batch: int = 2) -> list[amaml.Tasks]:
    return [random_tasks((1, 28, 28), batch=batch, seed=10 + i) for i in range(n)]


class Lines:
    """Tasks of one's own: straight lines; in meta-batch number `at` all targets are `value`."""

    def __init__(self, at: int = 0, value: float = 0.0):
        self.at, self.value, self.asked = at, value, 0

    def sample(self, meta_batch_size, generator):
        self.asked += 1
        slope = torch.randn(meta_batch_size, 1, 1, generator=generator)
        x = torch.randn(meta_batch_size, 10, 1, generator=generator)
        y = torch.full_like(x, self.value) if self.asked == self.at else slope * x
        return amaml.Tasks(x[:, :5], y[:, :5], x[:, 5:], y[:, 5:])


def line(seed: int) -> torch.nn.Linear:
    """A model of one's own, as a function of the seed."""
    model = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(model.weight, 0.5 + seed)
    torch.nn.init.zeros_(model.bias)
    return model


def squared_error(prediction, y):
    return (prediction - y).square().mean()


OWN = {"name": "lines", "model": line, "sampler": Lines(), "loss": squared_error}


def bits(folder: Path) -> tuple:
    """What a run's file holds, to the last bit, but for what made it and how long that took.

    Of a run that ended before its last iteration, what was computed after that is left out.
    """
    tensors, metrics, about = store.read_run(folder)
    kept = {"running": tensors, "done": tensors, "reached": {"state": tensors["state"]}}
    state = store.flatten(kept.get(about["status"], {}))
    told = {name: about[name] for name in ("config", "name", "parts", "status", "iteration")}
    return told, metrics.to_csv(), {name: value.numpy().tobytes() for name, value in state.items()}


class Cut(BaseException):
    """Stands for the end of a process."""


def cut_short(monkeypatch, after: int, *names: str) -> None:
    """Let these functions, such as "os.replace", be called so often, and the process end then."""
    calls = count()

    def call(real, *words, **more):
        if next(calls) >= after:
            raise Cut
        return real(*words, **more)

    for name in names:
        monkeypatch.setattr(name, partial(call, resolve_name(name)))


# Processes are forked from one that has imported what they need, and has no threads.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["amaml.paper", "pytest", "torch.fx.experimental.symbolic_shapes"])


def started(function, *words) -> tuple[multiprocessing.Process, TextIO]:
    """A process of its own that runs a function of a test, and what that prints."""
    reading, writing = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=printing, args=(writing, function, *words))
    process.start()
    writing.close()
    return process, os.fdopen(os.dup(reading.fileno()))


def printing(writing, function, *words) -> None:
    torch.set_num_threads(1)
    with os.fdopen(os.dup(writing.fileno()), "w", buffering=1) as said, redirect_stdout(said):
        writing.close()
        function(*words)
