"""MAML's inner loop and meta-gradient: equations 1 to 4 of Behl et al. (2019).

Everything is a pure function of the parameters `theta` (a dict by parameter name) and the inner
learning rate `alpha`. The tasks of a meta-batch run side by side in one `torch.func.vmap`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import unwrap

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.func import functional_call, grad_and_value, vjp, vmap
from torch.nn import functional as F

from amaml.arguments import (
    Loss,
    Theta,
    as_scalar,
    check_call,
    check_examples,
    checked_loss,
    is_differentiated,
)
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
    one task. The second-order term is left out with `first_order`. Tasks or theta in float64 give
    results in float64. With `recompute` inner steps are computed again on the way back: memory then
    hardly grows with `inner_steps`, for about half as much time more.

    The gradient is taken task by task and averaged afterwards, never of the average: the latter
    order of `torch.func` transforms is silently wrong through torch's own normalisation layers.
    """
    check_call(model, theta, inner_steps, first_order, loss, tasks)
    theta, (support_x, query_x) = same_dtype(theta, tasks.support_x, tasks.query_x)
    alpha = as_scalar("alpha", alpha, like=next(iter(theta.values())))
    loss = checked_loss(loss, support_y=tasks.support_y, query_y=tasks.query_y)
    batch = (support_x, tasks.support_y, query_x, tasks.query_y)
    gradient_of = by_mapping
    if recompute:
        gradient_of = by_recomputing
    elif is_stackable(model, alpha, theta):
        gradient_of = by_stacking
    gradient, d_alpha, metrics = gradient_of(
        model, theta, alpha, batch, inner_steps, first_order, loss
    )
    # Contiguous, as a checkpoint gives it back: the order of later sums depends on the layout.
    gradient = {name: g.contiguous() for name, g in gradient.items()}
    return gradient, d_alpha, {name: m.mean(0) for name, m in metrics.items()}


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


def by_stacking(model, theta, alpha, batch, inner_steps, first_order, loss):
    """`meta_gradient` for a model that takes a set of parameters for each task.

    The same numbers as `by_mapping` in less time: plain autograd works on all tasks at once.
    """
    names, measured = list(theta), ["support_loss", *measures(loss)]

    def work(alpha, *tensors):
        run_theta = dict(zip(names, tensors, strict=False))
        run_batch = tensors[len(names) :]
        return stacked_gradients(model, run_theta, alpha, run_batch, inner_steps, first_order, loss)

    outputs = ForEachRun.apply(work, alpha, *theta.values(), *batch)
    *gradient, d_alpha = outputs[: len(names) + 1]
    metrics = dict(zip(measured, outputs[len(names) + 1 :], strict=True))
    return dict(zip(names, gradient, strict=True)), d_alpha, metrics


class ForEachRun(Function):
    """A function of tensors that have the runs in front, for one run or under `vmap` for many.

    Plain autograd cannot work under `torch.func` transforms; this hands it the tensors beneath.
    """

    @staticmethod
    def forward(work: Callable, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(out.squeeze(0) for out in work(*(tensor.unsqueeze(0) for tensor in tensors)))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info, in_dims, work, *tensors):
        runs = [
            tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip(tensors, in_dims[1:], strict=True)
        ]
        outputs = work(*runs)
        return outputs, (0,) * len(outputs)


def stacked_gradients(model, theta, alpha, batch, inner_steps, first_order, loss):
    """Meta-gradients of runs side by side, everything with the runs in front: theta `(runs, ...)`,
    alpha `(runs,)`, the batch `(runs, tasks, ...)`. Returns gradients, d_alpha and metrics in turn.
    """
    runs, tasks = batch[0].shape[:2]
    support_x, support_y, query_x, query_y = (x.flatten(0, 1) for x in batch)
    with torch.enable_grad():
        theta = {name: value.detach().requires_grad_() for name, value in theta.items()}
        alpha = alpha.detach().requires_grad_()
        theta_prime, support_loss = stacked_inner_loop(
            model,
            {name: for_each_task(value, tasks) for name, value in theta.items()},
            for_each_task(alpha, tasks),
            *(support_x, support_y, inner_steps, first_order, loss),
        )
        prediction = functional_call(model, theta_prime, (query_x,))
        metrics = vmap(partial(measure, loss=loss))(prediction, query_y)
        # No run's loss depends on another's parameters: the sum has each run's own gradient.
        query_loss = metrics["query_loss"].view(runs, tasks).mean(1).sum()
        gradient = torch.autograd.grad(query_loss, [*theta.values(), alpha])  # (3) and (4)
    metrics = (support_loss, *metrics.values())
    return *gradient, *(value.detach().view(runs, tasks) for value in metrics)


def for_each_task(value: Tensor, tasks: int) -> Tensor:
    """(runs, ...) -> (runs*tasks, ...)"""
    return value.unsqueeze(1).expand(-1, tasks, *value.shape[1:]).flatten(0, 1)


