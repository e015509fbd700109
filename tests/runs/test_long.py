"""A long run takes no more memory, open files or bytes per row than a short one."""

import gc
import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers import small_model, started

import amaml
from amaml.runs import store
from amaml.runs.parts import run_id

CONFIG = amaml.RunConfig(
    data="glyphs", n_way=2, filters=1, meta_batch_size=1, iterations=900, validation_every=100,
    validation_tasks=1, alpha=0.1, beta=0.01, hyper_alpha=1e-4, hyper_beta=1e-4,
)  # fmt: skip
MARKS = (300, 600, 900)


class Watched:
    """A sampler that notes what its process holds when it is asked for certain meta-batches."""

    def __init__(self, sampler, path: Path):
        self.sampler, self.path, self.asked, self.held = sampler, path, 0, []

    def sample(self, meta_batch_size, generator):
        self.asked += 1
        if self.asked in MARKS:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            handles = len(os.listdir("/proc/self/fd"))
            self.held.append((pages, handles, self.path.stat().st_size))
        return self.sampler.sample(meta_batch_size, generator)


def train(folder: Path) -> None:
    """Make the run and say what the process held."""
    split = amaml.split_characters(amaml.load_glyphs())
    sampler = amaml.TaskSampler(split.train, CONFIG.n_way)
    watched = Watched(sampler, folder / store.NAME)
    amaml.train(
        CONFIG, folder.parent, name="watched", sampler=watched, validation_sampler=sampler,
        progress=False,
    )  # fmt: skip
    print(json.dumps(watched.held))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_nine_hundred_iterations_hold_no_more_than_three_hundred(tmp_path):
    folder = tmp_path / run_id(CONFIG, "watched")
    process, said = started(train, folder)
    pages, handles, sizes = zip(*json.loads(said.readline()), strict=True)
    process.join()
    assert len(set(handles)) == 1
    assert (pages[-1] - pages[0]) * os.sysconf("SC_PAGE_SIZE") < 600 * 3500  # bytes an iteration
    _, metrics, about = store.read_run(folder)
    assert about["status"] == "done" and len(metrics) == CONFIG.iterations
    bytes_per_row = 8 * len(metrics.columns)
    for size, larger in pairwise(sizes):
        assert larger - size == pytest.approx(300 * bytes_per_row, abs=64)  # the header's digits
    assert {path.name for path in folder.iterdir()} == {store.NAME, ".lock"}


def test_metrics_are_detached_and_no_tensor_outlives_its_iteration():
    def living() -> tuple[int, int]:
        gc.collect()
        tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
        return len(tensors), sum(tensor.numel() for tensor in tensors)

    model, counts = small_model().float(), []
    sampler = amaml.TaskSampler(amaml.load_glyphs(), n_way=3)
    generator, state = torch.Generator().manual_seed(0), amaml.init_state(model, 0.1, 0.1)
    for iteration in range(200):
        state, _ = amaml.meta_step(
            model, state, sampler.sample(2, generator), hyper_alpha=1e-3, hyper_beta=1e-3
        )
        if iteration in (20, 199):
            counts.append(living())
    assert counts[0] == counts[1]
