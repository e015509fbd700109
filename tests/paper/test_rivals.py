"""The rivals' steps, each against a computation written out with plain autograd."""

import pytest
import torch
from helpers import SMALL, batches, leaves, omniglot_forward, relative_error, small_model
from torch.nn import functional as F

import amaml
from amaml.paper.rivals import FROZEN_AFTER, Clipped, FrozenRates, LearnedRates

ALPHA, BETA = 0.3, 0.2


def mean_query_loss(theta, rates, tasks):
    """Differentiable in theta and in rates, a list with a dict by parameter name for each step."""
    losses, fixed = [], small_model().meta_only
    for i in range(len(tasks)):
        at = dict(theta)
        for of_step in rates:
            value = F.cross_entropy(omniglot_forward(at, tasks.support_x[i]), tasks.support_y[i])
            moving = [name for name in at if name not in fixed]
            gradient = torch.autograd.grad(value, [at[n] for n in moving], create_graph=True)
            at |= {n: at[n] - of_step[n] * g for n, g in zip(moving, gradient, strict=True)}
        losses.append(F.cross_entropy(omniglot_forward(at, tasks.query_x[i]), tasks.query_y[i]))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("inner_steps", [1, 2])
@pytest.mark.parametrize("per_element", [True, False])
def test_learned_rates_are_those_of_plain_autograd(per_element, inner_steps):
    """Meta-SGD and the learned rates per layer and step: theta and all rates, three iterations."""
    model, step = small_model(), LearnedRates(per_element)
    config = amaml.RunConfig(inner_steps=inner_steps)
    state = step.begin(amaml.init_state(model, ALPHA, BETA), config)
    theta, fixed = leaves(state.theta), model.meta_only
    shapes = {name: p.shape if per_element else () for name, p in theta.items()}
    start = {n: torch.full(shape, ALPHA, dtype=torch.float64) for n, shape in shapes.items()}
    rates = [leaves(start) for _ in range(inner_steps)]
    for tasks in batches(3):
        state, metrics = step(model, state, tasks, inner_steps=inner_steps)
        loss = mean_query_loss(theta, rates, tasks)
        learned = [rate for of_step in rates for n, rate in of_step.items() if n not in fixed]
        found = list(torch.autograd.grad(loss, [*theta.values(), *learned]))
        assert metrics["query_loss"].item() == pytest.approx(loss.item(), rel=1e-9)
        theta = leaves({n: p - BETA * found.pop(0) for n, p in theta.items()})
        rates = [
            leaves({n: r if n in fixed else r - BETA * found.pop(0) for n, r in of_step.items()})
            for of_step in rates
        ]
    assert relative_error(state.theta, theta) < 1e-9
    for k, of_step in enumerate(rates):
        learned = {name: rate[k] for name, rate in state.moments["rates"].items()}
        assert relative_error(learned, of_step) < 1e-9
    tasks = batches(1, batch=3)[0]
    measured = step.query_metrics(model, state, tasks, inner_steps, F.cross_entropy)
    expected = mean_query_loss(theta, rates, tasks)
    assert measured["query_loss"].mean().item() == pytest.approx(expected.item(), rel=1e-9)


def test_the_first_step_of_learned_rates_is_mamls_and_their_gradients_sum_to_alphas():
    model, (tasks,) = small_model(), batches(1)
    start = amaml.init_state(model, ALPHA, BETA)
    expected, metrics = amaml.meta_step(model, start, tasks)
    for per_element in (True, False):
        step = LearnedRates(per_element)
        state, found = step(model, step.begin(start, amaml.RunConfig()), tasks)
        assert relative_error(state.theta, expected.theta) < 1e-9
        for name in ("support_loss", "query_loss", "query_accuracy", "alpha", "beta", "d_alpha"):
            assert found[name].item() == pytest.approx(metrics[name].item(), rel=1e-9), name
        assert found.keys() == metrics.keys()


def test_frozen_rates_move_as_long_as_they_may(tmp_path):
    fields = SMALL | {"iterations": FROZEN_AFTER + 5}
    free = amaml.train(amaml.RunConfig(**fields), tmp_path, progress=False)
    config = amaml.RunConfig(**fields)
    frozen = amaml.train(config, tmp_path, name="frozen", step=FrozenRates(), progress=False)
    first = slice(0, FROZEN_AFTER + 1)  # the alpha of an iteration was moved in the one before
    assert frozen.metrics["alpha"][first].tolist() == free.metrics["alpha"][first].tolist()
    assert frozen.metrics["alpha"][FROZEN_AFTER:].nunique() == 1
    assert frozen.metrics["beta"][FROZEN_AFTER - 1 :].nunique() == 1
    assert free.metrics["alpha"][FROZEN_AFTER:].nunique() == 5


def test_a_clipped_step_is_alpha_mamls_with_smaller_gradients():
    """By hand, in the second iteration, so that there is a gradient before; nothing is clipped at
    infinity."""
    model, tasks = small_model(), batches(2)
    rates = {"hyper_alpha": 1e-2, "hyper_beta": 1e-3}
    state, _ = amaml.meta_step(model, amaml.init_state(model, ALPHA, BETA), tasks[0])
    plain, measured = amaml.meta_step(model, state, tasks[1], **rates)
    free, _ = Clipped()(model, state, tasks[1], **rates)
    assert relative_error(free.theta, plain.theta) < 1e-12 and free.alpha == plain.alpha

    limit = measured["gradient_norm"].item() / 2
    found, metrics = Clipped(gradient=limit)(model, state, tasks[1], **rates)
    assert metrics["d_beta"].item() == pytest.approx(measured["d_beta"].item() / 2)
    beta = BETA - 1e-3 * metrics["d_beta"].item()
    half = {n: state.theta[n] - beta / 2 * plain.direction[n] for n in state.theta}
    assert relative_error(found.theta, half) < 1e-12 and found.alpha == plain.alpha

    limit = min(abs(measured[name].item()) for name in ("d_alpha", "d_beta")) / 2
    found, metrics = Clipped(hypergradient=limit)(model, state, tasks[1], **rates)
    for name, rate, before, h in (
        ("d_alpha", found.alpha, ALPHA, 1e-2),
        ("d_beta", found.beta, BETA, 1e-3),
    ):
        assert metrics[name].item() == pytest.approx(limit * measured[name].sign().item())
        assert rate.item() == pytest.approx(before - h * metrics[name].item())


def test_a_rival_is_trained_validated_and_resumed_as_any_run(tmp_path):
    config = amaml.RunConfig(**SMALL, iterations=6, test_tasks=4)
    own = {"name": "meta-sgd", "step": LearnedRates(True), "progress": False}
    whole = amaml.train(config, tmp_path / "whole", **own)
    shorter = amaml.RunConfig(**SMALL, iterations=3)
    parent = amaml.train(shorter, tmp_path / "parts", checkpoint_every=1, **own)
    run = amaml.train(config, tmp_path / "parts", start=parent, **own)
    assert run.metrics["query_loss"].equals(whole.metrics["query_loss"])
    assert whole.metrics["test_accuracy"].notna().sum() == 1
    assert whole.metrics["validation_loss"].notna().sum() == 2
    rates = run.state.moments["rates"]
    assert all(torch.equal(v, whole.state.moments["rates"][n]) for n, v in rates.items())
