"""Each equation of the paper, held against finite differences or a computation written out.

The network is OmniglotCNN in float64, and its forward pass is written once more in helpers.py with
torch's own convolution and normalisation. Everything here is plain `torch.autograd`, without the
transforms that the module uses.
"""

import pytest
import torch
from helpers import batches, leaves, loop_losses, omniglot_forward, relative_error, small_model
from torch import nn
from torch.nn import functional as F

import amaml

ALPHA, BETA = 0.3, 0.2
STEP = 1e-7  # of finite differences: so small that hardly ever a ReLU switches within it


def support_gradient(theta, tasks, i=0, create_graph=False) -> dict[str, torch.Tensor]:
    """The gradient of a task's support loss at theta; zero for what the inner loop leaves alone."""
    loss = F.cross_entropy(omniglot_forward(theta, tasks.support_x[i]), tasks.support_y[i])
    gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=create_graph)
    fixed = small_model().meta_only
    return {n: 0 * g if n in fixed else g for n, g in zip(theta, gradients, strict=True)}


def query_gradient(theta_prime, tasks, i=0) -> dict[str, torch.Tensor]:
    """The gradient of a task's query loss at theta_prime, by theta_prime."""
    at = leaves(theta_prime)
    loss = F.cross_entropy(omniglot_forward(at, tasks.query_x[i]), tasks.query_y[i])
    return dict(zip(at, torch.autograd.grad(loss, list(at.values())), strict=True))


def adapted(theta, tasks, i=0, alpha=ALPHA) -> dict[str, torch.Tensor]:
    gradient = support_gradient(leaves(theta), tasks, i)
    return {name: theta[name] - alpha * gradient[name] for name in theta}


def meta_gradient(theta, tasks, i=0, alpha=ALPHA) -> dict[str, torch.Tensor]:
    """(I - alpha H) v, the Hessian's product by a second derivative."""
    at, v = leaves(theta), query_gradient(adapted(theta, tasks, i, alpha), tasks, i)
    gradient, fixed = support_gradient(at, tasks, i, create_graph=True), small_model().meta_only
    along = sum((gradient[name] * v[name]).sum() for name in at if name not in fixed)
    hessian_v = torch.autograd.grad(along, list(at.values()))
    return {n: v[n] - alpha * h for n, h in zip(at, hessian_v, strict=True)}


def dot(a, b) -> float:
    return sum((a[name] * b[name]).sum() for name in a).item()


def mean_query_loss(theta, tasks, alpha=ALPHA) -> float:
    fixed = small_model().meta_only
    losses = loop_losses(omniglot_forward, leaves(theta), alpha, tasks, 1, True, fixed)
    return torch.stack(losses).mean().item()


@pytest.fixture
def start() -> amaml.MetaState:
    return amaml.init_state(small_model(), alpha=ALPHA, beta=BETA)


def one_task(seed: int = 0) -> amaml.Tasks:
    return batches(seed + 1, batch=1)[seed]


def test_equation_1(start):
    """theta' = theta - alpha grad L_train(theta)"""
    task = one_task()
    theta_prime = amaml.adapt(
        small_model(), start.theta, ALPHA, task.support_x[0], task.support_y[0]
    )
    assert relative_error(theta_prime, adapted(start.theta, task)) < 1e-9


def test_equation_2(start):
    """The meta-objective: the query losses at theta', here their mean."""
    (tasks,) = batches(1, batch=3)
    _, metrics = amaml.meta_step(small_model(), start, tasks)
    losses = [
        F.cross_entropy(
            omniglot_forward(adapted(start.theta, tasks, i), tasks.query_x[i]), tasks.query_y[i]
        )
        for i in range(3)
    ]
    assert metrics["query_loss"].item() == pytest.approx(sum(losses).item() / 3, rel=1e-9)


def test_equation_3(start):
    """theta <- theta - beta grad_theta L_test(theta'), where the gradient is (I - alpha H) v."""
    (tasks,) = batches(1, batch=3)
    each = [meta_gradient(start.theta, tasks, i) for i in range(3)]
    mean = {name: sum(g[name] for g in each) / 3 for name in start.theta}
    gradient, _, _ = amaml.meta_gradient(small_model(), start.theta, ALPHA, tasks)
    assert relative_error(gradient, mean) < 1e-9
    state, _ = amaml.meta_step(small_model(), start, tasks)
    expected = {name: start.theta[name] - BETA * mean[name] for name in mean}
    assert relative_error(state.theta, expected) < 1e-9
    generator = torch.Generator().manual_seed(3)
    for name, value in start.theta.items():  # and along a random direction in each parameter
        u = torch.randn(value.shape, dtype=value.dtype, generator=generator)
        u /= u.norm()
        there = mean_query_loss({**start.theta, name: value + STEP * u}, tasks)
        back = mean_query_loss({**start.theta, name: value - STEP * u}, tasks)
        error = abs((gradient[name] * u).sum().item() - (there - back) / (2 * STEP))
        assert error < 1e-6 * max(gradient[name].norm().item(), 1e-2)


