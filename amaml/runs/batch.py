"""How a batch of runs is advanced together, without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from amaml.alpha_maml import MetaState, state_metrics, summary
from amaml.config import RunConfig
from amaml.fast import cuda_graph
from amaml.inner_loop import mapped
from amaml.runs.parts import Parts, seeded_generator
from amaml.runs.run import Run
from amaml.tasks import Tasks

# Iterations between two looks at the numbers, each of which waits for the device. On a CPU every
# validation is looked at, too: nothing is computed that the one before has made needless.
LOOK_EVERY, LOOK_EVERY_ON_GPU = 10, 100
WATCHED = ("query_loss", "alpha", "beta", "gradient_norm")  # a run diverges where one is not finite


class RunBatch:
    """The meta-iterations of runs that differ in their rates, hyper rates and seeds alone.

    All tensors have the runs in front. On a GPU an iteration is replayed as one graph of its
    kernels.
    """

    def __init__(self, runs: Sequence[Run], model: nn.Module, samplers: dict, parts: Parts):
        self.runs, self.model, self.samplers = list(runs), model, samplers
        self.config, like = runs[0].config, runs[0].state.alpha
        self.device = like.device
        shared = ("inner_steps", "first_order", "recompute")
        options = {name: getattr(self.config, name) for name in shared}
        self.step = partial(parts.step, model, loss=parts.loss, **options)
        measure = getattr(parts.step, "query_metrics", state_metrics)
        self.measure = partial(measure, model, loss=parts.loss)
        self.hyper_rates = [
            torch.tensor([getattr(run.config, name) for run in runs], dtype=like.dtype).to(like)
            for name in ("hyper_alpha", "hyper_beta")
        ]
        # Runs of one seed see the same tasks: these are drawn once.
        self.generators = {run.config.seed: torch.Generator(self.device) for run in runs}
        for run in runs:
            self.generators[run.config.seed].set_state(run.generator)
        self.validation = stacked([self.fixed_tasks(run, "validation") for run in runs])
        self.names: list[str] = []  # of the metrics
        self.iterate: Callable = self.iterate_once
        if cuda_graph.available(self.device):
            generators = list(self.generators.values())
            self.iterate = cuda_graph.replayed(self.iterate_once, self.load(), generators)

    def load(self) -> MetaState:
        """The states of the runs."""
        return tree_map(lambda *values: torch.stack(values), *(run.state for run in self.runs))

    def fixed_tasks(self, run: Run, kind: str) -> Tasks:
        """A run's "validation" or "test" tasks."""
        generator = seeded_generator(run.config.seed, f"{kind} tasks", self.device)
        tasks = self.samplers[kind].sample(getattr(self.config, f"{kind}_tasks"), generator)
        if not isinstance(tasks, Tasks):
            raise TypeError(f"sampler must give amaml.Tasks, not {type(tasks).__name__}")
        return tasks

    def iterate_once(self, state: MetaState) -> tuple[MetaState, Tensor]:
        """A meta-iteration; returns (next state, metrics (runs, names))."""
        size, sampler = self.config.meta_batch_size, self.samplers["training"]
        drawn = {seed: sampler.sample(size, each) for seed, each in self.generators.items()}

        def step(state, hyper_alpha, hyper_beta, *batch):
            tasks = Tasks(*batch)
            return self.step(state, tasks, hyper_alpha=hyper_alpha, hyper_beta=hyper_beta)

        batch = stacked([drawn[run.config.seed] for run in self.runs])
        state, metrics = self.map(step, state, *self.hyper_rates, *batch)
        self.names = list(metrics)
        return state, torch.stack(list(metrics.values()), 1)

    def validate(self, state: MetaState) -> dict[str, Tensor]:
        """What `evaluate` measures on the runs' validation tasks, (runs, tasks)."""

        def measured(state, *batch):
            return self.measure(state, Tasks(*batch), self.config.inner_steps)

        return self.map(measured, state, *self.validation)

    def map(self, function: Callable, *args) -> Any:
        """`function` of each run's part of all tensors in `args`, its results stacked.

        One run goes without `vmap`, so that a model of one's own need not work under it.
        """
        if len(self.runs) > 1:
            return mapped(self.model, function, *args)
        result = function(*tree_map(lambda value: value[0], args))
        return tree_map(lambda value: value.unsqueeze(0), result)

    def add_test_metrics(self, run: Run) -> None:
        """Measure a finished run on tasks of the test characters, which nothing was chosen by."""
        tasks = self.fixed_tasks(run, "test")
        for steps, suffix in test_columns(self.config).items():
            for name, value in summary(self.measure(run.state, tasks, steps)).items():
                run.metrics.loc[run.metrics.index[-1], name.replace("query", "test") + suffix] = (
                    value
                )


