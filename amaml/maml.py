"""MAML: equations 1 to 3 of Behl et al. (2019), and equation 4, which comes out of the same pass.

Everything is a pure function of the parameters `theta` (a dict by parameter name) and the inner
rate `alpha`, for any module. What is faster for some modules lies in `amaml.fast`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vjp
from torch.nn import functional as F

from amaml import fast
from amaml.checks import Loss, Theta, as_scalar, check_call, check_examples, checked_loss
from amaml.inner_loop import forward, inner_loop, mapped, task_metrics, through_steps
from amaml.shapes import Float
from amaml.tasks import Tasks

TASKS_AT_ONCE = 32  # of those that are evaluated: 1,000 at a time would fill the memory


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
    """Adapt the parameters to one task: equation 1, `inner_steps` times.

    Parameters named in an attribute `meta_only` of the model or of one of its parts stay as they
    are.

    Args:
        model: any module that `meta_gradient` takes; it is left as it is.
        theta: parameters by name, as from `MetaState.theta`.
        alpha: the inner rate.
        x, y: inputs and targets of the support set, (examples, ...).
        inner_steps, first_order, loss: see `meta_gradient`.

    Returns:
        theta_prime, a dict like `theta`, differentiable in `theta` and `alpha`.
    """
    check_call(model, theta, inner_steps, first_order)
    check_examples(x, y)
    theta, (x,) = same_dtype(theta, x)
    alpha, loss = as_scalar("alpha", alpha, like=widest(theta)), checked_loss(loss, y=y)
    theta_prime, _ = inner_loop(model, theta, alpha, x, y, inner_steps, first_order, loss)
    return theta_prime


def predict(
    model: nn.Module,
    theta: Theta,
    alpha: float | Tensor,
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    *,
    inner_steps: int = 1,
    loss: Loss = F.cross_entropy,
):
    """The model's output for `query_x` after it has been adapted to a support set.

    A model that normalises by batch statistics, as `OmniglotCNN` does, sees the query set as a
    whole (it is transductive): give all its examples together, in about the proportions of
    training, and not one at a time.

    Args:
        model, theta, alpha, inner_steps, loss: see `adapt`.
        support_x, support_y: inputs and targets of the support set, (examples, ...).
        query_x: inputs of the query set, (examples, ...).

    Returns:
        What `model(query_x)` gives at theta_prime: for `OmniglotCNN` logits, (examples, n_way).
    """
    at = adapt(model, theta, alpha, support_x, support_y, inner_steps=inner_steps, loss=loss)
    at, (query_x,) = same_dtype(at, query_x)
    return forward(model, at, query_x)


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
) -> tuple[dict[str, Tensor], Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """The gradient of the mean query loss after adaptation, by theta and by alpha.

    Float64 tasks or theta give results in float64. The gradient is taken task by task and averaged
    afterwards, never of the average: that order of `torch.func` transforms is silently wrong
    through torch's own normalisation layers.

    Args:
        model: any module whose output depends on its parameters and its input alone.
        theta: parameters by name.
        alpha: the inner rate.
        tasks: a meta-batch.
        inner_steps: gradient steps of the inner loop.
        first_order: take the inner gradients as constants (section 5.2 of Finn et al. 2017). This
            leaves out the second-order term, and what of the hypergradient goes through it.
        recompute: gradient checkpointing; memory hardly grows with `inner_steps`, and a call takes
            about 50 % more time.
        loss: a function of (prediction, y) that gives a scalar for one task.

    Returns:
        (gradient, d_alpha, metrics), all means over the tasks: the meta-gradient of equation 3 as
        a dict like `theta`; the hypergradient of equation 4, a scalar, out of the same backward
        pass; and `support_loss` (at theta), `query_loss` (at theta_prime) and, for the
        cross-entropy, `query_accuracy` in 0..1.
    """
    check_call(model, theta, inner_steps, first_order, tasks)
    at, batch, loss = prepared(theta, alpha, tasks, loss)
    by = fast.meta_gradient if fast.serves(model, *at) else mapped_meta_gradient
    gradient, d_alpha, metrics = by(model, *at, batch, inner_steps, first_order, loss, recompute)
    # Contiguous, as a checkpoint gives it back: the order of later sums depends on the layout.
    gradient = {name: g.contiguous() for name, g in gradient.items()}
    return gradient, d_alpha, {name: m.mean(0) for name, m in metrics.items()}


def query_metrics(
    model: nn.Module, theta: Theta, alpha: Tensor, tasks: Tasks, inner_steps: int, loss: Loss
) -> dict[str, Float[Tensor, " tasks"]]:
    """Each task's `query_loss` and, for the cross-entropy, `query_accuracy` after adaptation."""
    check_call(model, theta, inner_steps, False, tasks)
    at, batch, loss = prepared(theta, alpha, tasks, loss)
    by = fast.query_metrics if fast.serves(model, *at) else mapped_query_metrics
    return by(model, *at, batch, inner_steps, loss)


