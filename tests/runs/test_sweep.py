"""Many runs become one table: over workers or in this process, in batches, piece by piece."""

from dataclasses import replace

import pandas as pd
import pytest
from helpers import OWN, SMALL, bits

import amaml
from amaml import sweep

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIGS = [amaml.RunConfig(**SMALL, iterations=5, seed=seed) for seed in range(3)]


def run_all(configs, out, client=None, *words, **more) -> pd.DataFrame:
    return amaml.run_all(configs, out, client, *words, **{"progress": False} | more)


def test_all_runs_come_back_as_one_table_and_are_not_made_twice(tmp_path, capsys):
    configs = [*CONFIGS[:2], CONFIGS[0]]
    table = run_all(configs, tmp_path)  # on workers of its own
    assert len(table) == 10 and table["run"].unique().tolist() == [c.id for c in CONFIGS[:2]]
    assert (table["alpha_0"] == 0.1).all() and table["alpha"].nunique() > 5
    alone = amaml.train(CONFIGS[1], tmp_path / "alone", progress=False)
    of_run = table[table["run"] == alone.id].reset_index(drop=True)
    pd.testing.assert_frame_equal(of_run[list(alone.metrics)], alone.metrics, check_exact=True)
    assert (of_run["seed"] == 1).all() and (of_run["status"] == "done").all()
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/run.safetensors")}
    again = run_all(configs, tmp_path, minutes=1, progress=True)
    pd.testing.assert_frame_equal(again, table)
    assert written == {path: path.stat().st_mtime_ns for path in written}
    words = f"2 of 2 runs in {tmp_path} were finished: read, not made again"
    assert words in capsys.readouterr().out


def test_batches_hold_runs_of_one_shape_and_leave_no_worker_idle():
    configs = [amaml.RunConfig(seed=seed) for seed in range(7)]
    others = [amaml.RunConfig(seed=seed, n_way=20) for seed in range(3)]
    mixed = [*others[:1], *configs, *others[1:]]
    sizes = [len(batch) for batch in sweep.batches_of(mixed, 3, 2)]
    assert sizes == [2, 1, 3, 3, 1]
    assert [len(batch) for batch in sweep.batches_of(configs, 100, 2)] == [4, 3]
    assert sweep.batches_of(configs, 1, 2) == [[config] for config in configs]
    assert sorted(c.seed for b in sweep.batches_of(configs, 3, 2) for c in b) == list(range(7))


def test_a_cluster_is_named_by_its_client_or_its_address(client, tmp_path, monkeypatch):
    here = run_all(CONFIGS, tmp_path / "here", minutes=60)
    address = client.scheduler.address
    tables = [run_all(CONFIGS, tmp_path / "client", client, 3), run_all(CONFIGS, tmp_path, address)]
    monkeypatch.setenv("AMAML_SCHEDULER", address)
    tables.append(run_all(CONFIGS, tmp_path / "environment", runs_per_batch=2))
    for table in tables:
        pd.testing.assert_frame_equal(table, here, check_exact=True)


def test_parts_of_ones_own_reach_the_workers(client, tmp_path):
    configs = [amaml.RunConfig(iterations=3, seed=seed) for seed in (0, 1)]
    run_all(configs, tmp_path / "workers", client, **OWN)
    for config in configs:
        run = amaml.train(config, tmp_path, progress=False, **OWN)
        assert bits(tmp_path / run.id) == bits(tmp_path / "workers" / run.id)


def test_a_scheduler_that_does_not_answer_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "PATIENCE", "1s")
    with pytest.raises(ConnectionError, match=r"(?s)tcp://127.0.0.1:9.*dask worker"):
        run_all(CONFIGS, tmp_path, "tcp://127.0.0.1:9")
    monkeypatch.setenv("AMAML_SCHEDULER", "tcp://127.0.0.1:10")
    with pytest.raises(ConnectionError, match=r"tcp://127.0.0.1:10"):
        run_all(CONFIGS, tmp_path)


@pytest.mark.parametrize("where", ["on workers", "here"])
def test_a_failed_run_is_reported_with_its_config_and_stops_no_other(request, tmp_path, where):
    how = {"minutes": 60} if where == "here" else {"client": request.getfixturevalue("client")}
    good, bad = CONFIGS[0], replace(CONFIGS[0], n_way=999)
    finished = []
    with pytest.raises(RuntimeError, match=r"(?s)1 of 2 runs failed.*n_way=999.*needs 999 "):
        run_all([bad, good], tmp_path, on_finish=finished.append, **how)
    assert [run.config for run in finished] == [good]


def test_minutes_that_are_over_leave_checkpoints_to_go_on_from(tmp_path):
    configs = [replace(config, iterations=8) for config in CONFIGS]
    whole = run_all(configs, tmp_path / "whole", minutes=60)
    tables = [run_all(configs, tmp_path, minutes=0) for _ in range(6)]
    assert [len(table) for table in tables] == [0, 8, 8, 16, 16, 24]  # four iterations each
    pd.testing.assert_frame_equal(tables[-1], whole, check_exact=True)