def test_equation_4(start):
    """dL_test(theta') / dalpha = -grad L_test(theta') . grad L_train(theta)"""
    task = one_task()
    _, d_alpha, _ = amaml.meta_gradient(small_model(), start.theta, ALPHA, task)
    v = query_gradient(adapted(start.theta, task), task)
    g = support_gradient(leaves(start.theta), task)
    assert d_alpha.item() == pytest.approx(-dot(v, g), rel=1e-9)
    there, back = (mean_query_loss(start.theta, task, ALPHA + s) for s in (STEP, -STEP))
    assert d_alpha.item() == pytest.approx((there - back) / (2 * STEP), rel=1e-6)


def test_equation_5(start):
    """alpha_t = alpha_{t-1} + h_alpha grad L_test(theta'_{t-1}) . grad L_train(theta_{t-1})"""
    task = one_task()
    state, metrics = amaml.meta_step(small_model(), start, task, hyper_alpha=0.05)
    v = query_gradient(adapted(start.theta, task), task)
    g = support_gradient(leaves(start.theta), task)
    assert metrics["alpha"].item() == ALPHA  # this iteration still goes by the old one
    assert state.alpha.item() == pytest.approx(ALPHA + 0.05 * dot(v, g), rel=1e-9)
    assert abs(state.alpha.item() - ALPHA) > 1e-4


def test_equation_6():
    """dL_test(theta'_t) / dbeta = -grad_theta L_t(theta'_t) . grad_theta L_{t-1}(theta'_{t-1})"""
    first, second = one_task(0), one_task(1)

    def after_first(beta: float) -> amaml.MetaState:
        return amaml.meta_step(small_model(), amaml.init_state(small_model(), ALPHA, beta), first)[
            0
        ]

    state = after_first(BETA)
    _, metrics = amaml.meta_step(small_model(), state, second)
    previous = meta_gradient(amaml.init_state(small_model(), ALPHA, BETA).theta, first)
    expected = -dot(meta_gradient(state.theta, second), previous)
    assert metrics["d_beta"].item() == pytest.approx(expected, rel=1e-9)
    there, back = (mean_query_loss(after_first(BETA + s).theta, second) for s in (STEP, -STEP))
    assert metrics["d_beta"].item() == pytest.approx((there - back) / (2 * STEP), rel=1e-6)


def test_equation_7(start):
    """beta_t = beta_{t-1} + h_beta grad_theta L_t(theta'_t) . grad_theta L_{t-1}(theta'_{t-1})"""
    first, second = one_task(0), one_task(1)
    state, _ = amaml.meta_step(small_model(), start, first, hyper_beta=0.05)
    assert state.beta.item() == BETA  # there is no gradient before the first
    moved, _ = amaml.meta_step(small_model(), state, second, hyper_beta=0.05)
    along = dot(meta_gradient(state.theta, second), meta_gradient(start.theta, first))
    assert moved.beta.item() == pytest.approx(BETA + 0.05 * along, rel=1e-9)


def test_equation_8(start):
    """The four updates in their order, one task an iteration."""
    state, theta, alpha, beta, previous, v, g = start, start.theta, ALPHA, BETA, None, None, None
    for t in range(3):
        task = one_task(t)
        state, metrics = amaml.meta_step(
            small_model(), state, task, hyper_alpha=0.03, hyper_beta=0.02
        )
        alpha = alpha + 0.03 * dot(v, g) if v else alpha
        theta_prime = adapted(theta, task, alpha=alpha)
        gradient = meta_gradient(theta, task, alpha=alpha)
        beta = beta + 0.02 * dot(gradient, previous) if previous else beta
        v, g = query_gradient(theta_prime, task), support_gradient(leaves(theta), task)
        theta, previous = {n: theta[n] - beta * gradient[n] for n in theta}, gradient
        assert metrics["alpha"].item() == pytest.approx(alpha, rel=1e-9)
        assert metrics["beta"].item() == pytest.approx(beta, rel=1e-9)
        assert relative_error(state.theta, theta) < 1e-9