def mapped_meta_gradient(
    model, theta, alpha, batch, inner_steps, first_order, loss, recompute
) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """`meta_gradient` of any module, its checks apart: one task's, mapped over the tasks."""

    steps = partial(inner_loop, model, first_order=first_order, loss=loss)

    def query_loss(theta_prime, x, y):
        metrics = task_metrics(forward(model, theta_prime, x), y, loss)
        return metrics["query_loss"], metrics

    def task_loss(theta, alpha, x, y, query_x, query_y):
        theta_prime, support_loss = steps(theta, alpha, x, y, inner_steps)
        value, metrics = query_loss(theta_prime, query_x, query_y)
        return value, {"support_loss": support_loss, **metrics}

    # (3) and (4) in one pass
    in_one_pass = grad_and_value(task_loss, argnums=(0, 1), has_aux=True)

    def step_by_step(theta, alpha, x, y, query_x, query_y):
        def step(theta, alpha=alpha):
            return steps(theta, alpha, x, y, 1)[0]

        def step_vjp(theta, v):
            return vjp(step, theta, alpha)[1](v)

        theta_prime, support_loss = steps(theta, alpha, x, y, inner_steps)
        v, (_, metrics) = grad_and_value(query_loss, has_aux=True)(theta_prime, query_x, query_y)
        gradients = through_steps(theta, v, inner_steps, step, step_vjp)
        return gradients, ((), {"support_loss": support_loss, **metrics})

    task_gradient = step_by_step if recompute else in_one_pass
    (gradient, d_alpha), (_, metrics) = mapped(model, partial(task_gradient, theta, alpha), *batch)
    return {name: g.mean(0) for name, g in gradient.items()}, d_alpha.mean(0), metrics


def mapped_query_metrics(model, theta, alpha, batch, inner_steps, loss) -> dict[str, Tensor]:
    """`query_metrics` of any module, its checks apart."""

    def one_task(x, y, query_x, query_y):
        theta_prime, _ = inner_loop(model, theta, alpha, x, y, inner_steps, False, loss)
        return task_metrics(forward(model, theta_prime, query_x), query_y, loss)

    return mapped(model, one_task, *batch, chunk_size=TASKS_AT_ONCE)


def prepared(
    theta, alpha, tasks: Tasks, loss: Loss
) -> tuple[tuple[dict[str, Tensor], Tensor], tuple, Loss]:
    """((theta, alpha), (support_x, support_y, query_x, query_y), loss), ready to compute with."""
    loss = checked_loss(loss, support_y=tasks.support_y, query_y=tasks.query_y)
    theta, (support_x, query_x) = same_dtype(theta, tasks.support_x, tasks.query_x)
    alpha = as_scalar("alpha", alpha, like=widest(theta))
    return (theta, alpha), (support_x, tasks.support_y, query_x, tasks.query_y), loss


def same_dtype(theta: Theta, *inputs: Tensor) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """Theta and the inputs in float64 where one of them is and the other is in float32.

    Parameters of several dtypes, or of a shorter one, are the model's own affair: they stay.
    """
    theta, usual = dict(theta), {torch.float32, torch.float64}
    floats = [x for x in (*theta.values(), *inputs) if x.is_floating_point()]
    of_theta = {value.dtype for value in theta.values()}
    if len(of_theta) == 1 and {x.dtype for x in floats} == usual:
        theta = {name: value.double() for name, value in theta.items()}
        inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    return theta, inputs


def widest(theta: Theta) -> Tensor:
    """A parameter of the dtype that theta's rates have."""
    return max(theta.values(), key=lambda value: torch.finfo(value.dtype).bits)
