"""The same numbers, faster, for the paper's network and on GPUs: `amaml` is complete without it.

`amaml.maml` asks `serves` before each call and enters by `meta_gradient` and `query_metrics`;
`amaml.runs.batch` asks `cuda_graph.available`. AMAML_FAST=0 in the environment turns both off.
"""

from __future__ import annotations

import os
from itertools import chain

from torch import Tensor, nn

from amaml.checks import Theta, is_differentiated
from amaml.fast.meta_gradients import meta_gradient, query_metrics
from amaml.fast.omniglot_cnn import BLOCKS, HEAD
from amaml.inner_loop import meta_only
from amaml.model import ConvBlock, OmniglotCNN
from amaml.shapes import Float

__all__ = ["ON", "meta_gradient", "query_metrics", "serves"]

ON = os.environ.get("AMAML_FAST", "1") != "0"
MODULES = [OmniglotCNN, nn.Sequential, *4 * [ConvBlock], nn.Linear]


def serves(model: nn.Module, theta: Theta, alpha: Float[Tensor, ""]) -> bool:
    """Whether the written-out passes give what this call of `meta_gradient` asks for.

    They do for an `OmniglotCNN` as it was made, with all its parameters in theta and the offsets
    alone left out of the inner loop, unless somebody differentiates through the call.
    """
    return (
        ON
        and [type(module) for module in model.modules()] == MODULES
        and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        and theta.keys() == {*HEAD, *chain(*BLOCKS)}
        and meta_only(model) == {offset for _, offset in BLOCKS}
        and not is_differentiated(alpha, *theta.values())
    )
