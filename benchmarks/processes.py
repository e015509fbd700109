"""Measures that need a process of their own: the start, and many runs on two workers.

`python -m benchmarks.processes TASK JSON` is the process; it prints its result as a line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time

import torch

import amaml
from amaml.paper.records import PROJECT
from amaml.paper.settings import PROFILES, RUNS_PER_BATCH
from benchmarks.measures import AMAML, Bench, Rows, amaml_step

N_RUNS, RUN_ITERATIONS, N_WORKERS = 16, 100, 2


def fresh(task: str, threads: int, **given) -> dict:
    """The result of a task of this file in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.processes", task, json.dumps(given)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[2:])} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def start(bench: Bench) -> Rows:
    """A fresh process: its start, `import amaml`, the first meta-iteration, its end."""

    def process() -> None:
        fresh("first_iteration", bench.threads, device=bench.device)

    return bench.interleave({AMAML: process}, 3)


def first_iteration(device: str) -> dict:
    bench = Bench(device)
    sampler = amaml.TaskSampler(bench.characters, n_way=5)
    amaml_step(bench.model(), inner_steps=1)(sampler.sample(32, bench.generator()))
    bench.synchronise()
    return {}


def run_all(bench: Bench) -> Rows:
    """16 short runs by `run_all` on two workers, eight to a batch, and one after another on one
    thread.
    """
    rows = []
    for number in range(1, bench.rounds_of(2) + 1):
        for name, task in (("run_all", "runs_together"), ("one after another", "runs_in_turn")):
            value = fresh(task, 1, iterations=RUN_ITERATIONS)["seconds"]
            row = {"contestant": name, "n_runs": N_RUNS, "round": number}
            rows.append(row | {"value": value, "unit": "s"})
    return rows


def short_runs(iterations: int) -> list[amaml.RunConfig]:
    quick = PROFILES["quick"] | {"iterations": iterations}
    return [amaml.RunConfig(**quick, seed=seed) for seed in range(N_RUNS)]


def runs_together(iterations: int) -> dict:
    """Where the system allows it, on two cores alone: `run_all` starts one worker per core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:N_WORKERS])
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        size = RUNS_PER_BATCH["quick"]
        amaml.run_all(short_runs(iterations), out=folder, runs_per_batch=size, progress=False)
        return {"seconds": time.perf_counter() - begun}


def runs_in_turn(iterations: int) -> dict:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        for config in short_runs(iterations):
            amaml.train(config, out=folder, progress=False)
        return {"seconds": time.perf_counter() - begun}


TASKS = {f.__name__: f for f in (first_iteration, runs_together, runs_in_turn)}

if __name__ == "__main__":
    print(json.dumps(TASKS[sys.argv[1]](**json.loads(sys.argv[2]))))
