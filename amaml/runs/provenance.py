"""What makes a run or a measurement: commit, versions, machine."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def here(device="cpu") -> dict:
    """What makes a run here and now: source commit, library versions, machine, threads."""
    packages = ("torch", "numpy", "pandas", "safetensors")
    return {
        **source_commit(),
        "versions": {"python": platform.python_version()} | {p: package(p) for p in packages},
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": processor(),
            "cores": os.cpu_count(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
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
