"""Runs and sweeps that are killed or stopped at any moment end as if nothing had happened.

A moment is a call that a training makes: an iteration, a write, a sync, a rename. A process that
stands for a power cut or an impatient user dies before such a call, in the middle of it, or after.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import resource
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import amaml
from amaml import alpha_maml
from amaml.runs import checkpoints, files

CONFIG = amaml.RunConfig(
    data="glyphs", n_way=2, filters=2, meta_batch_size=1, iterations=14, validation_every=5,
    validation_tasks=2, alpha=0.1, beta=0.05, hyper_alpha=1e-3, hyper_beta=1e-3,
)  # fmt: skip
CHECKPOINT_EVERY = 4
SEED = 0
# Forked from a process that has imported what they need, and has no threads
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["amaml", "pytest", "torch.fx.experimental.symbolic_shapes"])


def child(out: Path, log: Path, number: int, part: str, signum: int) -> None:
    """Train, log each moment in a file, and be sent a signal at a part of the moment `number`.

    Runs in a process of its own, whose functions it changes.
    """
    torch.set_num_threads(1)
    handle, passed = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), 0

    def moment(name: str, path, call, half=None):
        nonlocal passed
        os.write(handle, f"{name} {Path(path).name}\n".encode())
        here, passed = passed == number, passed + 1
        if here and part == "before":
            os.kill(os.getpid(), signum)
        if here and part == "half" and half is not None:
            half()
            os.kill(os.getpid(), signum)
            return call(half=True)
        value = call()
        if here and part == "after":
            os.kill(os.getpid(), signum)
        return value

    class Raw(io.FileIO):
        def write(self, content) -> int:
            first = bytes(content[: len(content) // 2])

            def rest(half=False) -> int:
                if half:
                    return len(first)  # after a signal that is held back the rest is written
                return super(Raw, self).write(content)

            return moment("write", self.name, rest, lambda: super(Raw, self).write(first))

    def opened(path, mode="r", buffering=-1, encoding=None, errors=None, newline=None):
        if mode[0] not in "wa":
            return real_open(path, mode, buffering, encoding, errors, newline)
        raw = io.BufferedWriter(Raw(path, mode.replace("b", "")))
        return raw if "b" in mode else io.TextIOWrapper(raw, encoding, errors, newline)

    def changed(name: str, real, path_of):
        return lambda *words, **more: moment(name, path_of(*words), lambda: real(*words, **more))

    def name_of(file) -> str:
        return os.readlink(f"/proc/self/fd/{file}")

    real_open, Path.open = Path.open, opened
    os.replace = changed("replace", os.replace, lambda source, target: target)
    os.truncate = changed("truncate", os.truncate, lambda path, size: path)
    os.fsync = changed("fsync", os.fsync, name_of)
    gradient = alpha_maml.meta_gradient
    alpha_maml.meta_gradient = changed("iteration", gradient, lambda *words: "")
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
    process = CONTEXT.Process(target=child, args=(folder, log, number, part, int(signum)))
    process.start()
    process.join()
    return process.exitcode, log.read_text().splitlines()


def content(folder: Path) -> tuple[bytes, dict, dict]:
    """The metrics, the final checkpoint's tensors as bytes, and how the run ended."""
    run = folder / CONFIG.id
    saved, iteration, _ = checkpoints.load_checkpoint(run / "checkpoint.safetensors")
    tensors = {name: value.numpy().tobytes() for name, value in checkpoints.flatten(saved).items()}
    result = files.read_json(run / "result.json")
    ended = {"iteration": result["iteration"], "status": result["status"], "checkpoint": iteration}
    return (run / "metrics.csv").read_bytes(), tensors, ended


