"""One run: the training loop and its resumption."""

from __future__ import annotations

import hashlib
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from amaml.alpha_maml import MetaState, evaluate, init_state
from amaml.checks import Loss
from amaml.config import RunConfig, digest
from amaml.data import LOADERS, as_device, split_characters
from amaml.model import OmniglotCNN
from amaml.runs import checkpoints, files, provenance
from amaml.runs.batch import Program, Underway, advance, status_after
from amaml.tasks import Tasks, TaskSampler

VARIED = ("alpha", "beta", "hyper_alpha", "hyper_beta", "seed")  # by runs that are made together


@dataclass(frozen=True)
class Run:
    """What a run gave.

    id          the name of its folder
    config      its RunConfig
    status      "done", "reached" (the threshold) or "diverged" (something stopped being finite)
    iteration   the last iteration; for "diverged" the first with a number that is not finite
    metrics     DataFrame, a row an iteration (counted from 1): iteration, support_loss,
                query_loss, query_accuracy (0..1), alpha, beta, gradient_norm, d_alpha, d_beta; and
                at every validation_every-th, after that iteration's update, validation_loss and
                validation_accuracy (else empty). With a config of test_tasks the last row has
                test_loss, test_accuracy and their 95 % intervals test_loss_ci95 and
                test_accuracy_ci95 (mean +- ci95 over the tasks)
    state       the MetaState at its end
    """

    id: str
    config: RunConfig
    status: str
    iteration: int
    metrics: pd.DataFrame
    state: MetaState


def train(
    config: RunConfig | None = None,
    out: str | Path = "runs",
    *,
    model: nn.Module | None = None,
    sampler=None,
    validation_sampler=None,
    loss: Loss = F.cross_entropy,
    root: str | Path | None = None,
    device: str = "cpu",
    checkpoint_every: int = 50,
    progress: bool = True,
) -> Run:
    """Make one run in `out/<id>/`, resume it where it was left, or read it if it is finished.

    `model`, `sampler` and `loss` are one's own (any object with `sample(meta_batch_size,
    generator) -> Tasks` is a sampler; without `validation_sampler` it serves for the validation
    and test tasks too); the config's fields about data and network then have no effect. `root` is
    where Omniglot lies (see `load_omniglot`). A checkpoint is written every `checkpoint_every`
    iterations.

    A run that stops being finite ends with the status "diverged": a result, not an error. Ctrl-C
    and SIGTERM stop a run within 10 iterations (100 on a GPU), after a last checkpoint. Raises
    ValueError where the folder holds another config, PermissionError or another OSError where it
    cannot be written.
    """
    config = RunConfig() if config is None else config
    check_arguments([config], out, root, checkpoint_every, progress)
    check_own(model, sampler, validation_sampler, loss)
    device = as_device(device)
    own = {"model": model, "sampler": sampler, "validation_sampler": validation_sampler}
    own = {name: digest(part) for name, part in own.items() if part is not None}
    own |= {} if loss is F.cross_entropy else {"loss": digest(loss)}
    folder = Path(out) / (digest({"config": config.id, "own": own}) if own else config.id)
    identity = {"config": asdict(config), "own": own}
    if (folder / "result.json").exists():
        check_identity(folder, identity)
        return read_run(folder, config, device)

    samplers = Samplers(sampler, sampler, sampler) if sampler else samplers_of(config, root, device)
    if validation_sampler:
        samplers = samplers._replace(validation=validation_sampler, test=validation_sampler)
    model = deepcopy(model).to(device) if model else network_of(config).to(device)
    with files.lock(folder):
        if not (folder / "result.json").exists():  # or another process has just made it
            run = begin(config, folder, identity, model, samplers, device)
            bar = tqdm(
                total=config.iterations,
                initial=run.iteration,
                desc=folder.name,
                file=sys.stdout,
                mininterval=1.0,
                disable=not progress,
            )
            with stop_signals() as stopped, bar:
                if run.status == "running":
                    program = Program([run], model, samplers.train, loss)
                while run.status == "running" and not stopped():
                    (rows,) = go_on(program, samplers, checkpoint_every)
                    show(bar, len(rows), rows.iloc[-1])
                leave([run])
    return read_run(folder, config, device)


