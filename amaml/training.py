"""Runs from their config: begun or resumed, advanced, checkpointed, read when they are finished."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from amaml.alpha_maml import init_state, meta_step
from amaml.checks import Loss
from amaml.config import RunConfig
from amaml.data import as_device, whole_number
from amaml.runs import provenance, store
from amaml.runs.batch import RunBatch, advance
from amaml.runs.parts import Parts, check_alike, run_id, seeded_generator
from amaml.runs.process import keep_freed_memory, stop_signals
from amaml.runs.run import Run, load_run, resume, save

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
        out, start, root, device, checkpoint_every, progress: as for `train`.
        parts: `name`, `model`, `sampler`, `validation_sampler`, `loss`, `step`, as for `train`.

    Returns:
        The finished runs.

    Raises:
        ValueError, OSError: as `train`; also for configs that differ in another field.
    """
    configs, where, made_of = list(configs), as_device(device), Parts(**parts)
    checkpoint_every = whole_number("checkpoint_every", checkpoint_every)
    check_configs(configs)
    made_of.own()
    parent = None
    if start is not None:
        parent = load_run(start.folder if isinstance(start, Run) else start, device)
    networks = {config: made_of.network(config).to(where) for config in configs}
    runs = [begun(config, out, made_of, networks[config], parent) for config in configs]
    for run in runs:
        resume(run, where)
    running = [run for run in runs if run.status == "running"]
    samplers = made_of.samplers(configs[0], root, where) if running else {}
    with ExitStack() as locks:
        for folder in sorted(run.folder for run in running):  # in one order: no deadlock
            locks.enter_context(store.lock(folder))
        for run in running:  # another process may have gone on with it meanwhile
            resume(run, where)
            if not run.read:
                run.maker = provenance.continued(run.maker, provenance.environment(where))
        for run in runs:
            if progress and run.read:
                print(f"{run.folder} is finished: read, not made again", flush=True)
        running = [run for run in running if run.status == "running"]
        if running:
            keep_freed_memory()
            check_alike([networks[run.config] for run in running])
            structure = networks[running[0].config]  # each run has parameters of its own
            advance_all(running, structure, samplers, made_of, checkpoint_every, deadline, progress)
    return [run for run in runs if run.status != "running"]


def begun(config: RunConfig, out, parts: Parts, network: nn.Module, parent: Run | None) -> Run:
    """A run before its first iteration, or at the end of `parent`."""
    state = init_state(
        network, config.alpha, config.beta, meta_optimizer=config.meta_optimizer, rule=config.rule
    )
    state = parts.step.begin(state, config) if hasattr(parts.step, "begin") else state
    generator = seeded_generator(config.seed, "training tasks", state.alpha.device).get_state()
    start = parent.id if parent else ""
    folder, words = Path(out) / run_id(config, parts.name, start), parts.in_words(network)
    run = Run(folder, config, state, generator, name=parts.name, start=start, parts=words)
    if parent is None:
        return run
    flat = [store.flatten(some.tensors) for some in (parent, run)]
    shapes = [{name: value.shape for name, value in tensors.items()} for tensors in flat]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the run in {parent.folder} has another network or meta-optimiser, or was made on "
            "another kind of device, than the one given"
        )
    if parent.iteration >= config.iterations or parent.status in ("diverged", "running"):
        raise ValueError(
            f"the run in {parent.folder} ended at iteration {parent.iteration} ({parent.status}); "
            f"iterations={config.iterations} must be more, and it must be finished, not diverged"
        )
    run.state, run.generator, run.metrics = parent.state, parent.generator, parent.metrics
    run.iteration, run.seconds = parent.iteration, parent.seconds
    return run


def advance_all(
    running: list[Run], model, samplers: dict, parts: Parts, checkpoint_every, deadline, progress
) -> None:
    """Advance runs until they are finished, a signal has come, or the deadline."""
    batch, total = None, running[0].config.iterations
    one = running[0].folder.name if len(running) == 1 else f"{len(running)} runs"
    done = min(run.iteration for run in running)
    options: dict = {"total": total, "initial": done, "file": sys.stdout, "mininterval": 1.0}
    bar = tqdm(desc=one, disable=not progress, **options)
    with stop_signals() as stopped, bar:
        while running and not stopped():
            least = min(run.iteration for run in running)  # what a kill left behind catches up
            behind = [run for run in running if run.iteration == least]
            ahead = [run.iteration for run in running if run.iteration > least]
            if batch is None or batch.runs != behind:
                batch = None  # its memory goes before that of the next is taken
                batch = RunBatch(behind, model, samplers, parts)
                if parts.name and not least:  # what fails in validation fails now
                    batch.validate(batch.load())
            advance(batch, checkpoint_every, ahead)
            for run in behind:
                if run.config.test_tasks and run.status in ("done", "reached"):
                    batch.add_test_metrics(run)
                if run.status != "running" or run.iteration % checkpoint_every == 0:
                    save(run)
            running = [run for run in running if run.status == "running"]
            show(bar, behind[0], running)
            if time.monotonic() > deadline:
                break
        for run in running:
            if run.iteration:
                save(run)  # to be resumed from here


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


def show(bar: tqdm, first: Run, running: list[Run]) -> None:
    """Advance the progress line; show the first run's numbers."""
    row = first.metrics.iloc[-1]
    shown = [name for name in ("query_loss", "query_accuracy", "alpha", "beta") if name in row]
    bar.set_postfix({name.removeprefix("query_"): f"{row[name]:.3g}" for name in shown})
    bar.update(min((run.iteration for run in running), default=first.iteration) - bar.n)
