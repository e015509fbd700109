"""MAML: equations 1 to 3 of Behl et al. (2019), and equation 4, which comes out of the same pass.

Everything is a pure function of the parameters `theta` (a dict by parameter name) and the inner
learning rate `alpha`. The tasks of a meta-batch are worked on side by side.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from amaml.checks import (
    Loss,
    Theta,
    as_scalar,
    check_call,
    check_examples,
    checked_loss,
    is_differentiated,
)
from amaml.fast import omniglot_cnn
from amaml.fast.meta_gradients import by_passes, metrics_by_passes
from amaml.inner_loop import (
    by_mapping,
    by_recomputing,
    inner_loop,
    meta_only,
    metrics_by_mapping,
)
from amaml.memory import keep_freed_memory
from amaml.tasks import Tasks


def adapt(
    model: nn.Module,
    theta: Theta,
    alpha: float | Tensor,
    x: Tensor,
    y: Tensor,
    *,
    inner_steps: int = 1,
    first_order: bool = False,
    loss: Loss = F.cross_entropy,
) -> dict[str, Tensor]:
    """The parameters adapted to one task, theta_prime: equation 1, `inner_steps` times.

    `x` (examples, ...) and `y` (examples, ...) are the support set of one task. The result is
    differentiable in `theta` and `alpha`; with `first_order` the inner gradients count as
    constants (section 5.2 of Finn et al. 2017). Parameters named in an attribute `meta_only` of the
    model or of one of its parts are left as they are.
    """
    check_call(model, theta, inner_steps, first_order, loss)
    check_examples(x, y)
    theta, (x,) = same_dtype(theta, x)
    alpha = as_scalar("alpha", alpha, like=next(iter(theta.values())))
    loss = checked_loss(loss, y=y)
    return inner_loop(model, theta, alpha, x, y, inner_steps, first_order, loss)[0]


def meta_gradient(
    model: nn.Module,
    theta: Theta,
    alpha: float | Tensor,
    tasks: Tasks,
    *,
    inner_steps: int = 1,
    first_order: bool = False,
    recompute: bool = False,
    loss: Loss = F.cross_entropy,
) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """The gradient of the mean query loss after adaptation, with respect to theta and to alpha.

    Returns `(gradient, d_alpha, metrics)`: the meta-gradient of equation 3 as a dict like `theta`;
    the hypergradient of equation 4, a scalar, out of the same backward pass; and the tasks' mean
    `support_loss` (at theta, before adaptation), `query_loss` (at theta_prime) and, for the
    cross-entropy, `query_accuracy` in 0..1. All are means over the tasks of the meta-batch.

    `model` is any `nn.Module` without running statistics. `loss(prediction, y)` gives a scalar for
    one task. With `first_order` the inner gradients count as constants: the second-order term is
    left out, and of the hypergradient (which for one inner step stays exact) what goes through it.
    Tasks or theta in float64 give results in float64. With `recompute` inner steps are computed
    again on the way back: memory then hardly grows with `inner_steps`, for about half as much time
    more.

    The gradient is taken task by task and averaged afterwards, never of the average: the latter
    order of `torch.func` transforms is silently wrong through torch's own normalisation layers.
    """
    check_call(model, theta, inner_steps, first_order, loss, tasks)
    theta, (support_x, query_x) = same_dtype(theta, tasks.support_x, tasks.query_x)
    alpha = as_scalar("alpha", alpha, like=next(iter(theta.values())))
    loss = checked_loss(loss, support_y=tasks.support_y, query_y=tasks.query_y)
    batch = (support_x, tasks.support_y, query_x, tasks.query_y)
    if alpha.device.type == "cpu":
        keep_freed_memory()
    gradient_of = by_recomputing if recompute else by_mapping
    if has_passes(model, theta, alpha):
        gradient_of = partial(by_passes, recompute=recompute)
    gradient, d_alpha, metrics = gradient_of(
        model, theta, alpha, batch, inner_steps, first_order, loss
    )
    # Contiguous, as a checkpoint gives it back: the order of later sums depends on the layout.
    gradient = {name: g.contiguous() for name, g in gradient.items()}
    return gradient, d_alpha, {name: m.mean(0) for name, m in metrics.items()}


def query_metrics(model, theta, alpha, batch, inner_steps, loss) -> dict[str, Tensor]:
    """Each task's `query_loss` and, for the cross-entropy, `query_accuracy` after adaptation,
    `(tasks,)`; the batch is (support_x, support_y, query_x, query_y)."""
    way = metrics_by_passes if has_passes(model, theta, alpha) else metrics_by_mapping
    return way(model, theta, alpha, batch, inner_steps, loss)


def has_passes(model: nn.Module, theta: Theta, alpha: Tensor) -> bool:
    """Whether the written-out passes serve: they are the model's, and nobody differentiates through
    this call."""
    return omniglot_cnn.apply_to(model, theta, meta_only(model)) and not is_differentiated(
        alpha, *theta.values()
    )


def same_dtype(theta: Theta, *inputs: Tensor) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """theta and the inputs in the wider of their floating-point dtypes."""
    dtype = next(iter(theta.values())).dtype
    for x in inputs:
        if x.is_floating_point():
            dtype = torch.promote_types(dtype, x.dtype)
    theta = {name: value.to(dtype) for name, value in theta.items()}
    return theta, tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
