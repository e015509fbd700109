"""The meta-gradient by the written-out passes, for all tasks of a meta-batch and many runs at once.

Arguments and results are those of `amaml.inner_loop`, whose functions serve any module. A batch is
(support_x, support_y, query_x, query_y).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.func import grad, vjp, vmap
from torch.linalg import vecdot

from amaml.checks import Loss, Theta, is_cross_entropy
from amaml.fast.omniglot_cnn import Images, OmniglotPass, prepare
from amaml.inner_loop import metric_names, task_metrics, through_steps
from amaml.shapes import Float, Shaped

# On a CPU a piece of work should not outgrow the caches by far; on a GPU it has to fit.
EXAMPLES_AT_ONCE, EXAMPLES_AT_ONCE_ON_GPU = 80, 20_000


def meta_gradient(
    model: nn.Module,
    theta: Theta,
    alpha: Float[Tensor, ""],
    batch: Sequence[Shaped[Tensor, "tasks ..."]],
    inner_steps: int,
    first_order: bool,
    loss: Loss,
    recompute: bool,
) -> tuple[dict[str, Tensor], Float[Tensor, ""], dict[str, Float[Tensor, " tasks"]]]:
    """The gradients of the mean query loss by theta and by alpha, and metrics of each task.

    With `recompute` inner steps are computed again on the way back: see `through_steps`.
    """

    def of_tasks(theta, alpha, support_x, support_y, query_x, query_y):
        step_at = partial(inner_step, images=prepare(support_x), y=support_y, loss=loss)
        kept, support_losses, theta_prime = [], [], theta
        for _ in range(inner_steps):
            step = step_at(theta_prime)
            theta_prime = inner_update(theta_prime, step, alpha)
            support_losses.append(step.losses)
            if not recompute:
                kept.append(step if first_order else step._replace(gradient={}))
        query = OmniglotPass(theta_prime, prepare(query_x))
        query_loss, d_logits, _ = derivatives(loss, query.logits, query_y)
        metrics = [support_losses[0], query_loss]
        if "query_accuracy" in names:
            metrics.append((query.logits.argmax(-1) == query_y).to(alpha.dtype).mean(-1))
        v = query.gradient(d_logits)
        del step, query, theta_prime  # their memory is needed again

        if recompute:
            v, d_alpha = through_steps(
                theta,
                v,
                inner_steps,
                lambda theta: inner_update(theta, step_at(theta), alpha),
                lambda theta, v: inner_step_vjp(step_at(theta), v, alpha, first_order),
            )
        else:
            d_alpha = torch.zeros_like(alpha)
            while kept:
                v, of_step = inner_step_vjp(kept.pop(), v, alpha, first_order)
                d_alpha += of_step
        return [*(v[name] for name in theta), d_alpha], metrics

    names = ("support_loss", *metric_names(loss))
    outputs = ForEachRun.apply(of_tasks, list(theta), *theta.values(), alpha, *batch)
    *gradient, d_alpha = outputs[: len(theta) + 1]
    metrics = dict(zip(names, outputs[len(theta) + 1 :], strict=True))
    return dict(zip(theta, gradient, strict=True)), d_alpha, metrics


def query_metrics(
    model: nn.Module,
    theta: Theta,
    alpha: Float[Tensor, ""],
    batch: Sequence[Shaped[Tensor, "tasks ..."]],
    inner_steps: int,
    loss: Loss,
) -> dict[str, Float[Tensor, " tasks"]]:
    """Each task's query loss and, for the cross-entropy, accuracy after adaptation."""

    def of_tasks(theta, alpha, support_x, support_y, query_x, query_y):
        images = prepare(support_x)
        for _ in range(inner_steps):
            theta = inner_update(theta, inner_step(theta, images, support_y, loss), alpha)
        logits = OmniglotPass(theta, prepare(query_x)).logits
        return [], list(vmap(partial(task_metrics, loss=loss))(logits, query_y).values())

    outputs = ForEachRun.apply(of_tasks, list(theta), *theta.values(), alpha, *batch)
    return dict(zip(metric_names(loss), outputs, strict=True))


