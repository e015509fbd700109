"""A run: in memory when it is finished, and from its folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd

from amaml.alpha_maml import MetaState
from amaml.config import RunConfig
from amaml.data import as_device
from amaml.runs import store


@dataclass(frozen=True)
class Run:
    """What a run gave.

    Attributes:
        folder: where it is kept; its name is the run's `id`.
        config: its RunConfig.
        status: "done", "reached" (the threshold), "diverged" (something stopped being finite), or
            "running" (from `load_run` alone).
        iteration: the last one; for "diverged" the first with a number that is not finite.
        metrics: DataFrame, one row per iteration, counted from 1: `iteration`, what `meta_step`
            measures, and at every validation_every-th, after that iteration's update,
            `validation_loss` and `validation_accuracy` (else empty). With test_tasks the last row
            has `test_loss`, `test_accuracy` and their 95 % intervals `test_loss_ci95` and
            `test_accuracy_ci95` (mean +- ci95 over the tasks).
        state: the MetaState at its end.
        seconds: how long it took.
        maker: what made it: commit, versions, machine.
        read: whether it was finished before, and read.
    """

    folder: Path
    config: RunConfig
    status: str
    iteration: int
    metrics: pd.DataFrame
    state: MetaState
    seconds: float
    maker: dict
    read: bool = False

    @property
    def id(self) -> str:
        return self.folder.name


def load_run(folder: str | Path, device: str = "cpu") -> Run:
    """A run from its folder, also one that is not finished; its state is ready for `adapt`.

    Raises:
        FileNotFoundError: where there is no run.
        ValueError: where its file is damaged.
    """
    saved = store.read_run(Path(folder), as_device(device))
    if saved is None:
        raise FileNotFoundError(f"{folder} holds no run: there is no {store.NAME} in it")
    config = RunConfig(**saved[2]["config"])
    return replace(as_run(config, Path(folder), saved), read=True)


def as_run(config: RunConfig, folder: Path, saved: tuple) -> Run:
    tensors, metrics, about = saved
    ended = {name: about[name] for name in ("status", "iteration", "seconds", "maker")}
    return Run(folder, config, metrics=metrics, state=as_state(tensors), **ended)


def as_state(tensors: dict) -> MetaState:
    """The MetaState of a run's file, in which plain SGD has no moments."""
    return MetaState(**{"moments": {}, **tensors["state"]})


def read_own(folder: Path, about: dict, device) -> tuple[dict, pd.DataFrame, dict] | None:
    """What `store.read_run` gives, once it is certain that it is this run's."""
    saved = store.read_run(folder, device)
    if saved is None:
        return None
    found = saved[2]
    config = asdict(RunConfig()) | found["config"]  # a field that came later has its default there
    same = all(found.get(key, "") == about[key] for key in ("name", "start"))
    if config != about["config"] or not same:
        raise ValueError(
            f"{folder} holds another config than the one given; give another out, or move the "
            "folder away"
        )
    kinds = sorted(found["parts"].keys() | about["parts"].keys())
    other = [kind for kind in kinds if found["parts"].get(kind) != about["parts"].get(kind)]
    if other:
        raise ValueError(
            f"the run in {folder} was made with another {' and '.join(other)} than the one given; "
            "give another name, or move the folder away"
        )
    return saved
