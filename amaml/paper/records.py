"""The published tables that the figures are drawn from.

What a figure needs stands in `figures/records/<figure>-<profile>.csv.gz`, which anyone reads with
`pandas.read_csv(path, comment="#")`. Its first line is a comment with a header as JSON: figure,
profile, a SHA-256 of the rows, and which commit, libraries and machine made which runs.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import time
import zlib
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import pandas as pd

from amaml.config import NUMERICS
from amaml.paper import experiments, settings
from amaml.paper.experiments import PlannedRun
from amaml.runs.parts import run_id
from amaml.runs.run import load_run
from amaml.runs.store import NAME, lock, write_atomically
from amaml.sweep import run_all, tabulate
from amaml.training import Run

CHECKOUT = Path(__file__).resolve().parents[2]
PROJECT = CHECKOUT if (CHECKOUT / "figures").is_dir() else Path.cwd()  # installed: what is at hand
RECORDS = PROJECT / "figures" / "records"
PUBLISH_EVERY = 60  # seconds between two publications: each writes the whole table
TOLD = ("commit", "clean", "numerics", "versions", "machine", "threads", "float32_products")
REMEDY = "restore it from a copy, or remove it and train again"


def figure_records(
    figure: str,
    profile: str,
    *,
    retrain: bool = False,
    out: str | Path = PROJECT / "runs",
    folder: str | Path = RECORDS,
    client=None,
    root: str | Path | None = None,
    device: str = "cpu",
    minutes: float | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """A figure's published records, after training what is missing.

    Runs are published as they finish, in the place of older records of the same runs; of the
    figures in `settings.LONG` also what is under way as this ends, with the status "running".
    Records of another version of the numerics are not mixed with them: their runs count as
    missing, and they go as the first new run comes.

    Args:
        figure: a name in `experiments.FIGURES`.
        profile: "quick", "medium" or "paper".
        retrain: do not take the published records for granted; runs that are finished or under way
            in `out` still are (remove their folders to make them from nothing).
        out: folder of the runs.
        folder: where the records are.
        client, root, device, minutes, progress: see `run_all`.

    Raises:
        RuntimeError: where a profile for a GPU would be trained on a CPU without `minutes`.
    """
    if not isinstance(retrain, bool):
        raise TypeError(f"retrain={retrain!r}: must be True or False")
    planned = experiments.runs_of(figure, profile)
    labels = {run_id(plan.config, plan.parts): plan.labels for plan in planned}
    table, made_by = read_records(figure, profile, folder)
    table = table[table["run"].isin(present_runs(made_by) & set(labels))]
    present = set() if retrain else set(finished(table)["run"])
    missing = [plan for plan in planned if run_id(plan.config, plan.parts) not in present]
    if missing and profile in settings.MADE_ON_GPU and device == "cpu" and minutes is None:
        raise RuntimeError(
            f"{len(missing)} of the {len(planned)} runs of {figure}, profile {profile}, have no "
            "records and would take a CPU days; make them on a GPU with `python -m amaml.paper "
            f"--figure {figure} --profile {profile} --device cuda --out FOLDER`, or say with "
            "--minutes how long a CPU is to work on them"
        )
    waiting: list[Run] = []
    begun = written = time.monotonic()

    def publish() -> None:
        nonlocal table, written
        rows = experiments.max_rows(figure)
        tables = [shorten(subsample(tabulate(run, labels[run.id]), rows)) for run in waiting]
        table = publish_runs(figure, profile, waiting, tables, list(labels), folder)
        waiting.clear()
        written = time.monotonic()

    def finish(run: Run) -> None:
        waiting.append(run)
        if time.monotonic() - written > PUBLISH_EVERY:
            publish()

    try:
        for parts, plans in groupby(missing, key=lambda plan: plan.parts):
            left = minutes and max(minutes - (time.monotonic() - begun) / 60, 0)
            run_all(
                [plan.config for plan in plans],
                out,
                client,
                settings.RUNS_PER_BATCH[profile],
                device=device,
                minutes=left,
                root=root,
                progress=progress,
                on_finish=finish,
                name=parts,
                **(experiments.PARTS[parts] if parts else {}),
            )
    finally:
        if figure in settings.LONG:
            waiting += under_way(missing, out)
        if waiting:
            publish()
    return table.reset_index(drop=True)


def load(figure: str, profile: str, retrain: bool = False) -> pd.DataFrame:
    """The table that a chapter draws a figure from.

    Profile "quick" trains what is missing first. The others' records are committed, finished or
    under way, and are taken as they are, unless `retrain` says to make them again.

    Raises:
        FileNotFoundError: where a profile has no records of the figure.
    """
    if profile == "quick" or retrain:
        return figure_records(figure, profile, retrain=retrain)
    table, _ = read_records(figure, profile)
    if table.empty:
        raise FileNotFoundError(
            f"{figure} has no records of profile {profile}; make them with "
            f"`python -m amaml.paper --figure {figure} --profile {profile}`"
        )
    return table


def finished(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of runs that are not under way."""
    return table if table.empty else table[table["status"] != "running"]


def under_way(plans: Sequence[PlannedRun], out: str | Path) -> list[Run]:
    """The runs that are under way in `out`."""
    folders = [Path(out) / run_id(plan.config, plan.parts) for plan in plans]
    runs = [load_run(folder) for folder in folders if (folder / NAME).exists()]
    return [run for run in runs if run.status == "running"]