class ForEachRun(Function):
    """`in_pieces` for one run, or under `vmap` for many.

    Plain autograd cannot work under `torch.func` transforms; this gives it the tensors beneath.
    """

    @staticmethod
    def forward(work: Callable, names: Sequence[str], *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = in_pieces(work, names, *(tensor.unsqueeze(0) for tensor in tensors))
        return tuple(output.squeeze(0) for output in outputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info, in_dims, work, names, *tensors):
        runs = [
            tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip(tensors, in_dims[2:], strict=True)
        ]
        outputs = in_pieces(work, names, *runs)
        return outputs, (0,) * len(outputs)


def in_pieces(
    work: Callable, names: Sequence[str], *tensors: Shaped[Tensor, "runs ..."]
) -> tuple[Float[Tensor, "runs ..."], ...]:
    """Means over the tasks, `(runs, ...)`, and metrics, `(runs, tasks)`, a piece at a time.

    `work(theta, alpha, *batch)`, with the tasks of a piece in front, returns lists of what to
    average and of metrics. `tensors` are theta by `names` and alpha, `(runs, ...)`, and the batch,
    `(runs, tasks, ...)`. How a run's tasks are cut depends on this run only, so that it gets the
    same sums alone and beside others.
    """
    runs, tasks, examples = tensors[-4].shape[:3]
    at_once = EXAMPLES_AT_ONCE if tensors[-4].device.type == "cpu" else EXAMPLES_AT_ONCE_ON_GPU
    tasks_at_once = min(tasks, max(1, at_once // examples))
    runs_at_once = max(1, at_once // (examples * tasks_at_once))
    per_task = [x.unsqueeze(1).expand(runs, tasks, *x.shape[1:]) for x in tensors[:-4]]

    def of_piece(*tensors: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        sizes, flat = tensors[-4].shape[:2], [x.flatten(0, 1) for x in tensors]
        theta = dict(zip(names, flat, strict=False))
        to_average, metrics = work(theta, *flat[len(theta) :])
        sums = [x.unflatten(0, sizes).sum(1) for x in to_average]
        return sums, [x.view(sizes) for x in metrics]

    sums, metrics = [], []
    for i in range(0, runs, runs_at_once):
        some = (x[i : i + runs_at_once] for x in (*per_task, *tensors[-4:]))
        pieces = zip(*(x.split(tasks_at_once, 1) for x in some), strict=True)
        summed, measured = zip(*(of_piece(*piece) for piece in pieces), strict=True)
        sums.append([sum(each[1:], start=each[0]) for each in zip(*summed, strict=True)])
        metrics.append([torch.cat(each, 1) for each in zip(*measured, strict=True)])
    means = (torch.cat(each) / tasks for each in zip(*sums, strict=True))
    return *means, *(torch.cat(each) for each in zip(*metrics, strict=True))


class InnerStep(NamedTuple):
    """An inner step of many tasks, each at its own theta."""

    at: OmniglotPass
    losses: Float[Tensor, " tasks"]  # on the support set
    gradient: dict[str, Tensor]  # by what is adapted
    curvature: Callable[[Tensor], Tensor]  # the second derivative by the logits, times a tangent


def inner_step(
    theta: Theta, images: Images, y: Shaped[Tensor, "tasks n ..."], loss: Loss
) -> InnerStep:
    at = OmniglotPass(theta, images)
    losses, d_logits, curvature = derivatives(loss, at.logits, y)
    gradient = at.gradient(d_logits)
    adapted = {name: g for name, g in gradient.items() if not name.endswith("offset")}
    return InnerStep(at, losses, adapted, curvature)


def inner_update(theta: Theta, step: InnerStep, alpha: Float[Tensor, " tasks"]) -> Theta:
    """theta - alpha gradient (equation 1)."""
    return {**theta, **{n: minus_scaled(theta[n], alpha, g) for n, g in step.gradient.items()}}


def inner_step_vjp(
    step: InnerStep, v: Theta, alpha: Float[Tensor, " tasks"], first_order: bool
) -> tuple[Theta, Float[Tensor, " tasks"]]:
    """Backwards through an inner step: (I - alpha H) v, and d loss / d alpha = -gradient . v.

    That dot product is how fast the support loss grows along v, and comes with H v.
    """
    if first_order:
        dots = (vecdot(g.flatten(1), v[name].flatten(1)) for name, g in step.gradient.items())
        return v, -sum(dots)
    t_logits = step.at.jvp(v)
    d_alpha = -(step.at.d_logits * t_logits).sum((1, 2))
    hessian_v = step.at.hvp(step.curvature(t_logits))
    return {name: minus_scaled(v[name], alpha, h) for name, h in hessian_v.items()}, d_alpha


def minus_scaled(
    x: Float[Tensor, "tasks ..."], alpha: Float[Tensor, " tasks"], y: Float[Tensor, "tasks ..."]
) -> Float[Tensor, "tasks ..."]:
    """x - alpha y."""
    return torch.addcmul(x, y, -alpha.view(-1, *[1] * (y.ndim - 1)))


def derivatives(
    loss: Loss, logits: Float[Tensor, "tasks n n_way"], y: Shaped[Tensor, "tasks n ..."]
) -> tuple[Float[Tensor, " tasks"], Float[Tensor, "tasks n n_way"], Callable[[Tensor], Tensor]]:
    """Each task's loss, its gradient by the logits, and the product of its second derivative with
    a tangent of the logits, as a function."""
    if not is_cross_entropy(loss):

        def total(logits: Tensor) -> tuple[Tensor, Tensor]:
            losses = vmap(loss)(logits, y)
            return losses.sum(), losses

        d_logits, hvp, losses = vjp(grad(total, has_aux=True), logits, has_aux=True)  # type: ignore
        return losses, d_logits, lambda t: hvp(t)[0]
    if logits.device.type == "cpu":
        loss(logits[0], y[0])  # for its checks
    log_p, y = logits.log_softmax(-1), y.unsqueeze(-1)
    p, n = log_p.exp(), logits.shape[1]
    losses = -log_p.gather(-1, y).mean((1, 2))
    d_logits = p.scatter_add(-1, y, p.new_full((1, 1, 1), -1.0).expand_as(y)).div_(n)
    return losses, d_logits, lambda t: p * (t - (p * t).sum(-1, keepdim=True)) / n
