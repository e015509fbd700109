"""The written-out passes of OmniglotCNN are those of the plain network."""

import pytest
import torch
from helpers import relative_error
from torch import Tensor
from torch.func import functional_call, grad, vjp
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

import amaml
from amaml.fast.meta_gradients import derivatives
from amaml.fast.omniglot_cnn import OmniglotPass, patches, prepare, sum_of_patches

MODEL = amaml.OmniglotCNN(4, torch.Generator().manual_seed(0), filters=6).double()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def like_theta(tasks: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Parameters of each task."""
    return {
        name: p.detach() + 0.1 * draw(tasks, *p.shape, seed=seed + i)
        for i, (name, p) in enumerate(MODEL.named_parameters())
    }


def without_offsets(v: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: torch.zeros_like(t) if n in MODEL.meta_only else t for n, t in v.items()}


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
    x, d_logits, t_d_logits = draw(3, 5, 1, *size).abs(), draw(3, 5, 4, seed=1), draw(3, 5, 4)
    theta, v = like_theta(), without_offsets(like_theta(seed=30))
    at = OmniglotPass(theta, prepare(x))
    gradient, t_logits, product = at.gradient(d_logits), at.jvp(v), at.hvp(t_d_logits)
    for i in range(3):

        def logits(theta, i=i):
            return functional_call(MODEL, theta, (x[i],))

        def slope(theta, d, logits=logits):
            return grad(lambda theta: (logits(theta) * d).sum())(theta)

        here, along = of_task(theta, i), of_task(v, i)
        expected, tangent = with_tangent(logits, (here,), (along,))
        assert relative_error(at.logits[i], expected) < 1e-11
        assert relative_error(t_logits[i], tangent) < 1e-11
        expected, tangent = with_tangent(slope, (here, d_logits[i]), (along, t_d_logits[i]))
        assert relative_error(of_task(gradient, i), expected) < 1e-11
        assert relative_error(of_task(product, i), tangent) < 1e-11


def test_the_hessian_is_symmetric_and_that_of_finite_differences():
    images, y = prepare(draw(1, 5, 1, 28, 28).abs()), torch.arange(5).remainder(4).unsqueeze(0)
    theta, u, v = like_theta(1), *(without_offsets(like_theta(1, seed)) for seed in (20, 40))

    def gradient(theta):
        at = OmniglotPass(theta, images)
        _, d_logits, curvature = derivatives(F.cross_entropy, at.logits, y)
        return at, at.gradient(d_logits), curvature

    def product(v):
        at, _, curvature = gradient(theta)
        return at.hvp(curvature(at.jvp(v)))

    def dot(a, b):
        return float(sum((a[name] * b[name]).sum() for name in a))

    assert dot(u, product(v)) == pytest.approx(dot(v, product(u)), rel=1e-9)
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
    x = torch.full((3, 2, 1, 28, 28), 0.5, dtype=torch.float64)
    at = OmniglotPass(like_theta(), prepare(x))
    gradient = at.gradient(draw(3, 2, 4))
    assert all(value.isfinite().all() for value in (at.logits, *gradient.values()))


def test_patches_pad_as_tensorflow_does():
    # On 4 pixels with stride 2 SAME padding adds one row and column at the end only.
    rows = patches(torch.arange(1.0, 17.0).view(1, 1, 4, 4, 1))[0].tolist()
    assert rows[0] == [1, 2, 3, 5, 6, 7, 9, 10, 11]
    assert rows[1] == [3, 4, 0, 7, 8, 0, 11, 12, 0]
    assert rows[3] == [11, 12, 0, 15, 16, 0, 0, 0, 0]


@pytest.mark.parametrize(("h", "w"), [(28, 28), (7, 7), (6, 9)])
def test_patches_and_their_adjoint(h, w):
    x, shape = draw(2, 3, h, w, 4), (2, 3, -(-h // 2), -(-w // 2))
    rows = patches(x)
    other = draw(*rows.shape, seed=1)
    back = sum_of_patches(other, shape, x.shape).view(x.shape)
    assert torch.allclose((rows * other).sum(), (x * back).sum())  # <Px, z> = <x, P'z>
