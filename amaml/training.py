"""Runs from their config: begun or resumed, advanced, checkpointed, read when they are finished."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from amaml.alpha_maml import MetaState, init_state, meta_step, summary
from amaml.checks import Loss
from amaml.config import RunConfig
from amaml.data import as_device, whole_number
from amaml.runs import provenance, store
from amaml.runs.batch import RunBatch, RunInProgress, advance
from amaml.runs.parts import (
    Parts,
    check_alike,
    described,
    network_of,
    own_parts,
    run_id,
    samplers_of,
    seeded_generator,
)
from amaml.runs.process import keep_freed_memory, stop_signals
from amaml.runs.run import Run, as_run, as_state, load_run, read_own
from amaml.tasks import Tasks

VARIED = ("alpha", "beta", "hyper_alpha", "hyper_beta", "seed")  # by runs that are made together


def train(
    config: RunConfig | None = None,
    out: str | Path = "runs",
    *,
    name: str = "",
    model: nn.Module | Callable[[int], nn.Module] | None = None,
    sampler=None,
    validation_sampler=None,
    loss: Loss = F.cross_entropy,
    step: Callable = meta_step,
    start: Run | str | Path | None = None,
    root: str | Path | None = None,
    device: str = "cpu",
    checkpoint_every: int = 50,
    progress: bool = True,
) -> Run:
    """Make one run in `out/<id>/`, resume it where it was left, or read it if it is finished.

    A run that stops being finite ends with the status "diverged": a result, not an error. Ctrl-C
    and SIGTERM stop a run within 10 iterations (100 on a GPU), after a last checkpoint.

    Args:
        config: the run's; None is `RunConfig()`.
        out: folder of the runs.
        name: needed with parts of your own, to tell the run from others with the same config.
        model: your own network, or a function of the seed that builds it.
        sampler: your own, any object with `sample(meta_batch_size, generator) -> Tasks`; the
            config's fields about data and network then have no effect.
        validation_sampler: for the validation and test tasks; None takes `sampler`.
        loss: a function of (prediction, y) that gives a scalar.
        step: a function with the signature of `meta_step`.
        start: another run, or its folder, to go on from: with its state, rates, tasks to come and
            metrics. `iterations` counts from its first one, so a run is made longer by more.
        root: where Omniglot lies (see `load_omniglot`).
        device: "cpu", or "cuda".
        checkpoint_every: iterations between two checkpoints.
        progress: print a progress line, and whether a finished run was read.

    Raises:
        ValueError: where the folder holds another run, or one made with other parts.
        OSError: where it cannot be written.
    """
    parts = Parts(name, model, sampler, validation_sampler, loss, step)
    runs = train_together(
        [RunConfig() if config is None else config],
        out,
        start=start,
        root=root,
        device=device,
        checkpoint_every=checkpoint_every,
        progress=progress,
        **parts._asdict(),
    )
    return runs[0]


def train_together(
    configs: Sequence[RunConfig],
    out: str | Path = "runs",
    *,
    start: Run | str | Path | None = None,
    root: str | Path | None = None,
    device: str = "cpu",
    checkpoint_every: int = 50,
    deadline: float = math.inf,
    progress: bool = False,
    **parts,
) -> list[Run]:
    """Make runs that differ in their rates, hyper rates and seeds alone, as one batched program.

    Each gives the numbers that `train` gives it alone, bit for bit on one thread, has a folder of
    its own in `out`, and resumes there, alone or together.

    Args:
        configs: of the runs.
        deadline: a time of `time.monotonic()`, at which what is not finished is left with a
            checkpoint, to be resumed later.
        parts: `name`, `model`, `sampler`, `validation_sampler`, `loss`, `step`, as for `train`.

    Returns:
        The finished runs.

    Raises:
        ValueError: for configs that differ in another field, and as `train`.
    """
    configs, where = list(configs), as_device(device)
    checkpoint_every = whole_number("checkpoint_every", checkpoint_every)
    check_configs(configs)
    made_of = Parts(**parts)
    own, name, step = own_parts(made_of), made_of.name, made_of.step
    parent = None if start is None else load_run(start.folder if isinstance(start, Run) else start)
    told = {"name": name, "start": parent.id if parent else ""}
    folders = {config: Path(out) / run_id(config, **told) for config in configs}
    networks = {config: network_of(config, made_of.model) for config in configs}
    abouts = {
        config: told | {"config": asdict(config), "parts": described(own, network)}
        for config, network in networks.items()
    }

    def read(some: list[RunConfig], read: bool = True) -> dict[RunConfig, Run]:
        """Those of the runs that are finished."""
        saved = {c: read_own(folders[c], abouts[c], where) for c in some}
        return {
            c: replace(as_run(c, folders[c], s), read=read)
            for c, s in saved.items()
            if s is not None and s[2]["status"] != "running"
        }

    finished = read(configs)
    missing = [config for config in configs if config not in finished]
    samplers = samplers_of(configs[0], made_of, root, where) if missing else None
    with ExitStack() as locks:
        for folder in sorted(folders[config] for config in missing):  # in one order: no deadlock
            locks.enter_context(store.lock(folder))
        finished |= read(missing)  # another process may have made them meanwhile
        missing = [config for config in missing if config not in finished]
        for config in finished if progress else ():
            print(f"{folders[config]} is finished: read, not made again", flush=True)
        if missing:
            if where.type == "cpu":
                keep_freed_memory()
            check_alike([networks[config] for config in missing])
            running = [
                begin(
                    c, folders[c], abouts[c], networks[c].to(where), samplers, step, where, parent
                )
                for c in missing
            ]
            structure = networks[missing[0]]  # each run has parameters of its own
            advance_all(running, structure, samplers, made_of, checkpoint_every, deadline, progress)
    finished |= read(missing, read=False)
    return [finished[config] for config in configs if config in finished]


def advance_all(runs, model, samplers, parts, checkpoint_every, deadline, progress) -> None:
    """Advance runs until they are finished, a signal has come, or the deadline."""
    running, batch = [run for run in runs if run.status == "running"], None
    bar = progress_bar(running, progress)
    with stop_signals() as stopped, bar:
        while running and not stopped():
            least = min(run.iteration for run in running)  # what a kill left behind catches up
            behind = [run for run in running if run.iteration == least]
            ahead = [run.iteration for run in running if run.iteration > least]
            if batch is None or batch.runs != behind:
                batch = None  # its memory goes before that of the next is taken
                batch = RunBatch(behind, model, samplers.train, parts.loss, parts.step)
                if parts.name and not least:  # what fails in validation fails now
                    batch.validate(batch.load())
            advance(batch, checkpoint_every, ahead)
            for run in behind:
                if run.config.test_tasks and run.status in ("done", "reached"):
                    test(run, batch, samplers.test)
                if run.status != "running" or run.iteration % checkpoint_every == 0:
                    checkpoint(run)
            running = [run for run in running if run.status == "running"]
            show(bar, behind[0], running)
            if time.monotonic() > deadline:
                break
        for run in running:
            if run.iteration:
                checkpoint(run)  # to be resumed from here


def begin(config, folder, about, network, samplers, step, device, parent) -> RunInProgress:
    """A run at its start, or where its checkpoint left it. Its folder must be locked."""
    generator = seeded_generator(config.seed, "validation tasks", device)
    validation = samplers.validation.sample(config.validation_tasks, generator)
    if not isinstance(validation, Tasks):
        raise TypeError(f"sampler must give amaml.Tasks, not {type(validation).__name__}")
    state = init_state(network, config.alpha, config.beta, meta_optimizer=config.meta_optimizer)
    state = step.begin(state, config) if hasattr(step, "begin") else state
    generator = seeded_generator(config.seed, "training tasks", device)
    about = about | {"maker": provenance.environment(device)}
    run = RunInProgress(config, folder, about, validation, generator, state, pd.DataFrame())
    saved = read_own(folder, about, device)
    if saved is not None:
        run.status = saved[2]["status"]
    elif parent is not None:
        saved = store.read_run(parent.folder, device)
        check_start(parent, state, config)
    if saved is not None:
        tensors, run.metrics, found = saved
        run.state, run.iteration = as_state(tensors), found["iteration"]
        run.seconds = found["seconds"]
        try:
            generator.set_state(tensors["generator"].cpu())
        except RuntimeError as error:
            raise ValueError(
                f"the run in {folder} was begun on another kind of device than {device} and draws "
                "other tasks there; go on with it there, or give another out"
            ) from error
    return run


def check_start(parent: Run, state: MetaState, config: RunConfig) -> None:
    """ValueError where a run cannot go on from another one's end."""
    shapes = [
        {name: tuple(value.shape) for name, value in store.flatten(s._asdict()).items()}
        for s in (parent.state, state)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the run in {parent.folder} has another network or meta-optimiser than the one given"
        )
    if parent.iteration >= config.iterations or parent.status in ("diverged", "running"):
        raise ValueError(
            f"the run in {parent.folder} ended at iteration {parent.iteration} ({parent.status}); "
            f"iterations={config.iterations} must be more, and it must be finished, not diverged"
        )


