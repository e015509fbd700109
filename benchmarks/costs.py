"""What an iteration costs and where the time goes; memory; many runs as one."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch.func import vmap
from torch.utils._pytree import tree_map

import amaml
from amaml.paper.costs import maml_step, step_memory
from amaml.paper.settings import PROFILES
from benchmarks import peers
from benchmarks.measures import ALPHA, AMAML, BETA, RATES, Bench, Rows, amaml_step, right_peers

STANDARD = {"n_way": 5, "inner_steps": 1, "meta_batch_size": 32}


def alpha(bench: Bench) -> Rows:
    """Alpha MAML beside a MAML step without alpha's gradient, kept gradient and rate updates."""
    model, tasks = bench.model(), sample_of_32(bench)
    theta, alpha, *_ = amaml.init_state(model, ALPHA, BETA)

    def maml() -> None:
        nonlocal theta
        theta = maml_step(theta, alpha, BETA, tasks)

    contestants = {"MAML": maml}
    for name, rule in (("Alpha MAML", "additive"), ("scale-free rule", "scale-free")):
        contestants[name] = partial(amaml_step(model, inner_steps=1, rule=rule), tasks)
    return bench.interleave(contestants, 60, STANDARD)


def sample_of_32(bench: Bench) -> amaml.Tasks:
    return amaml.TaskSampler(bench.characters, n_way=5).sample(32, bench.generator())


def parts(bench: Bench) -> Rows:
    """Where the time of an iteration goes: sampling, updates, and the meta-gradient by operations.

    The operations' times are those of torch's profiler; what is left of the meta-gradient lies
    between them and goes to Python (with torch.func, autograd and, on a GPU, waiting).
    """
    sampler, generator = amaml.TaskSampler(bench.characters, n_way=5), bench.generator()
    model, tasks = bench.model(), sample_of_32(bench)
    state = amaml.init_state(model, ALPHA, BETA)
    calls = {
        "sampling": lambda: sampler.sample(32, generator),
        "meta-gradient": lambda: amaml.meta_gradient(model, state.theta, state.alpha, tasks),
        "step": lambda: amaml.meta_step(model, state, tasks, **RATES),
    }
    rows = bench.interleave(calls, 20)
    medians = {
        name: statistics.median(row["value"] for row in rows if row["contestant"] == name)
        for name in calls
    }
    times = profiled(bench, calls["meta-gradient"])
    scale = min(1.0, medians["meta-gradient"] / sum(times.values()))  # profiling takes time too
    times = {part: scale * value for part, value in times.items()}
    times[OTHER] = times.get(OTHER, 0.0) + medians["meta-gradient"] - sum(times.values())
    times |= {"sampling": medians["sampling"]}
    times |= {"updates": max(0.0, medians["step"] - medians["meta-gradient"])}
    return [{"contestant": part, "round": 1, "value": times[part], "unit": "s"} for part in times]


def profiled(bench: Bench, step: Callable, calls: int = 5) -> dict[str, float]:
    """Seconds per call in each part's operations, by torch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if bench.device != "cpu":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    step()
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(calls):
            step()
        bench.synchronise()
    times: dict[str, float] = {}
    for event in profiler.key_averages():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel: its time is also that of the operation that has started it
        own = event.self_cpu_time_total if bench.device == "cpu" else event.self_device_time_total
        part = part_of(event.key)
        times[part] = times.get(part, 0.0) + own / 1e6 / calls
    return times


OTHER = "Python and views"
PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::dot")
CONVOLUTIONS = ("conv", "mkldnn")
COPIES = ("copy", "clone", "constant_pad", "zero", "fill", "cat", "im2col", "col2im")
VIEWS = (
    *("empty", "view", "reshape", "stride", "expand", "transpose", "permute", "movedim", "detach"),
    *("flatten", "squeeze", "select", "slice", "resize", "alias", "matmul", "linear", "unfold"),
)  # and functions that only call others


def part_of(operation: str) -> str:
    """The part of a meta-gradient that one of torch's operations belongs to."""
    if not operation.startswith("aten::"):
        return OTHER
    if operation in PRODUCTS or any(word in operation for word in CONVOLUTIONS):
        return "matrix products"
    if any(word in operation for word in COPIES):
        return "patches and copies"
    if operation == "aten::t" or any(word in operation for word in VIEWS):
        return OTHER
    return "normalisation and other passes"


# -- memory ------------------------------------------------------------------------------------


def memory(bench: Bench) -> Rows:
    """Highest sum of the tensors made for a meta-gradient, from 1 to 20 inner steps.

    Counted by torch: by its profiler on the CPU, by its allocator on a GPU. A loop over
    the tasks holds one task at a time, a vmap all of them.
    """
    model, tasks, rows = bench.model(), sample_of_32(bench), []
    theta = amaml.init_state(model, ALPHA, BETA).theta
    ours = {AMAML: False, f"{AMAML}, recompute": True}
    for name in [*ours, *right_peers(bench, ["vmap(grad)", "learn2learn"])]:
        for inner_steps in (1, 5, 10, 20):
            if name in ours:
                given = {"inner_steps": inner_steps, "recompute": ours[name]}
                step = partial(amaml.meta_gradient, model, theta, ALPHA, **given)
            else:
                step = peers.peer_step(name, model, ALPHA, BETA, inner_steps)
            step(tasks[:1])  # what is kept from then on is no part of the peak
            value, _ = step_memory(partial(step, tasks), bench.device)
            sizes = STANDARD | {"inner_steps": inner_steps}
            rows.append({"contestant": name, **sizes, "round": 1, "value": value, "unit": "bytes"})
    return rows


# -- many runs ----------------------------------------------------------------------------------


def batched_runs(bench: Bench) -> Rows:
    """1 to 64 runs of the quick profile's sizes as one vmap over their states."""
    quick = PROFILES["quick"]
    sampler = amaml.TaskSampler(bench.characters, n_way=5)
    model = bench.model(filters=quick["filters"])
    one = amaml.init_state(model, ALPHA, BETA)
    batch, contestants = quick["meta_batch_size"], {}

    def iterate(state, *tasks):
        return amaml.meta_step(model, state, amaml.Tasks(*tasks), **RATES)[0]

    for n_runs in (1, 2, 4, 8, 16, 32, 64):
        states = tree_map(lambda value, n=n_runs: torch.stack([value] * n), one)
        tasks = sampler.sample(n_runs * batch, bench.generator())
        tasks = [value.unflatten(0, (n_runs, batch)) for value in vars(tasks).values()]
        columns = {"n_runs": n_runs, "n_way": 5, "inner_steps": 1, "meta_batch_size": batch}
        contestants[AMAML, tuple(columns.items())] = lambda s=states, t=tasks: vmap(iterate)(s, *t)
    return bench.interleave(contestants, 5)
