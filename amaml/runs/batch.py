"""Meta-iterations of runs side by side, from one look at their numbers to the next."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_map

from amaml.alpha_maml import MetaState, meta_step, summary, task_metrics
from amaml.checks import Loss
from amaml.config import RunConfig
from amaml.fast import cuda_graph
from amaml.maml import query_metrics
from amaml.tasks import Tasks

# Iterations between two looks, each of which waits for the device. On a CPU every validation is
# looked at, too, so that nothing is computed that the one before has made needless.
LOOK_EVERY, LOOK_EVERY_ON_GPU = 10, 100
WATCHED = ["query_loss", "alpha", "beta", "gradient_norm"]  # a run has diverged if one is infinite


@dataclass
class Underway:
    """A run that is being made: what it is, and how far it is."""

    config: RunConfig
    folder: Path
    validation: Tasks
    generator: torch.Generator  # of the training tasks
    state: MetaState
    iteration: int
    seconds: float
    maker: dict
    status: str = "running"


class Program:
    """The meta-iterations of some runs, which differ in their rates, hyper rates and seeds alone.

    One run goes by itself, so that a model of one's own need not work under `vmap`; more are mapped
    over. On a GPU an iteration is replayed as one graph of its kernels. Nothing in here waits for
    the device.
    """

    def __init__(self, runs: Sequence[Underway], model: nn.Module, sampler, loss: Loss):
        self.runs, self.model, self.sampler, self.loss = list(runs), model, sampler, loss
        self.config, like = runs[0].config, runs[0].state.alpha
        self.hyper_rates = [
            torch.tensor([getattr(r.config, name) for r in runs], dtype=torch.float64).to(like)
            for name in ("hyper_alpha", "hyper_beta")
        ]
        # Runs of one seed see the same tasks: these are drawn once, by the first of them.
        first = {run.config.seed: run for run in reversed(runs)}
        self.drawing = list(first.values())
        place = [list(first).index(run.config.seed) for run in runs]
        self.place = torch.tensor(place, device=like.device)
        self.validation = runs[0].validation
        if len(runs) > 1:
            self.validation = together([run.validation for run in runs])
        self.names: list[str] = []  # of the metrics
        self.iterate = self.iterate_once
        if cuda_graph.serve(like.device):
            generators = [run.generator for run in self.drawing]
            self.iterate = cuda_graph.replayed(self.iterate_once, self.load(), generators)

    def load(self) -> MetaState:
        """The states of the runs; of more than one, with the runs in front of all tensors."""
        if len(self.runs) == 1:
            return self.runs[0].state
        return tree_map(lambda *values: torch.stack(values), *(run.state for run in self.runs))

    def state_of(self, i: int, state: MetaState) -> MetaState:
        """That of one run."""
        if len(self.runs) == 1:
            return tree_map(torch.clone, state)
        return tree_map(lambda value: value[i].clone(), state)

    def iterate_once(self, state: MetaState) -> tuple[MetaState, Tensor]:
        """A meta-iteration; the metrics (runs, names)."""
        config = self.config
        drawn = [self.sampler.sample(config.meta_batch_size, r.generator) for r in self.drawing]
        fixed = {"inner_steps": config.inner_steps, "first_order": config.first_order}

        def step(state, hyper_alpha, hyper_beta, tasks):
            rates = {"hyper_alpha": hyper_alpha, "hyper_beta": hyper_beta}
            return meta_step(self.model, state, tasks, **rates, **fixed, loss=self.loss)

        if len(self.runs) == 1:
            state, metrics = step(state, *(rate[0] for rate in self.hyper_rates), drawn[0])
            metrics = {name: value.unsqueeze(0) for name, value in metrics.items()}
        else:
            batch = (x[self.place] for x in together(drawn))
            state, metrics = vmap(lambda *args: step(*args[:3], Tasks(*args[3:])))(
                state, *self.hyper_rates, *batch
            )
        self.names = list(metrics)
        return state, torch.stack(list(metrics.values()), 1)

    def validate(self, state: MetaState) -> dict[str, Tensor]:
        """What `evaluate` measures on the runs' validation tasks, (runs, tasks)."""
        inner_steps = self.config.inner_steps
        if len(self.runs) == 1:
            measured = task_metrics(
                self.model, state, self.validation, inner_steps=inner_steps, loss=self.loss
            )
            return {name: value.unsqueeze(0) for name, value in measured.items()}

        def measured(theta, alpha, *batch):
            return query_metrics(self.model, theta, alpha, batch, inner_steps, self.loss)

        return vmap(measured)(state.theta, state.alpha, *self.validation)