def test(run: RunInProgress, batch: RunBatch, sampler) -> None:
    """Measure a finished run on tasks of the test characters, which nothing was chosen by."""
    config = run.config
    generator = seeded_generator(config.seed, "test tasks", run.state.alpha.device)
    tasks = sampler.sample(config.test_tasks, generator)
    steps, loss = config.test_inner_steps, batch.loss
    for name, value in summary(batch.measure(batch.model, run.state, tasks, steps, loss)).items():
        run.metrics.loc[run.metrics.index[-1], name.replace("query", "test")] = value


def checkpoint(run: RunInProgress) -> None:
    """Write the run's file as the run is now."""
    tensors = {"state": run.state._asdict(), "generator": run.generator.get_state()}
    about = {"status": run.status, "iteration": run.iteration, "seconds": round(run.seconds, 3)}
    store.write_run(run.folder, tensors, run.metrics, run.about | about)


def check_configs(configs: list[RunConfig]) -> None:
    """TypeError or ValueError for configs of runs that cannot be made together."""
    for config in configs:
        if not isinstance(config, RunConfig):
            raise TypeError(f"config must be an amaml.RunConfig, not {type(config).__name__}")
    if len({shared_fields(config) for config in configs}) != 1 or len(set(configs)) != len(configs):
        raise ValueError(
            f"configs of runs that are made together must differ from each other, and in "
            f"{', '.join(VARIED)} alone"
        )


def shared_fields(config: RunConfig) -> RunConfig:
    """What runs that are made together have in common."""
    default = RunConfig()
    return replace(config, **{field: getattr(default, field) for field in VARIED})


def progress_bar(running: list[RunInProgress], progress: bool) -> tqdm:
    one = running[0].folder.name if len(running) == 1 else f"{len(running)} runs"
    iterations = running[0].config.iterations if running else 0
    done = min((run.iteration for run in running), default=0)
    options = {"total": iterations, "initial": done, "file": sys.stdout, "mininterval": 1.0}
    return tqdm(desc=one, disable=not progress, **options)


def show(bar: tqdm, first: RunInProgress, running: list[RunInProgress]) -> None:
    """Advance the progress line; show the first run's numbers."""
    row = first.metrics.iloc[-1]
    shown = [name for name in ("query_loss", "query_accuracy", "alpha", "beta") if name in row]
    bar.set_postfix({name.removeprefix("query_"): f"{row[name]:.3g}" for name in shown})
    bar.update(min((run.iteration for run in running), default=first.iteration) - bar.n)
