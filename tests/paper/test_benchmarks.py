"""The benchmark: its contestants compute the same, its arithmetic is right, its table says so.

No test looks at a time.
"""

import pandas as pd
import pytest
import torch
from helpers import batches, relative_error, small_model
from torch.utils.flop_counter import FlopCounterMode

import amaml
from amaml.paper import records
from amaml.paper.costs import maml_step, step_memory
from benchmarks import bench, costs, measures, peers
from benchmarks.measures import ALPHA, AMAML, BETA, PRODUCT, Bench


@pytest.fixture(scope="module")
def setting() -> Bench:
    return Bench()


@pytest.fixture(params=peers.PEERS)
def peer(request) -> str:
    if not peers.installed(request.param):
        library = peers.PEERS[request.param][2]
        pytest.skip(f"{library} is not installed: the benchmark leaves it out")
    return request.param


def test_a_peer_gives_our_meta_gradient(setting, peer):
    for steps in (1, 2):
        given = {"inner_steps": steps, "filters": 16}
        assert measures.gradient_error(setting, peer, slice(None), torch.float64, **given) < 1e-9


def test_an_iteration_of_a_peer_is_one_of_maml(setting, peer):
    model = setting.model(filters=8).double()
    sampler, generator = amaml.TaskSampler(setting.characters, n_way=5), setting.generator()
    state = amaml.init_state(model, ALPHA, BETA)
    network, gradient = peers.peer(peer, model, ALPHA, inner_steps=1)
    step = peers.sgd_step(network, gradient, BETA)
    for _ in range(3):
        tasks = sampler.sample(4, generator).double()
        state, _ = amaml.meta_step(model, state, tasks)
        step(tasks)
    theirs = peers.in_amaml_layout(peers.theta_of(network))
    assert relative_error({n: theirs[n] for n in state.theta}, state.theta) < 1e-12


def test_the_step_of_maml_is_that_of_alpha_maml_without_hyper_rates():
    state = amaml.init_state(model := small_model(), 0.3, 0.1)
    theta = state.theta
    for tasks in batches(3, batch=20):  # several pieces
        state, _ = amaml.meta_step(model, state, tasks)
        theta = maml_step(theta, state.alpha, 0.1, tasks)
    assert relative_error(theta, state.theta) < 1e-9


def test_memory_is_the_highest_sum_and_what_is_kept():
    def step():
        a = torch.empty(1000, dtype=torch.float32)
        b = torch.empty(500, dtype=torch.float32)
        del a
        return b, torch.empty(600, dtype=torch.float32)

    highest, kept = step_memory(step)  # blocks are of 64 bytes
    assert 6000 <= highest < 6000 + 256 and 4400 <= kept < 4400 + 256


def test_a_wrong_peer_is_reported_and_one_that_is_missing_left_out(monkeypatch):
    def of_half_the_rate(network, alpha, inner_steps):
        return peers.autograd_loop(network, alpha / 2, inner_steps)

    monkeypatch.setitem(peers.PEERS, "half the rate", (of_half_the_rate, "torch", None))
    monkeypatch.setitem(peers.PEERS, "missing", (peers.by_higher, "torch", "a_missing_library"))
    setting = Bench()
    names = ["half the rate", "missing", "grad(vmap)"]
    assert measures.right_peers(setting, names) == ["grad(vmap)"]
    assert setting.checked.keys() == {"half the rate", "grad(vmap)"}
    assert all(error > 1e-3 for error in setting.checked["half the rate"].values())
    assert measures.is_right(setting.checked["grad(vmap)"])


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
    contestants = {name: lambda name=name: calls.append(name) for name in "abc"}
    rows = setting.interleave(contestants, 2, {"n_way": 5})
    assert "".join(calls) == "abcabcabc"
    turns = [(row["contestant"], row["round"]) for row in rows]
    assert turns == [(name, number) for number in (1, 2) for name in "abc"]
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


@pytest.mark.parametrize(
    ("operation", "part"),
    [
        ("aten::bmm", "matrix products"),
        ("aten::mkldnn_convolution", "matrix products"),
        ("aten::copy_", "patches and copies"),
        ("aten::mean", "normalisation and other passes"),
        ("aten::empty_strided", costs.OTHER),
        ("ForEachRunBackward", costs.OTHER),
    ],
)
def test_operations_belong_to_parts(operation, part):
    assert costs.part_of(operation) == part


def test_the_parts_of_an_iteration_are_all_of_it():
    times = {row["contestant"]: row["value"] for row in costs.parts(Bench(rounds=1))}
    assert set(times) == {
        *("matrix products", "patches and copies", "normalisation and other passes"),
        *(costs.OTHER, "sampling", "updates"),
    }
    assert all(value >= 0 for value in times.values()) and times["matrix products"] > 0


def test_a_part_of_the_benchmark_runs_and_is_recorded(tmp_path, capsys, one_thread):
    bench.main(["--only", "alpha", "--rounds", "1", "--threads", "1", "--out", str(tmp_path)])
    table, (maker,) = records.read_records("performance", "cpu", tmp_path)
    assert list(table["contestant"]) == ["MAML", "Alpha MAML", "scale-free rule"]
    assert {"measure", "contestant", "round", "value", "unit"} <= set(table.columns)
    assert {"commit", "versions", "machine", "threads", "precision", "left_out"} <= set(maker)
    printed = capsys.readouterr().out
    assert maker["machine"]["processor"] in printed and "Alpha MAML" in printed


@pytest.mark.parametrize("options", [["--rounds", "0"], ["--only", "speed"], ["--threads", "0"]])
def test_wrong_options_are_refused(options):
    with pytest.raises(SystemExit):
        bench.main(options)
