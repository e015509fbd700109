"""A long run takes no more memory, open files or bytes a row than a short one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import amaml
from amaml.runs import checkpoints

CONFIG = amaml.RunConfig(
    data="glyphs", n_way=2, filters=1, meta_batch_size=1, iterations=3000, validation_every=100,
    validation_tasks=1, alpha=0.1, beta=0.01, hyper_alpha=1e-4, hyper_beta=1e-4,
)  # fmt: skip
MARKS = (1000, 3000)


class Watched:
    """A sampler that notes what its process holds when it is asked for certain meta-batches."""

    def __init__(self, sampler):
        self.sampler, self.asked, self.held = sampler, 0, []

    def sample(self, meta_batch_size, generator):
        self.asked += 1
        if self.asked in MARKS:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            handles = len(os.listdir("/proc/self/fd"))
            self.held.append((pages * os.sysconf("SC_PAGE_SIZE"), handles))
        return self.sampler.sample(meta_batch_size, generator)


def train(out: str) -> None:
    """Make the run and say what the process held."""
    torch.set_num_threads(1)
    split = amaml.split_characters(amaml.load_glyphs())
    watched, other = (amaml.TaskSampler(split.train, CONFIG.n_way) for _ in range(2))
    watched = Watched(watched)
    run = amaml.train(CONFIG, out, sampler=watched, validation_sampler=other, progress=False)
    print(json.dumps([run.id, run.status, watched.held]))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_three_thousand_iterations_hold_no_more_than_one_thousand(tmp_path):
    code = "import sys, test_long; test_long.train(sys.argv[1])"
    words, place = [sys.executable, "-c", code, str(tmp_path)], {"cwd": Path(__file__).parent}
    said = subprocess.run(words, **place, capture_output=True, text=True, check=True).stdout
    run, status, ((memory, handles), (memory_later, handles_later)) = json.loads(said)
    assert status == "done" and handles_later == handles
    assert memory_later == pytest.approx(memory, rel=0.02)
    metrics = tmp_path / run / "metrics.csv"
    lines = metrics.read_bytes().splitlines(keepends=True)[1:]
    assert len(lines) == CONFIG.iterations == len(checkpoints.read_metrics(metrics))
    sizes = [sum(map(len, lines[start : start + 1000])) for start in (0, 2000)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)
    assert len(list((tmp_path / run).iterdir())) == 5  # with the lock
