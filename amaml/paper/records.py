"""The published tables that the figures are drawn from.

What a figure needs is published to `figures/records/<figure>-<profile>.csv.gz`, with a header
`<figure>-<profile>.json` that says which commit, libraries and machine made which runs.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from amaml.runs.files import (
    TRAIN_AGAIN,
    checksum,
    damaged,
    lock,
    read_json,
    read_table,
    write_atomically,
    write_json,
    writing,
)

PROJECT = Path(__file__).resolve().parents[2]
RECORDS = PROJECT / "figures" / "records"


def thin(metrics: pd.DataFrame, points: int) -> pd.DataFrame:
    """At most about `points` rows of a run: evenly spaced ones, the first, the last, and all that
    hold a validation (of which there must be few: they are what figures are judged by)."""
    stride = max(1, -(-len(metrics) // points))
    iteration = metrics["iteration"]
    kept = (iteration % stride == 0) | iteration.isin([iteration.min(), iteration.max()])
    return metrics[kept | metrics["validation_loss"].notna()]


def final_validation(table: pd.DataFrame, window: int = 100) -> pd.DataFrame:
    """A row a run: its last `window` iterations in one number each.

    The columns that are constant within a run (labels, config, status), and `validation_loss` and
    `validation_accuracy` as means over the validations in the window; `alpha` and `beta` are those
    of the last iteration. The loss of a run that diverged is infinite.
    """
    ends = table.groupby("run", sort=False)["iteration"].transform("max")
    last = table[table["iteration"] > ends - window].groupby("run", sort=False)
    summary = last.first()
    means = last[["validation_loss", "validation_accuracy"]].mean()
    means.loc[summary["status"] == "diverged", "validation_loss"] = math.inf
    return summary.assign(**means, alpha=last["alpha"].last(), beta=last["beta"].last())


def publish_runs(
    figure: str,
    profile: str,
    finished: Sequence[tuple[pd.DataFrame, dict]],
    order: Sequence[str],
    folder: str | Path = RECORDS,
) -> pd.DataFrame:
    """Enter runs into a figure's records, in the place of older records of the same runs.

    `finished` holds for each run its part of the table, its id in the column `run`, and its
    result.json: what made it and the seconds it took. `order` lists the ids of all runs of the
    figure: the table is sorted by it, and runs that are no longer in it are dropped. Records are
    read again under a lock first, so that what other processes publish meanwhile is not lost.
    Returns the figure's table.
    """
    places = {run: place for place, run in enumerate(order)}
    results = {rows["run"].iloc[0]: result for rows, result in finished}
    with lock(folder):
        table, made_by = read_records(figure, profile, folder)
        kept = table[table["run"].isin(order) & ~table["run"].isin(results)]
        parts = [part for part in (kept, *(rows for rows, _ in finished)) if len(part)]
        table = pd.concat(parts, ignore_index=True)
        table = table.sort_values("run", key=lambda runs: runs.map(places), kind="stable")
        for batch in made_by:
            batch["runs"] = {run: s for run, s in batch["runs"].items() if run in set(kept["run"])}
        for run, result in results.items():
            enter(made_by, run, result)
        made_by = [batch for batch in made_by if batch["runs"]]
        write_records(figure, profile, table, made_by, folder)
    return table.reset_index(drop=True)


def enter(made_by: list[dict], run: str, result: dict) -> None:
    """Enter a run and the seconds it took into the header, under what made it."""
    told = ("commit", "clean", "versions", "machine", "threads", "float32_products")
    maker = {key: result[key] for key in told if key in result}
    for batch in made_by:
        if {key: value for key, value in batch.items() if key != "runs"} == maker:
            batch["runs"][run] = result["seconds"]
            return
    made_by.append(maker | {"runs": {run: result["seconds"]}})


def write_records(
    figure: str, profile: str, table: pd.DataFrame, made_by: list[dict], folder=RECORDS
) -> Path:
    """Publish a figure's table (a row a logged iteration) and its header; returns the table's path.

    `made_by` lists what made which runs (see `provenance`), with the seconds that each took. For
    one process at a time: see `publish_runs`. Of the two files one is replaced before the other;
    in between the header describes both tables, so that a kill loses neither.
    """
    path = Path(folder) / f"{figure}-{profile}.csv.gz"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    content = gzip.compress(table.to_csv(index=False).encode(), mtime=0)
    header = {"figure": figure, "profile": profile, "made_by": made_by}
    header["table_sha256"] = checksum(content)
    before = {}
    if path.exists():
        _, described = verified_records(path)
        before = {"before": {key: described[key] for key in ("made_by", "table_sha256")}}
    write_json(header_path(path), header | before)
    write_atomically(path, content)
    if before:
        write_json(header_path(path), header)
    return path


def read_records(
    figure: str, profile: str, folder: str | Path = RECORDS
) -> tuple[pd.DataFrame, list[dict]]:
    """A figure's table and who made it; both empty where nothing has been published yet.

    ValueError where they are damaged or of another layout.
    """
    path = Path(folder) / f"{figure}-{profile}.csv.gz"
    if not path.exists():
        return pd.DataFrame({"run": pd.Series(dtype=str)}), []
    content, header = verified_records(path)
    return read_table(gzip.decompress(content).decode()), header["made_by"]


def verified_records(path: Path) -> tuple[bytes, dict]:
    """The bytes of a table and what its header says of them; needs no lock."""
    while True:
        header, content = read_json(header_path(path), TRAIN_AGAIN), path.read_bytes()
        if f"{header['figure']}-{header['profile']}.csv.gz" != path.name:
            raise damaged(path, f"it is {header['figure']}, {header['profile']}", TRAIN_AGAIN)
        for described in (header, header.get("before", {})):
            if described.get("table_sha256") == checksum(content):
                return content, described
        if read_json(header_path(path), TRAIN_AGAIN) == header:  # else it has just been replaced
            raise damaged(path, "it does not give the checksum in its header", TRAIN_AGAIN)


def header_path(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".csv.gz") + ".json")
