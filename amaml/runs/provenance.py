"""What makes a run or a measurement: commit, versions, machine."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from amaml.config import NUMERICS


def environment(device="cpu") -> dict:
    """Source commit, version of the numerics, library versions, machine and threads."""
    libraries = ("torch", "numpy", "pandas", "safetensors")
    versions = {"python": platform.python_version()} | {n: package_version(n) for n in libraries}
    machine = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if "cuda" in str(device) else "cpu",
    }
    return source_commit() | {
        "numerics": NUMERICS,
        "versions": versions,
        "machine": machine,
        "threads": torch.get_num_threads(),
        "float32_products": torch.get_float32_matmul_precision(),  # "highest", or "high": TF32
    }


def continued(earlier: dict, now: dict) -> dict:
    """What makes a run that `earlier` began: `now`, with the commits of all that had a part."""
    if not earlier:
        return now
    commits = f"{earlier['commit'] or ''} {now['commit'] or ''}".split()
    commit = " ".join(dict.fromkeys(commits)) or None
    return now | {"commit": commit, "clean": earlier["clean"] and now["clean"]}


@cache
def source_commit() -> dict:
    """The commit of the source and whether it is clean; None where git does not track it.

    An installed package may lie in a folder of some other repository, whose commit says nothing.
    """

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).resolve().parents[1]), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "config.py")
        return {"commit": git("rev-parse", "HEAD"), "clean": not git("status", "--porcelain", ".")}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "clean": None}


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's name as the operating system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
