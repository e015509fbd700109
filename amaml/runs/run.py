"""A run, in memory and in its folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd
from torch import Tensor

from amaml.alpha_maml import MetaState
from amaml.config import RunConfig
from amaml.data import as_device
from amaml.runs import store

TOLD = ("name", "start", "parts", "status", "iteration", "seconds", "maker")  # in a run's file


@dataclass(eq=False)
class Run:
    """A run: what it is, how far it is and what it has given.

    Attributes:
        folder: where it is kept; its name is the run's `id`.
        config: its RunConfig.
        state: the MetaState at its end. That of a run that diverged may be some iterations later:
            it is the one at the next look at the numbers.
        generator: the state of the generator that draws its next training tasks.
        metrics: DataFrame, one row per iteration, counted from 1: `iteration`, what `meta_step`
            measures, and at every validation_every-th, after that iteration's update,
            `validation_loss` and `validation_accuracy` (else empty). With test_tasks the last row
            has `test_loss`, `test_accuracy` and their 95 % intervals `test_loss_ci95` and
            `test_accuracy_ci95` (mean +- ci95 over the tasks), after test_inner_steps; the same
            with `_1_step` at the end are after one inner step, where that is another number.
        status: "done", "reached" (the threshold), "diverged" (something stopped being finite), or
            "running" (from `load_run` alone).
        iteration: the last one; for "diverged" the first with a number that is not finite.
        seconds: how long it took.
        maker: what made it: commit, versions, machine.
        name: given with parts of one's own.
        start: the id of the run that it goes on from.
        parts: the parts of one's own, in words.
        read: whether it was finished before, and read.
    """

    folder: Path
    config: RunConfig
    state: MetaState
    generator: Tensor
    metrics: pd.DataFrame = field(default_factory=pd.DataFrame)
    status: str = "running"
    iteration: int = 0
    seconds: float = 0.0
    maker: dict = field(default_factory=dict)
    name: str = ""
    start: str = ""
    parts: dict[str, str] = field(default_factory=dict)
    read: bool = False

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def tensors(self) -> dict:
        return {"state": self.state._asdict(), "generator": self.generator}


def load_run(folder: str | Path, device: str = "cpu") -> Run:
    """A run from its folder, also one that is not finished; its state is ready for `adapt`.

    Args:
        folder: the run's own, such as `out/<id>`.
        device: where its state is wanted.

    Raises:
        FileNotFoundError: where there is no run.
        ValueError: where its file is damaged.
    """
    run = find_run(Path(folder), as_device(device))
    if run is None:
        raise FileNotFoundError(f"{folder} holds no run: there is no {store.NAME} in it")
    return run


def find_run(folder: Path, device) -> Run | None:
    """The run in a folder, if there is one."""
    saved = store.read_run(folder, device)
    if saved is None:
        return None
    tensors, metrics, about = saved
    # What came later is missing in older files: fields of the config, name and start. An empty
    # dict, such as the moments of plain SGD, leaves no trace.
    told = {name: about[name] for name in TOLD if name in about}
    state = MetaState(**{"moments": {}, **tensors["state"]})
    generator = tensors["generator"].cpu()
    return Run(folder, RunConfig(**about["config"]), state, generator, metrics, **told, read=True)


def save(run: Run) -> None:
    """Write the run's file as the run is now; its folder must be locked."""
    about = {name: getattr(run, name) for name in TOLD}
    about |= {"config": asdict(run.config), "seconds": round(run.seconds, 3)}
    store.write_run(run.folder, run.tensors, run.metrics, about)


def resume(run: Run, device) -> None:
    """Take over what the run's folder holds; ValueError where that is of another run."""
    saved = find_run(run.folder, device)
    if saved is None:
        return
    if (saved.config, saved.name, saved.start) != (run.config, run.name, run.start):
        raise ValueError(
            f"{run.folder} holds another config than the one given; give another out, or move the "
            "folder away"
        )
    kinds = sorted(saved.parts.keys() | run.parts.keys())
    if other := [kind for kind in kinds if saved.parts.get(kind) != run.parts.get(kind)]:
        raise ValueError(
            f"the run in {run.folder} was made with another {' and '.join(other)} than the one "
            "given; give another name, or move the folder away"
        )
    finished = saved.status != "running"
    if not finished and saved.generator.shape != run.generator.shape:
        raise ValueError(
            f"the run in {run.folder} was begun on another kind of device than {device} and draws "
            "other tasks there; go on with it there, or give another out"
        )
    vars(run).update(vars(saved), read=finished)
