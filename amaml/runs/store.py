"""Atomic, checksummed, locked files; one file a run.

`run.safetensors` in a run's folder holds its state, generator and metrics, and as metadata its
config, status, what made it, and a SHA-256. It is replaced as a whole and reaches the disk first:
a kill or a power cut leaves the old one or the new one. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np
import pandas as pd
import safetensors
import torch
from filelock import FileLock, Timeout
from safetensors.torch import save
from torch import Tensor

NAME = "run.safetensors"
LAYOUT = 3  # of a run's file; another number is refused by name
OLDER = ("config.json", "metrics.csv", "checkpoint.safetensors", "result.json")  # of layout 2
REMEDY = "restore it from a copy, or remove the run's folder to start the run anew"


def write_run(folder: Path, tensors: dict, metrics: pd.DataFrame, about: dict) -> None:
    """Replace a run's file; the folder must be locked.

    `tensors` is a nested dict, `about` plain data for json; of `metrics`, which holds numbers
    alone, `iteration` comes back as int64 and all else as float64.
    """
    flat = flatten(tensors)
    # The order of the parameters: sums over them depend on it in their last bits.
    about = {**about, "layout": LAYOUT, "order": list(flat), "columns": list(metrics)}
    flat["metrics"] = torch.tensor(metrics.to_numpy(np.float64)).contiguous()
    text = json.dumps(about, sort_keys=True)
    content = save(flat, {"about": text, "sha256": checksum(flat, text)})
    write_atomically(folder / NAME, content)


def read_run(folder: Path, device="cpu") -> tuple[dict, pd.DataFrame, dict] | None:
    """Returns (tensors, metrics, about) as given to `write_run`; None where there is no run.

    Raises:
        ValueError: where the file is damaged, or of another layout.
    """
    path = folder / NAME
    if not path.exists():
        if any((folder / name).exists() for name in OLDER):
            raise ValueError(
                f"{folder} holds a run of another layout, this version reads {NAME}; give another "
                "out, or move the folder away"
            )
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            flat = {key: file.get_tensor(key) for key in file.keys()}
        text = metadata["about"]
        if metadata["sha256"] != checksum(flat, text):
            raise ValueError("its content does not give its checksum")
        about = json.loads(text)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); {REMEDY}") from error
    if about["layout"] != LAYOUT:
        raise ValueError(
            f"{path} has layout {about['layout']}, this version reads {LAYOUT}; use the version of "
            f"amaml that wrote it, or {REMEDY}"
        )
    metrics = pd.DataFrame(flat["metrics"].numpy().copy(), columns=about["columns"])
    # Copies, aligned anew: the last bits of products depend on it.
    tensors = {name: flat[name].to(device, copy=True) for name in about["order"]}
    return unflatten(tensors), metrics.astype({"iteration": np.int64}), about


def checksum(flat: dict[str, Tensor], text: str) -> str:
    return hashlib.sha256(save(flat) + text.encode()).hexdigest()


def flatten(nested: dict) -> dict[str, Tensor]:
    """{"theta": {"w": x}} as {"theta/w": x}, on the CPU; a slash within a key is quoted."""
    flat: dict[str, Tensor] = {}
    for key, value in nested.items():
        inner = flatten(value) if isinstance(value, dict) else {"": value.detach().cpu()}
        place = quote(key, safe="")
        flat |= {f"{place}/{path}".rstrip("/"): value.contiguous() for path, value in inner.items()}
    return flat


def unflatten(flat: dict[str, Tensor]) -> dict:
    """The inverse of `flatten`; an empty dict leaves no trace in it."""
    nested: dict = {}
    for path, value in flat.items():
        *parents, key = map(unquote, path.split("/"))
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[key] = value
    return nested


@contextmanager
def lock(folder: str | Path) -> Iterator[None]:
    """Keep a folder, made where it is missing, to this process: another one waits, and says so."""
    folder = Path(folder)
    held = FileLock(folder / ".lock")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        held.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process that works in {folder}", flush=True)
        held.acquire()
    except NotImplementedError:
        what = f"{folder} cannot be locked: let no two processes work in it at a time"
        warnings.warn(what, stacklevel=3)
    try:
        yield
    finally:
        held.release()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say which file cannot be written, and what to do."""
    try:
        yield
    except OSError as error:
        what = (
            f"cannot be written ({error.strerror}); make room there, or give another output folder"
        )
        raise OSError(error.errno, what, str(path)) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file as a whole: a reader, a kill or a power cut finds the old one or the new one.

    For one process at a time: what a kill leaves behind is one .part file, replaced next time.
    """
    part = path.with_name(f"{path.name}.part")
    with writing(path):
        try:
            with part.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        if os.name == "posix":  # the new name is the folder's content
            handle = os.open(path.parent, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
