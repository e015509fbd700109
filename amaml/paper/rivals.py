"""What Alpha MAML is compared with: other ways to the rates, as steps with `meta_step`'s signature.

A step may bring two things that `meta_step` has no need of: `begin(state, config)`, which adds to
the state what it carries besides, and `query_metrics`, which evaluates it in a way of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import grad, grad_and_value
from torch.nn import functional as F

from amaml.alpha_maml import TINY, MetaState, dot, meta_step, norm, update_rate
from amaml.checks import Loss, Theta, as_hyper_rate
from amaml.config import RunConfig
from amaml.inner_loop import forward, mapped, meta_only, task_metrics
from amaml.tasks import Tasks

FROZEN_AFTER = 10  # iterations


class FrozenRates:
    """Alpha MAML whose rates stay as they are after the first iterations."""

    def begin(self, state: MetaState, config: RunConfig) -> MetaState:
        assert config.meta_optimizer == "sgd", "rivals go by plain descent"
        return state._replace(moments={"iteration": torch.zeros_like(state.alpha)})

    def __call__(
        self, model, state: MetaState, tasks: Tasks, *, hyper_alpha, hyper_beta, **options
    ):
        count = state.moments["iteration"] + 1
        moving = (count <= FROZEN_AFTER).to(count)
        rates = {"hyper_alpha": moving * hyper_alpha, "hyper_beta": moving * hyper_beta}
        state, metrics = meta_step(model, state._replace(moments={}), tasks, **rates, **options)
        return state._replace(moments={"iteration": count}), metrics


@dataclass(frozen=True)
class Clipped:
    """Alpha MAML whose meta-gradient or whose hypergradients are clipped, with plain descent.

    Attributes:
        gradient: the largest norm of the meta-gradient, before anything is done with it.
        hypergradient: the largest size of that of alpha and of that of beta.
    """

    gradient: float = math.inf
    hypergradient: float = math.inf

    def __call__(
        self, model, state: MetaState, tasks: Tasks, *, hyper_alpha, hyper_beta, **options
    ):
        after, metrics = meta_step(model, state, tasks, **options)  # moves no rate
        shrunk = (self.gradient / norm(after.direction).clamp_min(TINY)).clamp_max(1)
        gradient = {name: shrunk * g for name, g in after.direction.items()}
        d_alpha, d_beta = (
            slope.clamp(-self.hypergradient, self.hypergradient)
            for slope in (metrics["d_alpha"], -dot(gradient, state.direction))
        )
        hyper_alpha = as_hyper_rate("hyper_alpha", hyper_alpha, like=state.alpha)
        hyper_beta = as_hyper_rate("hyper_beta", hyper_beta, like=state.beta)
        alpha = update_rate(state.alpha, hyper_alpha, d_alpha)
        beta = update_rate(state.beta, hyper_beta, d_beta)
        theta = {name: value - beta * gradient[name] for name, value in state.theta.items()}
        metrics |= {"beta": beta, "d_alpha": d_alpha, "d_beta": d_beta}
        return MetaState(theta, alpha, beta, gradient, {}), metrics


@dataclass(frozen=True)
class LearnedRates:
    """Inner rates for each inner step that the meta-optimiser learns along with theta, at beta.

    Attributes:
        per_element: one rate per number in theta, as in Meta-SGD (Li et al. 2017); otherwise one
            per parameter tensor, as LSLR in MAML++ (Antoniou et al. 2019).
    """

    per_element: bool

    def begin(self, state: MetaState, config: RunConfig) -> MetaState:
        """Rates of alpha everywhere: a dict by parameter name, (inner_steps, ...)."""
        assert config.meta_optimizer == "sgd" and not (config.first_order or config.recompute)
        steps = config.inner_steps  # to which the rates belong: in a test as well
        assert not config.test_tasks or steps == config.test_inner_steps == 1
        shapes = {n: p.shape if self.per_element else () for n, p in state.theta.items()}
        rates = {n: state.alpha.expand(steps, *shape).clone() for n, shape in shapes.items()}
        return state._replace(moments={"rates": rates})

    def adapt(self, model, theta: Theta, rates: Theta, x, y, loss: Loss) -> tuple[dict, Tensor]:
        """(theta_prime, support loss at theta): theta - rate * gradient, step by step."""
        fixed, first = meta_only(model), None
        adapted = {name: value for name, value in theta.items() if name not in fixed}

        def support_loss(adapted):
            return loss(forward(model, {**theta, **adapted}, x), y)

        for step in range(len(next(iter(rates.values())))):
            gradient, value = grad_and_value(support_loss)(adapted)
            first = value if first is None else first
            adapted = {n: p - rates[n][step] * gradient[n] for n, p in adapted.items()}
        assert first is not None
        return {**theta, **adapted}, first

    def __call__(
        self, model: nn.Module, state: MetaState, tasks: Tasks, *, hyper_alpha=0.0, hyper_beta=0.0,
        inner_steps=1, first_order=False, recompute=False, loss: Loss = F.cross_entropy,
    ) -> tuple[MetaState, dict[str, Tensor]]:  # fmt: skip
        """One iteration: theta and the rates go down the gradient of the mean query loss."""
        theta, rates = state.theta, state.moments["rates"]

        def task_loss(at, x, y, query_x, query_y):
            theta_prime, support_loss = self.adapt(model, *at, x, y, loss)
            metrics = task_metrics(forward(model, theta_prime, query_x), query_y, loss)
            return metrics["query_loss"], {"support_loss": support_loss, **metrics}

        of_task = partial(grad(task_loss, has_aux=True), (theta, rates))
        gradients, metrics = mapped(model, of_task, *vars(tasks).values())
        gradient, d_rates = ({n: g.mean(0) for n, g in each.items()} for each in gradients)
        metrics = {name: value.mean(0) for name, value in metrics.items()}
        moving = [rate.flatten() for name, rate in rates.items() if name not in meta_only(model)]
        beta, alpha = state.beta, torch.cat(moving).mean()
        metrics |= {"alpha": alpha, "beta": beta, "gradient_norm": dot(gradient, gradient).sqrt()}
        metrics["d_alpha"] = torch.stack([g.sum() for g in d_rates.values()]).sum()
        metrics["d_beta"] = torch.zeros_like(beta)
        theta = {name: theta[name] - beta * gradient[name] for name in theta}
        rates = {name: rates[name] - beta * d_rates[name] for name in rates}
        return state._replace(theta=theta, direction=gradient, moments={"rates": rates}), metrics

    def query_metrics(
        self, model, state: MetaState, tasks: Tasks, inner_steps: int, loss: Loss
    ) -> dict[str, Tensor]:
        """Each task's metrics after adaptation by the learned rates, (tasks,)."""

        def one_task(x, y, query_x, query_y):
            at, _ = self.adapt(model, state.theta, state.moments["rates"], x, y, loss)
            return task_metrics(forward(model, at, query_x), query_y, loss)

        return mapped(model, one_task, *vars(tasks).values())
