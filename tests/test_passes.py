"""The written-out passes of OmniglotCNN are those of the plain network."""

from __future__ import annotations

import platform
import resource

import pytest
import torch
from conftest import random_tasks, relative_error
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

import amaml
from amaml import maml
from amaml.fast import omniglot_cnn
from amaml.fast.meta_gradients import derivatives
from amaml.fast.omniglot_cnn import OmniglotPass, patches, prepare, sum_of_patches


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def network(filters: int = 6) -> amaml.OmniglotCNN:
    return amaml.OmniglotCNN(4, torch.Generator().manual_seed(0), filters=filters).double()


def theta_of_each_task(model: nn.Module, tasks: int = 3) -> dict[str, Tensor]:
    return {
        name: p.detach() + 0.1 * draw(tasks, *p.shape, seed=i)
        for i, (name, p) in enumerate(model.named_parameters())
    }


def of_task(theta, i: int) -> dict[str, Tensor]:
    return {name: value[i] for name, value in theta.items()}


def with_tangent(function, at: tuple, along: tuple):
    """A function's value, and its derivative along a direction, by reverse passes alone: for any u
    the vector-Jacobian product is linear in u, and its slope in u is what is asked for."""
    value = function(*at)

    def paired(u):
        pulled = tree_leaves(vjp(function, *at)[1](u))
        return sum((p * a).sum() for p, a in zip(pulled, tree_leaves(along), strict=True))

    return value, grad(paired)(tree_map(torch.zeros_like, value))


@pytest.mark.parametrize("size", [(28, 28), (20, 20), (9, 14), (1, 6)])
def test_all_passes_are_those_of_the_plain_network(size):
    """Against automatic differentiation of the plain forward pass, task by task."""
    model, x, d_logits = network(), draw(3, 5, 1, *size).abs(), draw(3, 5, 4, seed=1)
    theta, v = theta_of_each_task(model), theta_of_each_task(model)
    v = {name: torch.zeros_like(t) if name in model.meta_only else t for name, t in v.items()}
    at = OmniglotPass(theta, prepare(x))
    gradient = at.gradient(d_logits)
    t_logits, t_d_logits = at.push(v), draw(3, 5, 4, seed=2)
    pulled = at.pull(t_d_logits)
    for i in range(3):

        def logits(theta, i=i):
            return functional_call(model, theta, (x[i],))

        def slope(theta, d, logits=logits):
            return grad(lambda theta: (logits(theta) * d).sum())(theta)

        here, along = of_task(theta, i), of_task(v, i)
        expected, tangent = with_tangent(logits, (here,), (along,))
        assert relative_error(at.logits[i], expected) < 1e-11
        assert relative_error(t_logits[i], tangent) < 1e-11
        expected, tangent = with_tangent(slope, (here, d_logits[i]), (along, t_d_logits[i]))
        assert relative_error(of_task(gradient, i), expected) < 1e-11
        assert relative_error(of_task(pulled, i), tangent) < 1e-11


def test_the_hessian_is_symmetric_and_that_of_finite_differences():
    model, x = network(), draw(1, 5, 1, 28, 28).abs()
    y = torch.arange(5).remainder(4).unsqueeze(0)
    theta, u, v = (theta_of_each_task(model, 1) for _ in range(3))
    u = {name: draw(*t.shape, seed=i + 20) for i, (name, t) in enumerate(u.items())}
    for name in model.meta_only:
        u[name] = v[name] = torch.zeros_like(theta[name])

    def gradient(theta):
        at = OmniglotPass(theta, prepare(x))
        _, d_logits, curvature = derivatives(F.cross_entropy, at.logits, y)
        return at, at.gradient(d_logits), curvature

    def product(v):
        at, _, curvature = gradient(theta)
        return at.pull(curvature(at.push(v)))

    def dot(a, b):
        return sum((a[name] * b[name]).sum() for name in a)

    assert float(dot(u, product(v))) == pytest.approx(float(dot(v, product(u))), rel=1e-9)
    step = 1e-7
    there, back = (
        gradient({name: theta[name] + sign * step * v[name] for name in theta})[1]
        for sign in (1, -1)
    )
    difference = {name: (there[name] - back[name]) / (2 * step) for name in theta}
    assert relative_error(product(v), difference) < 1e-6


