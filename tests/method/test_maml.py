"""The meta-gradient and the hypergradient of alpha are right, for our network and for others."""

from functools import partial

import pytest
import torch
from helpers import leaves, loop_losses, omniglot_forward, random_tasks, relative_error
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import amaml
from amaml import fast
from amaml.maml import mapped_meta_gradient


def conv_net(norm: nn.Module) -> nn.Module:
    """A small network of smooth functions around a normalisation layer."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), norm, nn.Softplus(), nn.Conv2d(4, 4, 3), nn.Tanh(),
        nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


MODELS = {
    "OmniglotCNN": lambda: amaml.OmniglotCNN(3, torch.Generator().manual_seed(0), filters=4),
    "BatchNorm2d": lambda: conv_net(nn.BatchNorm2d(4, track_running_stats=False)),
    "BatchNorm2d without weights": lambda: conv_net(
        nn.BatchNorm2d(4, affine=False, track_running_stats=False)
    ),
    "InstanceNorm2d": lambda: conv_net(nn.InstanceNorm2d(4, affine=True)),
    "LayerNorm": lambda: conv_net(nn.LayerNorm([4, 4, 4])),
    "GroupNorm": lambda: conv_net(nn.GroupNorm(2, 4)),
    "BatchNorm1d": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8, track_running_stats=False),
        nn.Tanh(), nn.Linear(8, 3),
    ),
}  # fmt: skip


def prepared(kind: str):
    """A float64 model away from its initial norm weights, a forward, its theta and tasks."""
    torch.manual_seed(1)
    model = MODELS[kind]().double()
    generator = torch.Generator().manual_seed(2)
    theta = {
        name: p.detach() + 0.1 * torch.randn(p.shape, dtype=p.dtype, generator=generator)
        for name, p in model.named_parameters()
    }
    if kind == "OmniglotCNN":
        return model, omniglot_forward, theta, random_tasks((1, 28, 28))
    return model, lambda th, x: functional_call(model, th, (x,)), theta, random_tasks((1, 6, 6))


@pytest.mark.parametrize("inner_steps", [1, 5])
@pytest.mark.parametrize("kind", MODELS)
def test_meta_gradient_is_that_of_a_plain_loop(kind, inner_steps):
    model, forward, theta, tasks = prepared(kind)
    gradient, d_alpha, metrics = amaml.meta_gradient(
        model, theta, 0.3, tasks, inner_steps=inner_steps
    )

    at, alpha = leaves(theta), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    fixed = getattr(model, "meta_only", ())
    loss = torch.stack(loop_losses(forward, at, alpha, tasks, inner_steps, fixed=fixed)).mean()
    *expected, expected_alpha = torch.autograd.grad(loss, [*at.values(), alpha])
    assert relative_error(gradient, dict(zip(at, expected, strict=True))) < 1e-9
    assert relative_error(d_alpha, expected_alpha) < 1e-9
    assert relative_error(metrics["query_loss"], loss.detach()) < 1e-12


@pytest.mark.parametrize("inner_steps", [1, 5])
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_those_of_finite_differences(kind, inner_steps):
    model, forward, theta, tasks = prepared(kind)
    # A small step, so that hardly ever a ReLU switches within it (its slope then has no limit).
    alpha, step = torch.tensor(0.3, dtype=torch.float64), 1e-7
    gradient, d_alpha, _ = amaml.meta_gradient(model, theta, alpha, tasks, inner_steps=inner_steps)
    fixed = getattr(model, "meta_only", ())

    def mean_loss(theta, alpha) -> torch.Tensor:
        losses = loop_losses(forward, leaves(theta), alpha, tasks, inner_steps, True, fixed)
        return torch.stack(losses).mean().detach()

    difference = (mean_loss(theta, alpha + step) - mean_loss(theta, alpha - step)) / (2 * step)
    assert relative_error(d_alpha, difference) < 1e-6
    generator = torch.Generator().manual_seed(3)
    for name in theta:  # a random direction within each parameter
        direction = torch.randn(theta[name].shape, dtype=torch.float64, generator=generator)
        direction /= direction.norm()
        there = mean_loss({**theta, name: theta[name] + step * direction}, alpha)
        back = mean_loss({**theta, name: theta[name] - step * direction}, alpha)
        error = abs((gradient[name] * direction).sum() - (there - back) / (2 * step))
        assert error < 1e-6 * max(gradient[name].norm(), 1e-2)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("inner_steps", [1, 2, 5])
@pytest.mark.parametrize("kind", ["OmniglotCNN", "BatchNorm2d", "LayerNorm"])
def test_all_ways_to_the_meta_gradient_agree(kind, inner_steps, first_order):
    model, _forward, theta, tasks = prepared(kind)
    theta, alpha = {n: value.clone() for n, value in theta.items()}, torch.tensor(0.3).double()
    batch = (tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y)
    arguments = (model, theta, alpha, batch, inner_steps, first_order, F.cross_entropy)
    expected, expected_alpha, expected_metrics = mapped_meta_gradient(*arguments, False)
    ways = [partial(mapped_meta_gradient, recompute=True)]
    if kind == "OmniglotCNN":
        ways += [partial(fast.meta_gradient, recompute=again) for again in (False, True)]
    for way in ways:
        gradient, d_alpha, metrics = way(*arguments)
        assert relative_error(gradient, expected) < 1e-9
        assert relative_error(d_alpha, expected_alpha) < 1e-9
        assert metrics.keys() == expected_metrics.keys()
        for name, value in metrics.items():
            assert torch.allclose(value, expected_metrics[name], rtol=1e-9)


def test_single_precision_is_near_double_precision():
    model, _forward, theta, tasks = prepared("OmniglotCNN")
    expected, expected_alpha, _ = amaml.meta_gradient(model, theta, 0.3, tasks)
    single = amaml.Tasks(
        tasks.support_x.float(), tasks.support_y, tasks.query_x.float(), tasks.query_y
    )
    gradient, d_alpha, _ = amaml.meta_gradient(
        model.float(), {n: value.float() for n, value in theta.items()}, 0.3, single
    )
    assert gradient["linear.weight"].dtype == torch.float32
    assert relative_error({n: g.double() for n, g in gradient.items()}, expected) < 1e-4
    assert relative_error(d_alpha.double(), expected_alpha) < 1e-4


def test_first_order_leaves_out_the_second_derivatives_and_nothing_else():
    model, _forward, theta, tasks = prepared("OmniglotCNN")
    second, _, _ = amaml.meta_gradient(model, theta, 0.3, tasks)
    first, d_alpha, _ = amaml.meta_gradient(model, theta, 0.3, tasks, first_order=True)
    assert relative_error(first, second) > 0.01

    # Section 5.2 of Finn et al. (2017): the query loss's gradient at theta_prime.
    fixed, expected, expected_alpha = model.meta_only, {name: 0 for name in theta}, 0
    for i in range(len(tasks)):
        x, y = tasks.support_x[i], tasks.support_y[i]
        theta_prime = leaves(amaml.adapt(model, theta, 0.3, x, y))
        loss = F.cross_entropy(omniglot_forward(theta_prime, tasks.query_x[i]), tasks.query_y[i])
        at_prime = torch.autograd.grad(loss, list(theta_prime.values()))
        at = leaves(theta)
        loss = F.cross_entropy(omniglot_forward(at, x), y)
        at_theta = torch.autograd.grad(loss, list(at.values()))
        for name, v, g in zip(theta, at_prime, at_theta, strict=True):
            expected[name] = expected[name] + v / len(tasks)
            if name not in fixed:
                expected_alpha = expected_alpha - (v * g).sum() / len(tasks)  # equation 4
    assert relative_error(first, expected) < 1e-10
    assert relative_error(d_alpha, expected_alpha) < 1e-10


def test_results_have_the_wider_dtype_of_tasks_and_theta():
    model = amaml.OmniglotCNN(3, torch.Generator().manual_seed(0), filters=4)
    tasks = random_tasks((1, 28, 28))
    theta = {name: p.detach() for name, p in model.named_parameters()}
    gradient, d_alpha, metrics = amaml.meta_gradient(model, theta, 0.3, tasks)
    results = [*gradient.values(), d_alpha, *metrics.values()]
    assert {result.dtype for result in results} == {torch.float64}
    narrow = amaml.meta_gradient(model, theta, 0.3, tasks.to(dtype=torch.float32))
    assert {value.dtype for value in narrow[0].values()} == {torch.float32}
    assert relative_error(
        {name: value.double() for name, value in narrow[0].items()}, gradient
    ) < 1e-4  # fmt: skip


def test_parts_of_a_model_keep_their_parameters_for_the_meta_step():
    inner = amaml.OmniglotCNN(3, torch.Generator().manual_seed(0), filters=4)
    model = nn.Sequential(inner, nn.Linear(3, 3)).double()
    theta = {name: p.detach() for name, p in model.named_parameters()}
    tasks = random_tasks((1, 28, 28))
    adapted = amaml.adapt(model, theta, 0.3, tasks.support_x[0], tasks.support_y[0])
    unchanged = {name for name in theta if torch.equal(adapted[name], theta[name])}
    assert unchanged == {f"0.{name}" for name in inner.meta_only}
