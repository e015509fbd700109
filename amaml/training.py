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

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from tqdm import tqdm

from amaml import checkpoints, files, provenance
from amaml.alpha_maml import MetaState, evaluate, init_state, meta_step, summary
from amaml.arguments import Loss
from amaml.config import RunConfig, digest
from amaml.data import LOADERS, as_device, split_characters
from amaml.maml import query_metrics
from amaml.model import OmniglotCNN
from amaml.tasks import Tasks, TaskSampler

# Iterations between two looks at the metrics, each of which waits for the device
FLUSH_EVERY, FLUSH_EVERY_ON_GPU = 10, 100
VARIED = ("alpha", "beta", "hyper_alpha", "hyper_beta", "seed")  # by runs that are made together
WATCHED = ["query_loss", "alpha", "beta", "gradient_norm"]  # a run has diverged if one is infinite


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
    and SIGTERM stop a run within 10 iterations, after a last checkpoint. Raises ValueError where
    the folder holds another config, PermissionError or another OSError where it cannot be written.
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
                while run.status == "running" and not stopped():
                    rows = advance([run], model, samplers, loss, checkpoint_every)[0]
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
        with stop_signals() as stopped, bar:
            while running and not stopped() and time.monotonic() < deadline:
                least = min(run.iteration for run in running)  # what a kill left behind catches up
                behind = [run for run in running if run.iteration == least]
                ahead = [run.iteration for run in running if run.iteration > least]
                advance(behind, model, samplers, F.cross_entropy, checkpoint_every, ahead)
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
        generator.set_state(saved.pop("generator"))
        state = restore_state(saved, device)
    checkpoints.truncate_metrics(folder / "metrics.csv")
    maker = provenance.here(device)
    run = Underway(config, folder, validation, generator, state, iteration, seconds, maker)
    if iteration:
        run.status = status_after(config, checkpoints.read_metrics(folder / "metrics.csv"))
        if run.status != "running":  # killed between its last checkpoint and its result
            write_result(run)
    return run


