"""The meta-gradient of an `OmniglotCNN`, for all tasks of a meta-batch and many runs at once.

The arguments are those of the ways in `amaml.backward`, and so are the numbers; these come by the
network's written-out passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from inspect import unwrap
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.func import vmap
from torch.nn import functional as F

from amaml.checks import Loss, Theta
from amaml.fast.omniglot_cnn import Images, OmniglotPass, prepare
from amaml.inner_loop import metric_names, task_metrics, through_steps

# On a CPU what a piece works on should not outgrow the caches by far; on a GPU it has to fit.
EXAMPLES_AT_ONCE, EXAMPLES_AT_ONCE_ON_GPU = 80, 20_000


def by_passes(model, theta, alpha, batch, inner_steps, first_order, loss, *, recompute=False):
    """`meta_gradient` of an `OmniglotCNN`; with `recompute` inner steps are computed again on the
    way back, see `through_steps`."""
    names, measured = list(theta), ["support_loss", *metric_names(loss)]
    options = (inner_steps, first_order, loss, recompute)

    def work(alpha, *tensors):
        run_theta = dict(zip(names, tensors, strict=False))
        return gradients_of_runs(run_theta, alpha, tensors[len(names) :], options)

    outputs = ForEachRun.apply(work, alpha, *theta.values(), *batch)
    *gradient, d_alpha = outputs[: len(names) + 1]
    metrics = dict(zip(measured, outputs[len(names) + 1 :], strict=True))
    return dict(zip(names, gradient, strict=True)), d_alpha, metrics


def metrics_by_passes(model, theta, alpha, batch, inner_steps, loss) -> dict[str, Tensor]:
    """Each task's query loss and accuracy after adaptation, `(tasks,)`."""
    names = list(theta)

    def work(alpha, *tensors):
        run_theta = dict(zip(names, tensors, strict=False))
        pieces = in_pieces(
            partial(metrics_at_once, inner_steps=inner_steps, loss=loss),
            *(run_theta, alpha, tensors[len(names) :]),
        )
        runs = [[torch.cat(each, 1) for each in zip(*piece, strict=True)] for piece in pieces]
        return tuple(torch.cat(each) for each in zip(*runs, strict=True))

    measured = ForEachRun.apply(work, alpha, *theta.values(), *batch)
    return dict(zip(metric_names(loss), measured, strict=True))


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


def gradients_of_runs(theta, alpha, batch, options) -> tuple[Tensor, ...]:
    """Meta-gradients of runs side by side, everything with the runs in front: theta `(runs, ...)`,
    alpha `(runs,)`, the batch `(runs, tasks, ...)`. Returns gradients, d_alpha and metrics in turn.
    """
    sums, metrics = [], []
    for pieces in in_pieces(partial(gradients_at_once, options=options), theta, alpha, batch):
        gradients, measured = zip(*pieces, strict=True)
        sums.append([sum(each[1:], start=each[0]) for each in zip(*gradients, strict=True)])
        metrics.append([torch.cat(each, 1) for each in zip(*measured, strict=True)])
    tasks = batch[0].shape[1]
    means = [torch.cat(each) / tasks for each in zip(*sums, strict=True)]
    return *means, *(torch.cat(each) for each in zip(*metrics, strict=True))


