"""Two ways to the meta-gradient of any module, backwards through the inner loop.

Both take the model, theta, alpha, a meta-batch `(support_x, support_y, query_x, query_y)` with the
tasks in front, the number of inner steps, whether to leave out the second order, and the loss; both
give the gradients by theta and by alpha, means over the tasks, and metrics of each task.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import unwrap

from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vjp, vmap
from torch.nn import functional as F

from amaml.checks import Loss, Theta

TASKS_AT_ONCE = 32  # tasks of any module that are evaluated at a time: 1,000 would fill the memory


def inner_loop(
    model: nn.Module,
    theta: Theta,
    alpha: float | Tensor,
    x: Tensor,
    y: Tensor,
    inner_steps: int,
    first_order: bool,
    loss: Loss,
) -> tuple[dict[str, Tensor], Tensor]:
    """`adapt` without its checks: theta_prime, and the support loss at theta (before any step)."""
    fixed = meta_only(model)
    adapted = {name: value for name, value in theta.items() if name not in fixed}

    def support_loss(adapted: Theta) -> Tensor:
        return loss(functional_call(model, {**theta, **adapted}, (x,)), y)

    first_loss = None
    for _ in range(inner_steps):
        gradient, value = grad_and_value(support_loss)(adapted)
        first_loss = value if first_loss is None else first_loss
        if first_order:
            gradient = {name: g.detach() for name, g in gradient.items()}
        adapted = {name: adapted[name] - alpha * gradient[name] for name in adapted}  # (1)
    return {**theta, **adapted}, first_loss


def by_mapping(model, theta, alpha, batch, inner_steps, first_order, loss):
    """`meta_gradient` for any module: one task's gradient, mapped over the tasks."""

    def task_loss(theta, alpha, support_x, support_y, query_x, query_y):
        theta_prime, support_loss = inner_loop(
            model, theta, alpha, support_x, support_y, inner_steps, first_order, loss
        )
        metrics = measure(functional_call(model, theta_prime, (query_x,)), query_y, loss)
        return metrics["query_loss"], {"support_loss": support_loss, **metrics}

    per_task = grad_and_value(task_loss, argnums=(0, 1), has_aux=True)  # (3) and (4) in one pass
    (gradient, d_alpha), (_, metrics) = vmap(per_task, in_dims=(None, None, 0, 0, 0, 0))(
        theta, alpha, *batch
    )
    return {name: g.mean(0) for name, g in gradient.items()}, d_alpha.mean(0), metrics


def by_recomputing(model, theta, alpha, batch, inner_steps, first_order, loss):
    """`meta_gradient` in memory that hardly grows with `inner_steps`: see `through_steps`."""

    def task_gradient(support_x, support_y, query_x, query_y):
        def adapt(theta, alpha, steps: int = 1):
            return inner_loop(model, theta, alpha, support_x, support_y, steps, first_order, loss)

        def pull_back(theta, v):
            return vjp(adapt, theta, alpha, has_aux=True)[1](v)

        def query_loss(theta_prime):
            metrics = measure(functional_call(model, theta_prime, (query_x,)), query_y, loss)
            return metrics["query_loss"], metrics

        theta_prime, support_loss = adapt(theta, alpha, inner_steps)
        v, (_, metrics) = grad_and_value(query_loss, has_aux=True)(theta_prime)
        gradient, d_alpha = through_steps(
            theta, v, inner_steps, lambda theta: adapt(theta, alpha)[0], pull_back
        )
        return gradient, d_alpha, {"support_loss": support_loss, **metrics}

    gradient, d_alpha, metrics = vmap(task_gradient)(*batch)
    return {name: g.mean(0) for name, g in gradient.items()}, d_alpha.mean(0), metrics


def through_steps(theta, v, steps: int, step: Callable, pull_back: Callable) -> tuple:
    """v, `steps` inner steps earlier, at theta; and what alpha gathers on the way.

    `step(theta)` is the next theta; `pull_back(theta, v)` goes back through one step,
    v_k = (I - alpha H(theta_k)) v_{k+1}. Only one step's graph is held at a time: the theta_k on
    the way are computed again from the middle of what is left, and the memory is that of as many
    theta as the logarithm of the steps.
    """
    waiting, gathered = [(theta, steps)], 0
    while waiting:
        theta, steps = waiting.pop()
        while steps > 1:
            waiting.append((theta, steps // 2))
            for _ in range(steps // 2):
                theta = step(theta)
            steps -= steps // 2
        v, of_step = pull_back(theta, v)
        gathered = gathered + of_step
    return v, gathered


def metrics_by_mapping(model, theta, alpha, batch, inner_steps, loss) -> dict[str, Tensor]:
    """Each task's query loss and accuracy after adaptation, `(tasks,)`; no gradient is kept."""

    def one_task(support_x, support_y, query_x, query_y):
        theta_prime, _ = inner_loop(
            model, theta, alpha, support_x, support_y, inner_steps, False, loss
        )
        return measure(functional_call(model, theta_prime, (query_x,)), query_y, loss)

    return vmap(one_task, chunk_size=TASKS_AT_ONCE)(*batch)


def measures(loss: Loss) -> tuple[str, ...]:
    """What `measure` gives."""
    return ("query_loss", "query_accuracy") if unwrap(loss) is F.cross_entropy else ("query_loss",)


def measure(prediction: Tensor, y: Tensor, loss: Loss) -> dict[str, Tensor]:
    """One task's `query_loss` and, for the cross-entropy, `query_accuracy`."""
    metrics = {"query_loss": loss(prediction, y)}
    if unwrap(loss) is F.cross_entropy:
        metrics["query_accuracy"] = accuracy(prediction, y)
    return metrics


def meta_only(model: nn.Module) -> set[str]:
    """Names of the parameters that the inner loop leaves alone, from all parts of the model."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in getattr(module, "meta_only", ())
    }


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """The share of each task's examples, in 0..1, whose largest logit is that of their label."""
    return (logits.argmax(-1) == y).to(logits.dtype).mean(-1)
