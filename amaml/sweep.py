"""Many runs: on this machine's cores, over a Dask cluster, or on a GPU."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
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
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), 1)
Batch = list[RunConfig]


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
    """
    if isinstance(configs, RunConfig):
        raise TypeError("configs must be a list of amaml.RunConfig, not a single one")
    configs = list(dict.fromkeys(configs))
    if not configs:
        raise ValueError("configs is empty: give at least one RunConfig")
    size, out = whole_number("runs_per_batch", runs_per_batch), str(Path(out).absolute())
    if minutes is not None and not minutes >= 0:
        raise ValueError(f"minutes={minutes!r}: must be at least 0")
    as_device(device)
    if minutes is None and device == "cpu":
        results = over_dask(configs, out, client, size, root, parts)
    else:
        results = in_this_process(configs, out, size, device, minutes, root, parts)
    runs: dict[RunConfig, Run] = {}
    failed: dict[RunConfig, BaseException] = {}
    bar = tqdm(total=len(configs), unit="run", file=sys.stdout, disable=not progress)
    with bar:
        for batch, finished, error in results:
            if error is not None:
                failed |= dict.fromkeys(batch, error)
            for run in finished:
                runs[run.config] = run
                if on_finish is not None:
                    on_finish(run)
            bar.update(len(batch) if error else len(finished))
            counts = Counter(run.status for run in runs.values())
            bar.set_postfix({**counts, **({"failed": len(failed)} if failed else {})})
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
    of each iteration.
    """
    starts = {"alpha": "alpha_0", "beta": "beta_0"}
    config = {starts.get(name, name): value for name, value in asdict(run.config).items()}
    if config["threshold"] is None:
        config["threshold"] = math.nan  # as it is read back from a table
    columns = {"run": run.id, **(labels or {}), **config, "status": run.status}
    constant = pd.DataFrame([columns] * len(run.metrics))
    return pd.concat([constant, run.metrics.reset_index(drop=True)], axis=1)


def over_dask(configs, out, client, size, root, parts) -> Iterator[tuple]:
    """(batch, its finished runs, error or None) as the workers finish them."""
    with workers(client, len(configs)) as connected:
        from distributed import as_completed

        batches = batches_of(configs, size, max(1, len(connected.nthreads())))
        futures = {
            connected.submit(train_batch, batch, out, root, parts, pure=False): batch
            for batch in batches
        }
        for future in as_completed(list(futures)):
            batch = futures.pop(future)  # so that its worker forgets the result
            if future.status == "finished":
                yield batch, future.result(), None
            else:
                yield batch, [], future.exception()


def train_batch(configs: Batch, out: str, root, parts: dict[str, Any]) -> list[Run]:
    """Runs in a worker process, with one thread: as many batches as cores go at a time."""
    torch.set_num_threads(1)
    return train_together(configs, out, root=root, **parts)


def in_this_process(configs, out, size, device, minutes, root, parts) -> Iterator[tuple]:
    """The same, one batch after another, until the minutes are over."""
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    every = CHECKPOINT_EVERY if as_device(device).type == "cpu" else CHECKPOINT_EVERY_ON_GPU
    for batch in batches_of(configs, size, 1):
        finished, failure = [], None
        try:
            finished = train_together(
                batch,
                out,
                root=root,
                device=device,
                checkpoint_every=every,
                deadline=deadline,
                **parts,
            )
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
    if client is not None and not isinstance(client, str):
        if not callable(getattr(client, "submit", None)):
            raise TypeError(
                f"client={client!r}: must be a dask.distributed.Client, a scheduler's address such "
                "as 'tcp://10.0.0.1:8786', or None"
            )
        yield client
        return
    if client is None:
        check_main_guard()
    import dask
    from dask.system import CPU_COUNT
    from distributed import Client, LocalCluster

    if client is not None:
        try:
            connected = Client(client, timeout=PATIENCE)
        except (OSError, ValueError, TypeError) as error:
            raise ConnectionError(
                f"no Dask scheduler answers at {client} ({error}); start one with `dask scheduler` "
                "and workers with `dask worker ADDRESS --nthreads 1`, or leave the address away"
            ) from error
        with connected:
            yield connected
        return
    n_workers = max(1, min(CPU_COUNT, n_runs))
    with (
        dask.config.set({"distributed.nanny.pre-spawn-environ": ONE_THREAD}),
        LocalCluster(n_workers, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        yield client


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