def test_rounding_is_no_worse_than_in_the_plain_network():
    model, x = amaml.OmniglotCNN(5, torch.Generator().manual_seed(0)), draw(1, 25, 1, 28, 28).abs()
    theta = {name: p.detach().unsqueeze(0) for name, p in model.named_parameters()}
    passed, plain = OmniglotPass(theta, prepare(x.float())).logits[0], model(x[0].float())
    exact = model.double()(x[0])
    error, of_plain = (relative_error(each.double(), exact) for each in (passed, plain))
    assert error < 3 * of_plain < 1e-5


def test_a_constant_image_has_no_variance_and_finite_passes():
    model, x = network(), torch.full((3, 2, 1, 28, 28), 0.5, dtype=torch.float64)
    at = OmniglotPass(theta_of_each_task(model), prepare(x))
    gradient = at.gradient(draw(3, 2, 4))
    assert all(value.isfinite().all() for value in (at.logits, *gradient.values()))


def squared_error(prediction, y):
    return (prediction.tanh() - F.one_hot(y, 4)).square().mean()


@pytest.mark.parametrize("loss", [F.cross_entropy, squared_error, lambda p, y: p.sum()])
def test_derivatives_of_a_loss(loss):
    logits, y, t = 3 * draw(2, 6, 4), torch.arange(12).view(2, 6) % 4, draw(2, 6, 4, seed=1)
    losses, d_logits, curvature = derivatives(loss, logits, y)
    for i in range(2):

        def of_task(logits, i=i):
            return loss(logits, y[i])

        slope, tangent = with_tangent(grad(of_task), (logits[i],), (t[i],))
        assert torch.allclose(losses[i], of_task(logits[i]))
        assert torch.allclose(d_logits[i], slope, atol=1e-14)
        assert torch.allclose(curvature(t)[i], tangent, atol=1e-14)


def test_patches_pad_as_tensorflow_does():
    # On 4 pixels with stride 2 SAME padding adds one row and column at the end only.
    x = torch.arange(1.0, 17.0).view(1, 1, 4, 4, 1)
    rows = patches(x)[0].tolist()
    assert rows[0] == [1, 2, 3, 5, 6, 7, 9, 10, 11]
    assert rows[1] == [3, 4, 0, 7, 8, 0, 11, 12, 0]
    assert rows[3] == [11, 12, 0, 15, 16, 0, 0, 0, 0]


@pytest.mark.parametrize(("h", "w"), [(28, 28), (7, 7), (6, 9)])
def test_patches_and_their_adjoint(h, w):
    x, shape = draw(2, 3, h, w, 4), (2, 3, -(-h // 2), -(-w // 2))
    rows = patches(x)
    other = torch.randn_like(rows)
    back = sum_of_patches(other, shape, x.shape).view(x.shape)
    assert torch.allclose((rows * other).sum(), (x * back).sum())  # <Px, z> = <x, P'z>


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


CHANGED = {
    "subclass": lambda model: Doubled(4, torch.Generator().manual_seed(0), filters=6).double(),
    "hook": hooked,
    "another part": with_another_part,
    "another inner loop": adapting_the_head_alone,
    "frozen part": with_a_frozen_part,
}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_a_changed_network_goes_by_its_own_forward_pass(change):
    tasks = random_tasks((1, 28, 28), n_way=4)
    batch = (tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y)
    model, alpha = change(network()), torch.tensor(0.3, dtype=torch.float64)
    theta = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    assert maml.has_passes(network(), theta_of_each_task(network(), 1), alpha)
    assert not maml.has_passes(model, theta, alpha)
    gradient, _, _ = amaml.meta_gradient(model, theta, 0.3, tasks)
    expected, _, _ = maml.by_mapping(model, theta, alpha, batch, 1, False, F.cross_entropy)
    assert relative_error(gradient, expected) < 1e-12


def test_labels_that_do_not_fit_are_refused():
    tasks, model = random_tasks((1, 28, 28), n_way=5), network()
    with pytest.raises(ValueError, match="0 to 4; the model has 4 outputs"):
        amaml.meta_gradient(model, dict(model.named_parameters()), 0.3, tasks)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_memory_is_kept_from_one_meta_gradient_to_the_next():
    """Else each of them takes some 20,000 pages anew from the system."""
    model = amaml.OmniglotCNN(5, torch.Generator().manual_seed(0))
    theta = {name: p.detach() for name, p in model.named_parameters()}
    sampler = amaml.TaskSampler(amaml.load_glyphs(), n_way=5)
    tasks = sampler.sample(32, torch.Generator().manual_seed(0))
    taken = []
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        amaml.meta_gradient(model, theta, 0.4, tasks)
        taken.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert sorted(taken[3:])[2] < 2000
    assert omniglot_cnn.apply_to(model, theta, set(model.meta_only))
