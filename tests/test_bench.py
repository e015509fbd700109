"""The benchmark: its contestants compute the same, its arithmetic is right, its table says so.

No test looks at a time.
"""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from conftest import relative_error
from torch.utils.flop_counter import FlopCounterMode

import amaml
from amaml.paper import records
from benchmarks import bench, costs, measures, peers
from benchmarks.measures import ALPHA, AMAML, BETA, PRODUCT, Bench


@pytest.fixture(scope="module")
def setting() -> Bench:
    return Bench()


def require(name: str) -> None:
    if not peers.installed(name):
        pytest.skip(f"{peers.PEERS[name][2]} is not installed: the benchmark leaves it out")


@pytest.mark.parametrize("name", peers.PEERS)
def test_a_peer_gives_our_meta_gradient(setting, name):
    require(name)
    for inner_steps in (1, 2):
        error = measures.gradient_error(
            setting, name, slice(None), torch.float64, inner_steps, filters=16
        )
        assert error < 1e-9


@pytest.mark.parametrize("name", peers.PEERS)
def test_an_iteration_of_a_peer_is_one_of_maml(setting, name):
    require(name)
    model = setting.model(filters=8).double()
    sampler, generator = amaml.TaskSampler(setting.characters, n_way=5), setting.generator()
    state = amaml.init_state(model, ALPHA, BETA)
    network, gradient = peers.peer(name, model, ALPHA, inner_steps=1)
    step = peers.sgd_step(network, gradient, BETA)
    for _ in range(3):
        tasks = sampler.sample(4, generator).double()
        state, _ = amaml.meta_step(model, state, tasks)
        step(tasks)
    theirs = peers.in_amaml_layout(peers.theta_of(network))
    assert relative_error({n: theirs[n] for n in state.theta}, state.theta) < 1e-12


def test_a_wrong_peer_is_reported_and_not_timed(monkeypatch):
    def of_half_the_rate(network, alpha, inner_steps):
        return peers.autograd_loop(network, alpha / 2, inner_steps)

    monkeypatch.setitem(peers.PEERS, "half the rate", (of_half_the_rate, "torch", None))
    setting = Bench()
    assert measures.right_peers(setting, ["half the rate", "grad(vmap)"]) == ["grad(vmap)"]
    assert setting.checked["half the rate"]["float64"] > 1e-3
    assert setting.checked["half the rate"]["float32"] > 1e-3
    assert measures.is_right(setting.checked["grad(vmap)"])


def test_a_library_that_is_missing_is_left_out(monkeypatch, setting):
    missing = (peers.by_higher, "torch", "a_library_that_is_not_there")
    monkeypatch.setitem(peers.PEERS, "missing", missing)
    assert not peers.installed("missing")
    assert measures.right_peers(setting, ["missing"]) == []


def test_the_arithmetic_is_that_of_a_hand_count(setting):
    convolutions = 14 * 14 * 9 * 1 * 64 + 7 * 7 * 9 * 64 * 64 + (4 * 4 + 2 * 2) * 9 * 64 * 64
    assert measures.forward_flop(setting.model()) == 2 * (convolutions + 64 * 5) == 5_313_664
    flop = measures.iteration_flop(setting.model(), 5, inner_steps=1, meta_batch_size=32)
    assert flop == 32 * (9 * 5 + 3 * 5) * 5_313_664
    flop = measures.iteration_flop(setting.model(20), 20, inner_steps=5, meta_batch_size=16)
    assert flop == 16 * (9 * 5 * 20 + 3 * 20) * (5_313_664 + 2 * 64 * 15)


def test_the_arithmetic_is_that_counted_by_torch(setting):
    """But for the first convolution: its images need no derivative, which the count leaves out."""
    model = setting.model()
    network, gradient = peers.peer("autograd loop", model, ALPHA, 1)
    tasks = amaml.TaskSampler(setting.characters, n_way=5).sample(2, setting.generator())
    with FlopCounterMode(display=False) as forward:
        network(tasks.support_x[0])
    assert forward.get_total_flops() == 5 * measures.forward_flop(model)
    with FlopCounterMode(display=False) as iteration:
        gradient(tasks)
    flop = measures.iteration_flop(model, 5, inner_steps=1, meta_batch_size=2)
    assert 0.9 * flop < iteration.get_total_flops() < flop


