"""The same numbers, faster, for what the paper's experiments spend their time on.

Everything here can be deleted, or switched off by the environment variable AMAML_FAST=0: `maml`
is complete without it.
"""

from __future__ import annotations

import os

from torch import Tensor, nn

from amaml.checks import Theta, is_differentiated
from amaml.fast.meta_gradients import by_passes, metrics_by_passes
from amaml.fast.omniglot_cnn import apply_to
from amaml.inner_loop import meta_only

ON = os.environ.get("AMAML_FAST") != "0"
query_metrics = metrics_by_passes


def serves(model: nn.Module, theta: Theta, alpha: Tensor) -> bool:
    """Whether the written-out passes are those of this model, and nobody differentiates them."""
    passes = ON and apply_to(model, theta, meta_only(model))
    return passes and not is_differentiated(alpha, *theta.values())


def meta_gradient(
    model, theta, alpha, batch, inner_steps, first_order, loss, recompute
) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    return by_passes(
        model, theta, alpha, batch, inner_steps, first_order, loss, recompute=recompute
    )
