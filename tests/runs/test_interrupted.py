"""Runs and sweeps that are killed or stopped at any moment end as if nothing had happened.

A moment is a call that a training makes: an iteration, a sync, a rename. A process that stands for
a power cut or an impatient user dies before such a call or after it, or where half of a file has
been written.
"""

import os
import signal
import stat
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import PROCESSES, bits

import amaml
from amaml import alpha_maml
from amaml.runs import store
from amaml.runs.process import stop_signals

CONFIG = amaml.RunConfig(
    data="glyphs", n_way=2, filters=2, meta_batch_size=1, iterations=14, validation_every=5,
    validation_tasks=2, alpha=0.1, beta=0.05, hyper_alpha=1e-3, hyper_beta=1e-3,
)  # fmt: skip
CHECKPOINT_EVERY = 4


def child(out: Path, log: Path, number: int, part: str, signum: int) -> None:
    """Train, log each moment in a file, and be sent a signal at a part of the moment `number`.

    Runs in a process of its own, whose functions it changes.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job ignores it
    handle, passed = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), 0

    def changed(name: str, real):
        def moment(*words, **more):
            nonlocal passed
            is_file = name == "sync" and stat.S_ISREG(os.fstat(words[0]).st_mode)
            os.write(handle, f"{name}{' file' if is_file else ''}\n".encode())
            here, passed = passed == number, passed + 1
            if here and part == "half":
                os.ftruncate(words[0], os.fstat(words[0]).st_size // 2)
            if here and part != "after":
                os.kill(os.getpid(), signum)
            value = real(*words, **more)
            if here and part == "after":
                os.kill(os.getpid(), signum)
            return value

        return moment

    os.fsync, os.replace = changed("sync", os.fsync), changed("rename", os.replace)
    alpha_maml.meta_gradient = changed("iteration", alpha_maml.meta_gradient)
    try:
        amaml.train(CONFIG, out, progress=False, checkpoint_every=CHECKPOINT_EVERY)
    except KeyboardInterrupt:
        sys.exit(130)


def train(
    folder: Path, number: int = -1, part: str = "before", signum: int = signal.SIGKILL
) -> tuple[int, list[str]]:
    """The exit code of a process that trains in a folder, and the moments that it came to."""
    log = folder.with_suffix(".log")
    log.unlink(missing_ok=True)
    process = PROCESSES.Process(target=child, args=(folder, log, number, part, int(signum)))
    process.start()
    process.join()
    return process.exitcode, log.read_text().splitlines()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[tuple, list[str]]:
    """What an undisturbed run leaves, and all its moments."""
    folder = tmp_path_factory.mktemp("undisturbed") / "runs"
    code, moments = train(folder)
    assert code == 0 and moments.count("iteration") == CONFIG.iterations
    assert moments.count("sync file") == moments.count("rename") == moments.count("sync") == 4
    return bits(folder / CONFIG.id), moments


def draw(moments: list[str], kinds: str, count: int) -> list[tuple[int, str]]:
    """Some of the moments of these kinds, and a part of each; half only of a file."""
    parts = ("before", "half", "after") if kinds == "sync file" else ("before", "after")
    places = [place for place, kind in enumerate(moments) if kind in kinds.split(", ")]
    every = list(product(places, parts))
    return [every[i] for i in np.random.default_rng(0).choice(len(every), count, replace=False)]


@pytest.mark.parametrize(
    ("kinds", "count"), [("iteration", 14), ("sync file", 8), ("rename, sync", 8)]
)
def test_killed_at_any_moment_a_run_is_resumed_bit_for_bit(undisturbed, tmp_path, kinds, count):
    whole, moments = undisturbed
    for number, part in draw(moments, kinds, count):
        folder, where = tmp_path / f"{number}-{part}", (moments[number], number, part)
        code, before = train(folder, number, part)
        assert code == -signal.SIGKILL and before == moments[: number + 1], where
        code, after = train(folder)
        assert code == 0 and bits(folder / CONFIG.id) == whole, where
        twice = (before + after).count("iteration") - CONFIG.iterations
        assert 0 <= twice <= CHECKPOINT_EVERY, where
        assert not list(folder.rglob("*.part")), where


def test_killed_again_and_again_a_run_ends_as_if_nothing_had_happened(undisturbed, tmp_path):
    """Each process goes on where the one before was killed."""
    rng, codes = np.random.default_rng(0), []
    while 0 not in codes:
        number, part = int(rng.integers(3, 12)), str(rng.choice(["before", "after"]))
        codes.append(train(tmp_path / "runs", number, part)[0])
    assert set(codes[:-1]) == {-signal.SIGKILL} and len(codes) > 3
    assert bits(tmp_path / "runs" / CONFIG.id) == undisturbed[0]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_stopped_at_any_moment_a_run_loses_no_iteration(undisturbed, tmp_path, signum):
    whole, moments = undisturbed
    unfinished = 0
    for number, part in {(0, "before"), *draw(moments, "iteration, sync file, rename, sync", 9)}:
        folder, where = tmp_path / f"{number}-{part}", (moments[number], number, part)
        code, before = train(folder, number, part, signum)
        assert code == (130 if signum == signal.SIGINT else -signum), where
        _, metrics, about = store.read_run(folder / CONFIG.id)
        assert about["iteration"] == len(metrics) == before.count("iteration"), where
        unfinished += about["status"] == "running"
        code, after = train(folder)
        assert code == 0 and (before + after).count("iteration") == CONFIG.iterations, where
        assert bits(folder / CONFIG.id) == whole, where
    assert unfinished >= 5


def test_a_signal_is_held_back_to_the_end_and_a_second_one_is_not(request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    passed = []
    with pytest.raises(KeyboardInterrupt), stop_signals() as stopped:
        for number in range(2):
            assert stopped() == bool(number)
            signal.raise_signal(signal.SIGINT)
            passed.append(number)
    assert passed == [0] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_two_processes_that_start_the_same_run_make_it_once(undisturbed, tmp_path):
    whole, moments = undisturbed
    logs = [tmp_path / name for name in ("first", "second")]
    arguments = [(tmp_path, log, -1, "before", 0) for log in logs]
    running = [PROCESSES.Process(target=child, args=words) for words in arguments]
    for process in running:
        process.start()
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0, 0]
    assert sorted(log.read_text().splitlines() for log in logs) == [[], moments]
    assert bits(tmp_path / CONFIG.id) == whole


def test_a_sweep_whose_worker_is_killed_gives_the_same_table(client, tmp_path):
    def die_at(count: int) -> int:
        """Let this worker be killed in an iteration; the one in its place is as it was."""
        from amaml import alpha_maml

        left, gradient = iter(range(count)), alpha_maml.meta_gradient

        def deadly(*words, **more):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return gradient(*words, **more)

        alpha_maml.meta_gradient = deadly
        return os.getpid()

    configs = [replace(CONFIG, seed=seed) for seed in range(6)]
    whole = amaml.run_all(configs, tmp_path / "whole", minutes=60, progress=False)
    first = next(iter(client.nthreads()))
    (killed,) = client.run(die_at, CONFIG.iterations // 2, workers=[first]).values()
    table = amaml.run_all(configs, tmp_path / "killed", client, progress=False)
    assert killed not in client.run(os.getpid).values()
    pd.testing.assert_frame_equal(table, whole, check_exact=True)