def test_contestants_take_turns_and_the_first_round_only_warms_up(setting):
    calls = []
    contestants = {name: lambda name=name: calls.append(name) for name in ("a", "b", "c")}
    rows = setting.interleave(contestants, 2, {"n_way": 5})
    assert "".join(calls) == "abcabcabc"
    assert [(row["contestant"], row["round"]) for row in rows] == [
        (name, number) for number in (1, 2) for name in "abc"
    ]
    assert all(row["value"] > 0 and row["unit"] == "s" and row["n_way"] == 5 for row in rows)


def test_ratios_and_shares_are_taken_round_by_round():
    times = {AMAML: [1.0, 2.0, 4.0], "learn2learn": [4.0, 10.0, 12.0], PRODUCT: [0.5, 0.5, 0.5]}
    table = pd.DataFrame(
        {"measure": "iteration", "contestant": name, "n_way": 5, "round": number + 1,
         "value": value, "unit": "s", "gflop": 20.0 if name == PRODUCT else 10.0}
        for name, values in times.items() for number, value in enumerate(values)
    )  # fmt: skip
    shown = bench.summarise(table).set_index("contestant")
    assert list(shown.index) == list(times)
    assert shown.loc["learn2learn", "median"] == 10_000 and shown.loc[AMAML, "unit"] == "ms"
    assert shown.loc["learn2learn", "ratio"] == 4.0  # of 4, 5 and 3, not of the medians
    assert shown.loc["learn2learn", "its quartiles"] == "3.500 to 4.500"
    assert shown.loc[PRODUCT, "GFLOP/s"] == 40
    assert shown.loc[AMAML, "GFLOP/s"] == 5 and shown.loc[AMAML, "share"] == 0.125


def test_memory_is_the_highest_sum(setting):
    def step():
        a = torch.empty(1000, dtype=torch.float32)
        b = torch.empty(500, dtype=torch.float32)
        del a
        return b, torch.empty(600, dtype=torch.float32)

    assert 6000 <= costs.peak_of_tensors(setting, step) < 6000 + 256  # blocks are of 64 bytes


@pytest.mark.parametrize(
    ("operation", "part"),
    [
        ("aten::bmm", "matrix products"),
        ("aten::mkldnn_convolution", "matrix products"),
        ("aten::copy_", "patches and copies"),
        ("aten::mean", "normalisation and other passes"),
        ("aten::empty_strided", costs.OTHER),
        ("PatchesBackward", costs.OTHER),
    ],
)
def test_operations_belong_to_parts(operation, part):
    assert costs.part_of(operation) == part


def test_a_part_of_the_benchmark_runs_and_is_recorded(tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        bench.main(["--only", "alpha", "--rounds", "1", "--threads", "1", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    table, (maker,) = records.read_records("performance", "cpu", tmp_path)
    assert list(table["contestant"]) == ["MAML", "Alpha MAML"]
    assert {"measure", "contestant", "round", "value", "unit"} <= set(table.columns)
    assert {"commit", "versions", "machine", "threads", "precision", "left_out"} <= set(maker)
    printed = capsys.readouterr().out
    assert maker["machine"]["processor"] in printed and "Alpha MAML" in printed


def test_the_parts_of_an_iteration_are_all_of_it():
    rows = costs.parts(Bench(rounds=1))
    times = {row["contestant"]: row["value"] for row in rows}
    assert set(times) == {
        *("matrix products", "patches and copies", "normalisation and other passes"),
        *(costs.OTHER, "sampling", "updates"),
    }
    assert all(value >= 0 for value in times.values()) and times["matrix products"] > 0


@pytest.mark.parametrize("options", [["--rounds", "0"], ["--only", "speed"], ["--threads", "0"]])
def test_wrong_options_are_refused(options):
    with pytest.raises(SystemExit):
        bench.main(options)