def present_runs(made_by: list[dict]) -> set[str]:
    """The runs that were made by the present version of the numerics."""
    return {run for batch in made_by if batch["numerics"] == NUMERICS for run in batch["runs"]}


def subsample(metrics: pd.DataFrame, max_rows: int) -> pd.DataFrame:
    """At most about `max_rows` rows of a run: evenly spaced ones, the first, the last, and all that
    hold a validation (of which there must be few: they are what figures are judged by)."""
    stride = max(1, -(-len(metrics) // max_rows))
    iteration = metrics["iteration"]
    kept = (iteration % stride == 0) | iteration.isin([iteration.min(), iteration.max()])
    return metrics[kept | metrics["validation_loss"].notna()]


def shorten(table: pd.DataFrame) -> pd.DataFrame:
    """The same numbers in as few digits as tell float32 numbers apart: a file a third smaller."""
    floats = table.select_dtypes("float")
    return table.assign(**{name: [float(f"{x:.9g}") for x in floats[name]] for name in floats})


def final_validation(table: pd.DataFrame, window: int = 100) -> pd.DataFrame:
    """One row per run: its last `window` iterations in one number each.

    Returns:
        The columns that are constant within a run (labels, config, status), the validation's
        metrics as means over the validations in the window, and the last `alpha` and `beta`. The
        loss of a run that diverged is infinite.
    """
    ends = table.groupby("run", sort=False)["iteration"].transform("max")
    last = table[table["iteration"] > ends - window].groupby("run", sort=False)
    summary = last.first()
    metrics = [name for name in table if name in ("validation_loss", "validation_accuracy")]
    means = last[metrics].mean()
    means.loc[summary["status"] == "diverged", "validation_loss"] = math.inf
    return summary.assign(**means, alpha=last["alpha"].last(), beta=last["beta"].last())


def publish_runs(
    figure: str,
    profile: str,
    runs: Sequence[Run],
    tables: Sequence[pd.DataFrame],
    order: Sequence[str],
    folder: str | Path = RECORDS,
) -> pd.DataFrame:
    """Enter runs, and the rows of each, into a figure's records; returns its table.

    Older records of these runs go, as do runs that are not in `order` (the ids of all runs of the
    figure, by which the table is sorted) and those of another version of the numerics. Records are
    read again under a lock, so that what other processes publish is not lost.
    """
    places = {run: place for place, run in enumerate(order)}
    new = {run.id for run in runs}
    with lock(folder):
        table, made_by = read_records(figure, profile, folder)
        kept = table[table["run"].isin(present_runs(made_by) & set(places) - new)]
        table = pd.concat([some for some in (kept, *tables) if len(some)], ignore_index=True)
        table = table.sort_values("run", key=lambda ids: ids.map(places), kind="stable")
        still = set(kept["run"])
        for batch in made_by:
            batch["runs"] = {run: s for run, s in batch["runs"].items() if run in still}
        for run in runs:
            add_to_header(made_by, run)
        made_by = [batch for batch in made_by if batch["runs"]]
        write_records(figure, profile, table, made_by, folder)
    return table.reset_index(drop=True)


def add_to_header(made_by: list[dict], run: Run) -> None:
    """Enter a run and the seconds it took, under what made it."""
    maker = {key: run.maker[key] for key in TOLD}
    for batch in made_by:
        if {key: batch.get(key) for key in TOLD} == maker:
            batch["runs"][run.id] = run.seconds
            return
    made_by.append(maker | {"runs": {run.id: run.seconds}})


def write_records(
    figure: str, profile: str, table: pd.DataFrame, made_by: list[dict], folder=RECORDS
) -> Path:
    """Publish a figure's table and what made which runs, with the seconds that each took."""
    path = Path(folder) / f"{figure}-{profile}.csv.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = table.to_csv(index=False)
    digest = hashlib.sha256(rows.encode()).hexdigest()
    header = {"figure": figure, "profile": profile, "sha256": digest, "made_by": made_by}
    content = f"# {json.dumps(header)}\n{rows}"
    write_atomically(path, gzip.compress(content.encode(), mtime=0))
    return path


def read_records(
    figure: str, profile: str, folder: str | Path = RECORDS
) -> tuple[pd.DataFrame, list[dict]]:
    """A figure's table and who made it; both empty where nothing has been published yet.

    Raises:
        ValueError: where the file is damaged, of another figure, or of an older layout.
    """
    path = Path(folder) / f"{figure}-{profile}.csv.gz"
    if not path.exists():
        return pd.DataFrame({"run": pd.Series(dtype=str)}), []
    try:
        first, _, rows = gzip.decompress(path.read_bytes()).decode().partition("\n")
        if not first.startswith("# {"):
            raise ValueError("its first line is no header: an older layout")
        header = json.loads(first[2:])
        if (header["figure"], header["profile"]) != (figure, profile):
            raise ValueError(f"it is of {header['figure']}, {header['profile']}")
        if header["sha256"] != hashlib.sha256(rows.encode()).hexdigest():
            raise ValueError("its rows do not give its checksum")
        made_by = header["made_by"]
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); {REMEDY}") from error
    # Empty fields are NaN; the ids of runs stay text also where they could be numbers.
    kept = {"dtype": {"run": str}, "keep_default_na": False, "na_values": [""]}
    kept["low_memory"] = False  # one type per column, however long
    exact = {} if int(pd.__version__.partition(".")[0]) >= 3 else {"float_precision": "round_trip"}
    return pd.read_csv(io.StringIO(rows), **kept, **exact), made_by
