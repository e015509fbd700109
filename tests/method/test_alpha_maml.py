"""Algorithm 2: the step of equation 9, MAML as its special case, Adam, evaluation."""

import math

import pytest
import torch
from helpers import (
    batches,
    leaves,
    loop_losses,
    omniglot_forward,
    random_tasks,
    relative_error,
    small_model,
)
from torch.nn import functional as F

import amaml


def test_infinite_gradients_leave_rates_alone_that_have_no_hyper_rate():
    model = small_model()
    state = amaml.init_state(model, alpha=0.3, beta=0.2)
    state = state._replace(
        direction={name: torch.full_like(p, math.inf) for name, p in state.theta.items()}
    )
    tasks = batches(1)[0]
    broken = amaml.Tasks(tasks.support_x, tasks.support_y, tasks.query_x * math.inf, tasks.query_y)
    state, metrics = amaml.meta_step(model, state, broken)
    assert not math.isfinite(metrics["d_alpha"]) and not math.isfinite(metrics["d_beta"])
    assert (state.alpha.item(), state.beta.item()) == (0.3, 0.2)
    moved, _ = amaml.meta_step(model, state, broken, hyper_alpha=0.1)
    assert not math.isfinite(moved.alpha) and moved.beta.item() == 0.2


def test_adam_takes_the_steps_of_torchs_adam():
    model = small_model()
    state = amaml.init_state(model, alpha=0.3, beta=0.01, meta_optimizer="adam")
    theta = leaves(dict(model.named_parameters()))
    adam = torch.optim.Adam(theta.values(), lr=0.01)
    for tasks in batches(5):
        state, _ = amaml.meta_step(model, state, tasks)
        losses = loop_losses(omniglot_forward, theta, 0.3, tasks, fixed=model.meta_only)
        adam.zero_grad()
        torch.stack(losses).mean().backward()
        adam.step()
    assert relative_error(state.theta, {n: p.detach() for n, p in theta.items()}) < 1e-8


def test_adam_counts_on_where_bfloat16_has_no_next_number():
    model = torch.nn.Linear(2, 1).bfloat16()
    state = amaml.init_state(model, alpha=0.1, beta=0.01, meta_optimizer="adam")
    late = state.moments | {"count": state.moments["count"] + 256}
    x, y = torch.ones(1, 4, 2).bfloat16(), torch.ones(1, 4, 1).bfloat16()
    tasks = amaml.Tasks(support_x=x, support_y=y, query_x=x, query_y=y)
    state, _ = amaml.meta_step(model, state._replace(moments=late), tasks, loss=F.mse_loss)
    assert state.moments["count"] == 257
    assert {value.dtype for value in state.theta.values()} == {torch.bfloat16}


def test_hypergradient_of_beta_under_adam_is_that_of_finite_differences():
    model, (first, second), step = small_model(), batches(2), 1e-7

    def after_first(beta: float):
        start = amaml.init_state(model, alpha=0.3, beta=beta, meta_optimizer="adam")
        return amaml.meta_step(model, start, first)[0]

    def loss_after(beta: float) -> float:
        theta = leaves(after_first(beta).theta)
        losses = loop_losses(omniglot_forward, theta, 0.3, second, 1, True, model.meta_only)
        return torch.stack(losses).mean().item()

    _, metrics = amaml.meta_step(model, after_first(0.01), second)
    difference = (loss_after(0.01 + step) - loss_after(0.01 - step)) / (2 * step)
    assert metrics["d_beta"].item() == pytest.approx(difference, rel=1e-5)


def test_the_state_keeps_no_graph_and_the_model_is_not_touched():
    model = small_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = amaml.init_state(model, alpha=0.3, beta=0.2)
    for tasks in batches(2):
        state, metrics = amaml.meta_step(model, state, tasks, hyper_alpha=0.1, hyper_beta=0.1)
    kept = [*state.theta.values(), *state.direction.values(), state.alpha, state.beta]
    assert not any(tensor.requires_grad for tensor in [*kept, *metrics.values()])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


