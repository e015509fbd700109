"""Alpha MAML: MAML whose two learning rates adapt themselves online.

Equation 9 and Algorithm 2 of Behl et al. (2019), as a pure function from one state to the next; and
a rule of this project's own for the rates, in which no hyper rate has a unit.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from amaml.checks import Loss, Theta, as_hyper_rate, as_scalar, check_module
from amaml.config import CHOICES
from amaml.maml import meta_gradient, query_metrics, widest
from amaml.shapes import Float
from amaml.tasks import Tasks

# Of the scale-free rule, all without a unit: how much of the sum of directions is kept from one
# iteration to the next, and the largest step of theta as a part of its norm
DECAY, LARGEST_STEP = 0.9, 0.1
TINY = 1e-30  # nothing is divided by zero


class MetaState(NamedTuple):
    """All that Alpha MAML carries from one iteration to the next; tensors only.

    Attributes:
        theta: dict by parameter name: the initialisation that is being learned.
        alpha: scalar: inner learning rate of the next iteration.
        beta: scalar: meta learning rate of the iteration just done.
        direction: dict like theta: the last meta-step went along minus this (with "sgd" it is the
            previous meta-gradient); zeros before the first iteration. With the scale-free rule a
            decayed sum of the directions so far.
        moments: dict of dicts, empty for "sgd"; for "adam" its `first` and `second` moment, and
            `count`. With the scale-free rule also `slopes`, see `scale_free_rates`.
    """

    theta: dict[str, Tensor]
    alpha: Float[Tensor, ""]
    beta: Float[Tensor, ""]
    direction: dict[str, Tensor]
    moments: dict


def init_state(
    model: nn.Module,
    alpha: float | Tensor,
    beta: float | Tensor,
    *,
    meta_optimizer: str = "sgd",
    rule: str = "additive",
) -> MetaState:
    """The state before the first iteration.

    Args:
        model: its trainable parameters are copied.
        alpha, beta: starting rates, finite and >= 0 (additive hypergradient descent can leave 0).
        meta_optimizer: "sgd", as in the paper, or "adam".
        rule: how `meta_step` moves the rates: "additive", as in the paper, or "scale-free".

    Raises:
        ValueError: for a rate, optimiser or rule that is none, and a model with nothing to learn.
    """
    check_module(model)
    theta = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    if not theta:
        raise ValueError("the model has no trainable parameter, so there is nothing to learn")
    rates = {}
    for name, rate in (("alpha", alpha), ("beta", beta)):
        rates[name] = as_scalar(name, rate, like=widest(theta)).detach().clone()
        if not math.isfinite(rates[name]) or rates[name] < 0:
            raise ValueError(f"{name}={float(rate)}: a starting rate must be finite and >= 0")
        if rule == "scale-free" and rates[name] == 0:
            raise ValueError(f"{name}=0: the scale-free rule moves its logarithm; start above 0")
    for name, given in (("meta_optimizer", meta_optimizer), ("rule", rule)):
        if given not in CHOICES[name]:
            raise ValueError(f"{name}={given!r}: known are {', '.join(CHOICES[name])}")
    direction, first, second = (
        {name: torch.zeros_like(value) for name, value in theta.items()} for _ in range(3)
    )
    moments: dict = {}
    if meta_optimizer == "adam":
        exact = torch.promote_types(rates["beta"].dtype, torch.float32)  # bfloat16 ends at 256
        count = torch.zeros_like(rates["beta"], dtype=exact)
        moments = {"first": first, "second": second, "count": count}
    if rule == "scale-free":
        moments["slopes"] = {name: torch.zeros_like(rate) for name, rate in rates.items()}
    return MetaState(theta, rates["alpha"], rates["beta"], direction, moments)


def meta_step(
    model: nn.Module,
    state: MetaState,
    tasks: Tasks,
    *,
    hyper_alpha: float | Tensor = 0.0,
    hyper_beta: float | Tensor = 0.0,
    inner_steps: int = 1,
    first_order: bool = False,
    recompute: bool = False,
    loss: Loss = F.cross_entropy,
) -> tuple[MetaState, dict[str, Float[Tensor, ""]]]:
    """One iteration of Algorithm 2.

    The gradient over the meta-batch is the mean over its tasks (equation 9 has the sum; the
    difference is a change of scale of beta and of the hyper rates). `hyper_alpha` = `hyper_beta`
    = 0 is MAML, Algorithm 1. The rates are not clamped, except by the scale-free rule
    (`scale_free_rates`), which moves them where `state` was made with it.

    Args:
        model: the module that `state` belongs to; it is left as it is.
        state: that of the iteration before, or of `init_state`.
        tasks: this iteration's meta-batch.
        hyper_alpha, hyper_beta: hyper learning rates of alpha and beta, >= 0; with the scale-free
            rule its constants, which have no unit: 1 each serves.
        inner_steps, first_order, recompute, loss: see `meta_gradient`.

    Returns:
        (next_state, metrics). Metrics are scalars: `support_loss` (at theta), `query_loss` and
        `query_accuracy` (at theta_prime), the `alpha` and `beta` of this iteration,
        `gradient_norm` of the meta-gradient, and the hypergradients `d_alpha` (equation 4) and
        `d_beta` (equation 6); with `first_order` these are approximate.
    """
    check_state(state)
    theta, alpha, beta, previous, moments = state
    hyper_alpha = as_hyper_rate("hyper_alpha", hyper_alpha, like=alpha)
    hyper_beta = as_hyper_rate("hyper_beta", hyper_beta, like=beta)
    gradient, d_alpha, metrics = meta_gradient(  # (1), (3) and (4)
        model, theta, alpha, tasks,
        inner_steps=inner_steps, first_order=first_order, recompute=recompute, loss=loss,
    )  # fmt: skip
    d_beta = -dot(gradient, previous)  # (6)
    direction, moments = descent_direction(gradient, moments)
    next_alpha = update_rate(alpha, hyper_alpha, d_alpha)  # (9), alpha of the next one
    beta = update_rate(beta, hyper_beta, d_beta)  # (9), beta
    kept = direction
    if "slopes" in moments:  # the scale-free rule, in place of these two
        hypers = (hyper_alpha, hyper_beta, d_alpha, d_beta, metrics["query_loss"])
        next_alpha, beta, kept, moments = scale_free_rates(
            state, moments, gradient, direction, *hypers
        )
    theta = {name: theta[name] - beta * direction[name] for name in theta}  # (9), theta
    metrics |= {"alpha": alpha, "beta": beta, "gradient_norm": norm(gradient)}
    metrics |= {"d_alpha": d_alpha, "d_beta": d_beta}
    return MetaState(theta, next_alpha, beta, kept, moments), metrics


def evaluate(
    model: nn.Module,
    state: MetaState,
    tasks: Tasks,
    *,
    inner_steps: int = 1,
    loss: Loss = F.cross_entropy,
) -> dict[str, float]:
    """Query loss and accuracy after adaptation: means over the tasks with 95 % intervals.

    With a model that normalises by batch statistics the query set is seen as a whole: the accuracy
    is transductive.

    Returns:
        `query_loss`, `query_loss_ci95` and, for the cross-entropy, `query_accuracy` (0..1) and
        `query_accuracy_ci95`. Each interval is mean +- ci95, 1.96 standard errors over the tasks
        (not a number for a single task).
    """
    return summary(state_metrics(model, state, tasks, inner_steps, loss))


def state_metrics(
    model: nn.Module, state: MetaState, tasks: Tasks, inner_steps: int, loss: Loss
) -> dict[str, Float[Tensor, " tasks"]]:
    """What `evaluate` gives the means of."""
    check_state(state)
    return query_metrics(model, state.theta, state.alpha, tasks, inner_steps, loss)


def summary(measured: dict[str, Tensor]) -> dict[str, float]:
    """Means over the tasks, and the half widths of their 95 % intervals."""
    numbers = {}
    for name, values in measured.items():
        values = values.cpu().double()  # in this order: not every device has float64
        error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        numbers[name], numbers[f"{name}_ci95"] = float(values.mean()), 1.96 * error
    return numbers


def check_state(state: MetaState) -> None:
    if not isinstance(state, MetaState):
        raise TypeError(
            f"state must be an amaml.MetaState, as init_state gives it, not {type(state).__name__}"
        )


def update_rate(rate: Tensor, hyper_rate: Tensor, hypergradient: Tensor) -> Tensor:
    """One step of gradient descent on a learning rate.

    A hyper rate of zero leaves the rate alone also where the hypergradient is not finite, since
    0 * inf is not a number.
    """
    return torch.where(hyper_rate == 0, rate, rate - hyper_rate * hypergradient)


def scale_free_rates(
    state: MetaState, moments: dict, gradient: Theta, direction: Theta,
    hyper_alpha: Tensor, hyper_beta: Tensor, d_alpha: Tensor, d_beta: Tensor, loss: Tensor,
) -> tuple[Tensor, Tensor, dict[str, Tensor], dict]:  # fmt: skip
    """Both rates moved by relative steps that no unit enters; this rule is not the paper's.

    Each logarithm goes by AdaGrad (Duchi et al. 2011) down a slope without a unit. That of alpha is
    the elasticity of the query loss, d log L / d log alpha. That of beta is minus the cosine
    between the meta-gradient and a decayed sum of the directions before it, where equation 6 has
    the last one alone: one batch of tasks says little about the next. A step changes a rate by at
    most a factor of e, and theta by at most a tenth of its norm.

    Returns:
        alpha for the next iteration, beta for this one, the sum of directions and the moments.
    """
    squares = moments["slopes"]
    slopes = {
        "alpha": state.alpha * d_alpha / loss.abs(),
        "beta": d_beta / (norm(gradient) * norm(state.direction)).clamp_min(TINY),
    }
    squares = {name: squares[name] + slope**2 for name, slope in slopes.items()}
    steps = {n: slope / squares[n].sqrt().clamp_min(TINY) for n, slope in slopes.items()}
    alpha, beta = (
        torch.where(hyper_rate == 0, rate, rate * (-hyper_rate * step).clamp(-1, 1).exp())
        for rate, hyper_rate, step in (
            (state.alpha, hyper_alpha, steps["alpha"]),
            (state.beta, hyper_beta, steps["beta"]),
        )
    )
    most = LARGEST_STEP * norm(state.theta) / norm(direction).clamp_min(TINY)
    beta = torch.where(hyper_beta == 0, beta, torch.minimum(beta, most))
    kept = {name: DECAY * state.direction[name] + direction[name] for name in direction}
    return alpha, beta, kept, moments | {"slopes": squares}


def descent_direction(gradient: dict[str, Tensor], moments: dict) -> tuple[dict[str, Tensor], dict]:
    """What the meta-step goes along: the gradient itself, or Adam's direction (Kingma and Ba 2015).

    With Adam the hypergradient of beta is taken against this direction, as in hypergradient
    descent for Adam (Baydin et al. 2018, algorithm 3).
    """
    if "first" not in moments:
        return gradient, moments
    decay_1, decay_2, epsilon = 0.9, 0.999, 1e-8
    count = moments["count"] + 1
    first, second, direction = {}, {}, {}
    for name, g in gradient.items():
        first[name] = decay_1 * moments["first"][name] + (1 - decay_1) * g
        second[name] = decay_2 * moments["second"][name] + (1 - decay_2) * g * g
        unbiased_first = first[name] / (1 - decay_1**count).to(g.dtype)
        unbiased_second = second[name] / (1 - decay_2**count).to(g.dtype)
        direction[name] = unbiased_first / (unbiased_second.sqrt() + epsilon)
    return direction, moments | {"first": first, "second": second, "count": count}


def norm(a: Theta) -> Float[Tensor, ""]:
    """The Euclidean norm over all parameters."""
    return dot(a, a).sqrt()


def dot(a: Theta, b: Theta) -> Float[Tensor, ""]:
    """The dot product over all parameters."""
    return reduce(torch.add, ((a[name] * b[name]).sum() for name in a))
