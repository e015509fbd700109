"""Nothing is lost and nothing is wrong in silence: damage, full disks, kills, two at a time."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TextIO

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import amaml
from amaml import data
from amaml.paper import records
from amaml.runs import checkpoints, files

CONFIG = amaml.RunConfig(
    data="glyphs", n_way=2, filters=2, meta_batch_size=1, iterations=5, validation_tasks=2
)
RUN_FILES = ("config.json", "metrics.csv", "checkpoint.safetensors", "result.json")
RECORD_FILES = ("figure_9-small.csv.gz", "figure_9-small.json")
RESULT = {
    "status": "done", "seconds": 1.5, "commit": "abc", "clean": True, "versions": {},
    "machine": {}, "threads": 1,
}  # fmt: skip


def train(out: Path) -> amaml.Run:
    return amaml.train(CONFIG, out, progress=False, checkpoint_every=2)


def rows(run: str, value: float = 0.5) -> pd.DataFrame:
    return pd.DataFrame({"run": run, "iteration": [1, 2], "query_loss": [value, math.inf]})


def publish(folder: Path, run: str, value: float = 0.5, order=None) -> pd.DataFrame:
    order = order or [f"run{i}" for i in range(100)]
    finished = [(rows(run, value), RESULT)]
    return records.publish_runs("figure_9", "small", finished, order, folder)


def read(folder: Path):
    """Everything that there is in a folder, as plain data."""
    if (folder / RECORD_FILES[0]).exists():
        table, made_by = records.read_records("figure_9", "small", folder)
        return table.to_csv(), made_by
    run = train(folder)
    assert run.id == CONFIG.id
    result = files.read_json(folder / run.id / "result.json")
    tensors = {k: v.numpy().tobytes() for k, v in checkpoints.flatten(run.state._asdict()).items()}
    return run.status, run.iteration, run.metrics.to_csv(), tensors, result


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Path]:
    """The path of each file that the module reads back, in a folder of records or of runs."""
    folder, out = tmp_path_factory.mktemp("records"), tmp_path_factory.mktemp("runs")
    run = train(out)
    for name in ("run0", "run1"):
        publish(folder, name)
    return {name: folder / name for name in RECORD_FILES} | {
        name: out / run.id / name for name in RUN_FILES
    }


def damages(content: bytes, rng, times: int):
    """Cut at random lengths, then with single bytes changed."""
    for length in rng.integers(0, len(content), times):
        yield content[:length]
    for place in rng.integers(0, len(content), times):
        changed = bytearray(content)
        changed[place] ^= rng.integers(1, 256)
        yield bytes(changed)


def check_damaged(path: Path, content: bytes, whole) -> bool:
    """Read with `content` in the place of a file: True if refused, False if as it was written."""
    intact = path.read_bytes()
    path.write_bytes(content)
    try:
        read_back = read(path.parent if path.name in RECORD_FILES else path.parent.parent)
    except (ValueError, OSError) as error:
        assert path.name.partition(".")[0] in str(error), error
        assert "restore it from a copy, or remove" in str(error) or "has layout" in str(error)
        return True
    finally:
        path.write_bytes(intact)
    assert read_back == whole
    return False


@pytest.mark.parametrize("name", [*RECORD_FILES, *RUN_FILES])
def test_torn_and_altered_files_are_refused_or_read_as_written(written, name):
    path, rng = written[name], np.random.default_rng(0)
    whole = read(path.parent if name in RECORD_FILES else path.parent.parent)
    refused = [check_damaged(path, c, whole) for c in damages(path.read_bytes(), rng, 50)]
    assert sum(refused[:50]) >= 48  # a cut may take no more than the last line's end
    assert sum(refused[50:]) >= 40  # and a change fall on a blank


def test_files_that_are_gone_are_named(written):
    for name in ("figure_9-small.json", "checkpoint.safetensors", "metrics.csv"):
        path = written[name]
        content = path.read_bytes()
        path.unlink()
        with pytest.raises((ValueError, OSError), match=f"{name}.*restore it|restore it.*{name}"):
            read(path.parent if name in RECORD_FILES else path.parent.parent)
        path.write_bytes(content)


def test_a_damaged_cache_is_made_again_and_says_so(tmp_path):
    path, rng = tmp_path / "packed.npz", np.random.default_rng(0)
    images, names = rng.integers(0, 255, (3, 20, 28, 28), np.uint8), ["a", "b", "c"]
    data.write_packed(path, images, names)
    content = path.read_bytes()
    for changed in damages(content, rng, 50):
        path.write_bytes(changed)
        with pytest.warns(UserWarning, match="packed.npz is damaged; it is made again"):
            assert data.read_packed(path) is None
    path.write_bytes(content)
    read_back = data.read_packed(path)
    assert np.array_equal(read_back[0], images) and read_back[1] == names


def test_rows_before_the_checkpoint_are_vouched_for_and_those_after_it_cut(tmp_path):
    metrics, checkpoint = tmp_path / "metrics.csv", tmp_path / "checkpoint.safetensors"
    table = pd.DataFrame({"iteration": [1, 2], "query_loss": [0.1, 1e-300]})
    checkpoints.append_metrics(metrics, table)
    assert checkpoints.read_metrics(metrics).empty  # no checkpoint vouches for them yet
    checkpoints.save_checkpoint(checkpoint, {"alpha": torch.tensor(0.1)}, 2, 1.0)
    whole = metrics.read_bytes()
    for after in (b"3,0.2\n", b"3,0.", b"nonsense"):
        metrics.write_bytes(whole + after)
        pd.testing.assert_frame_equal(checkpoints.read_metrics(metrics), table, check_exact=True)
        checkpoints.truncate_metrics(metrics)
        assert metrics.read_bytes() == whole
    metrics.write_bytes(whole.replace(b"0.1", b"0.7"))
    with pytest.raises(ValueError, match=r"metrics.csv is damaged.*anew"):
        checkpoints.truncate_metrics(metrics)


def test_other_layouts_are_refused_by_name(written, monkeypatch):
    out = written["config.json"].parent.parent
    newer = files.LAYOUT + 1
    for module in (files, checkpoints):
        monkeypatch.setattr(module, "LAYOUT", newer)
    words = f"has layout {files.LAYOUT - 1}, this version reads {files.LAYOUT}; use the version"
    for name in RECORD_FILES[1:]:
        with pytest.raises(ValueError, match=f"{name} {words}.*train again"):
            read(written[name].parent)
    for name in ("config.json", "checkpoint.safetensors"):
        with pytest.raises(ValueError, match=f"{name} {words}.*anew"):
            read(out) if name == "config.json" else checkpoints.load_checkpoint(written[name])
    monkeypatch.undo()
    older = written["config.json"].with_name("older.json")
    older.write_text('{"config": {}}')  # of the time before layouts were written everywhere
    with pytest.raises(ValueError, match="older.json has layout None, this version reads"):
        files.read_json(older)
    older.unlink()


def test_a_table_and_header_of_another_figure_are_refused(written, tmp_path):
    for name in RECORD_FILES:
        shutil.copy(written[name], tmp_path / name.replace("figure_9", "figure_8"))
    with pytest.raises(ValueError, match=r"figure_8-small.csv.gz is damaged \(it is figure_9"):
        records.read_records("figure_8", "small", tmp_path)


class Cut(BaseException):
    """Stands for the end of the process in the middle of a write."""


def test_a_publication_that_is_cut_short_loses_neither_the_old_nor_the_new(tmp_path, monkeypatch):
    """Cut at each step of it, and gone on with from there."""
    publish(tmp_path / "start", "run0")
    before = records.read_records("figure_9", "small", tmp_path / "start")
    shutil.copytree(tmp_path / "start", tmp_path / "end")
    publish(tmp_path / "end", "run1", 0.7)
    after = records.read_records("figure_9", "small", tmp_path / "end")
    seen, step = [], 0
    while True:
        folder, step = tmp_path / f"cut{step}", step + 1
        shutil.copytree(tmp_path / "start", folder)
        calls = iter(range(step))

        def replace(source, target, calls=calls, real=os.replace):
            if next(calls, None) is None:
                raise Cut
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)
        try:
            publish(folder, "run1", 0.7)
            finished = True
        except Cut:
            finished = False
        monkeypatch.undo()
        table, made_by = records.read_records("figure_9", "small", folder)
        expected = after if "run1" in set(table["run"]) else before
        pd.testing.assert_frame_equal(table, expected[0], check_exact=True)
        assert made_by == expected[1]
        seen.append(expected is after)
        publish(folder, "run1", 0.7)
        assert records.read_records("figure_9", "small", folder)[1] == after[1]
        assert not list(folder.glob("*.part"))
        if finished:
            break
    assert seen[0] is False and seen[-1] is True and len(seen) >= 3


def test_what_a_name_stands_for_is_on_the_disk_first(tmp_path, monkeypatch):
    """File, name, folder; and the metrics before the checkpoint that vouches for them."""
    steps = []

    def sync(handle, real=os.fsync):
        steps.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        real(handle)

    def replace(source, target, real=os.replace):
        steps.append(f"rename to {Path(target).name}")
        real(source, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("the names of open files are read from /proc")
    checkpoints.append_metrics(tmp_path / "metrics.csv", pd.DataFrame({"iteration": [1]}))
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    checkpoints.save_checkpoint(tmp_path / "c.safetensors", {"alpha": torch.tensor(0.1)}, 1, 1.0)
    assert steps == [
        "metrics.csv", "c.safetensors.part", "rename to c.safetensors", tmp_path.name,
    ]  # fmt: skip


def fork(function, *words) -> tuple[multiprocessing.Process, TextIO]:
    """A process of its own that runs a function, and what it says."""
    reading, writing = os.pipe()

    def speak():
        sys.stdout = os.fdopen(writing, "w", buffering=1)
        function(*words)
        sys.stdout.close()

    process = multiprocessing.get_context("fork").Process(target=speak)
    process.start()
    os.close(writing)
    return process, os.fdopen(reading)


def fill_the_disk(folder: Path) -> None:
    """Write each kind of file, then a larger one where no file may have more than 4 KiB."""
    many = np.random.default_rng(0).random(10_000)
    weights, table = torch.tensor(many), pd.DataFrame({"run": "a", "query_loss": many})
    calls = [
        lambda n: checkpoints.save_checkpoint(folder / "c.safetensors", {"w": weights[:n]}, n, 1.0),
        lambda n: checkpoints.append_metrics(folder / "metrics.csv", table[:n]),
        lambda n: records.write_records("figure_9", "small", table[:n], [], folder),
        lambda n: files.write_json(folder / "result.json", {"many": many[:n].tolist()}),
        lambda n: data.write_packed(folder / "packed.npz", (255 * many[:n]).astype("uint8"), "a"),
    ]
    for call in calls:
        call(10)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    for call in calls:
        try:
            call(10_000)
        except OSError as error:
            print(error)


def test_a_full_disk_is_explained_and_leaves_the_last_good_files(tmp_path):
    process, said = fork(fill_the_disk, tmp_path)
    messages = said.read().splitlines()
    process.join()
    names = ("c.safetensors", "metrics.csv", "figure_9-small.csv.gz", "result.json", "packed.npz")
    for message, name in zip(messages, names, strict=True):
        assert name in message and "make room there, or give a" in message
    assert len(checkpoints.load_checkpoint(tmp_path / "c.safetensors")[0]["w"]) == 10
    assert len(records.read_records("figure_9", "small", tmp_path)[0]) == 10
    assert len(files.read_json(tmp_path / "result.json")["many"]) == 10
    assert data.read_packed(tmp_path / "packed.npz")[0].shape == (10,)
    assert not list(tmp_path.glob("*.part"))


class Never:
    """A sampler that must not be asked."""

    def sample(self, meta_batch_size, generator):
        raise AssertionError("something was computed")


def train_where_nobody_may_write(folder: Path) -> None:
    if os.geteuid() == 0:  # who may write everywhere
        os.seteuid(65534)
    own = {"model": torch.nn.Linear(1, 1), "sampler": Never(), "loss": torch.nn.functional.mse_loss}
    try:
        amaml.train(CONFIG, folder, **own, progress=False)
    except PermissionError as error:
        print(error)


def test_a_folder_that_is_read_only_is_refused_before_anything_is_computed():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        process, said = fork(train_where_nobody_may_write, Path(folder))
        message = said.read()
        process.join()
        os.chmod(folder, 0o755)
        assert process.exitcode == 0 and not list(Path(folder).iterdir())
    assert folder in message and "cannot be written" in message and "give another out" in message


def hold(folder: Path, until: int) -> None:
    with files.lock(folder):
        print("held")
        os.read(until, 1)


def test_a_second_process_waits_says_so_and_goes_on_when_the_first_is_killed(tmp_path):
    folder, (end, ending) = tmp_path / "run", os.pipe()
    first, first_said = fork(hold, folder, end)
    assert first_said.readline() == "held\n"
    second, second_said = fork(hold, folder, end)
    assert second_said.readline() == f"waiting for another process that works in {folder}\n"
    first.kill()
    assert second_said.readline() == "held\n"
    os.write(ending, b"!")
    second.join()
    first.join()
    assert (first.exitcode, second.exitcode) == (-signal.SIGKILL, 0)


def test_where_there_are_no_locks_a_warning_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    with pytest.warns(UserWarning, match="cannot be locked.*no two processes"):
        with files.lock(tmp_path):
            pass


def publish_some(folder: Path, some: range) -> None:
    for i in some:
        publish(folder, f"run{i}", i)


def test_processes_that_publish_into_one_file_lose_nothing(tmp_path):
    running = [fork(publish_some, tmp_path, range(start, 12, 3))[0] for start in range(3)]
    for process in running:
        process.join()
    table, made_by = records.read_records("figure_9", "small", tmp_path)
    expected = pd.concat([rows(f"run{i}", i) for i in range(12)], ignore_index=True)
    pd.testing.assert_frame_equal(table, expected)
    assert made_by[0]["runs"] == {f"run{i}": 1.5 for i in range(12)} and len(made_by) == 1


def test_two_processes_that_start_the_same_run_make_it_once(tmp_path):
    code = "import sys, test_records as t; t.train(t.Path(sys.argv[1]))"
    words = [sys.executable, "-c", code, str(tmp_path)]
    place = {"cwd": Path(__file__).parent, "stdout": subprocess.DEVNULL}
    running = [subprocess.Popen(words, **place) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert train(tmp_path).metrics["iteration"].tolist() == [1, 2, 3, 4, 5]
    lines = (tmp_path / CONFIG.id / "metrics.csv").read_text().splitlines()
    assert [line.partition(",")[0] for line in lines] == ["iteration", "1", "2", "3", "4", "5"]


def test_publishing_again_replaces_a_run_drops_strangers_and_keeps_the_order(tmp_path):
    for run in ("run2", "stranger", "run0"):
        publish(tmp_path, run, order=["run0", "run1", "run2", "stranger"])
    table = publish(tmp_path, "run2", 0.9, order=["run0", "run1", "run2"])
    expected = pd.concat([rows("run0"), rows("run2", 0.9)], ignore_index=True)
    pd.testing.assert_frame_equal(table, expected)
    table, made_by = records.read_records("figure_9", "small", tmp_path)
    pd.testing.assert_frame_equal(table, expected)
    assert [list(batch["runs"]) for batch in made_by] == [["run0", "run2"]]


numbers = st.floats(width=64) | st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 5e-324])
labels = st.sampled_from(["MAML", "Alpha MAML", "NA", "None", "nan", 'a "quoted", word', "é"])
ids = st.text("0123456789abcdef", min_size=16, max_size=16)
tables = st.lists(
    st.tuples(ids, labels, st.booleans(), st.integers(0, 2**62), numbers, numbers), min_size=1
)


@settings(max_examples=60, deadline=None)
@given(tables)
def test_any_table_comes_back_bit_for_bit(content):
    names = ["run", "method", "rotate", "iteration", "alpha", "query_loss"]
    table = pd.DataFrame(content, columns=names).astype({"alpha": float, "query_loss": float})
    with tempfile.TemporaryDirectory() as folder:
        records.write_records("figure_9", "small", table, [], folder)
        back, _ = records.read_records("figure_9", "small", folder)
    assert list(back) == names and back.dtypes.tolist() == table.dtypes.tolist()
    for name in names[:4]:
        assert back[name].tolist() == table[name].tolist()
    for name in names[4:]:  # the bits, but for those of a NaN
        bits = [np.nan_to_num(t[name].to_numpy(), nan=7.0).tobytes() for t in (back, table)]
        assert bits[0] == bits[1]
        assert (back[name].isna() == table[name].isna()).all()


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=10,
        ),
    ).filter(lambda content: not {"layout", "sha256"} & set(content))
)
def test_any_json_comes_back(content):
    with tempfile.TemporaryDirectory() as folder:
        files.write_json(Path(folder) / "x.json", content)
        assert files.read_json(Path(folder) / "x.json") == json.loads(json.dumps(content))


def test_errors_of_writing_keep_their_class(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="cannot be written.*give another out") as raised:
        files.write_json(tmp_path / "file" / "x.json", {})
    assert raised.value.errno == errno.ENOTDIR