def together(tasks: Sequence[Tasks]) -> list[Tensor]:
    """The tensors of several meta-batches, each with these in front."""
    return [torch.stack(each) for each in zip(*(vars(t).values() for t in tasks), strict=True)]


def advance(
    program: Program, checkpoint_every: int, ahead: Sequence[int] = ()
) -> list[pd.DataFrame]:
    """Go on with a program's runs, all at the same iteration, up to where they are looked at next.

    `ahead` are iterations not to be passed. Each run gets its state, iteration and status; returns
    the new rows of its metrics.
    """
    started, runs, config = time.perf_counter(), program.runs, program.config
    start, stop = runs[0].iteration, min((next_look(program, checkpoint_every), *ahead))
    state, values, measured, states = program.load(), [], {}, {}
    for iteration in range(start + 1, stop + 1):
        state, row = program.iterate(state)
        values.append(row)
        if validation_due(config, iteration):
            measured[iteration] = program.validate(state)
            if config.threshold is not None and iteration < stop:  # a run may have ended here
                states[iteration] = tree_map(torch.clone, state)
    values = torch.stack(values).double().cpu().numpy()
    measured = {
        iteration: {name: value.cpu() for name, value in each.items()}
        for iteration, each in measured.items()
    }
    tables = []
    for i, run in enumerate(runs):
        of_run = {
            iteration: summary({name: value[i] for name, value in each.items()})
            for iteration, each in measured.items()
        }
        rows = to_rows(program.names, values[:, i], start + 1, of_run, config)
        run.iteration, run.status = int(rows["iteration"].iloc[-1]), status_after(config, rows)
        run.state = program.state_of(i, states.get(run.iteration, state))
        tables.append(rows)
    for run in runs:
        drawing = next(r for r in program.drawing if r.config.seed == run.config.seed)
        if run is not drawing:
            run.generator.set_state(drawing.generator.get_state())
    seconds = (time.perf_counter() - started) / len(runs)
    for run in runs:
        run.seconds += seconds
    return tables


def next_look(program: Program, checkpoint_every: int) -> int:
    """The iteration after which a program's numbers are looked at next."""
    config, iteration = program.config, program.runs[0].iteration
    if program.runs[0].state.alpha.device.type == "cpu":
        every = (LOOK_EVERY, config.validation_every, checkpoint_every)
    else:
        every = (LOOK_EVERY_ON_GPU, checkpoint_every)
    return min(*((iteration // n + 1) * n for n in every), config.iterations)


def to_rows(
    names: list[str], values: np.ndarray, first: int, measured: dict, config: RunConfig
) -> pd.DataFrame:
    """A run's metrics (iterations, names) as rows, with what was measured on validation tasks at
    some of these iterations, and with room for what is measured on test tasks.

    Rows after the one that ends the run are dropped: they say nothing.
    """
    rows = {"iteration": range(first, first + len(values))}
    rows |= dict(zip(names, values.T, strict=True))
    finite = np.isfinite(values[:, [names.index(name) for name in WATCHED]]).all(axis=1)
    length = len(values) if finite.all() else int(finite.argmin()) + 1
    for kind in ("loss", "accuracy") if "query_accuracy" in names else ("loss",):
        rows[f"validation_{kind}"] = np.full(len(values), np.nan)
        if config.test_tasks:
            rows[f"test_{kind}"] = rows[f"test_{kind}_ci95"] = np.nan
    for iteration, numbers in measured.items():
        place = iteration - first
        if place >= length or not finite[place]:
            break
        for name, value in numbers.items():
            if name.replace("query", "validation") in rows:
                rows[name.replace("query", "validation")][place] = value
        if ended(config, numbers["query_loss"]):
            length = place + 1
    return pd.DataFrame(rows).iloc[:length].copy()


def validation_due(config: RunConfig, iteration: int) -> bool:
    return iteration % config.validation_every == 0 or iteration == config.iterations


def ended(config: RunConfig, validation_loss: float) -> bool:
    """Whether a run ends with this validation loss: diverged, or at its threshold."""
    reached = config.threshold is not None and validation_loss <= config.threshold
    return reached or not np.isfinite(validation_loss)


def status_after(config: RunConfig, rows: pd.DataFrame) -> str:
    """A run's status by the last of its rows: "running", or how it ended (see `Run`)."""
    row = rows.iloc[-1]
    validated = ["validation_loss"] if validation_due(config, int(row["iteration"])) else []
    if not np.isfinite(row[WATCHED + validated]).all():
        return "diverged"
    if validated and ended(config, row["validation_loss"]):
        return "reached"
    return "done" if row["iteration"] == config.iterations else "running"
