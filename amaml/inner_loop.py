"""Equation 1 of Behl et al. (2019) for one task, and what is measured of a task."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from amaml.checks import Loss, Theta, is_cross_entropy
from amaml.shapes import Float

UNMAPPABLE: WeakSet[nn.Module] = WeakSet()  # models that `vmap` cannot serve


def inner_loop(
    model: nn.Module,
    theta: Theta,
    alpha: Float[Tensor, ""],
    x: Tensor,
    y: Tensor,
    inner_steps: int,
    first_order: bool,
    loss: Loss,
) -> tuple[dict[str, Tensor], Float[Tensor, ""]]:
    """Theta_prime of one task, and the support loss at theta (before any step)."""
    fixed = meta_only(model)
    adapted = {name: value for name, value in theta.items() if name not in fixed}

    def support_loss(adapted: Theta) -> Tensor:
        return loss(forward(model, {**theta, **adapted}, x), y)

    losses = []
    for _ in range(inner_steps):
        gradient, value = grad_and_value(support_loss)(adapted)
        losses.append(value)
        if first_order:
            gradient = {name: g.detach() for name, g in gradient.items()}
        adapted = {name: adapted[name] - alpha * gradient[name] for name in adapted}  # (1)
    return {**theta, **adapted}, losses[0]


def forward(model: nn.Module, theta: Theta, x: Tensor):
    """The model's output at theta; the model itself is left as it is.

    Each place of a parameter is filled once. `functional_call` alone would fill a place that has
    two names (a submodule registered twice) twice, and put the wrong tensor back.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    places = {
        f"{prefix}.{name}" if prefix else name: names[id(parameter)]
        for prefix, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    }
    values = {place: theta[name] for place, name in places.items() if name in theta}
    with sdpa_kernel(SDPBackend.MATH):  # the one attention with second derivatives
        return functional_call(model, values, (x,), tie_weights=False)


def mapped(model: nn.Module, function: Callable, *args, chunk_size: int | None = None):
    """`function` of each first index of the tensors in `args`, its results stacked.

    By `vmap`; where that cannot serve the model (recurrent layers, branches on data) in a loop,
    and a warning says so once.
    """
    reason = "it has recurrent layers"
    if model not in UNMAPPABLE and not any(isinstance(m, nn.RNNBase) for m in model.modules()):
        try:
            return vmap(function, chunk_size=chunk_size)(*args)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
                raise
    n = len(tree_leaves(args)[0])
    results = [function(*tree_map(lambda value, i=i: value[i], args)) for i in range(n)]
    if model not in UNMAPPABLE:  # and the loop has gone well
        UNMAPPABLE.add(model)
        name = type(model).__name__
        warnings.warn(f"{name} goes task by task, since vmap cannot map it: {reason}", stacklevel=4)
    return tree_map(lambda *values: torch.stack(values), *results)


def meta_only(model: nn.Module) -> set[str]:
    """Names of the parameters that the inner loop leaves alone, from all parts of the model."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in getattr(module, "meta_only", ())
    }


def through_steps(theta, v, steps: int, step: Callable, inner_step_vjp: Callable) -> tuple:
    """Carry v back through `steps` inner steps; returns (v at theta, what alpha gathers).

    `step(theta)` is the next theta; `inner_step_vjp(theta, v)` goes back through one step,
    v_k = (I - alpha H(theta_k)) v_{k+1}, and returns (v_k, its part of d loss / d alpha). Gradient
    checkpointing: the theta_k are computed again from the middle of what is left, so memory grows
    with the logarithm of the steps.
    """
    waiting, gathered = [(theta, steps)], 0
    while waiting:
        theta, steps = waiting.pop()
        while steps > 1:
            waiting.append((theta, steps // 2))
            for _ in range(steps // 2):
                theta = step(theta)
            steps -= steps // 2
        v, of_step = inner_step_vjp(theta, v)
        gathered = gathered + of_step
    return v, gathered


def task_metrics(prediction, y: Tensor, loss: Loss) -> dict[str, Float[Tensor, ""]]:
    """One task's `query_loss` and, for the cross-entropy, `query_accuracy`."""
    metrics = {"query_loss": loss(prediction, y)}
    if is_cross_entropy(loss):  # torch has the classes in dimension 1
        metrics["query_accuracy"] = (prediction.argmax(1) == y).to(prediction.dtype).mean()
    return metrics


def metric_names(loss: Loss) -> tuple[str, ...]:
    """The names that `task_metrics` gives."""
    return ("query_loss", "query_accuracy") if is_cross_entropy(loss) else ("query_loss",)