def iterations(moments: list[str]) -> int:
    return sum(name.startswith("iteration") for name in moments)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What an undisturbed run leaves, all its moments, and its folder."""
    folder = tmp_path_factory.mktemp("undisturbed") / "runs"
    code, moments = train(folder)
    assert code == 0 and iterations(moments) == CONFIG.iterations
    return content(folder), moments, folder / CONFIG.id


def draw(moments: list[str], words: str, count: int, rng) -> list[tuple[int, str]]:
    """Moments of a kind, and the part of each."""
    places = [i for i, name in enumerate(moments) if any(w in name for w in words.split())]
    parts = [
        (place, part)
        for place in places
        for part in ("before", "half", "after")
        if part != "half" or moments[place].startswith("write")
    ]
    chosen = rng.choice(len(parts), min(count, len(parts)), replace=False)
    return [parts[i] for i in sorted(chosen)]


KILLS = {"iteration": 8, "metrics.csv": 8, "checkpoint": 8, "result.json": 4, "config.json": 2}


@pytest.mark.parametrize("kind", KILLS)
def test_killed_at_any_moment_a_run_is_resumed_bit_for_bit(undisturbed, tmp_path, kind):
    whole, moments, _ = undisturbed
    rng = np.random.default_rng((SEED, list(KILLS).index(kind)))
    drawn = draw(moments, kind, KILLS[kind], rng)
    assert len(drawn) == KILLS[kind]
    for number, part in drawn:
        folder, where = tmp_path / f"{number}-{part}", (moments[number], number, part)
        code, before = train(folder, number, part)
        assert code == -signal.SIGKILL and before == moments[: number + 1], where
        code, after = train(folder)
        assert code == 0, where
        assert content(folder) == whole, where
        twice = iterations(before) + iterations(after) - CONFIG.iterations
        assert 0 <= twice <= CHECKPOINT_EVERY, where
        assert not list(folder.rglob("*.part")), where


def test_killed_again_and_again_a_run_ends_as_if_nothing_had_happened(undisturbed, tmp_path):
    """Each process goes on where the one before was killed, also while it was resuming."""
    whole, _, _ = undisturbed
    rng, folder, killed, resumed = np.random.default_rng(SEED), tmp_path / "runs", 0, set()
    while True:
        number, part = int(rng.integers(4, 24)), str(rng.choice(["before", "half", "after"]))
        code, passed = train(folder, number, part)
        resumed |= set(passed)
        if code == 0:
            break
        assert code == -signal.SIGKILL, (number, part)
        killed += 1
    assert content(folder) == whole and killed >= 3
    assert "truncate metrics.csv" in resumed


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_stopped_at_any_moment_a_run_loses_no_iteration(undisturbed, tmp_path, signum):
    whole, moments, _ = undisturbed
    drawn = draw(moments[4:], "iteration metrics checkpoint result", 9, np.random.default_rng(SEED))
    drawn = [(4, "before"), *((number + 4, part) for number, part in drawn)]  # after config.json
    assert moments[4].startswith("iteration")
    unfinished = 0
    for number, part in drawn:
        folder, where = tmp_path / f"{number}-{part}", (moments[number], number, part)
        code, before = train(folder, number, part, signum)
        assert code == (130 if signum == signal.SIGINT else -signum), where
        run = folder / CONFIG.id
        _, iteration, _ = checkpoints.load_checkpoint(run / "checkpoint.safetensors")
        assert iteration == iterations(before), where
        rows = (run / "metrics.csv").read_bytes()
        assert (
            len(checkpoints.read_metrics(run / "metrics.csv")) == iteration == rows.count(b"\n") - 1
        )
        unfinished += not (run / "result.json").exists()
        code, after = train(folder)
        assert code == 0 and iterations(before) + iterations(after) == CONFIG.iterations, where
        assert content(folder) == whole, where
    assert unfinished >= 5


def child_on_a_full_disk(out: Path, limit: int) -> None:
    """Train where no file may have more than `limit` bytes; 28 if the error says what to do."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        amaml.train(CONFIG, out, progress=False, checkpoint_every=CHECKPOINT_EVERY)
    except OSError as error:
        sys.exit(28 if "make room there, or give another out" in str(error) else 1)


@pytest.mark.parametrize("name", ["config.json", "metrics.csv", "checkpoint.safetensors"])
def test_a_run_that_met_a_full_disk_goes_on_when_there_is_room(undisturbed, tmp_path, name):
    whole, _, made = undisturbed
    folder, limit = tmp_path / "runs", (made / name).stat().st_size - 1
    process = CONTEXT.Process(target=child_on_a_full_disk, args=(folder, limit))
    process.start()
    process.join()
    assert process.exitcode == 28 and not (folder / CONFIG.id / "result.json").exists()
    assert train(folder)[0] == 0 and content(folder) == whole


def test_a_sweep_whose_workers_are_killed_gives_the_same_table(tmp_path):
    from distributed import Client, LocalCluster

    def die_at(count: int) -> int:
        """Let this worker be killed in an iteration; the one in its place is as it was."""
        from amaml.runs import batch

        left, step = iter(range(count)), batch.meta_step

        def deadly_step(*words, **more):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*words, **more)

        batch.meta_step = deadly_step
        return os.getpid()

    configs = [replace(CONFIG, seed=seed) for seed in range(6)]
    with (
        LocalCluster(2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        whole = amaml.run_all(configs, tmp_path / "undisturbed", client, progress=False)
        killed = client.run(die_at, CONFIG.iterations + 5)  # in the second run of each
        table = amaml.run_all(configs, tmp_path / "killed", client, progress=False)
        assert not set(killed.values()) & set(client.run(os.getpid).values())
    pd.testing.assert_frame_equal(table, whole, check_exact=True)
