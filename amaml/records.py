"""Reading and writing of runs, and of the tables that the figures are drawn from.

A run's folder holds `config.json`, `metrics.csv` (a row an iteration, appended as they come),
`checkpoint.safetensors` (replaced as a whole), and, once the run has ended, `result.json`. What a
figure needs is published to `figures/records/<figure>-<profile>.csv.gz`, with a header
`<figure>-<profile>.json` that says which commit, libraries and machine made which runs.

Every file is verified by a SHA-256 when it is read: a json file and a checkpoint hold their own,
the checkpoint holds that of the metrics up to it, a header that of its table. What is damaged, or
of another layout, is refused by name. Files are replaced as a whole and reach the disk before
anything relies on them, so a power cut leaves the old one or the new one.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import math
import os
import platform
import subprocess
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pandas as pd
import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

LAYOUT = 2  # of all these files; another number is refused by name
PROJECT = Path(__file__).resolve().parents[1]
RECORDS = PROJECT / "figures" / "records"
# What to do about a file that cannot be read
ANEW = "remove the run's folder to start the run anew"
TRAIN_AGAIN = "remove it and the .csv.gz or .json beside it and train again"


@contextmanager
def lock(folder: str | Path) -> Iterator[None]:
    """Keep a folder to this process (and thread): another that asks for it waits, and says so.

    The folder is made where it is missing. The operating system lets go of the lock when the
    process ends, however it ends. Where there are no such locks a warning says so.
    """
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("ab")
    with file:
        try:
            if fcntl is None:
                raise OSError(errno.ENOTSUP, "this system has no fcntl")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process that works in {folder}", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            warnings.warn(
                f"{folder} cannot be locked ({error.strerror}): see to it that no two processes "
                "work in it at the same time",
                stacklevel=3,
            )
        try:
            yield
        finally:
            if fcntl is not None:  # by name: a forked child would hold on to it
                fcntl.flock(file, fcntl.LOCK_UN)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say which file cannot be written, and what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot be written ({error.strerror}); make room there, or give another out (or "
            "folder) that can be written",
            str(path),
        ) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file as a whole: a reader, a kill or a power cut finds the old one or the new one.

    For one process at a time (see `lock`), so that what a kill leaves behind is one .part file,
    which the next call replaces.
    """
    part = path.with_name(f"{path.name}.part")
    with writing(path):
        try:
            with part.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except OSError:
            part.unlink(missing_ok=True)
            raise
        if os.name == "posix":  # the new name is the folder's content
            handle = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def write_json(path: Path, content: dict) -> None:
    """Write a dict with text keys, the layout and a checksum beside them."""
    content = {"layout": LAYOUT, **content}
    content["sha256"] = checksum(content)
    write_atomically(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: Path, remedy: str = ANEW) -> dict:
    """What `write_json` wrote.

    FileNotFoundError where it is not there, ValueError where it is damaged or of another layout.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it does not hold names and values")
    except FileNotFoundError as error:
        raise missing(path, remedy) from error
    except ValueError as error:
        raise damaged(path, error, remedy) from error
    check_layout(path, content.get("layout"), remedy)
    if content.pop("sha256", None) != checksum(content):
        raise damaged(path, "its content does not give its checksum", remedy)
    del content["layout"]
    return content


def checksum(content: dict | bytes) -> str:
    if isinstance(content, dict):
        content = json.dumps(content, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


def missing(path: Path, remedy: str) -> FileNotFoundError:
    return FileNotFoundError(
        errno.ENOENT, f"is missing; restore it from a copy, or {remedy}", str(path)
    )


def damaged(path: Path, why: object, remedy: str) -> ValueError:
    return ValueError(f"{path} is damaged ({why}); restore it from a copy, or {remedy}")


def check_layout(path: Path, layout: object, remedy: str) -> None:
    if layout != LAYOUT:
        raise ValueError(
            f"{path} has layout {layout}, this version reads {LAYOUT}; use the version of amaml "
            f"that wrote it, or {remedy}"
        )


# -- the metrics of a run ---------------------------------------------------------------------


def append_metrics(path: Path, rows: pd.DataFrame) -> None:
    """Append rows to a run's metrics; numbers are written so that they read back bit for bit."""
    with writing(path), path.open("a", encoding="utf-8", newline="") as file:
        rows.to_csv(file, index=False, header=file.tell() == 0)


