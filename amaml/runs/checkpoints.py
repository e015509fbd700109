"""A run's folder: what is written while it is made, and read to resume it.

It holds `config.json`, `metrics.csv` (a row an iteration, appended as they come),
`checkpoint.safetensors` (replaced as a whole), and, once the run has ended, `result.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pandas as pd
import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from amaml.runs.files import (
    ANEW,
    LAYOUT,
    check_layout,
    checksum,
    damaged,
    missing,
    read_table,
    write_atomically,
    writing,
)


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