def test_evaluation_is_that_of_a_plain_loop_with_95_percent_intervals():
    model, tasks = small_model(), random_tasks((1, 28, 28), batch=40)
    state = amaml.init_state(model, alpha=0.3, beta=0.2)
    measured = amaml.evaluate(model, state, tasks, inner_steps=2)
    theta = leaves(state.theta)
    losses = loop_losses(omniglot_forward, theta, 0.3, tasks, 2, True, model.meta_only)
    losses = torch.stack(losses).detach()
    assert measured["query_loss"] == pytest.approx(losses.mean().item(), rel=1e-9)
    half_width = 1.96 * losses.std().item() / math.sqrt(40)
    assert measured["query_loss_ci95"] == pytest.approx(half_width, rel=1e-9)
    right = []
    for i in range(40):
        adapted = amaml.adapt(
            model, state.theta, 0.3, tasks.support_x[i], tasks.support_y[i], inner_steps=2
        )
        guess = omniglot_forward(adapted, tasks.query_x[i]).argmax(1)
        right.append((guess == tasks.query_y[i]).double().mean())
    assert measured["query_accuracy"] == pytest.approx(torch.stack(right).mean().item())
    assert math.isnan(amaml.evaluate(model, state, tasks[0])["query_loss_ci95"])


def scale_free(loss_scale=1.0, iterations=6, alpha=0.3, beta=0.2, hypers=(1.0, 1.0)):
    """The path of a state under the scale-free rule in float64, where the loss has a scale."""
    model = Regression().double()
    generator = torch.Generator().manual_seed(0)
    state = amaml.init_state(model, alpha / loss_scale, beta / loss_scale, rule="scale-free")

    def loss(prediction, y):
        return loss_scale * F.mse_loss(prediction, y)

    path = []
    for _ in range(iterations):
        tasks = amaml.Tasks(*torch.randn(4, 5, 3, 2, generator=generator, dtype=torch.float64))
        state, metrics = amaml.meta_step(
            model, state, tasks, hyper_alpha=hypers[0], hyper_beta=hypers[1], loss=loss
        )
        path.append((state, metrics))
    return path


class Regression(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([[0.5, -1.0], [2.0, 0.3]]))

    def forward(self, x):
        return torch.tanh(x @ self.weight)


def test_the_scale_free_rule_written_out():
    alpha, beta, squares, kept = 0.3, 0.2, [0.0, 0.0], 0.0
    for state, metrics in scale_free():
        gradient = float(metrics["gradient_norm"])
        slope = alpha * float(metrics["d_alpha"]) / float(metrics["query_loss"])
        squares[0] += slope**2
        alpha *= math.exp(-slope / math.sqrt(squares[0]))
        size = float(torch.linalg.vector_norm(torch.as_tensor(kept)))
        cosine = -float(metrics["d_beta"]) / (gradient * size) if size else 0.0
        squares[1] += cosine**2
        beta *= math.exp(cosine / math.sqrt(squares[1])) if cosine else 1.0
        direction = state.direction["weight"] - 0.9 * torch.as_tensor(kept)
        assert gradient == pytest.approx(float(direction.norm()), rel=1e-9)
        before = state.theta["weight"] + metrics["beta"] * direction
        beta = min(beta, 0.1 * float(before.norm()) / gradient)
        assert float(state.alpha) == pytest.approx(alpha, rel=1e-9)
        assert float(state.beta) == float(metrics["beta"]) == pytest.approx(beta, rel=1e-9)
        kept = state.direction["weight"]


@pytest.mark.parametrize("scale", [10.0, 1e-3])
def test_the_scale_of_the_loss_does_not_enter_the_scale_free_rule(scale):
    """With the rates in their unit, theta goes the same way whatever the loss is measured in."""
    for (one, _), (other, _) in zip(scale_free(), scale_free(loss_scale=scale), strict=True):
        torch.testing.assert_close(one.theta, other.theta, rtol=1e-9, atol=1e-12)
        assert float(other.alpha * scale) == pytest.approx(float(one.alpha), rel=1e-9)


def test_the_scale_free_rule_bounds_a_meta_step_and_leaves_a_rate_without_a_constant_alone():
    (state, _), *_ = scale_free(beta=1e6, iterations=1)
    start = Regression().double().weight
    assert ((state.theta["weight"] - start).norm() / start.norm()).item() == pytest.approx(0.1)
    for state, _ in scale_free(hypers=(0.0, 0.0)):
        assert (float(state.alpha), float(state.beta)) == (0.3, 0.2)