def advance(
    runs: list[Underway],
    model: nn.Module,
    samplers: Samplers,
    loss: Loss,
    checkpoint_every: int,
    ahead: Sequence[int] = (),
) -> list[pd.DataFrame]:
    """Go on with runs at the same iteration, up to where their numbers are looked at next.

    Their metrics, checkpoints and results are written; returns the new rows of each. `ahead` are
    iterations not to be passed.
    """
    started, config, iteration = time.perf_counter(), runs[0].config, runs[0].iteration
    on_cpu = runs[0].state.alpha.device.type == "cpu"
    flush_every = FLUSH_EVERY if on_cpu else FLUSH_EVERY_ON_GPU
    intervals = (flush_every, config.validation_every, checkpoint_every, config.iterations)
    stop = min(*((iteration // n + 1) * n for n in intervals), *ahead, config.iterations)
    pending = steps(runs, stop - iteration, model, samplers.train, loss)
    tables = [to_rows(metrics, stop, config) for metrics in pending]
    if validation_due(config, stop):
        pairs = zip(runs, tables, strict=True)
        finite = [pair for pair in pairs if np.isfinite(pair[1][WATCHED].iloc[-1]).all()]
        validated = evaluations([run for run, _ in finite], model, loss)
        for (_, rows), measured in zip(finite, validated, strict=True):
            enter(rows, "validation", measured)
    for run, rows in zip(runs, tables, strict=True):
        run.iteration, run.status = int(rows["iteration"].iloc[-1]), status_after(config, rows)
        if config.test_tasks and run.status in ("done", "reached"):
            enter(rows, "test", on_test_tasks(run, model, samplers.test, loss))
    seconds = (time.perf_counter() - started) / len(runs)
    for run, rows in zip(runs, tables, strict=True):
        run.seconds += seconds
        write(run, rows, stop % checkpoint_every == 0)
    return tables


def steps(runs: list[Underway], iterations: int, model, sampler, loss: Loss) -> list[list[dict]]:
    """Meta-iterations of runs side by side: their states go on, and each gives its metrics.

    Nothing in here waits for the device.
    """
    config, pending = runs[0].config, []
    fixed = {"inner_steps": config.inner_steps, "first_order": config.first_order, "loss": loss}
    if len(runs) == 1:
        (run,) = runs
        rates = {"hyper_alpha": run.config.hyper_alpha, "hyper_beta": run.config.hyper_beta}
        for _ in range(iterations):
            tasks = sampler.sample(config.meta_batch_size, run.generator)
            run.state, metrics = meta_step(model, run.state, tasks, **rates, **fixed)
            pending.append(metrics)
        return [pending]

    def step(state, hyper_alpha, hyper_beta, *batch):
        rates = {"hyper_alpha": hyper_alpha, "hyper_beta": hyper_beta}
        return meta_step(model, state, Tasks(*batch), **rates, **fixed)

    # Runs of one seed see the same tasks: these are drawn once, by the first of them.
    first = {run.config.seed: run for run in reversed(runs)}
    place = [list(first).index(run.config.seed) for run in runs]
    place = torch.tensor(place, device=runs[0].state.alpha.device)
    state = tree_map(lambda *values: torch.stack(values), *(run.state for run in runs))
    like = state.alpha
    hyper_rates = [
        torch.tensor([getattr(run.config, name) for run in runs], dtype=torch.float64).to(like)
        for name in ("hyper_alpha", "hyper_beta")
    ]
    for _ in range(iterations):
        drawn = [sampler.sample(config.meta_batch_size, run.generator) for run in first.values()]
        batch = [
            torch.stack(x)[place] for x in zip(*(vars(d).values() for d in drawn), strict=True)
        ]
        state, metrics = vmap(step)(state, *hyper_rates, *batch)
        pending.append(metrics)
    for i, run in enumerate(runs):
        run.state = tree_map(lambda value, i=i: value[i].clone(), state)
        run.generator.set_state(first[run.config.seed].generator.get_state())
    return [
        [{n: m[i] for n, m in metrics.items()} for metrics in pending] for i in range(len(runs))
    ]


def validation_due(config: RunConfig, iteration: int) -> bool:
    return iteration % config.validation_every == 0 or iteration == config.iterations


def status_after(config: RunConfig, rows: pd.DataFrame) -> str:
    """A run's status by the last of its rows: "running", or how it ended (see `Run`)."""
    row = rows.iloc[-1]
    validated = ["validation_loss"] if validation_due(config, int(row["iteration"])) else []
    if not np.isfinite(row[WATCHED + validated]).all():
        return "diverged"
    if config.threshold is not None and row["validation_loss"] <= config.threshold:
        return "reached"
    return "done" if row["iteration"] == config.iterations else "running"


def evaluations(runs: list[Underway], model: nn.Module, loss: Loss) -> list[dict[str, float]]:
    """Each run's state on its validation tasks, as `evaluate` measures it."""
    if len(runs) < 2:  # vmap would ask more of a model of one's own than it has to give
        return [
            evaluate(
                model, run.state, run.validation, inner_steps=run.config.inner_steps, loss=loss
            )
            for run in runs
        ]
    state = tree_map(lambda *values: torch.stack(values), *(run.state for run in runs))
    batch = [torch.stack(x) for x in zip(*(vars(r.validation).values() for r in runs), strict=True)]
    inner_steps = runs[0].config.inner_steps

    def measured(theta, alpha, *batch):
        return query_metrics(model, theta, alpha, batch, inner_steps, loss)

    together = vmap(measured)(state.theta, state.alpha, *batch)
    return [summary({name: m[i] for name, m in together.items()}) for i in range(len(runs))]


def on_test_tasks(run: Underway, model: nn.Module, sampler, loss: Loss) -> dict[str, float]:
    """A finished run's state on tasks of the test characters, which nothing was chosen by."""
    config, device = run.config, run.state.alpha.device
    tasks = sampler.sample(config.test_tasks, stream(config.seed, "test tasks", device))
    return evaluate(model, run.state, tasks, inner_steps=config.test_inner_steps, loss=loss)


def enter(rows: pd.DataFrame, kind: str, measured: dict[str, float]) -> None:
    """Put what was measured on validation or test tasks into the last row, where it has room."""
    for name, value in measured.items():
        column = name.replace("query", kind)
        if column in rows:
            rows.loc[rows.index[-1], column] = value


def write(run: Underway, rows: pd.DataFrame, checkpoint_due: bool) -> None:
    """Append a run's new rows; write its checkpoint where that is due, its result at the end."""
    checkpoints.append_metrics(run.folder / "metrics.csv", rows)
    if checkpoint_due or run.status != "running":
        checkpoint(run)
    if run.status != "running":
        write_result(run)


def write_result(run: Underway) -> None:
    result = {"status": run.status, "iteration": run.iteration}
    result |= {"seconds": round(run.seconds, 1)} | run.maker
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


def to_rows(pending: list[dict[str, Tensor]], iteration: int, config: RunConfig) -> pd.DataFrame:
    """Metrics of the iterations up to `iteration` as rows, with room for what is measured later.

    Rows after the first that is not finite are dropped: they say nothing.
    """
    names = list(pending[0])
    values = torch.stack([torch.stack([m[name] for name in names]) for m in pending])
    rows = pd.DataFrame(values.double().cpu().numpy(), columns=names)
    rows.insert(0, "iteration", range(iteration - len(rows) + 1, iteration + 1))
    for kind in ("loss", "accuracy") if "query_accuracy" in names else ("loss",):
        rows[f"validation_{kind}"] = np.nan
        if config.test_tasks:
            rows[f"test_{kind}"] = rows[f"test_{kind}_ci95"] = np.nan
    finite = np.isfinite(rows[WATCHED]).all(axis=1)
    return rows if finite.all() else rows.loc[: int(finite.argmin())]


def stream(seed: int, purpose: str, device="cpu") -> torch.Generator:
    """A generator of its own for each purpose, all fixed by one seed."""
    hashed = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(hashed[:8], "big") >> 1)
