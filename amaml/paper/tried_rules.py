"""The rules that were tried for the rates on the way to the scale-free one, made of parts.

Each is a step with `meta_step`'s signature. All but the additive ones move the logarithms of the
rates, by a normalised slope each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from amaml.alpha_maml import DECAY, LARGEST_STEP, TINY, MetaState, meta_step, norm, update_rate
from amaml.checks import as_hyper_rate
from amaml.config import RunConfig
from amaml.tasks import Tasks

KEPT = 0.9  # of a running mean, from one iteration to the next


# How a slope becomes a step: (slope, two numbers of memory, iteration) -> (step, memory)


def adagrad(slope: Tensor, memory: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The slope over the root of the sum of all squares so far (Duchi et al. 2011)."""
    square = memory[0] + slope**2
    return slope / square.sqrt().clamp_min(TINY), torch.stack([square, memory[1]])


def running(slope: Tensor, memory: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The slope over a running root mean square, with steps that shrink as 1 / sqrt(t)."""
    square = KEPT * memory[0] + (1 - KEPT) * slope**2
    mean = square / (1 - KEPT**t)
    step = slope / (mean.sqrt().clamp_min(TINY) * t.sqrt())
    return step, torch.stack([square, memory[1]])


def rprop(slope: Tensor, memory: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The slope's sign; the step grows by 1.2 where it stays, and halves where it turns
    (Riedmiller and Braun 1993)."""
    size, before = memory
    sign = slope.sign()
    turned = sign * before
    factor = torch.where(turned > 0, 1.2, torch.where(turned < 0, 0.5, 1.0))
    size = torch.where(size == 0, sign.abs(), (size * factor).clamp_max(1.0))
    return size * sign, torch.stack([size, sign])


def signal_to_noise(slope: Tensor, memory: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The running mean over the running root mean square, squared, with the mean's sign."""
    memory = KEPT * memory + (1 - KEPT) * torch.stack([slope**2, slope])
    square, mean = memory / (1 - KEPT**t)
    ratio = mean / square.sqrt().clamp_min(TINY)
    return ratio * ratio.abs(), memory


def plain(slope: Tensor, memory: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The slope itself."""
    return slope, memory


@dataclass(frozen=True)
class TriedRule:
    """A rule for both rates: which slope of each is followed, how it is normalised, and the bound.

    Attributes:
        alpha: ("hypergradient" of log alpha, or "elasticity": that over the query loss; how it is
            normalised).
        beta: the same; its slope may also be minus the "cosine" between the meta-gradient and the
            one before, or a decayed sum of those before ("summed cosine").
        bounded: theta moves by at most a tenth of its norm.
        additive: equation 9 in place of all this, but for the bound.
    """

    alpha: tuple[str, Callable] = ("hypergradient", adagrad)
    beta: tuple[str, Callable] = ("hypergradient", adagrad)
    bounded: bool = True
    additive: bool = False

    def begin(self, state: MetaState, config: RunConfig) -> MetaState:
        assert config.meta_optimizer == "sgd", "these rules go by plain descent"
        nothing = {rate: torch.zeros(2).to(state.alpha) for rate in ("alpha", "beta")}
        return state._replace(moments=nothing | {"iteration": torch.zeros_like(state.alpha)})

    def __call__(
        self, model, state: MetaState, tasks: Tasks, *, hyper_alpha, hyper_beta, **options
    ):
        t = state.moments["iteration"] + 1
        after, metrics = meta_step(model, state._replace(moments={}), tasks, **options)
        gradient, previous = after.direction, state.direction
        moved, memory = {}, {}
        for name, rate, hyper_rate, (kind, normalise) in (
            ("alpha", state.alpha, hyper_alpha, self.alpha),
            ("beta", state.beta, hyper_beta, self.beta),
        ):
            hyper_rate = as_hyper_rate(f"hyper_{name}", hyper_rate, like=rate)
            d_rate = metrics[f"d_{name}"]
            scale = {
                "hypergradient": rate,
                "elasticity": rate / metrics["query_loss"].abs(),
                "cosine": 1 / (norm(gradient) * norm(previous)).clamp_min(TINY),
            }[kind.removeprefix("summed ")]
            step, memory[name] = normalise(scale * d_rate, state.moments[name], t)
            moved[name] = rate * (-hyper_rate * step).clamp(-1, 1).exp()
            if self.additive:
                moved[name] = update_rate(rate, hyper_rate, d_rate)
        beta = moved["beta"]
        if self.bounded:
            most = LARGEST_STEP * norm(state.theta) / norm(gradient).clamp_min(TINY)
            beta = torch.minimum(beta, most)
        theta = {name: value - beta * gradient[name] for name, value in state.theta.items()}
        kept = DECAY if self.beta[0] == "summed cosine" else 0.0
        direction = {name: kept * previous[name] + g for name, g in gradient.items()}
        metrics["beta"] = beta
        return MetaState(theta, moved["alpha"], beta, direction, memory | {"iteration": t}), metrics


ELASTICITY = ("elasticity", adagrad)
TRIED = {  # by the name of the runs
    # The bound alone, with fixed rates and with the paper's rule: what does it do by itself?
    "MAML-bounded": TriedRule(additive=True),
    "additive-bounded": TriedRule(additive=True),
    "AdaGrad-unbounded": TriedRule(bounded=False),
    "AdaGrad": TriedRule(),
    "RMS": TriedRule(("hypergradient", running), ("hypergradient", running)),
    "Rprop": TriedRule(("hypergradient", rprop), ("hypergradient", rprop)),
    "AdaGrad-elasticity": TriedRule(ELASTICITY, ELASTICITY),
    "signal-to-noise": TriedRule(("elasticity", signal_to_noise), ("elasticity", signal_to_noise)),
    "cosine": TriedRule(ELASTICITY, ("cosine", plain)),
    "AdaGrad-cosine": TriedRule(ELASTICITY, ("cosine", adagrad)),
    "summed-cosine": TriedRule(ELASTICITY, ("summed cosine", plain)),
}