def stacked_inner_loop(model, theta, alpha, x, y, inner_steps, first_order, loss):
    """`inner_loop` for all tasks at once: all tensors have the tasks in front."""
    fixed = meta_only(model)
    adapted = {name: value for name, value in theta.items() if name not in fixed}
    first_loss = None
    for _ in range(inner_steps):
        losses = vmap(loss)(functional_call(model, {**theta, **adapted}, (x,)), y)
        first_loss = losses if first_loss is None else first_loss
        # No task's loss depends on another's parameters: the sum has each task's own gradient.
        gradient = torch.autograd.grad(
            losses.sum(), list(adapted.values()), create_graph=not first_order
        )
        adapted = {
            name: torch.addcmul(value, g, -alpha.view(-1, *[1] * (g.ndim - 1)))  # (1)
            for (name, value), g in zip(adapted.items(), gradient, strict=True)
        }
    return {**theta, **adapted}, first_loss


def by_recomputing(model, theta, alpha, batch, inner_steps, first_order, loss):
    """`meta_gradient` in memory that hardly grows with `inner_steps`: by their logarithm.

    Backwards through the inner steps, v_k = (I - alpha H(theta_k)) v_{k+1}, one step's graph at a
    time. The theta_k on the way are computed again from the middle of what is left.
    """

    def task_gradient(support_x, support_y, query_x, query_y):
        def adapt(theta, alpha, steps: int = 1):
            return inner_loop(model, theta, alpha, support_x, support_y, steps, first_order, loss)

        def backward(theta, v, steps: int):
            """v, `steps` inner steps earlier, at theta; and what alpha gathers on the way."""
            if steps == 1:
                _, pull_back, _ = vjp(adapt, theta, alpha, has_aux=True)
                return pull_back(v)
            half = steps // 2
            v, later = backward(adapt(theta, alpha, half)[0], v, steps - half)
            v, earlier = backward(theta, v, half)
            return v, earlier + later

        def query_loss(theta_prime):
            metrics = measure(functional_call(model, theta_prime, (query_x,)), query_y, loss)
            return metrics["query_loss"], metrics

        theta_prime, support_loss = adapt(theta, alpha, inner_steps)
        v, (_, metrics) = grad_and_value(query_loss, has_aux=True)(theta_prime)
        gradient, d_alpha = backward(theta, v, inner_steps)
        return gradient, d_alpha, {"support_loss": support_loss, **metrics}

    gradient, d_alpha, metrics = vmap(task_gradient)(*batch)
    return {name: g.mean(0) for name, g in gradient.items()}, d_alpha.mean(0), metrics


def query_metrics(model, theta, alpha, batch, inner_steps, loss) -> dict[str, Tensor]:
    """Each task's query loss and accuracy after adaptation, `(tasks,)`; no gradient is kept."""
    support_x, support_y, query_x, query_y = batch
    with_loss = partial(measure, loss=loss)
    if is_stackable(model, alpha, theta):
        stacked = {
            name: for_each_task(value.detach().unsqueeze(0), len(query_x)).requires_grad_()
            for name, value in theta.items()
        }
        alpha = alpha.detach().expand(len(query_x))
        theta_prime, _ = stacked_inner_loop(
            model, stacked, alpha, support_x, support_y, inner_steps, True, loss
        )
        with torch.no_grad():
            return vmap(with_loss)(functional_call(model, theta_prime, (query_x,)), query_y)

    def one_task(support_x, support_y, query_x, query_y):
        theta_prime, _ = inner_loop(
            model, theta, alpha, support_x, support_y, inner_steps, False, loss
        )
        return with_loss(functional_call(model, theta_prime, (query_x,)), query_y)

    return vmap(one_task)(*batch)


def measures(loss: Loss) -> tuple[str, ...]:
    """What `measure` gives."""
    return ("query_loss", "query_accuracy") if unwrap(loss) is F.cross_entropy else ("query_loss",)


def measure(prediction: Tensor, y: Tensor, loss: Loss) -> dict[str, Tensor]:
    """One task's `query_loss` and, for the cross-entropy, `query_accuracy`."""
    metrics = {"query_loss": loss(prediction, y)}
    if unwrap(loss) is F.cross_entropy:
        metrics["query_accuracy"] = accuracy(prediction, y)
    return metrics


def is_stackable(model: nn.Module, alpha: Tensor, theta: Theta) -> bool:
    """Whether plain autograd can work on all tasks at once: the model takes stacked parameters, and
    nobody differentiates through this call."""
    return getattr(model, "stackable", False) and not is_differentiated(alpha, *theta.values())


def meta_only(model: nn.Module) -> set[str]:
    """Names of the parameters that the inner loop leaves alone, from all parts of the model."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in getattr(module, "meta_only", ())
    }


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """The share of examples, in 0..1, whose largest logit is that of their label."""
    return (logits.argmax(-1) == y).to(logits.dtype).mean()


def same_dtype(theta: Theta, *inputs: Tensor) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """theta and the inputs in the wider of their floating-point dtypes."""
    dtype = next(iter(theta.values())).dtype
    for x in inputs:
        if x.is_floating_point():
            dtype = torch.promote_types(dtype, x.dtype)
    theta = {name: value.to(dtype) for name, value in theta.items()}
    return theta, tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
