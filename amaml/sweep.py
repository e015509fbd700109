"""Many runs: on this machine's cores or over a Dask cluster, and the records of a whole figure.

`python -m amaml.sweep --figure figure_1 --profile medium` trains what is missing of a figure.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from amaml.config import RunConfig
from amaml.data import as_device
from amaml.paper import experiments, records
from amaml.runs import files
from amaml.training import Run, shape, train, train_together

PUBLISH_EVERY = 20  # seconds between two publications: each writes the whole table
CHECKPOINT_EVERY, CHECKPOINT_EVERY_ON_GPU = 50, 500  # iterations, of `run_here`
PATIENCE = "10s"  # how long a scheduler that is named may take to answer
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), 1)


def run_all(
    configs: Iterable[RunConfig],
    out: str | Path = "runs",
    client=None,
    runs_per_batch: int = 1,
    *,
    root: str | Path | None = None,
    progress: bool = True,
    on_finish: Callable[[Run], None] | None = None,
) -> pd.DataFrame:
    """Make many runs and return one tidy table: a row an iteration, the config's fields beside.

    Finished runs are read and not made again, unfinished ones resume: a sweep that was killed is
    simply called again. `client` is a `dask.distributed.Client` or a scheduler's address; None
    takes the address in the environment variable AMAML_SCHEDULER, or else starts workers on this
    machine, one a core with one torch thread each. Up to `runs_per_batch` runs that differ in
    rates and seeds alone are made as one program (see `train_together`), which pays for small
    ones. `on_finish(run)` is called for each run as it finishes. What fails with an error does not
    stop the others: a RuntimeError at the end lists it with its configs.
    """
    configs = checked_configs(configs, out, root, runs_per_batch, on_finish)
    runs, failed, out = {}, {}, str(Path(out).absolute())
    with workers(client, len(configs)) as client:
        from distributed import as_completed

        n_workers = max(1, len(client.nthreads()))
        batches = batches_of(configs, runs_per_batch, n_workers)
        futures = {client.submit(train_batch, b, out, root, pure=False): b for b in batches}
        waiting = dict(futures)
        bar = tqdm(total=len(configs), unit="run", file=sys.stdout, disable=not progress)
        bar.set_postfix(running=running(waiting, n_workers))
        with bar:
            for future in as_completed(futures):
                batch = waiting.pop(future)
                if future.status == "finished":
                    for run in future.result():
                        runs[run.config] = run
                        if on_finish is not None:
                            on_finish(run)
                else:
                    failed |= dict.fromkeys(batch, future.exception())
                bar.update(len(batch))
                counts = Counter(run.status for run in runs.values())
                counts |= {"failed": len(failed)} if failed else {}
                bar.set_postfix(running=running(waiting, n_workers), **counts)
    report(failed, len(configs))
    return pd.concat([tabulate(runs[config]) for config in configs], ignore_index=True)


def running(waiting: dict, n_workers: int) -> int:
    """How many runs are being made: workers take the batches in their order."""
    return sum(len(batch) for batch in list(waiting.values())[:n_workers])


def run_here(
    configs: Iterable[RunConfig],
    out: str | Path = "runs",
    runs_per_batch: int = 1,
    *,
    device: str = "cpu",
    minutes: float = math.inf,
    root: str | Path | None = None,
    progress: bool = True,
    on_finish: Callable[[Run], None] | None = None,
) -> None:
    """Make many runs in this process, one batch after another: on one GPU, or for so many minutes.

    When the minutes are over the runs under way are left with a checkpoint; the same call later
    goes on from there. Dask is not needed. Errors are treated as by `run_all`.
    """
    configs = checked_configs(configs, out, root, runs_per_batch, on_finish)
    if isinstance(minutes, bool) or not isinstance(minutes, int | float):
        raise TypeError(f"minutes={minutes!r}: must be a number")
    if not minutes >= 0:
        raise ValueError(f"minutes={minutes!r}: must be at least 0")
    deadline, failed, waiting = time.monotonic() + 60 * minutes, {}, []
    on_cpu = as_device(device).type == "cpu"
    every = CHECKPOINT_EVERY if on_cpu else CHECKPOINT_EVERY_ON_GPU
    for config in configs:
        if not (Path(out) / config.id / "result.json").exists():
            waiting.append(config)
        elif on_finish is not None:
            on_finish(train(config, out, device=device))
    for number, batch in enumerate(batches := batches_of(waiting, runs_per_batch, 1), 1):
        if progress:
            print(f"batch {number} of {len(batches)}: {len(batch)} runs", flush=True)
        try:
            runs = train_together(
                *(batch, out),
                **{"root": root, "device": device, "checkpoint_every": every},
                **{"deadline": deadline, "progress": progress},
            )
        except Exception as error:
            error.__context__ = error.__cause__ = None  # with what they hold of the device's memory
            failed |= dict.fromkeys(batch, error.with_traceback(None))
            continue
        if on_finish is not None:
            for run in runs:
                on_finish(run)
        if time.monotonic() > deadline:
            break
    report(failed, len(configs))


def report(failed: dict[RunConfig, Exception], n_runs: int) -> None:
    if failed:
        lines = "\n".join(f"{config}: {error!r}" for config, error in failed.items())
        raise RuntimeError(f"{len(failed)} of {n_runs} runs failed:\n{lines}")


def checked_configs(configs, out, root, runs_per_batch, on_finish) -> list[RunConfig]:
    """The configs, each once; TypeError or ValueError for what `run_all` cannot take."""
    if isinstance(configs, RunConfig) or not isinstance(configs, Iterable):
        raise TypeError(f"configs must be a list of amaml.RunConfig, not {configs!r}")
    configs = list(configs)
    for config in configs:
        if not isinstance(config, RunConfig):
            raise TypeError(f"configs must be amaml.RunConfig, one is {type(config).__name__}")
    if not configs:
        raise ValueError("configs is empty: give at least one RunConfig")
    for name, folder in (("out", out), ("root", root)):
        if not isinstance(folder, str | Path) and not (name == "root" and folder is None):
            raise TypeError(f"{name}={folder!r}: must be the path of a folder")
    if isinstance(runs_per_batch, bool) or not isinstance(runs_per_batch, int):
        raise TypeError(f"runs_per_batch must be a whole number, not {runs_per_batch!r}")
    if runs_per_batch < 1:
        raise ValueError(f"runs_per_batch={runs_per_batch}: must be at least 1")
    if on_finish is not None and not callable(on_finish):
        raise TypeError(f"on_finish={on_finish!r}: must be a function of a Run")
    return list(dict.fromkeys(configs))


def batches_of(
    configs: list[RunConfig], runs_per_batch: int, n_workers: int
) -> list[list[RunConfig]]:
    """Configs of one shape in batches of at most `runs_per_batch`, no worker without one."""
    alike: dict[RunConfig, list[RunConfig]] = {}
    for config in configs:
        alike.setdefault(shape(config), []).append(config)
    batches = []
    for group in alike.values():
        size = min(runs_per_batch, -(-len(group) // n_workers))
        batches += [group[i : i + size] for i in range(0, len(group), size)]
    return batches


def train_batch(configs: list[RunConfig], out: str, root) -> list[Run]:
    """Runs in a worker process, with one thread: as many batches as cores go at a time."""
    torch.set_num_threads(1)
    if len(configs) == 1:
        return [train(configs[0], out, root=root, progress=False)]
    return train_together(configs, out, root=root)


@contextmanager
def workers(client, n_runs: int):
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


def tabulate(run: Run, labels: dict | None = None) -> pd.DataFrame:
    """A run's metrics with its id, labels, config and status in every row.

    The config's starting rates are the columns alpha_0 and beta_0; alpha and beta are the rates
    of each iteration.
    """
    starts = {"alpha": "alpha_0", "beta": "beta_0"}
    config = {starts.get(name, name): value for name, value in asdict(run.config).items()}
    if config["threshold"] is None:
        config["threshold"] = float("nan")  # as it is read back from a table
    columns = {"run": run.id, **(labels or {}), **config, "status": run.status}
    return pd.concat(
        [pd.DataFrame([columns] * len(run.metrics)), run.metrics.reset_index(drop=True)], axis=1
    )


def figure_records(
    figure: str,
    profile: str,
    *,
    retrain: bool = False,
    out: str | Path = records.PROJECT / "runs",
    folder: str | Path = records.RECORDS,
    client=None,
    root: str | Path | None = None,
    device: str = "cpu",
    minutes: float | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """The table that a figure is drawn from: its published records, after training what is missing.

    Runs are published to `folder` as they finish, in the place of older records of the same runs.
    With `retrain` the published records are not taken for granted; runs that are finished or under
    way in `out` still are (remove their folders to make them from nothing). With a `device` other
    than the CPU or with `minutes` the runs are made in this process, see `run_here`, and the table
    holds those that are finished when the minutes are over. RuntimeError where a profile for a GPU
    would be trained on a CPU without `minutes`.
    """
    labelled = experiments.runs_of(figure, profile)
    labels = {config.id: label for label, config in labelled}
    table, _ = records.read_records(figure, profile, folder)
    table = table[table["run"].isin(labels)]
    finished = set(table["run"])

    waiting, written = [], time.monotonic()

    def publish() -> None:
        nonlocal table, written
        finished = [
            (
                records.thin(tabulate(run, labels[run.id]), experiments.points(figure)),
                files.read_json(Path(out) / run.id / "result.json"),
            )
            for run in waiting
        ]
        table = records.publish_runs(figure, profile, finished, list(labels), folder)
        waiting.clear()
        written = time.monotonic()

    def finish(run: Run) -> None:
        waiting.append(run)
        if time.monotonic() - written > PUBLISH_EVERY:
            publish()

    missing = [config for _, config in labelled if retrain or config.id not in finished]
    if missing and profile in experiments.MADE_ON_GPU and device == "cpu" and minutes is None:
        raise RuntimeError(
            f"{len(missing)} of the {len(labelled)} runs of {figure}, profile {profile}, have no "
            "records and would take a CPU days; make them on a GPU with `python -m amaml.sweep "
            f"--figure {figure} --profile {profile} --device cuda --out FOLDER`, or say with "
            "--minutes how long a CPU is to work on them"
        )
    if missing:
        try:
            size = experiments.RUNS_PER_BATCH[profile]
            common = {"root": root, "progress": progress, "on_finish": finish}
            if device == "cpu" and minutes is None:
                run_all(missing, out, client, size, **common)
            else:
                limit = math.inf if minutes is None else minutes
                run_here(missing, out, size, device=device, minutes=limit, **common)
        finally:
            if waiting:
                publish()
    return table.reset_index(drop=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m amaml.sweep", description=__doc__)
    parser.add_argument("--figure", required=True, choices=list(experiments.FIGURES))
    parser.add_argument("--profile", required=True, choices=list(experiments.PROFILES))
    parser.add_argument(
        "--out", default=records.PROJECT / "runs", help="folder of the runs (default: runs)"
    )
    parser.add_argument("--data", default=None, help="folder of Omniglot (default: $AMAML_DATA)")
    parser.add_argument("--retrain", action="store_true", help="replace the published records")
    parser.add_argument(
        "--records", default=records.RECORDS, help="folder to publish to (default: figures/records)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: one GPU, no Dask")
    parser.add_argument(
        "--minutes", type=float, help="stop after so long, to be called again; no Dask"
    )
    parser.add_argument(
        "--tf32", action="store_true", help="products of float32 in TF32 on a GPU: faster, rougher"
    )
    given = parser.parse_args(arguments)
    if given.tf32:
        torch.set_float32_matmul_precision("high")
    table = figure_records(
        *(given.figure, given.profile),
        **{"retrain": given.retrain, "out": given.out, "folder": given.records},
        **{"root": given.data, "device": given.device, "minutes": given.minutes},
    )
    n_runs = len(experiments.runs_of(given.figure, given.profile))
    print(f"{given.figure}, {given.profile}: {table['run'].nunique()} of {n_runs} runs published")


if __name__ == "__main__":
    main()
