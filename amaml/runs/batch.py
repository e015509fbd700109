"""Runs in progress, and how a batch of them is advanced without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from amaml.alpha_maml import MetaState, state_metrics, summary
from amaml.checks import Loss
from amaml.config import RunConfig
from amaml.fast import cuda_graph
from amaml.inner_loop import mapped
from amaml.tasks import Tasks

# Iterations between two looks at the numbers, each of which waits for the device. On a CPU every
# validation is looked at, too: nothing is computed that the one before has made needless.
LOOK_EVERY, LOOK_EVERY_ON_GPU = 10, 100
WATCHED = ("query_loss", "alpha", "beta", "gradient_norm")  # a run diverges if one is infinite


@dataclass
class RunInProgress:
    """A run, and how far it is."""

    config: RunConfig
    folder: Path
    about: dict  # what it is and what makes it
    validation: Tasks
    generator: torch.Generator  # of the training tasks
    state: MetaState
    metrics: pd.DataFrame
    iteration: int = 0
    seconds: float = 0.0
    status: str = "running"


class RunBatch:
    """The meta-iterations of runs that differ in their rates, hyper rates and seeds alone.

    One run goes alone, so that a model of one's own need not work under `vmap`; more are mapped
    over. On a GPU an iteration is replayed as one graph of its kernels.
    """

    def __init__(self, runs: Sequence[RunInProgress], model: nn.Module, sampler, loss: Loss, step):
        self.runs, self.model, self.sampler, self.loss = list(runs), model, sampler, loss
        self.config, like = runs[0].config, runs[0].state.alpha
        shared = ("inner_steps", "first_order", "recompute")
        options = {name: getattr(self.config, name) for name in shared}
        self.step = partial(step, model, loss=loss, **options)
        self.measure = getattr(step, "query_metrics", state_metrics)
        self.hyper_rates = [
            torch.tensor([getattr(r.config, name) for r in runs], dtype=like.dtype).to(like.device)
            for name in ("hyper_alpha", "hyper_beta")
        ]
        # Runs of one seed see the same tasks: these are drawn once, by the first of them.
        first = {run.config.seed: run for run in reversed(runs)}
        self.drawing = list(first.values())
        self.drawn_by = [list(first).index(run.config.seed) for run in runs]
        self.place = torch.tensor(self.drawn_by, device=like.device)
        self.validation = stacked([run.validation for run in runs])
        self.names: list[str] = []  # of the metrics
        self.iterate: Callable = self.iterate_once
        if cuda_graph.available(like.device):
            generators = [run.generator for run in self.drawing]
            self.iterate = cuda_graph.replayed(self.iterate_once, self.load(), generators)

    def load(self) -> MetaState:
        """The states of the runs; of more than one, with the runs in front of all tensors."""
        if len(self.runs) == 1:
            return self.runs[0].state
        return tree_map(lambda *values: torch.stack(values), *(run.state for run in self.runs))

    def state_of(self, i: int, state: MetaState) -> MetaState:
        alone = len(self.runs) == 1
        return tree_map(lambda value: (value if alone else value[i]).clone(), state)

    def iterate_once(self, state: MetaState) -> tuple[MetaState, Tensor]:
        """A meta-iteration; returns (next state, metrics (runs, names))."""
        size = self.config.meta_batch_size
        drawn = stacked([self.sampler.sample(size, run.generator) for run in self.drawing])

        def step(state, hyper_alpha, hyper_beta, *batch):
            tasks = Tasks(*batch)
            return self.step(state, tasks, hyper_alpha=hyper_alpha, hyper_beta=hyper_beta)

        batch = [x[self.place] for x in drawn] if len(self.runs) > 1 else drawn
        state, metrics = self.map(step, state, *self.hyper_rates, *batch)
        self.names = list(metrics)
        return state, torch.stack(list(metrics.values()), 1)

    def validate(self, state: MetaState) -> dict[str, Tensor]:
        """What `evaluate` measures on the runs' validation tasks, (runs, tasks)."""

        def measured(state, *batch):
            return state, self.measure(self.model, state, Tasks(*batch), steps, self.loss)

        steps = self.config.inner_steps
        return self.map(measured, state, *self.validation)[1]

    def map(self, function: Callable, state: MetaState, *tensors: Tensor) -> tuple:
        """`function` of each run's state and tensors, which have the runs in front: the next
        states as they come, and metrics with the runs in front."""
        if len(self.runs) > 1:
            return mapped(self.model, function, state, *tensors)
        state, metrics = function(state, *(tensor[0] for tensor in tensors))
        return state, {name: value.unsqueeze(0) for name, value in metrics.items()}


def stacked(tasks: Sequence[Tasks]) -> list[Tensor]:
    """The tensors of several meta-batches, each with these in front."""
    if len(tasks) == 1:
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
    state, values, validated, states = batch.load(), [], {}, {}
    for iteration in range(start + 1, stop + 1):
        state, row = batch.iterate(state)
        values.append(row)
        if iteration % config.validation_every == 0 or iteration == config.iterations:
            validated[iteration] = batch.validate(state)
            if config.threshold is not None and iteration < stop:  # a run may have ended here
                drawn = [run.generator.get_state() for run in batch.drawing]
                states[iteration] = tree_map(torch.clone, state), drawn
    drawn = [run.generator.get_state() for run in batch.drawing]
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
        at, generators = states.get(run.iteration, (state, drawn))
        run.state = batch.state_of(i, at)
        run.generator.set_state(generators[batch.drawn_by[i]])
        run.seconds += (time.perf_counter() - started) / len(runs)


def next_look(batch: RunBatch, checkpoint_every: int) -> int:
    """The iteration after which a batch's numbers are looked at next."""
    config, iteration = batch.config, batch.runs[0].iteration
    every: tuple[int, ...] = (LOOK_EVERY_ON_GPU, checkpoint_every)
    if batch.runs[0].state.alpha.device.type == "cpu":
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
    for kind in [name.removeprefix("query_") for name in names if name.startswith("query_")]:
        tested = [f"test_{kind}", f"test_{kind}_ci95"] if config.test_tasks else []
        rows[[f"validation_{kind}", *tested]] = np.nan
    watched = rows[[name for name in WATCHED if name in names]]
    finite = np.isfinite(watched.to_numpy()).all(axis=1)
    diverged, reached = ~finite, np.zeros(len(rows), bool)
    for iteration, numbers in measured.items():
        place, loss = iteration - first, numbers["query_loss"]
        if finite[place]:
            for name in [name for name in numbers if not name.endswith("ci95")]:
                rows.loc[place, name.replace("query", "validation")] = numbers[name]
            diverged[place] = not np.isfinite(loss)
            reached[place] = config.threshold is not None and loss <= config.threshold
    over = diverged | reached
    last = int(over.argmax()) if over.any() else len(rows) - 1
    status = "done" if first + last == config.iterations else "running"
    status = "diverged" if diverged[last] else "reached" if reached[last] else status
    return rows.iloc[: last + 1].copy(), status
