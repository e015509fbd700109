"""The measures: each function returns rows of a tidy table, one per round and contestant.

Contestants of a measure take turns (A B C A B C ...), so that a drift of the machine's speed
affects all of them alike, and are compared round by round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

import amaml
from amaml.fast import cuda_graph
from benchmarks import peers

ALPHA, BETA, HYPER_RATE = 0.4, 0.01, 1e-3
RATES = {"hyper_alpha": HYPER_RATE, "hyper_beta": HYPER_RATE}
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "TF32": 1e-2}  # of a meta-gradient's relative error
AMAML, PRODUCT = "amaml", "matrix product"

Rows = list[dict]


@dataclass
class Bench:
    """The device to measure on, and how far each peer's meta-gradient is from ours."""

    device: str = "cpu"
    threads: int = 2
    rounds: int | None = None
    precision: str = "float32"
    checked: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self):
        self.characters = amaml.load_glyphs().to(self.device)

    def generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(0)

    def model(self, n_way: int = 5, filters: int = 64) -> amaml.OmniglotCNN:
        drawn = amaml.OmniglotCNN(n_way, torch.Generator().manual_seed(0), filters=filters)
        return drawn.to(self.device)

    def seconds(self, step: Callable) -> float:
        """Seconds of one call, until the device has finished."""
        self.synchronise()
        start = time.perf_counter()
        step()
        self.synchronise()
        return time.perf_counter() - start

    def synchronise(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def interleave(self, contestants: dict, rounds: int, common: dict | None = None) -> Rows:
        """Time the contestants in turn; the first round warms up and is not kept.

        Keys are a contestant's name, or (name, further columns as pairs).
        """
        rows = []
        for number in range(self.rounds_of(rounds) + 1):
            for key, step in contestants.items():
                name, columns = key if isinstance(key, tuple) else (key, ())
                value = self.seconds(step)
                row = {"contestant": name, **(common or {}), **dict(columns), "round": number}
                rows.append(row | {"value": value, "unit": "s"})
        return [row for row in rows if row["round"] > 0]

    def rounds_of(self, rounds: int) -> int:
        return rounds if self.rounds is None else self.rounds


# -- one meta-iteration -------------------------------------------------------------------------


def iterations(
    bench: Bench, names: list[str], n_way: int, inner_steps: int, meta_batch_size: int
) -> dict[str, Callable]:
    """A meta-iteration of each contestant: sampling, meta-gradient, updates.

    Our rates are updated too. Each contestant has its own parameters and the same tasks in the
    same order.
    """
    sampler = amaml.TaskSampler(bench.characters, n_way, k_shot=1, k_query=1)
    model = bench.model(n_way)

    def of_peer(name: str) -> Callable:
        step, generator = peers.peer_step(name, model, ALPHA, BETA, inner_steps), bench.generator()
        return lambda: step(sampler.sample(meta_batch_size, generator))

    ours = amaml_iteration(bench, model, sampler, inner_steps, meta_batch_size)
    return {AMAML: ours} | {name: of_peer(name) for name in names}


def amaml_iteration(bench: Bench, model, sampler, inner_steps: int, meta_batch_size: int):
    """One iteration of Alpha MAML; on a GPU as `amaml.train` makes it, as the replay of a graph."""
    state, generator = amaml.init_state(model, ALPHA, BETA), bench.generator()
    rates = {name: torch.tensor(rate, device=bench.device) for name, rate in RATES.items()}

    def step(state):
        tasks = sampler.sample(meta_batch_size, generator)
        state, metrics = amaml.meta_step(model, state, tasks, inner_steps=inner_steps, **rates)
        return state, torch.stack(list(metrics.values()))

    replay = step
    if cuda_graph.available(torch.device(bench.device)):
        replay = cuda_graph.replayed(step, state, [generator])

    def iteration() -> None:
        nonlocal state
        state, _ = replay(state)

    iteration.reads = step  # and thereby keeps the tensors that a graph reads
    return iteration


def amaml_step(model, inner_steps: int, rule: str = "additive") -> Callable:
    """One iteration of Alpha MAML as a function of the tasks; it keeps the state."""
    state = amaml.init_state(model, ALPHA, BETA, rule=rule)
    rates = {name: torch.tensor(rate).to(state.alpha) for name, rate in RATES.items()}

    def step(tasks: amaml.Tasks) -> None:
        nonlocal state
        state, _ = amaml.meta_step(model, state, tasks, inner_steps=inner_steps, **rates)

    return step


def right_peers(bench: Bench, names=tuple(peers.PEERS)) -> list[str]:
    """The peers that are installed and give our meta-gradient; the others go to `bench.wrong`."""
    here = [name for name in names if peers.installed(name)]
    for name in here:
        if name not in bench.checked:
            exact = gradient_error(bench, name, slice(None), torch.float64)
            # In float32 rounding can put a unit on the other side of ReLU's kink, which changes
            # the gradient of that task by percents: the median over tasks tells right from wrong.
            rounded = statistics.median(
                gradient_error(bench, name, i, torch.float32) for i in range(8)
            )
            bench.checked[name] = {"float64": exact, bench.precision: rounded}
    return [name for name in here if is_right(bench.checked[name])]


def is_right(errors: dict[str, float]) -> bool:
    return all(error <= TOLERANCE[kind] for kind, error in errors.items())


def gradient_error(
    bench: Bench,
    name: str,
    which: int | slice,
    dtype: torch.dtype,
    inner_steps: int = 2,
    filters: int = 64,
) -> float:
    """Relative difference of a peer's meta-gradient from ours, over some of 8 tasks."""
    model = bench.model(filters=filters).to(dtype)
    tasks = amaml.TaskSampler(bench.characters, n_way=5).sample(8, bench.generator())
    tasks, theta = tasks[which].to(dtype=dtype), dict(model.named_parameters())
    ours, _, _ = amaml.meta_gradient(model, theta, ALPHA, tasks, inner_steps=inner_steps)
    theirs = peers.in_amaml_layout(peers.peer(name, model, ALPHA, inner_steps)[1](tasks))
    difference = sum((ours[key] - theirs[key]).detach().square().sum() for key in ours)
    length = sum(value.detach().square().sum() for value in ours.values())
    return float((difference / length).sqrt())


def forward_flop(model: amaml.OmniglotCNN, image_size: int = 28) -> int:
    """Floating-point operations of the products of one image's forward pass.

    A multiplication and an addition count as two. Normalisation and ReLU are not counted.
    """
    flop, size = 0, image_size
    for value in model.state_dict().values():
        if value.ndim == 4:  # (3, 3, in, out), with stride 2
            size = -(-size // 2)
            flop += 2 * size * size * value.numel()
        elif value.ndim == 2:
            flop += 2 * value.numel()
    return flop


def iteration_flop(
    model: amaml.OmniglotCNN, n_way: int, inner_steps: int, meta_batch_size: int
) -> int:
    """Arithmetic of a second-order meta-iteration, 1-shot with one query image per class.

    A backward pass costs two forward passes. Each inner step is a forward and a backward pass over
    the support set, and both are differentiated: 9 forward passes. The query set takes 3.
    """
    images = 9 * inner_steps * n_way + 3 * n_way
    return meta_batch_size * images * forward_flop(model)


def iteration(bench: Bench) -> Rows:
    """5-way 1-shot, meta-batch 32, one inner step, beside all peers and a large matrix product."""
    size = 2048 if bench.device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=bench.device) for _ in range(2))
    sizes = {"n_way": 5, "inner_steps": 1, "meta_batch_size": 32}
    contestants = iterations(bench, right_peers(bench), **sizes)
    flop = iteration_flop(bench.model(), **sizes)
    rows = bench.interleave(contestants | {PRODUCT: lambda: a @ b}, 10, sizes)
    return [
        row | {"gflop": (2 * size**3 if row["contestant"] == PRODUCT else flop) / 1e9}
        for row in rows
    ]


