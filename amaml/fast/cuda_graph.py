"""A step of tensors as one CUDA graph: a single call starts all its kernels.

A meta-iteration is hundreds of small kernels, and starting each of them takes time of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from amaml import fast

StepFunction = Callable[[Any], tuple[Any, Tensor]]
TOLERANCE = 1e-3  # relative, of a replayed step's values from those of the step itself
WITHOUT = "set AMAML_CUDA_GRAPHS=0 to start its kernels one by one"


def capture(work: Callable[[], None], generators: Sequence[torch.Generator]) -> Callable:
    """The kernels of `work` as a function that replays them; the generators advance as with it."""
    graph, device = torch.cuda.CUDAGraph(), generators[0].device
    for generator in generators:
        graph.register_generator_state(generator)
    # A stream of its own: what libraries set aside for one would go with the first of its graphs.
    captured = torch.cuda.graph(graph, stream=torch.cuda.Stream(device))
    try:
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream()), captured:
            work()
    except RuntimeError as error:
        raise RuntimeError(f"a step cannot be captured as a CUDA graph; {WITHOUT}") from error
    return graph.replay


CAPTURES = {"cuda": capture}  # by the type of device


def available(device: torch.device) -> bool:
    """Whether steps are replayed there; AMAML_CUDA_GRAPHS=0 in the environment says no."""
    return fast.ON and device.type in CAPTURES and os.environ.get("AMAML_CUDA_GRAPHS", "1") != "0"


def replayed(step: StepFunction, state, generators: Sequence[torch.Generator]) -> StepFunction:
    """`step(state) -> (next_state, values)` as the replay of what it did for `state`.

    The next call overwrites the state that this one returns: clone what is to last. The caller must
    keep all other tensors that the step reads, where they are. Raises RuntimeError where the first
    two replays do not agree with the step itself.
    """
    static = tree_map(torch.clone, state)
    before = [generator.get_state() for generator in generators]
    values = torch.empty(0)

    def load(new) -> None:
        for place, value in zip(tree_leaves(static), tree_leaves(new), strict=True):
            place.copy_(value)  # nothing to do where both are the same tensor

    def rewind() -> None:
        load(state)
        for generator, was in zip(generators, before, strict=True):
            generator.set_state(was)

    def work() -> None:
        nonlocal values
        new, values = step(static)
        load(new)

    def replay_from(new) -> tuple[Any, Tensor]:
        if new is not static:
            load(new)
        replay()
        return static, values.clone()

    # Without a graph first: libraries make themselves ready in their first calls.
    next_state, first = step(state)
    expected = torch.stack([first, step(next_state)[1]])
    rewind()
    replay = CAPTURES[first.device.type](work, generators)
    rewind()
    found = torch.stack([replay_from(static)[1] for _ in range(2)])
    rewind()
    if not torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True):
        raise RuntimeError(
            "a replayed step does not give the numbers of the step itself "
            f"({found.tolist()} for {expected.tolist()}, torch {torch.__version__}); {WITHOUT}"
        )
    return replay_from
