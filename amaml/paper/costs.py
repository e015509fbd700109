"""What a step costs: a MAML step to compare Alpha MAML with, and the memory of any step."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from amaml.checks import Theta
from amaml.fast import meta_gradients as fast
from amaml.fast.omniglot_cnn import OmniglotPass, prepare
from amaml.shapes import Float
from amaml.tasks import Tasks


def maml_step(theta: Theta, alpha: Float[Tensor, ""], beta: float, tasks: Tasks) -> Theta:
    """Algorithm 1 for `OmniglotCNN`, one inner step, by the passes and in the pieces of
    `amaml.meta_step`, without what Alpha MAML adds to it: the derivative by alpha, the kept
    gradient and the updates of the rates. Returns the next theta."""

    def gradients(theta, alpha, support_x, support_y, query_x, query_y):
        step = fast.inner_step(theta, prepare(support_x), support_y, F.cross_entropy)
        query = OmniglotPass(fast.inner_update(theta, step, alpha), prepare(query_x))
        v = query.gradient(fast.derivatives(F.cross_entropy, query.logits, query_y)[1])
        step = step._replace(gradient={})  # neither is held any longer by `amaml.fast`
        del query
        hessian_v = step.at.hvp(step.curvature(step.at.jvp(v)))
        return [fast.minus_scaled(v[name], alpha, hessian_v[name]) for name in theta], []

    of_one_run = (value.unsqueeze(0) for value in (*theta.values(), alpha, *vars(tasks).values()))
    means = fast.in_pieces(gradients, list(theta), *of_one_run)
    return {name: theta[name] - beta * g.squeeze(0) for name, g in zip(theta, means, strict=True)}


def step_memory(step: Callable[[], object], device: str = "cpu") -> tuple[int, int]:
    """The highest sum of bytes of tensors during `step()`, and those of its result, as counted by
    torch: by its profiler on the CPU, by its allocator on a GPU."""
    if device != "cpu":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        _kept = step()
        sums = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
        return sums[0] - before, sums[1] - before
    with torch.profiler.profile(profile_memory=True) as profiler:
        _kept = step()  # held while its memory is counted
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    total = highest = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        total += event["args"]["Bytes"]
        highest = max(highest, total)
    return highest, total