def train_together(
    configs: Sequence[RunConfig],
    out: str | Path = "runs",
    *,
    root: str | Path | None = None,
    device: str = "cpu",
    checkpoint_every: int = 50,
    deadline: float = math.inf,
    progress: bool = False,
) -> list[Run]:
    """Make runs that differ in their rates, hyper rates and seeds alone, as one batched program.

    Each gives the numbers that `train` gives it alone, but for rounding, has a folder of its own in
    `out`, and resumes there, alone or together. Many small runs so take less time than one after
    another. At the `deadline`, a time of `time.monotonic()`, what is not finished is left with a
    checkpoint, to be resumed later, and only the finished runs are returned. Raises ValueError for
    configs that differ in another field.
    """
    configs = list(configs)
    check_arguments(configs, out, root, checkpoint_every, progress)
    device = as_device(device)
    if len({shape(config) for config in configs}) != 1 or len(set(configs)) != len(configs):
        raise ValueError(
            f"configs of runs that are made together must differ from each other, and in "
            f"{', '.join(VARIED)} alone"
        )
    folders = {config: Path(out) / config.id for config in configs}
    samplers = samplers_of(configs[0], root, device)
    with ExitStack() as locks:
        for folder in sorted(folders.values()):  # in one order everywhere: no two wait in a circle
            locks.enter_context(files.lock(folder))
        running = []
        for config, folder in folders.items():
            identity = {"config": asdict(config), "own": {}}
            if (folder / "result.json").exists():
                check_identity(folder, identity)
            else:
                network = network_of(config).to(device)
                run = begin(config, folder, identity, network, samplers, device)
                running += [run] if run.status == "running" else []
        model = network_of(configs[0]).to(device)  # each run has parameters of its own
        bar = tqdm(
            total=configs[0].iterations,
            initial=min((run.iteration for run in running), default=0),
            desc=f"{len(running)} runs",
            file=sys.stdout,
            mininterval=1.0,
            disable=not progress,
        )
        program = None
        with stop_signals() as stopped, bar:
            while running and not stopped() and time.monotonic() < deadline:
                least = min(run.iteration for run in running)  # what a kill left behind catches up
                behind = [run for run in running if run.iteration == least]
                ahead = [run.iteration for run in running if run.iteration > least]
                if program is None or program.runs != behind:
                    program = None  # its memory goes before that of the next is taken
                    program = Program(behind, model, samplers.train, F.cross_entropy)
                go_on(program, samplers, checkpoint_every, ahead)
                running = [run for run in running if run.status == "running"]
                bar.set_postfix(running=len(running))
                bar.update(min((run.iteration for run in running), default=bar.total) - bar.n)
            leave(running)
    left = {run.config for run in running}
    return [
        read_run(folder, config, device) for config, folder in folders.items() if config not in left
    ]


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Hold Ctrl-C and SIGTERM back until runs are where they can be resumed from.

    Gives a function that says whether one has come; it takes effect at the end of the block, and
    a second one at once. Only the main thread receives signals: in others nothing is held back.
    """
    received = []

    def note(number, frame) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt

    in_main_thread = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if in_main_thread else ()
    handlers = {number: signal.getsignal(number) for number in numbers}
    for number, handler in handlers.items():
        if handler not in (None, signal.SIG_IGN):
            signal.signal(number, note)
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in handlers.items():
            if handler not in (None, signal.SIG_IGN):
                signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])


class Samplers(NamedTuple):
    """Where a run's tasks come from: objects with `sample(meta_batch_size, generator) -> Tasks`."""

    train: TaskSampler
    validation: TaskSampler
    test: TaskSampler