def test_columns(config: RunConfig) -> dict[int, str]:
    """The inner steps after which the test metrics are measured, and how their columns end."""
    return {1: "_1_step", config.test_inner_steps: ""} if config.test_tasks else {}


def stacked(tasks: Sequence[Tasks]) -> list[Tensor]:
    """The tensors of several meta-batches, each with these in front."""
    if len(tasks) == 1:  # without a copy
        return [value.unsqueeze(0) for value in vars(tasks[0]).values()]
    return [torch.stack(each) for each in zip(*(vars(t).values() for t in tasks), strict=True)]


def advance(batch: RunBatch, checkpoint_every: int, ahead: Sequence[int] = ()) -> None:
    """Advance runs, all at the same iteration, to where their numbers are looked at next.

    Each gets its state, iteration, status and new rows of metrics. `ahead` are iterations not to
    be passed.
    """
    started, runs, config = time.perf_counter(), batch.runs, batch.config
    start = runs[0].iteration
    stop = min([next_look(batch, checkpoint_every), *ahead])

    def here() -> tuple[MetaState, dict[int, Tensor]]:
        """The states of the runs, and of the generators by seed."""
        return state, {seed: each.get_state() for seed, each in batch.generators.items()}

    state, values, validated, places = batch.load(), [], {}, {}
    for iteration in range(start + 1, stop + 1):
        state, row = batch.iterate(state)
        values.append(row)
        if iteration % config.validation_every == 0 or iteration == config.iterations:
            validated[iteration] = batch.validate(state)
            if config.threshold is not None and iteration < stop:  # a run may have ended here
                places[iteration] = tree_map(torch.clone, here())
    end = here()
    numbers = torch.stack(values).cpu().double().numpy()
    measured = tree_map(lambda value: value.cpu(), validated)
    for i, run in enumerate(runs):
        of_run = {
            iteration: summary({name: value[i] for name, value in each.items()})
            for iteration, each in measured.items()
        }
        rows, run.status = to_rows(batch.names, numbers[:, i], start + 1, of_run, config)
        run.metrics = pd.concat([run.metrics, rows], ignore_index=True) if start else rows
        run.iteration = int(rows["iteration"].iloc[-1])
        states, generators = places.get(run.iteration, end)
        run.state = tree_map(lambda value, i=i: value[i].clone(), states)
        run.generator = generators[run.config.seed]
        run.seconds += (time.perf_counter() - started) / len(runs)


def next_look(batch: RunBatch, checkpoint_every: int) -> int:
    """The iteration after which a batch's numbers are looked at next."""
    config, iteration = batch.config, batch.runs[0].iteration
    every: tuple[int, ...] = (LOOK_EVERY_ON_GPU, checkpoint_every)
    if batch.device.type == "cpu":
        every = (LOOK_EVERY, config.validation_every, checkpoint_every)
    return min(*((iteration // n + 1) * n for n in every), config.iterations)


def to_rows(
    names: list[str], values: np.ndarray, first: int, measured: dict, config: RunConfig
) -> tuple[pd.DataFrame, str]:
    """A run's metrics (iterations, names) as rows up to the one that ends it, and its status.

    `measured` holds what was found on the validation tasks after some of these iterations.
    """
    rows = pd.DataFrame(values, columns=names)
    rows.insert(0, "iteration", range(first, first + len(values)))
    finite = np.isfinite(rows[[name for name in WATCHED if name in names]]).all(axis=1)
    for kind in [name.removeprefix("query_") for name in names if name.startswith("query_")]:
        found = {iteration: numbers[f"query_{kind}"] for iteration, numbers in measured.items()}
        rows[f"validation_{kind}"] = rows["iteration"].map(found).astype(float).where(finite)
        for suffix in test_columns(config).values():
            rows[[f"test_{kind}{suffix}", f"test_{kind}_ci95{suffix}"]] = np.nan
    loss = rows["validation_loss"]
    diverged = ~finite | rows["iteration"].isin(measured) & ~np.isfinite(loss)
    reached = loss <= (-np.inf if config.threshold is None else config.threshold)
    over = diverged | reached
    last = int(over.argmax()) if over.any() else len(rows) - 1
    status = "done" if first + last == config.iterations else "running"
    status = "diverged" if diverged[last] else "reached" if reached[last] else status
    return rows[: last + 1].copy(), status
