"""A step of tensors as one CUDA graph: all its kernels are started by a single call.

A meta-iteration is hundreds of small kernels, and starting each of them takes time of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Step = Callable[[object], tuple[object, Tensor]]
TOLERANCE = 1e-3  # relative, of a replayed step's values from those of the step itself
WITHOUT = "set AMAML_CUDA_GRAPHS=0 to start its kernels one by one"


def cuda_graph(work: Callable[[], None], generators: Sequence[torch.Generator]) -> Callable:
    """`work`, whose tensors stay where they are, as a function that replays its kernels.

    The generators go on with each replay as they do with the work itself.
    """
    graph, device = torch.cuda.CUDAGraph(), generators[0].device
    for generator in generators:
        graph.register_generator_state(generator)
    # A stream of its own: what libraries set aside for one would go with the first of its graphs.
    capture = torch.cuda.graph(graph, stream=torch.cuda.Stream(device))
    try:
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream()), capture:
            work()
    except RuntimeError as error:
        raise RuntimeError(
            f"a meta-iteration could not be captured as a CUDA graph ({error}); {WITHOUT}"
        ) from error
    return graph.replay


CAPTURES = {"cuda": cuda_graph}  # by the type of device


def available(device: torch.device) -> bool:
    """Whether steps are replayed there; the environment variable AMAML_CUDA_GRAPHS=0 says no."""
    return device.type in CAPTURES and os.environ.get("AMAML_CUDA_GRAPHS", "1") != "0"


def replayed(step: Step, state, generators: Sequence[torch.Generator]) -> Step:
    """`step(state) -> (next state, values)` as the replay of what it did for `state`.

    The state that comes back is overwritten by the next call; take a copy of what is to last. All
    other tensors that the step reads must be kept by the caller, where they are. The first two
    replays are held against the step itself: a RuntimeError where they do not agree.
    """
    static = tree_map(torch.clone, state)
    before = [generator.get_state() for generator in generators]
    values: list[Tensor] = [torch.empty(0)]

    def load(new) -> None:
        for place, value in zip(tree_leaves(static), tree_leaves(new), strict=True):
            if place is not value:
                place.copy_(value)

    def rewind() -> None:
        load(state)
        for generator, was in zip(generators, before, strict=True):
            generator.set_state(was)

    def work() -> None:
        new, values[0] = step(static)
        load(new)

    # Outside of the graph first: libraries make themselves ready in their first calls.
    next_state, first = step(state)
    expected = torch.stack([first, step(next_state)[1]])
    rewind()
    replay = CAPTURES[first.device.type](work, generators)
    rewind()
    found = []
    for _ in range(2):
        replay()
        found.append(values[0].clone())
    found = torch.stack(found)
    rewind()
    if not torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True):
        raise RuntimeError(
            "a replayed meta-iteration does not give the numbers of the iteration itself "
            f"({found.tolist()} for {expected.tolist()}, torch {torch.__version__}); {WITHOUT}"
        )

    def replay_from(new) -> tuple[object, Tensor]:
        if new is not static:
            load(new)
        replay()
        return static, values[0].clone()

    return replay_from
