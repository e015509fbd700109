"""Three ways to the same meta-gradient, backwards through the inner loop.

All take the model, theta, alpha, a meta-batch `(support_x, support_y, query_x, query_y)` with the
tasks in front, the number of inner steps, whether to leave out the second order, and the loss; all
give the gradients by theta and by alpha, means over the tasks, and metrics of each task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from inspect import unwrap

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.func import functional_call, grad_and_value, vjp, vmap
from torch.nn import functional as F

from amaml.arguments import Loss, Theta, is_differentiated

# Larger pieces ask the C library for memory that it gives back after each use, and getting it anew
# takes as long as the arithmetic.
EXAMPLES_AT_ONCE = 160
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

    def work(*piece):
        return gradients_at_once(model, *piece, inner_steps, first_order, loss)

    sums, metrics = [], []
    for pieces in in_pieces(work, theta, alpha, batch):
        gradients, measured = zip(*pieces, strict=True)
        sums.append([sum(each[1:], start=each[0]) for each in zip(*gradients, strict=True)])
        metrics.append([torch.cat(each, 1) for each in zip(*measured, strict=True)])
    tasks = batch[0].shape[1]
    means = [torch.cat(each) / tasks for each in zip(*sums, strict=True)]
    return *means, *(torch.cat(each) for each in zip(*metrics, strict=True))


def in_pieces(work: Callable, theta, alpha, batch) -> Iterator[list]:
    """`work` on parts of what has `(runs, tasks)` in front; for each part of the runs, a list.

    How a run's tasks are cut does not depend on the other runs, so that a run gets the same sums
    alone and beside others. Nothing is cut on a GPU.
    """
    runs, tasks, examples = batch[0].shape[:3]
    at_once = EXAMPLES_AT_ONCE if alpha.device.type == "cpu" else runs * tasks * examples
    tasks_at_once = min(tasks, max(1, at_once // examples))
    runs_at_once = max(1, at_once // (examples * tasks_at_once))
    for i in range(0, runs, runs_at_once):
        some = slice(i, i + runs_at_once)
        some_theta = {name: value[some] for name, value in theta.items()}
        parts = zip(*(x[some].split(tasks_at_once, 1) for x in batch), strict=True)
        yield [work(some_theta, alpha[some], part) for part in parts]


def gradients_at_once(model, theta, alpha, batch, inner_steps, first_order, loss):
    """A piece of `stacked_gradients`: sums over its tasks, `(runs, ...)`, and metrics of each task,
    `(runs, tasks)`.
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
        gradient = torch.autograd.grad(
            metrics["query_loss"].sum(),
            [*theta.values(), alpha],  # (3) and (4)
        )
    metrics = (support_loss, *metrics.values())
    return gradient, [value.detach().view(runs, tasks) for value in metrics]


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
    if is_stackable(model, alpha, theta):
        names = list(theta)

        def work(alpha, *tensors):
            run_theta = dict(zip(names, tensors, strict=False))
            return stacked_metrics(
                model, run_theta, alpha, tensors[len(names) :], inner_steps, loss
            )

        measured = ForEachRun.apply(work, alpha, *theta.values(), *batch)
        return dict(zip(measures(loss), measured, strict=True))

    def one_task(support_x, support_y, query_x, query_y):
        theta_prime, _ = inner_loop(
            model, theta, alpha, support_x, support_y, inner_steps, False, loss
        )
        return measure(functional_call(model, theta_prime, (query_x,)), query_y, loss)

    return vmap(one_task, chunk_size=TASKS_AT_ONCE)(*batch)


def stacked_metrics(model, theta, alpha, batch, inner_steps, loss) -> tuple[Tensor, ...]:
    """`query_metrics` of runs side by side, `(runs, tasks)` each, in the order of `measures`."""

    def work(theta, alpha, batch):
        runs, tasks = batch[0].shape[:2]
        support_x, support_y, query_x, query_y = (x.flatten(0, 1) for x in batch)
        with torch.enable_grad():
            theta = {
                name: for_each_task(value.detach(), tasks).requires_grad_()
                for name, value in theta.items()
            }
            alpha = for_each_task(alpha.detach(), tasks)
            theta_prime, _ = stacked_inner_loop(
                model, theta, alpha, support_x, support_y, inner_steps, True, loss
            )
        with torch.no_grad():
            prediction = functional_call(model, theta_prime, (query_x,))
            metrics = vmap(partial(measure, loss=loss))(prediction, query_y)
        return [value.view(runs, tasks) for value in metrics.values()]

    runs = [
        [torch.cat(each, 1) for each in zip(*pieces, strict=True)]
        for pieces in in_pieces(work, theta, alpha, batch)
    ]
    return tuple(torch.cat(each) for each in zip(*runs, strict=True))


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