def twenty_way(bench: Bench) -> Rows:
    """20-way 1-shot, 5 inner steps, meta-batch 16, beside learn2learn."""
    sizes = {"n_way": 20, "inner_steps": 5, "meta_batch_size": 16}
    names = right_peers(bench, ["learn2learn"])
    return bench.interleave(iterations(bench, names, **sizes), 3, sizes)


def curve(bench: Bench, rounds: int, name: str, values: list[int], names=(), **sizes) -> Rows:
    """Iterations with one of the sizes varied, all in the same rounds."""
    contestants = {}
    for value in values:
        varied = sizes | {name: value}
        for contestant, step in iterations(bench, names, **varied).items():
            contestants[contestant, tuple(varied.items())] = step
    return bench.interleave(contestants, rounds)


def meta_batch(bench: Bench) -> Rows:
    """5-way 1-shot: meta-batches of 1 to 256 tasks."""
    values = [2**power for power in range(9)]
    return curve(bench, 6, "meta_batch_size", values, n_way=5, inner_steps=1)


def inner_steps(bench: Bench) -> Rows:
    """5-way 1-shot, meta-batch 16: 1 to 10 inner steps."""
    names = right_peers(bench, ["learn2learn"])
    return curve(bench, 3, "inner_steps", [1, 2, 5, 10], names, n_way=5, meta_batch_size=16)


def ways(bench: Bench) -> Rows:
    """1-shot, one inner step, meta-batch 16: 2 to 20 classes."""
    names = right_peers(bench, ["learn2learn"])
    return curve(bench, 4, "n_way", [2, 5, 10, 20], names, inner_steps=1, meta_batch_size=16)
