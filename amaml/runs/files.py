"""Files that are whole and true: written in one step, verified when they are read, locked.

Every file of a run and of the records is verified by a SHA-256 when it is read: a json file and a
checkpoint hold their own, the checkpoint holds that of the metrics up to it, a header that of its
table. What is damaged, or of another layout, is refused by name. Files are replaced as a whole and
reach the disk before anything relies on them, so a power cut leaves the old one or the new one.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

LAYOUT = 2  # of all these files; another number is refused by name
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


def read_table(text: str) -> pd.DataFrame:
    """A table from CSV, numbers bit for bit: newer versions of pandas do that without asking.

    Empty fields are NaN; the ids of runs stay text also where they could be numbers.
    """
    exactly = (
        {} if int(pd.__version__.partition(".")[0]) >= 3 else {"float_precision": "round_trip"}
    )
    kept = {"dtype": {"run": str}, "keep_default_na": False, "na_values": [""]}
    return pd.read_csv(io.StringIO(text), **kept, **exactly)
