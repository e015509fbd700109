"""One run: the training loop and its resumption."""

from __future__ import annotations

import hashlib
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from amaml import records
from amaml.alpha_maml import MetaState, evaluate, init_state, meta_step
from amaml.arguments import Loss
from amaml.config import RunConfig, digest
from amaml.data import LOADERS, as_device, split_characters
from amaml.model import OmniglotCNN
from amaml.tasks import Tasks, TaskSampler

FLUSH_EVERY = 10  # iterations between two looks at the metrics, and so between two device syncs


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
                validation_accuracy (else empty)
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
    too); the config's fields about data and network then have no effect. `root` is where Omniglot
    lies (see `load_omniglot`). A checkpoint is written every `checkpoint_every` iterations.

    A run that stops being finite ends with the status "diverged": a result, not an error. Raises
    ValueError where the folder holds another config, PermissionError or another OSError where it
    cannot be written.
    """
    config = RunConfig() if config is None else config
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
    device = as_device(device)
    check_own(model, sampler, validation_sampler, loss)
    own = {"model": model, "sampler": sampler, "validation_sampler": validation_sampler}
    own = {name: digest(part) for name, part in own.items() if part is not None}
    own |= {} if loss is F.cross_entropy else {"loss": digest(loss)}
    run_id = digest({"config": config.id, "own": own}) if own else config.id
    folder, identity = Path(out) / run_id, {"config": asdict(config), "own": own}
    if (folder / "result.json").exists():
        check_identity(folder, identity)
        return read_run(folder, config, device)

    if sampler is None:
        split = split_characters(load(config.data, root).to(device))
        train_sampler, other_sampler = (
            TaskSampler(part, config.n_way, config.k_shot, config.k_query, config.rotate)
            for part in (split.train, split.validation)
        )
    else:
        train_sampler = other_sampler = sampler
    validation_sampler = other_sampler if validation_sampler is None else validation_sampler
    if model is None:
        model = OmniglotCNN(
            config.n_way, stream(config.seed, "initialisation"), filters=config.filters
        )
    model = model.to(device)
    tasks_generator = stream(config.seed, "training tasks", device)
    validation = validation_sampler.sample(
        config.validation_tasks, stream(config.seed, "validation tasks", device)
    )
    if not isinstance(validation, Tasks):
        raise TypeError(f"sampler must give amaml.Tasks, not {type(validation).__name__}")
    state = init_state(
        model, alpha=config.alpha, beta=config.beta, meta_optimizer=config.meta_optimizer
    )
    with records.lock(folder):
        if (folder / "result.json").exists():  # another process has just made it
            check_identity(folder, identity)
            return read_run(folder, config, device)
        iteration, seconds, maker = 0, 0.0, records.provenance(device)
        open_folder(folder, identity)
        if (folder / "checkpoint.safetensors").exists():
            saved, iteration, seconds = records.load_checkpoint(folder / "checkpoint.safetensors")
            tasks_generator.set_state(saved.pop("generator"))
            state = restore_state(saved, device)
        records.truncate_metrics(folder / "metrics.csv")

        rates = {"hyper_alpha": config.hyper_alpha, "hyper_beta": config.hyper_beta}
        inner = {"inner_steps": config.inner_steps, "first_order": config.first_order, "loss": loss}
        status, started = "running", time.perf_counter() - seconds
        bar = tqdm(
            total=config.iterations,
            initial=iteration,
            desc=run_id,
            file=sys.stdout,
            mininterval=1.0,
            disable=not progress,
        )
        with bar:
            while status == "running":
                intervals = (
                    FLUSH_EVERY,
                    config.validation_every,
                    checkpoint_every,
                    config.iterations,
                )
                stop = min((iteration // interval + 1) * interval for interval in intervals)
                pending = []
                for _ in range(iteration, stop):  # nothing in here waits for the device
                    tasks = train_sampler.sample(config.meta_batch_size, tasks_generator)
                    state, metrics = meta_step(model, state, tasks, **rates, **inner)
                    pending.append(metrics)
                iteration, last = stop, stop == config.iterations

                rows, finite = to_rows(pending, iteration)
                validation_loss = math.inf
                if finite and (last or iteration % config.validation_every == 0):
                    measured = evaluate(
                        model, state, validation, inner_steps=config.inner_steps, loss=loss
                    )
                    validation_loss = measured["query_loss"]
                    finite = math.isfinite(validation_loss)
                    for name in ("loss", "accuracy"):
                        if f"query_{name}" in measured:
                            rows.loc[rows.index[-1], f"validation_{name}"] = measured[
                                f"query_{name}"
                            ]
                records.append_metrics(folder / "metrics.csv", rows)
                show(bar, len(pending), rows.iloc[-1])

                if not finite:
                    status, iteration = "diverged", int(rows["iteration"].iloc[-1])
                elif config.threshold is not None and validation_loss <= config.threshold:
                    status = "reached"
                elif last:
                    status = "done"
                if status != "running" or iteration % checkpoint_every == 0:
                    seconds = time.perf_counter() - started
                    tensors = {**state._asdict(), "generator": tasks_generator.get_state()}
                    records.save_checkpoint(
                        folder / "checkpoint.safetensors", tensors, iteration, seconds
                    )
        result = {"status": status, "iteration": iteration, "seconds": round(seconds, 1)}
        records.write_json(folder / "result.json", result | maker)
    return read_run(folder, config, device)


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
    result = records.read_json(folder / "result.json")
    saved, _, _ = records.load_checkpoint(folder / "checkpoint.safetensors")
    saved.pop("generator")
    metrics = records.read_metrics(folder / "metrics.csv")
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
        records.write_json(folder / "config.json", identity)


def check_identity(folder: Path, identity: dict) -> None:
    if records.read_json(folder / "config.json") != identity:
        raise ValueError(
            f"{folder} holds another config than the one given; give another out, or move the "
            "folder away"
        )


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


def to_rows(pending: list[dict[str, Tensor]], iteration: int) -> tuple[pd.DataFrame, bool]:
    """Metrics of the iterations up to `iteration` as rows, and whether all of them are finite.

    Rows after the first that is not finite are dropped: they say nothing.
    """
    names = list(pending[0])
    values = torch.stack([torch.stack([m[name] for name in names]) for m in pending])
    values = values.double().cpu().numpy()
    watched = [names.index(n) for n in ("query_loss", "alpha", "beta", "gradient_norm")]
    bad = ~np.isfinite(values[:, watched]).all(1)
    kept = int(bad.argmax()) + 1 if bad.any() else len(values)
    rows = pd.DataFrame(values[:kept], columns=names)
    rows.insert(
        0, "iteration", range(iteration - len(values) + 1, iteration - len(values) + 1 + kept)
    )
    rows["validation_loss"] = np.nan
    if "query_accuracy" in names:
        rows["validation_accuracy"] = np.nan
    return rows, not bad.any()


def stream(seed: int, purpose: str, device="cpu") -> torch.Generator:
    """A generator of its own for each purpose, all fixed by one seed."""
    hashed = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(hashed[:8], "big") >> 1)
