"""Many runs: on this machine's cores or over a Dask cluster, and the records of a whole figure.

`python -m amaml.sweep --figure figure_1 --profile medium` trains what is missing of a figure.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from amaml import experiments, records
from amaml.config import RunConfig
from amaml.training import Run, train

PUBLISH_EVERY = 20  # seconds between two publications: each writes the whole table
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), 1)


def run_all(
    configs: Iterable[RunConfig],
    out: str | Path = "runs",
    client=None,
    *,
    root: str | Path | None = None,
    progress: bool = True,
    on_finish: Callable[[Run], None] | None = None,
) -> pd.DataFrame:
    """Make many runs and return one tidy table: a row an iteration, the config's fields beside.

    Finished runs are read and not made again, unfinished ones resume: a sweep that was killed is
    simply called again. `client` is a `dask.distributed.Client`; None starts workers on this
    machine, one a core with one torch thread each. `on_finish(run)` is called for each run as it
    finishes. A run that fails with an error does not stop the others: a RuntimeError at the end
    lists those that failed, with their configs.
    """
    if isinstance(configs, RunConfig) or not isinstance(configs, Iterable):
        raise TypeError(f"configs must be a list of amaml.RunConfig, not {configs!r}")
    configs = list(configs)
    for config in configs:
        if not isinstance(config, RunConfig):
            raise TypeError(f"configs must be amaml.RunConfig, one is {type(config).__name__}")
    configs = list(dict.fromkeys(configs))
    if not configs:
        raise ValueError("configs is empty: give at least one RunConfig")
    for name, folder in (("out", out), ("root", root)):
        if not isinstance(folder, str | Path) and not (name == "root" and folder is None):
            raise TypeError(f"{name}={folder!r}: must be the path of a folder")
    if client is not None and not callable(getattr(client, "submit", None)):
        raise TypeError(
            f"client={client!r}: must be a dask.distributed.Client, such as Client(address)"
        )
    if on_finish is not None and not callable(on_finish):
        raise TypeError(f"on_finish={on_finish!r}: must be a function of a Run")
    runs, failed = {}, {}
    with workers(client, len(configs)) as client:
        from distributed import as_completed

        futures = {
            client.submit(train_alone, config, str(Path(out).absolute()), root, pure=False): config
            for config in configs
        }
        bar = tqdm(total=len(configs), unit="run", file=sys.stdout, disable=not progress)
        with bar:
            for future in as_completed(futures):
                config = futures[future]
                if future.status == "finished":
                    runs[config] = future.result()
                    if on_finish is not None:
                        on_finish(runs[config])
                else:
                    failed[config] = future.exception()
                bar.update()
                statuses = pd.Series([run.status for run in runs.values()], dtype=str)
                counts = statuses.value_counts().to_dict()
                bar.set_postfix(counts | ({"failed": len(failed)} if failed else {}))
    if failed:
        lines = "\n".join(f"{config}: {error!r}" for config, error in failed.items())
        raise RuntimeError(f"{len(failed)} of {len(configs)} runs failed:\n{lines}")
    return pd.concat([tabulate(runs[config]) for config in configs], ignore_index=True)


def train_alone(config: RunConfig, out: str, root) -> Run:
    """One run in a worker process, with one thread: as many runs as cores go at a time."""
    torch.set_num_threads(1)
    return train(config, out, root=root, progress=False)


@contextmanager
def workers(client, n_runs: int):
    """The client that was given, or one of a local cluster that ends with the sweep."""
    if client is not None:
        yield client
        return
    import dask
    from dask.system import CPU_COUNT
    from distributed import Client, LocalCluster

    # Dask tells malloc to hand freed memory back at once; a training step takes the same memory
    # again, and then spends more than half of its time on page faults.
    keep = {"MALLOC_TRIM_THRESHOLD_": 1 << 30, "MALLOC_MMAP_THRESHOLD_": 1 << 30}
    n_workers = max(1, min(CPU_COUNT, n_runs))
    with (
        dask.config.set({"distributed.nanny.pre-spawn-environ": keep | ONE_THREAD}),
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
    progress: bool = True,
) -> pd.DataFrame:
    """The table that a figure is drawn from: its published records, after training what is missing.

    Runs are published to `folder` as they finish, in the place of older records of the same runs.
    With `retrain` the published records are not taken for granted; runs that are finished or under
    way in `out` still are (remove their folders to make them from nothing).
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
                records.read_json(Path(out) / run.id / "result.json"),
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
    if missing:
        try:
            run_all(missing, out, client, root=root, progress=progress, on_finish=finish)
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
    given = parser.parse_args(arguments)
    figure_records(
        given.figure, given.profile, retrain=given.retrain, out=given.out, root=given.data
    )


if __name__ == "__main__":
    main()