def by_hand(model, batches, alpha, beta, hyper_alpha, hyper_beta, inner_steps=1):
    """Equation 9 with explicit dot products, no torch.func and no shortcut.

    Hypergradients of alpha are summed over inner steps as sum_k v_{k+1} . grad L_train(theta_k).
    Yields (theta, alpha, beta) after each iteration.
    """
    fixed, theta, previous = model.meta_only, dict(model.named_parameters()), None
    for tasks in batches:
        total, alpha_dot = {name: 0.0 for name in theta}, 0.0
        for i in range(len(tasks)):
            x, y = tasks.support_x[i], tasks.support_y[i]
            path, inner = [leaves(theta)], []
            for _ in range(inner_steps):
                at = path[-1]
                support = F.cross_entropy(omniglot_forward(at, x), y)
                g = dict(
                    zip(
                        at,
                        torch.autograd.grad(support, list(at.values()), create_graph=True),
                        strict=True,
                    )
                )
                inner.append(g)
                path.append(leaves({n: at[n] if n in fixed else at[n] - alpha * g[n] for n in at}))
            query = F.cross_entropy(omniglot_forward(path[-1], tasks.query_x[i]), tasks.query_y[i])
            v = dict(zip(theta, torch.autograd.grad(query, list(path[-1].values())), strict=True))
            for at, g in zip(reversed(path[:-1]), reversed(inner), strict=True):
                moving = [n for n in at if n not in fixed]
                dot = sum((v[n] * g[n]).sum() for n in moving)
                alpha_dot += dot.item() / len(tasks)
                hessian_v = torch.autograd.grad(  # the Hessian of the support loss times v
                    sum((g[n] * v[n].detach()).sum() for n in moving), list(at.values())
                )
                v = {n: v[n] - alpha * h for n, h in zip(at, hessian_v, strict=True)}
            total = {n: total[n] + v[n].detach() / len(tasks) for n in theta}
        if previous is not None:
            beta = beta + hyper_beta * sum((total[n] * previous[n]).sum() for n in theta).item()
        theta = {n: theta[n].detach() - beta * total[n] for n in theta}
        alpha = alpha + hyper_alpha * alpha_dot
        previous = total
        yield theta, alpha, beta


@pytest.mark.parametrize("inner_steps", [1, 3])
def test_equation_9(inner_steps):
    model = small_model()
    rates = {"hyper_alpha": 0.03, "hyper_beta": 0.02}
    state = amaml.init_state(model, alpha=0.3, beta=0.2)
    expected = by_hand(model, batches(4), 0.3, 0.2, 0.03, 0.02, inner_steps)
    for tasks, (theta, alpha, beta) in zip(batches(4), expected, strict=True):
        state, metrics = amaml.meta_step(model, state, tasks, inner_steps=inner_steps, **rates)
        assert relative_error(state.theta, theta) < 1e-9
        assert state.alpha.item() == pytest.approx(alpha, rel=1e-9)
        assert state.beta.item() == metrics["beta"].item() == pytest.approx(beta, rel=1e-9)
    assert abs(state.alpha - 0.3) > 1e-4 and abs(state.beta - 0.2) > 1e-4


def test_two_iterations_worked_out_on_paper():
    # One parameter w = 1, prediction w x, loss (w x - y)^2 / 2, alpha = beta = 0.1, hyper rates
    # 0.01 and 0.02. Two equal meta-batches of two equal tasks: support (1, 2), query (1, 3).
    # Iteration 1: support gradient w - 2 = -1, w' = 1.1, query gradient w' - 3 = -1.9; the
    # meta-gradient is -1.9 * (1 - 0.1) = -1.71; beta stays 0.1; w = 1.171;
    # alpha = 0.1 + 0.01 * (-1.9 * -1) = 0.119.
    # Iteration 2: support gradient -0.829, w' = 1.171 + 0.119 * 0.829 = 1.269651, query gradient
    # -1.730349, meta-gradient -1.730349 * 0.881 = -1.524437469,
    # beta = 0.1 + 0.02 * (-1.524437469 * -1.71) = 0.1521357614, w = 1.171 + that * 1.524437...
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(model.weight)

    def number(value: float) -> torch.Tensor:
        return torch.full((2, 1, 1), value, dtype=torch.float64)

    tasks = amaml.Tasks(number(1.0), number(2.0), number(1.0), number(3.0))
    arguments = {
        "hyper_alpha": 0.01,
        "hyper_beta": 0.02,
        "loss": lambda prediction, y: (prediction - y).square().mean() / 2,
    }
    state = amaml.init_state(model, alpha=0.1, beta=0.1)
    state, metrics = amaml.meta_step(model, state, tasks, **arguments)
    assert metrics["d_alpha"].item() == pytest.approx(-1.9)
    assert metrics["d_beta"].item() == 0  # no previous gradient yet
    assert metrics["gradient_norm"].item() == pytest.approx(1.71)
    assert metrics["support_loss"].item() == pytest.approx(0.5)
    assert state.theta["weight"].item() == pytest.approx(1.171)
    assert (state.alpha.item(), state.beta.item()) == pytest.approx((0.119, 0.1))
    state, metrics = amaml.meta_step(model, state, tasks, **arguments)
    assert metrics["alpha"].item() == pytest.approx(0.119)
    assert state.beta.item() == pytest.approx(0.1521357614398)
    assert state.theta["weight"].item() == pytest.approx(1.171 + 0.1521357614398 * 1.524437469)
