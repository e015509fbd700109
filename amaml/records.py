"""Reading and writing of runs, and of the tables that the figures are drawn from.

A run's folder holds `config.json`, `metrics.csv` (a row an iteration, appended and flushed as they
come), `checkpoint.safetensors` (replaced as a whole), and, once the run has ended, `result.json`.
What a figure needs is published to `figures/records/<figure>-<profile>.csv.gz`, with a header
`<figure>-<profile>.json` that says which commit, libraries and machine made which runs.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pandas as pd
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

LAYOUT = 1  # of the records and checkpoints; another number is refused by name
PROJECT = Path(__file__).resolve().parents[1]
RECORDS = PROJECT / "figures" / "records"


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file as a whole: a reader, or a kill, sees the old one or the new one."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def write_json(path: Path, content: dict) -> None:
    write_atomically(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> dict:
    """A json file as a dict; ValueError with the file's name where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it and make it again") from error


# -- the metrics of a run ---------------------------------------------------------------------


def append_metrics(path: Path, rows: pd.DataFrame) -> None:
    """Append rows to a run's metrics; numbers are written so that they read back bit for bit."""
    with path.open("a", encoding="utf-8", newline="") as file:
        rows.to_csv(file, index=False, header=file.tell() == 0)
        file.flush()


def read_metrics(path: Path, last_iteration: int | None = None) -> pd.DataFrame:
    """A run's metrics up to `last_iteration`; a torn last line, as a kill leaves it, is dropped."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    complete = text[: text.rfind("\n") + 1]
    if not complete:
        return pd.DataFrame({"iteration": pd.Series(dtype="int64")})
    table = read_table(complete)
    return table if last_iteration is None else table[table["iteration"] <= last_iteration]


def read_table(text: str) -> pd.DataFrame:
    """A table from CSV, numbers bit for bit: newer versions of pandas do that without asking."""
    exactly = (
        {} if int(pd.__version__.partition(".")[0]) >= 3 else {"float_precision": "round_trip"}
    )
    return pd.read_csv(io.StringIO(text), **exactly)


def truncate_metrics(path: Path, last_iteration: int) -> None:
    """Cut the metrics back to a checkpoint, so that the iterations after it are not there twice.

    ValueError where rows before the checkpoint are missing.
    """
    kept = read_metrics(path, last_iteration)
    if len(kept) != last_iteration:
        raise ValueError(
            f"{path} holds {len(kept)} of the {last_iteration} iterations before the checkpoint; "
            "remove the run's folder to start the run anew"
        )
    text = kept.to_csv(index=False) if len(kept) else ""
    write_atomically(path, text.encode())


# -- checkpoints --------------------------------------------------------------------------------


def save_checkpoint(path: Path, tensors: dict, iteration: int, seconds: float) -> None:
    """Write a nested dict of tensors after `iteration` iterations and `seconds` of work."""
    flat = flatten(tensors)
    metadata = {
        "layout": str(LAYOUT),
        "iteration": str(iteration),
        "seconds": repr(seconds),
        "order": json.dumps(list(flat)),  # sums over parameters depend on it in their last bits
    }
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    save_file(flat, part, metadata)
    os.replace(part, path)


def load_checkpoint(path: Path, device="cpu") -> tuple[dict, int, float]:
    """What `save_checkpoint` wrote: (nested dict of tensors, iteration, seconds)."""
    try:
        with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            flat = {key: file.get_tensor(key) for key in json.loads(metadata.get("order", "[]"))}
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is damaged ({error}); remove the run's folder to start the run anew"
        ) from error
    if metadata.get("layout") != str(LAYOUT):
        raise ValueError(
            f"{path} has layout {metadata.get('layout')}, this version reads {LAYOUT}; remove the "
            "run's folder, or use the version of amaml that wrote it"
        )
    return unflatten(flat), int(metadata["iteration"]), float(metadata["seconds"])


def flatten(nested: dict, prefix: str = "") -> dict[str, Tensor]:
    """{"theta": {"w": x}} as {"theta/w": x}."""
    flat = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[prefix + key] = value.detach().contiguous()
    return flat


def unflatten(flat: dict[str, Tensor]) -> dict:
    """The inverse of `flatten`; an empty dict leaves no trace in it."""
    nested: dict = {}
    for path, value in flat.items():
        *parents, key = path.split("/")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[key] = value
    return nested


# -- the records of a figure --------------------------------------------------------------------


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


def write_records(
    figure: str, profile: str, table: pd.DataFrame, made_by: list[dict], folder=RECORDS
) -> Path:
    """Publish a figure's table (a row a logged iteration) and its header; returns the table's path.

    `made_by` lists what made which runs (see `provenance`), with the seconds that each took.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{figure}-{profile}.csv.gz"
    content = gzip.compress(table.to_csv(index=False).encode(), mtime=0)
    header = {"layout": LAYOUT, "figure": figure, "profile": profile, "made_by": made_by}
    write_json(folder / f"{figure}-{profile}.json", header)
    write_atomically(path, content)
    return path


def read_records(figure: str, profile: str, folder=RECORDS) -> tuple[pd.DataFrame, list[dict]]:
    """A figure's table and who made it; both empty where nothing has been published yet."""
    path = Path(folder) / f"{figure}-{profile}.csv.gz"
    if not path.exists():
        return pd.DataFrame({"run": pd.Series(dtype=str)}), []
    header = read_json(path.with_name(f"{figure}-{profile}.json"))
    if header.get("layout") != LAYOUT:
        raise ValueError(
            f"{path} has layout {header.get('layout')}, this version reads {LAYOUT}; draw it with "
            "the version of amaml that wrote it, or remove it and train again"
        )
    try:
        text = gzip.decompress(path.read_bytes()).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); restore it, or remove it and train again"
        ) from error
    return read_table(text), header["made_by"]


def provenance(device="cpu") -> dict:
    """What makes a run here and now: source commit, library versions, machine, threads."""
    packages = ("torch", "numpy", "pandas", "safetensors")
    return {
        **source_commit(),
        "versions": {"python": platform.python_version()} | {p: package(p) for p in packages},
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": processor(),
            "cores": os.cpu_count(),
            "device": torch.cuda.get_device_name(device) if "cuda" in str(device) else "cpu",
        },
        "threads": torch.get_num_threads(),
    }


def source_commit() -> dict:
    """The commit of the source tree and whether it was clean; None outside a git checkout."""

    def git(*words: str) -> str:
        folder = Path(__file__).resolve().parent
        answer = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
        )
        return answer.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "clean": not git("status", "--porcelain", ".")}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "clean": None}


def package(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's name as the operating system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