def begin(config, folder, identity, model, samplers, device) -> Underway:
    """A run at its start, or where its checkpoint left it. Its folder must be locked."""
    validation = samplers.validation.sample(
        config.validation_tasks, stream(config.seed, "validation tasks", device)
    )
    if not isinstance(validation, Tasks):
        raise TypeError(f"sampler must give amaml.Tasks, not {type(validation).__name__}")
    state = init_state(
        model, alpha=config.alpha, beta=config.beta, meta_optimizer=config.meta_optimizer
    )
    generator = stream(config.seed, "training tasks", device)
    iteration, seconds = 0, 0.0
    open_folder(folder, identity)
    if (folder / "checkpoint.safetensors").exists():
        saved, iteration, seconds = checkpoints.load_checkpoint(folder / "checkpoint.safetensors")
        try:
            generator.set_state(saved.pop("generator"))
        except RuntimeError as error:
            raise ValueError(
                f"the run in {folder} was begun on another kind of device than {device} and draws "
                "other tasks there; go on with it there, or give another out"
            ) from error
        state = restore_state(saved, device)
    checkpoints.truncate_metrics(folder / "metrics.csv")
    maker = provenance.here(device)
    run = Underway(config, folder, validation, generator, state, iteration, seconds, maker)
    if iteration:
        run.status = status_after(config, checkpoints.read_metrics(folder / "metrics.csv"))
        if run.status != "running":  # killed between its last checkpoint and its result
            write_result(run)
    return run


def go_on(
    program: Program, samplers: Samplers, checkpoint_every: int, ahead: Sequence[int] = ()
) -> list[pd.DataFrame]:
    """Advance runs to where they are looked at next, and write their metrics, checkpoints and
    results; returns the new rows of each."""
    tables = advance(program, checkpoint_every, ahead)
    for run, rows in zip(program.runs, tables, strict=True):
        if run.config.test_tasks and run.status in ("done", "reached"):
            measured = on_test_tasks(run, program.model, samplers.test, program.loss)
            for name, value in measured.items():
                if (column := name.replace("query", "test")) in rows:
                    rows.loc[rows.index[-1], column] = value
        write(run, rows, run.iteration % checkpoint_every == 0)
    return tables


def on_test_tasks(run: Underway, model: nn.Module, sampler, loss: Loss) -> dict[str, float]:
    """A finished run's state on tasks of the test characters, which nothing was chosen by."""
    config, device = run.config, run.state.alpha.device
    tasks = sampler.sample(config.test_tasks, stream(config.seed, "test tasks", device))
    return evaluate(model, run.state, tasks, inner_steps=config.test_inner_steps, loss=loss)


def write(run: Underway, rows: pd.DataFrame, checkpoint_due: bool) -> None:
    """Append a run's new rows; write its checkpoint where that is due, its result at the end."""
    checkpoints.append_metrics(run.folder / "metrics.csv", rows)
    if checkpoint_due or run.status != "running":
        checkpoint(run)
    if run.status != "running":
        write_result(run)


def write_result(run: Underway) -> None:
    result = {"status": run.status, "iteration": run.iteration}
    result |= {"seconds": round(run.seconds, 3)} | run.maker
    files.write_json(run.folder / "result.json", result)


def leave(runs: list[Underway]) -> None:
    """Write the checkpoints of runs that are not finished, to be resumed from here."""
    for run in runs:
        if run.status == "running":
            checkpoint(run)


def checkpoint(run: Underway) -> None:
    tensors = {**run.state._asdict(), "generator": run.generator.get_state()}
    path = run.folder / "checkpoint.safetensors"
    checkpoints.save_checkpoint(path, tensors, run.iteration, run.seconds)


def shape(config: RunConfig) -> RunConfig:
    """What runs that are made together have in common."""
    default = RunConfig()
    return replace(config, **{name: getattr(default, name) for name in VARIED})


def samplers_of(config: RunConfig, root, device) -> Samplers:
    """The samplers of the characters that a config names."""
    split = split_characters(load(config.data, root).to(device))
    sizes = (config.n_way, config.k_shot, config.k_query, config.rotate)
    return Samplers(*(TaskSampler(x, *sizes) for x in (split.train, split.validation, split.test)))