def in_pieces(work: Callable, theta, alpha, batch) -> Iterator[list]:
    """`work` on parts of what has `(runs, tasks)` in front; for each part of the runs, a list.

    How a run's tasks are cut does not depend on the other runs, so that a run gets the same sums
    alone and beside others.
    """
    runs, tasks, examples = batch[0].shape[:3]
    at_once = EXAMPLES_AT_ONCE if alpha.device.type == "cpu" else EXAMPLES_AT_ONCE_ON_GPU
    tasks_at_once = min(tasks, max(1, at_once // examples))
    runs_at_once = max(1, at_once // (examples * tasks_at_once))
    for i in range(0, runs, runs_at_once):
        some = slice(i, i + runs_at_once)
        some_theta = {name: value[some] for name, value in theta.items()}
        parts = zip(*(x[some].split(tasks_at_once, 1) for x in batch), strict=True)
        yield [work(some_theta, alpha[some], part) for part in parts]


def gradients_at_once(theta, alpha, batch, options) -> tuple[list[Tensor], list[Tensor]]:
    """A piece of `gradients_of_runs`: sums over its tasks, `(runs, ...)`, and metrics of each task,
    `(runs, tasks)`.
    """
    inner_steps, first_order, loss, recompute = options
    runs, tasks = batch[0].shape[:2]
    support_x, support_y, query_x, query_y = (x.flatten(0, 1) for x in batch)
    theta = {name: for_each_task(value, tasks) for name, value in theta.items()}
    alpha, images = for_each_task(alpha, tasks), prepare(support_x)

    def step_at(theta: Theta) -> Step:
        return inner_step(theta, images, support_y, loss)

    kept, support_losses, theta_prime = [], [], theta
    for _ in range(inner_steps):
        step = step_at(theta_prime)
        theta_prime = descend(theta_prime, step, alpha)
        support_losses.append(step.losses)
        if not recompute:
            kept.append(step if first_order else step._replace(gradient={}))
    query = OmniglotPass(theta_prime, prepare(query_x))
    query_loss, d_logits, _ = derivatives(loss, query.logits, query_y)
    metrics = [support_losses[0], query_loss]
    if "query_accuracy" in metric_names(loss):
        metrics.append((query.logits.argmax(-1) == query_y).to(query.logits.dtype).mean(-1))
    v = query.gradient(d_logits)
    del step, query, theta_prime  # their memory is needed again

    if recompute:
        v, d_alpha = through_steps(
            *(theta, v, inner_steps),
            lambda theta: descend(theta, step_at(theta), alpha),
            lambda theta, v: pull_back(step_at(theta), v, alpha, first_order),
        )
    else:
        d_alpha = torch.zeros_like(alpha)
        while kept:
            v, of_step = pull_back(kept.pop(), v, alpha, first_order)
            d_alpha += of_step
    sums = [
        value.unflatten(0, (runs, tasks)).sum(1)
        for value in (*(v[name] for name in theta), d_alpha)
    ]
    return sums, [value.view(runs, tasks) for value in metrics]


def metrics_at_once(theta, alpha, batch, inner_steps, loss) -> list[Tensor]:
    """A piece of `metrics_by_passes`, `(runs, tasks)` each."""
    runs, tasks = batch[0].shape[:2]
    support_x, support_y, query_x, query_y = (x.flatten(0, 1) for x in batch)
    theta = {name: for_each_task(value, tasks) for name, value in theta.items()}
    alpha, images = for_each_task(alpha, tasks), prepare(support_x)
    for _ in range(inner_steps):
        theta = descend(theta, inner_step(theta, images, support_y, loss), alpha)
    logits = OmniglotPass(theta, prepare(query_x)).logits
    metrics = vmap(partial(task_metrics, loss=loss))(logits, query_y)
    return [value.view(runs, tasks) for value in metrics.values()]


def for_each_task(value: Tensor, tasks: int) -> Tensor:
    """(runs, ...) -> (runs*tasks, ...)"""
    return value.unsqueeze(1).expand(-1, tasks, *value.shape[1:]).flatten(0, 1)


class Step(NamedTuple):
    """An inner step of many tasks: the pass at their theta, and of their support losses the values
    (tasks,), the gradient by what is adapted, and the second derivative by the logits."""

    at: OmniglotPass
    losses: Tensor
    gradient: dict[str, Tensor]
    curvature: Callable[[Tensor], Tensor]


def inner_step(theta: Theta, images: Images, y: Tensor, loss: Loss) -> Step:
    at = OmniglotPass(theta, images)
    losses, d_logits, curvature = derivatives(loss, at.logits, y)
    gradient = at.gradient(d_logits)
    adapted = {name: g for name, g in gradient.items() if not name.endswith("offset")}
    return Step(at, losses, adapted, curvature)


def descend(theta: Theta, step: Step, alpha: Tensor) -> dict[str, Tensor]:
    """theta - alpha gradient (equation 1)."""
    return theta | {name: less(theta[name], alpha, g) for name, g in step.gradient.items()}


def pull_back(step: Step, v: Theta, alpha: Tensor, first_order: bool) -> tuple[dict, Tensor]:
    """Backwards through an inner step: (I - alpha H) v, and d loss / d alpha = -gradient . v.

    That dot product is how fast the support loss grows along v, and comes with H v.
    """
    if first_order:
        products = (
            torch.linalg.vecdot(g.flatten(1), v[n].flatten(1)) for n, g in step.gradient.items()
        )
        return v, -sum(products)
    t_logits = step.at.push(v)
    d_alpha = -(step.at.d_logits * t_logits).sum((1, 2))
    hessian_v = step.at.pull(step.curvature(t_logits))
    return {name: less(v[name], alpha, h) for name, h in hessian_v.items()}, d_alpha


def less(x: Tensor, alpha: Tensor, y: Tensor) -> Tensor:
    """x - alpha y, with an alpha a task."""
    return torch.addcmul(x, y, -alpha.view(-1, *[1] * (y.ndim - 1)))


def derivatives(loss: Loss, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Callable]:
    """Each task's loss (tasks,), its gradient by the logits (tasks, n, n_way), and the product of
    its second derivative with a tangent of the logits, as a function."""
    if unwrap(loss) is F.cross_entropy:
        if logits.device.type == "cpu":
            loss(logits[0], y[0])  # for its checks
        log_p, y = logits.log_softmax(-1), y.unsqueeze(-1)
        p, n = log_p.exp(), logits.shape[1]
        d_logits = p.scatter_add(-1, y, p.new_full((1, 1, 1), -1.0).expand_as(y)).div_(n)
        return (
            *(-log_p.gather(-1, y).mean((1, 2)), d_logits),
            lambda t: p * (t - (p * t).sum(-1, keepdim=True)) / n,
        )
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()
        losses = vmap(loss)(logits, y)
        (d_logits,) = torch.autograd.grad(losses.sum(), logits, create_graph=True)

    def curvature(t: Tensor) -> Tensor:
        if not d_logits.requires_grad:  # of a loss that is linear
            return torch.zeros_like(t)
        return torch.autograd.grad(d_logits, logits, t, retain_graph=True)[0]

    return losses.detach(), d_logits.detach(), curvature