def read_metrics(path: Path) -> pd.DataFrame:
    """A run's metrics up to its checkpoint, which vouches for them.

    What came after it, whole rows or one torn by a kill, is left out. ValueError where something
    before it is missing or altered.
    """
    content = vouched_metrics(path)
    if not content:
        return pd.DataFrame({"iteration": pd.Series(dtype="int64")})
    return read_table(content.decode())


def truncate_metrics(path: Path) -> None:
    """Cut the metrics back to the checkpoint, so that the iterations after it are not there twice.

    Raises as `read_metrics` does.
    """
    size = len(vouched_metrics(path))
    if path.exists():
        with writing(path):
            os.truncate(path, size)


def vouched_metrics(path: Path) -> bytes:
    """The part of the metrics that the checkpoint beside them vouches for."""
    checkpoint = path.with_name("checkpoint.safetensors")
    if not checkpoint.exists():
        return b""
    metadata = open_checkpoint(checkpoint)[1]
    size, expected = json.loads(metadata["metrics"])
    content = path.read_bytes()[:size] if path.exists() else b""
    if len(content) < size:
        rows = max(0, content.count(b"\n") - 1)  # the first line names the columns
        raise ValueError(
            f"{path} holds {rows} of the {metadata['iteration']} iterations before the checkpoint; "
            f"restore it from a copy, or {ANEW}"
        )
    if checksum(content) != expected:
        raise damaged(path, "it does not give the checksum in the checkpoint", ANEW)
    return content


def read_table(text: str) -> pd.DataFrame:
    """A table from CSV, numbers bit for bit: newer versions of pandas do that without asking.

    Empty fields are NaN; the ids of runs stay text also where they could be numbers.
    """
    exactly = (
        {} if int(pd.__version__.partition(".")[0]) >= 3 else {"float_precision": "round_trip"}
    )
    kept = {"dtype": {"run": str}, "keep_default_na": False, "na_values": [""]}
    return pd.read_csv(io.StringIO(text), **kept, **exactly)


# -- checkpoints --------------------------------------------------------------------------------


def save_checkpoint(path: Path, tensors: dict, iteration: int, seconds: float) -> None:
    """Write a nested dict of tensors after `iteration` iterations and `seconds` of work.

    It vouches for the `metrics.csv` beside it as that is now, and brings it to the disk first.
    """
    flat = flatten(tensors)
    metrics = b""
    if path.with_name("metrics.csv").exists():
        with path.with_name("metrics.csv").open("rb") as file:
            os.fsync(file.fileno())
            metrics = file.read()
    metadata = {
        "layout": str(LAYOUT),
        "iteration": str(iteration),
        "seconds": repr(seconds),
        "order": json.dumps(list(flat)),  # sums over parameters depend on it in their last bits
        "metrics": json.dumps([len(metrics), checksum(metrics)]),
    }
    metadata["sha256"] = checkpoint_sum(flat, metadata)
    write_atomically(path, save(flat, metadata))


def load_checkpoint(path: Path, device="cpu") -> tuple[dict, int, float]:
    """What `save_checkpoint` wrote: (nested dict of tensors, iteration, seconds).

    FileNotFoundError where it is not there, ValueError where it is damaged or of another layout.
    """
    flat, metadata = open_checkpoint(path, device)
    return unflatten(flat), int(metadata["iteration"]), float(metadata["seconds"])


def open_checkpoint(path: Path, device="cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """A checkpoint's tensors and metadata, verified."""
    try:
        with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            flat = {key: file.get_tensor(key) for key in json.loads(metadata.get("order", "[]"))}
    except FileNotFoundError as error:
        raise missing(path, ANEW) from error
    except (safetensors.SafetensorError, ValueError) as error:
        raise damaged(path, error, ANEW) from error
    layout = metadata.get("layout", "")
    check_layout(path, int(layout) if layout.isdigit() else layout, ANEW)
    if metadata.pop("sha256", None) != checkpoint_sum(flat, metadata):
        raise damaged(path, "its content does not give its checksum", ANEW)
    return flat, metadata


def checkpoint_sum(flat: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, value in flat.items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


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
        "float32_products": torch.get_float32_matmul_precision(),  # "highest", or "high": TF32
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
