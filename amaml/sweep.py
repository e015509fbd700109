"""Many runs: on this machine's cores, over a Dask cluster, or on a GPU."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from amaml.config import RunConfig
from amaml.data import as_device, whole_number
from amaml.training import Run, shared_fields, train_together

CHECKPOINT_EVERY, CHECKPOINT_EVERY_ON_GPU = 50, 500  # iterations
PATIENCE = "10s"  # how long a scheduler that is named may take to answer
Batch = list[RunConfig]
Result = tuple[Batch, list[Run], BaseException | None]  # a batch, its finished runs, its error


def run_all(
    configs: Iterable[RunConfig],
    out: str | Path = "runs",
    client=None,
    runs_per_batch: int = 1,
    *,
    device: str = "cpu",
    minutes: float | None = None,
    root: str | Path | None = None,
    progress: bool = True,
    on_finish: Callable[[Run], None] | None = None,
    **parts,
) -> pd.DataFrame:
    """Make many runs and return one tidy table: one row per iteration, the config's fields beside.

    Finished runs are read and not made again, unfinished ones resume: a sweep that was killed is
    simply called again. What fails with an error does not stop the others.

    Args:
        configs: of the runs.
        out: folder of the runs.
        client: a `dask.distributed.Client` or a scheduler's address; None takes the address in the
            environment variable AMAML_SCHEDULER, or else starts one worker per core on this
            machine, each with one torch thread.
        runs_per_batch: up to so many runs that differ in rates and seeds alone are made as one
            program (see `train_together`), which pays for small ones and on a GPU.
        device: another device than "cpu" has the runs made in this process, without Dask.
        minutes: stop after so long, with checkpoints; the runs are made in this process.
        root: where Omniglot lies (see `load_omniglot`).
        progress: print a progress line.
        on_finish: a function that is called with each run as it finishes.
        parts: `name`, `model`, `sampler`, `validation_sampler`, `loss`, `step`, as for `train`.

    Returns:
        The table of the runs that are finished.

    Raises:
        RuntimeError: at the end, with the errors and configs of the runs that failed.
        TypeError, ValueError: for `configs`, `client` or another argument that cannot be used.
        ConnectionError: where no scheduler answers at the address.
    """
    if isinstance(configs, RunConfig):
        raise TypeError("configs must be a list of amaml.RunConfig, not a single one")
    configs = list(dict.fromkeys(configs))
    if not configs:
        raise ValueError("configs is empty: give at least one RunConfig")
    size, out = whole_number("runs_per_batch", runs_per_batch), str(Path(out).absolute())
    if minutes is not None and not minutes >= 0:
        raise ValueError(f"minutes={minutes!r}: must be at least 0")
    on_cpu = as_device(device).type == "cpu"
    train = partial(train_together, out=out, root=root, **parts)
    if minutes is None and on_cpu:
        results = over_dask(train, configs, size, client)
    else:
        every = CHECKPOINT_EVERY if on_cpu else CHECKPOINT_EVERY_ON_GPU
        train = partial(train, device=device, checkpoint_every=every)
        results = in_this_process(train, batches_of(configs, size, 1), minutes)
    runs: dict[RunConfig, Run] = {}
    failed: dict[RunConfig, BaseException] = {}
    with tqdm(total=len(configs), unit="run", file=sys.stdout, disable=not progress) as bar:
        for batch, finished, error in results:
            failed |= dict.fromkeys(batch, error) if error else {}
            for run in finished:
                runs[run.config] = run
                if on_finish is not None:
                    on_finish(run)
            bar.update(len(batch) if error else len(finished))
            statuses = [run.status for run in runs.values()] + ["failed"] * len(failed)
            bar.set_postfix(Counter(statuses))
    if progress and (read := sum(run.read for run in runs.values())):
        print(f"{read} of {len(configs)} runs in {out} were finished: read, not made again")
    if failed:
        lines = "\n".join(f"{config}: {error!r}" for config, error in failed.items())
        raise RuntimeError(f"{len(failed)} of {len(configs)} runs failed:\n{lines}")
    tables = [tabulate(runs[config]) for config in configs if config in runs]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def tabulate(run: Run, labels: dict | None = None) -> pd.DataFrame:
    """A run's metrics with its id, labels, config and status in every row.

    The config's starting rates are the columns alpha_0 and beta_0; alpha and beta are the rates
    of each iteration. With a sampler of one's own `data` is "own".
    """
    starts = {"alpha": "alpha_0", "beta": "beta_0"}
    config = {starts.get(name, name): value for name, value in asdict(run.config).items()}
    if "sampler" in run.parts:
        config["data"] = "own"
    if config["threshold"] is None:
        config["threshold"] = math.nan  # as it is read back from a table
    columns = {"run": run.id, **(labels or {}), **config, "status": run.status}
    constant = pd.DataFrame([columns] * len(run.metrics))
    return pd.concat([constant, run.metrics.reset_index(drop=True)], axis=1)


def over_dask(train: Callable, configs: Batch, size: int, client) -> Iterator[Result]:
    """Batches as the workers finish them."""
    with workers(client, len(configs)) as connected:
        from distributed import as_completed

        batches = batches_of(configs, size, max(1, len(connected.nthreads())))
        futures = {connected.submit(in_one_thread, train, b, pure=False): b for b in batches}
        for future in as_completed(list(futures)):
            batch = futures.pop(future)  # so that its worker forgets the result
            done = future.status == "finished"
            yield batch, future.result() if done else [], None if done else future.exception()


def in_one_thread(train: Callable, configs: Batch) -> list[Run]:
    """Runs in a worker process: as many batches as cores go at a time."""
    torch.set_num_threads(1)
    return train(configs)


def in_this_process(train: Callable, batches: list[Batch], minutes) -> Iterator[Result]:
    """One batch after another, until the minutes are over."""
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    for batch in batches:
        finished: list[Run] = []
        failure = None
        try:
            finished = train(batch, deadline=deadline)
        except Exception as error:
            # Without the frames, which hold the device's memory
            error.__context__ = error.__cause__ = None
            failure = error.with_traceback(None)
        yield batch, finished, failure
        if sum(run.read for run in finished) < len(batch) and time.monotonic() > deadline:
            break


def batches_of(configs: Batch, runs_per_batch: int, n_workers: int) -> list[Batch]:
    """Configs of one shape in batches of at most `runs_per_batch`, no worker without one."""
    alike: dict[RunConfig, Batch] = {}
    for config in configs:
        alike.setdefault(shared_fields(config), []).append(config)
    batches = []
    for group in alike.values():
        size = min(runs_per_batch, -(-len(group) // n_workers))
        batches += [group[i : i + size] for i in range(0, len(group), size)]
    return batches


@contextmanager
def workers(client, n_runs: int) -> Iterator[Any]:
    """The client that was given, one of the scheduler that is named, or one of a local cluster
    that ends with the sweep."""
    client = client or os.environ.get("AMAML_SCHEDULER")
    if client is None:
        check_main_guard()
    elif callable(getattr(client, "submit", None)):
        yield client
        return
    elif not isinstance(client, str):
        raise TypeError(
            f"client={client!r}: must be a dask.distributed.Client, a scheduler's address such as "
            "'tcp://10.0.0.1:8786', or None"
        )
    from dask.system import CPU_COUNT
    from distributed import Client, LocalCluster

    n_workers = min(CPU_COUNT, n_runs)
    local = {"n_workers": n_workers, "threads_per_worker": 1, "dashboard_address": ":0"}
    with nullcontext(client) if client else LocalCluster(**local) as where:
        try:
            connected = Client(where, timeout=PATIENCE)
        except (OSError, ValueError, TypeError) as error:
            raise ConnectionError(
                f"no Dask scheduler answers at {where} ({error}); start one with `dask scheduler` "
                "and workers with `dask worker ADDRESS --nthreads 1`, or give no address"
            ) from error
        with connected:
            yield connected


def check_main_guard() -> None:
    """Worker processes import the script that starts them: without a guard it would start them
    again, and again."""
    main = sys.modules["__main__"]
    script = getattr(main, "__file__", None) if main.__spec__ is None else None
    if script and "__name__" not in Path(script).read_text(encoding="utf-8", errors="ignore"):
        raise RuntimeError(
            f"run_all starts worker processes, and each of them imports {script}: put the call "
            'under `if __name__ == "__main__":`'
        )


if __name__ == "__main__":
    sys.exit("python -m amaml.sweep is now: python -m amaml.paper --figure F --profile P")
