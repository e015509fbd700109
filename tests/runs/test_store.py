"""A run's file is whole or refused by name, on the disk, and written by one process at a time."""

import errno
import fcntl
import json
import math
import os
import resource
import signal
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from helpers import OWN, PROCESSES, Lines, started
from hypothesis import given, settings
from hypothesis import strategies as st

import amaml
from amaml.paper import records
from amaml.runs import store

RATE = torch.tensor(0.1, dtype=torch.float64)
ABOUT = {"status": "done", "iteration": 2}
METRICS = pd.DataFrame({"iteration": [1, 2], "query_loss": [0.5, math.inf]})


def write(folder: Path, n: int = 2, metrics=METRICS, about=ABOUT, name="a") -> Path:
    """A small run's file; `n` is the size of its state."""
    theta = {"b": torch.arange(float(n)), name: torch.ones(2)}
    tensors = {"state": {"theta": theta, "alpha": RATE}}
    store.write_run(folder, tensors, metrics, about)
    return folder / store.NAME


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
numbers = st.floats(width=64) | st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 5e-324])


@settings(max_examples=60)
@given(
    st.dictionaries(st.text(), plain),
    st.lists(numbers, min_size=1),
    st.sampled_from(["a", "heads.en/fr", "50 %2F"]) | st.text("c/%.é", min_size=1),
)
def test_whatever_is_written_comes_back_bit_for_bit(about, values, name):
    about = {f"told {name}": value for name, value in about.items()}
    metrics = pd.DataFrame({"iteration": range(1, len(values) + 1), "query_loss": values})
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), metrics=metrics, about=about, name=name)
        tensors, back, told = store.read_run(Path(folder))
    assert json.loads(json.dumps(about)).items() <= told.items()
    assert back.dtypes.tolist() == [np.int64, np.float64] and list(back) == list(metrics)
    assert back.to_numpy().tobytes() == metrics.to_numpy().tobytes()
    assert list(tensors["state"]["theta"]) == ["b", name]  # sums depend on their order
    assert torch.equal(tensors["state"]["theta"]["b"], torch.tensor([0.0, 1.0]))
    assert tensors["state"]["alpha"].dtype == torch.float64


def test_whatever_byte_is_lost_or_changed_the_file_is_refused_by_name(tmp_path):
    path = write(tmp_path)
    intact = path.read_bytes()
    damaged = [intact[:size] for size in range(len(intact))]
    for place in range(len(intact)):
        flipped = intact[place] ^ (1 << place % 8)
        damaged.append(intact[:place] + bytes([flipped]) + intact[place + 1 :])
    for content in [*damaged, intact + b"!", b"nonsense"]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="run.safetensors is damaged.*anew"):
            store.read_run(tmp_path)


def test_files_of_others_and_of_other_layouts_are_refused_by_name(tmp_path, monkeypatch):
    path = tmp_path / store.NAME
    assert store.read_run(tmp_path) is None
    for metadata in (None, {"format": "pt"}):
        safetensors.torch.save_file({"weight": torch.ones(3)}, path, metadata)
        with pytest.raises(ValueError, match="run.safetensors is damaged.*anew"):
            store.read_run(tmp_path)
    write(tmp_path)
    monkeypatch.setattr(store, "LAYOUT", newer := store.LAYOUT + 1)
    words = f"run.safetensors has layout {newer - 1}, this version reads {newer}.*wrote it.*anew"
    with pytest.raises(ValueError, match=words):
        store.read_run(tmp_path)


@pytest.mark.parametrize("name", store.OLDER)
def test_the_folder_of_an_older_layout_is_refused_and_kept(tmp_path, name):
    folder = tmp_path / amaml.RunConfig().id
    folder.mkdir()
    (folder / name).write_text("{}")
    with pytest.raises(ValueError, match=f"{folder}.*another layout.*run.safetensors.*another out"):
        amaml.train(amaml.RunConfig(), tmp_path)
    assert [path.name for path in folder.iterdir()] == [name]


def test_what_a_name_stands_for_is_on_the_disk_first(tmp_path, monkeypatch):
    """The content, then the name, then the folder that holds the name."""
    steps = []

    def noted(real, *words):
        steps.append(os.fstat(words[0]).st_ino if real is sync else [Path(w).name for w in words])
        real(*words)

    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", partial(noted, sync))
    monkeypatch.setattr(os, "replace", partial(noted, replace))
    path = write(tmp_path)
    content, folder = path.stat().st_ino, tmp_path.stat().st_ino
    assert steps == [content, [f"{store.NAME}.part", store.NAME], folder]


def fill_the_disk(folder: Path) -> None:
    """Write files, small and then large, where none may have more than 4 KiB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    for n in (10, 10_000):
        table = pd.DataFrame({"run": "a", "query_loss": np.random.default_rng(0).random(n)})
        write_records = partial(records.write_records, "figure_9", "small", table, [], folder)
        for write_one in (partial(write, folder, n), write_records):
            try:
                write_one()
            except OSError as error:
                print(error)


def test_a_full_disk_is_explained_and_leaves_the_last_good_files(tmp_path):
    process, said = started(fill_the_disk, tmp_path)
    for message, name in zip(said, (store.NAME, "figure_9-small.csv.gz"), strict=True):
        assert name in message and "make room there, or give another out" in message
    process.join()
    assert len(store.read_run(tmp_path)[0]["state"]["theta"]["b"]) == 10
    assert len(records.read_records("figure_9", "small", tmp_path)[0]) == 10
    assert len(list(tmp_path.iterdir())) == 2


def train_where_nobody_may_write(folder: Path) -> None:
    if os.geteuid() == 0:  # who may write everywhere
        os.seteuid(65534)
    sampler = Lines()
    try:
        amaml.train(amaml.RunConfig(), folder, **OWN | {"sampler": sampler}, progress=False)
    except PermissionError as error:
        print(error, f"after {sampler.asked} tasks")


def test_a_folder_that_is_read_only_is_refused_before_anything_is_computed():
    with tempfile.TemporaryDirectory() as folder:  # one that others may look into
        os.chmod(folder, 0o555)
        process, said = started(train_where_nobody_may_write, Path(folder))
        message = said.read()
        process.join()
        assert not list(Path(folder).iterdir())
    words = (folder, "cannot be written", "give another out", "after 0 tasks")
    assert all(some in message for some in words)


def test_a_file_in_the_place_of_a_folder_is_refused_and_kept(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises((NotADirectoryError, FileExistsError), match="cannot be written.*another"):
        amaml.train(amaml.RunConfig(data="glyphs"), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "not a folder"


def hold(folder: Path, end) -> None:
    with store.lock(folder):
        print("held")
        end.poll(None)


def test_a_second_process_waits_says_so_and_goes_on_when_the_first_is_killed(tmp_path):
    folder, (end, ending) = tmp_path / "run", PROCESSES.Pipe(duplex=False)
    first, first_said = started(hold, folder, end)
    assert first_said.readline() == "held\n"
    second, second_said = started(hold, folder, end)
    assert second_said.readline() == f"waiting for another process that works in {folder}\n"
    first.kill()
    assert second_said.readline() == "held\n"
    ending.close()
    second.join()
    first.join()
    assert (first.exitcode, second.exitcode) == (-signal.SIGKILL, 0)


def test_where_there_are_no_locks_a_warning_says_so(tmp_path, monkeypatch):
    def flock(handle, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="cannot be locked|not supported"), store.lock(tmp_path):
        write(tmp_path)
