"""The faster meta-gradient: its pieces, its runs side by side, and which models it serves."""

import platform
import resource

import pytest
import torch
from helpers import random_tasks, relative_error, small_model
from torch import nn
from torch.func import grad, vmap
from torch.nn import functional as F

import amaml
from amaml import fast
from amaml.fast import meta_gradients
from amaml.maml import mapped_meta_gradient, mapped_query_metrics, query_metrics
from amaml.runs.process import keep_freed_memory

ALPHAS = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)


def theta_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def squared_error(prediction, y):
    return (prediction.tanh().sum(-1) - y).square().mean()


def of_one_hot(prediction, y):
    return (prediction.tanh() - F.one_hot(y, prediction.shape[-1])).square().mean()


def linear(prediction, y):
    return prediction.sum()


LOSSES = [F.cross_entropy, squared_error, linear]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("examples_at_once", [1, 14, 24, 100])
def test_pieces_and_runs_side_by_side_give_what_each_run_gives(monkeypatch, examples_at_once, loss):
    monkeypatch.setattr(meta_gradients, "EXAMPLES_AT_ONCE", examples_at_once)
    model, tasks = small_model(), random_tasks((1, 28, 28))  # 3 runs of 2 tasks of 6 images
    theta, batch = theta_of(model), tuple(vars(tasks).values())

    def results(alpha):
        of_gradient = amaml.meta_gradient(model, theta, alpha, tasks, inner_steps=2, loss=loss)
        return *of_gradient, query_metrics(model, theta, alpha, tasks, 2, loss)

    gradient, d_alpha, metrics, of_tasks = vmap(results)(ALPHAS)
    for i, alpha in enumerate(ALPHAS):
        run, d_alpha_of_run = {name: g[i] for name, g in gradient.items()}, d_alpha[i]
        alone, alpha_alone, _, of_tasks_alone = results(alpha)
        assert all(torch.equal(alone[name], g) for name, g in run.items())
        assert torch.equal(alpha_alone, d_alpha_of_run)
        expected, expected_alpha, each = mapped_meta_gradient(
            model, theta, alpha, batch, 2, False, loss, False
        )
        assert relative_error(run, expected) < 1e-9
        assert relative_error(d_alpha_of_run, expected_alpha) < 1e-9
        for name, value in metrics.items():
            assert torch.allclose(value[i], each[name].mean(), rtol=1e-9)
        for name, value in mapped_query_metrics(model, theta, alpha, batch, 2, loss).items():
            assert torch.allclose(of_tasks_alone[name], value, rtol=1e-9)
            assert torch.allclose(of_tasks[name][i], value, rtol=1e-9)


@pytest.mark.parametrize("loss", [*LOSSES, of_one_hot])
def test_derivatives_of_a_loss(loss):
    generator = torch.Generator().manual_seed(0)
    logits, t = torch.randn(2, 2, 6, 4, dtype=torch.float64, generator=generator)
    y = torch.arange(12).view(2, 6) % 4
    losses, d_logits, curvature = meta_gradients.derivatives(loss, logits, y)
    for i in range(2):

        def of_task(logits, i=i):
            return loss(logits, y[i])

        def along(logits, of_task=of_task, i=i):
            return (grad(of_task)(logits) * t[i]).sum()

        assert torch.allclose(losses[i], of_task(logits[i]))
        assert torch.allclose(d_logits[i], grad(of_task)(logits[i]), atol=1e-14)
        assert torch.allclose(curvature(t)[i], grad(along)(logits[i]), atol=1e-14)


class Doubled(amaml.OmniglotCNN):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(model: nn.Module) -> nn.Module:
    model.linear.register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


def with_another_part(model: nn.Module) -> nn.Module:
    model.blocks.append(nn.Tanh())
    return model


def adapting_the_head_alone(model: nn.Module) -> nn.Module:
    model.meta_only = frozenset(n for n, _ in model.named_parameters() if "linear" not in n)
    return model


def with_a_frozen_part(model: nn.Module) -> nn.Module:
    model.blocks[0].weight.requires_grad_(False)
    return model


def with_a_shared_part(model: nn.Module) -> nn.Module:
    model.blocks[2].weight = model.blocks[1].weight
    return model


CHANGED = {
    "subclass": lambda model: Doubled(3, torch.Generator().manual_seed(0), filters=4).double(),
    "hook": hooked,
    "another part": with_another_part,
    "another inner loop": adapting_the_head_alone,
    "frozen part": with_a_frozen_part,
    "shared part": with_a_shared_part,
}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_a_changed_network_goes_by_its_own_forward_pass(change):
    tasks, alpha = random_tasks((1, 28, 28)), ALPHAS[0]
    assert fast.serves(small_model(), theta_of(small_model()), alpha)
    model = change(small_model())
    theta, batch = theta_of(model), tuple(vars(tasks).values())
    assert not fast.serves(model, theta, alpha)
    gradient, _, _ = amaml.meta_gradient(model, theta, alpha, tasks)
    expected, _, _ = mapped_meta_gradient(
        model, theta, alpha, batch, 1, False, F.cross_entropy, False
    )
    assert relative_error(gradient, expected) < 1e-12


def test_who_differentiates_through_a_call_goes_by_automatic_differentiation():
    model, tasks = small_model(), random_tasks((1, 28, 28))

    def d_alpha(alpha):
        return amaml.meta_gradient(model, theta_of(model), alpha, tasks)[1]

    step = 1e-6
    difference = (d_alpha(ALPHAS[0] + step) - d_alpha(ALPHAS[0] - step)) / (2 * step)
    assert relative_error(grad(d_alpha)(ALPHAS[0]), difference) < 1e-5


@pytest.mark.parametrize(
    "make", [small_model, lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 3)).double()]
)
def test_labels_that_do_not_fit_are_refused_in_runs_side_by_side(make):
    """Also those that torch's cross-entropy would pass over."""
    tasks, model = random_tasks((1, 28, 28)), make()

    def step(query_y):
        of_run = amaml.Tasks(tasks.support_x, tasks.support_y, tasks.query_x, query_y)
        return amaml.meta_gradient(model, theta_of(model), 0.3, of_run)[1]

    wrong = tasks.query_y.clone()
    wrong[0, 0] = -100
    with pytest.raises(ValueError, match="query_y holds labels from -100 to 2.*0 to 2"):
        vmap(step)(torch.stack([tasks.query_y, wrong]))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_kept_from_one_meta_gradient_to_the_next(glyphs):
    """Else each of them takes some 20,000 pages anew from the system."""
    keep_freed_memory()
    model = amaml.OmniglotCNN(5, torch.Generator().manual_seed(0))
    tasks = amaml.TaskSampler(glyphs, n_way=5).sample(32, torch.Generator().manual_seed(0))
    taken = []
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        amaml.meta_gradient(model, theta_of(model), 0.4, tasks)
        taken.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert sorted(taken[3:])[2] < 2000