def network_of(config: RunConfig) -> OmniglotCNN:
    generator = stream(config.seed, "initialisation")
    return OmniglotCNN(config.n_way, generator, filters=config.filters)


def load(data: str, root=None):
    """The characters of a data set by its name in RunConfig."""
    return LOADERS[data](root) if data == "omniglot" else LOADERS[data]()


def show(bar: tqdm, iterations: int, row: pd.Series) -> None:
    """Advance the progress line and show the numbers of an iteration."""
    shown = {"query_loss": "loss", "query_accuracy": "accuracy", "alpha": "alpha", "beta": "beta"}
    numbers = {label: f"{row[name]:.3g}" for name, label in shown.items() if name in row}
    bar.update(iterations)
    bar.set_postfix(numbers)


def read_run(folder: Path, config: RunConfig, device="cpu") -> Run:
    """A finished run from its folder."""
    result = files.read_json(folder / "result.json")
    saved, _, _ = checkpoints.load_checkpoint(folder / "checkpoint.safetensors")
    saved.pop("generator")
    metrics = checkpoints.read_metrics(folder / "metrics.csv")
    state = restore_state(saved, device)
    return Run(folder.name, config, result["status"], result["iteration"], metrics, state)


def restore_state(saved: dict, device="cpu") -> MetaState:
    """The MetaState of a checkpoint; plain SGD has no moments."""

    def move(value):
        if isinstance(value, dict):
            return {name: move(inner) for name, inner in value.items()}
        return value.to(device, copy=True)  # aligned anew: the last bits of products depend on it

    return MetaState(**{"moments": {}, **move(saved)})


def open_folder(folder: Path, identity: dict) -> None:
    """Say in a run's folder what run it is, or check that it is the same one."""
    if (folder / "config.json").exists():
        check_identity(folder, identity)
    else:
        files.write_json(folder / "config.json", identity)


def check_identity(folder: Path, identity: dict) -> None:
    found = files.read_json(folder / "config.json")
    if isinstance(found.get("config"), dict):  # a field that came later has its default in it
        found["config"] = asdict(RunConfig()) | found["config"]
    if found != identity:
        raise ValueError(
            f"{folder} holds another config than the one given; give another out, or move the "
            "folder away"
        )


def check_arguments(configs, out, root, checkpoint_every, progress=True) -> None:
    """Raise TypeError or ValueError for what `train` and `train_together` cannot take."""
    for config in configs:
        if not isinstance(config, RunConfig):
            raise TypeError(f"config must be an amaml.RunConfig, not {type(config).__name__}")
    if isinstance(checkpoint_every, bool) or not isinstance(checkpoint_every, int):
        raise TypeError(f"checkpoint_every must be a whole number, not {checkpoint_every!r}")
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every={checkpoint_every}: must be at least 1")
    if not isinstance(out, str | Path):
        raise TypeError(f"out={out!r}: must be the path of a folder")
    if not isinstance(root, str | Path | None):
        raise TypeError(f"root={root!r}: must be the path of a folder, or None")
    if not isinstance(progress, bool):
        raise TypeError(f"progress={progress!r}: must be True or False")


def check_own(model, sampler, validation_sampler, loss) -> None:
    """TypeError for parts of one's own that cannot be used."""
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    for name, part in (("sampler", sampler), ("validation_sampler", validation_sampler)):
        if part is not None and not callable(getattr(part, "sample", None)):
            raise TypeError(
                f"{name} must have a method sample(meta_batch_size, generator) -> Tasks; "
                f"{type(part).__name__} has none"
            )
    if not callable(loss):
        raise TypeError(f"loss must be a function of (prediction, y), not {loss!r}")


def stream(seed: int, purpose: str, device="cpu") -> torch.Generator:
    """A generator of its own for each purpose, all fixed by one seed."""
    hashed = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(hashed[:8], "big") >> 1)
