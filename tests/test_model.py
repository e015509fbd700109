"""OmniglotCNN is the network of the original code."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

import amaml
from amaml.model import Block, patches, sum_of_patches


def model(n_way: int = 5, seed: int = 0) -> amaml.OmniglotCNN:
    return amaml.OmniglotCNN(n_way, torch.Generator().manual_seed(seed))


def test_shapes_and_sizes():
    x = torch.rand(10, 28, 28, 1)
    network, sizes = model(), []
    for block in network.blocks:
        x = block(x)
        sizes.append(tuple(x.shape[1:]))
    assert sizes == [(14, 14, 64), (7, 7, 64), (4, 4, 64), (2, 2, 64)]
    assert network(torch.rand(10, 1, 28, 28)).shape == (10, 5)
    # 3x3 convolutions, offsets, a linear layer of 64 inputs with its bias
    expected = 9 * 64 + 3 * 9 * 64 * 64 + 4 * 64 + 64 * 5 + 5
    assert sum(p.numel() for p in network.parameters()) == expected
    assert not list(network.buffers())  # no running statistics


def block_of_torch(x, weight, offset):
    """The same block from torch's own convolution and normalisation."""
    h, w = x.shape[-3:-1]
    padded = F.pad(x.movedim(-1, 1), (w % 2, 1, h % 2, 1))
    z = F.conv2d(padded, weight.permute(3, 2, 0, 1), stride=2)
    return F.batch_norm(z, None, None, bias=offset, training=True, eps=1e-3).relu().movedim(1, -1)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("h", "w"), [(28, 28), (7, 7), (6, 9), (2, 3)])
def test_a_block_is_torchs_convolution_and_normalisation(h, w):
    x, weight, offset = draw(4, h, w, 3), draw(3, 3, 3, 5, seed=1), draw(5, seed=2)
    y, x_hat, r = Block.apply(x, weight, offset)
    assert torch.allclose(y, block_of_torch(x, weight, offset), atol=1e-12)
    assert torch.allclose(x_hat.mean(0), torch.zeros(5, dtype=torch.float64), atol=1e-12)
    assert r.shape == (1, 5)


def test_convolution_pads_as_tensorflow_does():
    # On 4 pixels with stride 2 SAME padding adds one row and column at the end only.
    x = torch.arange(1.0, 17.0).view(1, 1, 4, 4, 1)
    rows = patches(x)[0].tolist()
    assert rows[0] == [1, 2, 3, 5, 6, 7, 9, 10, 11]
    assert rows[1] == [3, 4, 0, 7, 8, 0, 11, 12, 0]
    assert rows[3] == [11, 12, 0, 15, 16, 0, 0, 0, 0]


@pytest.mark.parametrize(("h", "w"), [(28, 28), (7, 7), (6, 9)])
def test_patches_and_their_adjoint(h, w):
    x, y_shape = draw(2, 3, h, w, 4), (2, 3, -(-h // 2), -(-w // 2), 1)
    rows = patches(x)
    other = torch.randn_like(rows)
    back = sum_of_patches(other, y_shape, x.shape)
    assert torch.allclose((rows * other).sum(), (x * back).sum())  # <Px, z> = <x, P'z>


@pytest.mark.parametrize("size", [(5, 4), (3, 3)])
def test_derivatives_of_a_block(size):
    x, weight, offset = draw(2, *size, 2), draw(3, 3, 2, 3, seed=1), draw(3, seed=2)
    inputs = [t.requires_grad_() for t in (x, weight, offset)]

    def y(*inputs):
        return Block.apply(*inputs)[0]

    assert torch.autograd.gradcheck(y, inputs)
    assert torch.autograd.gradgradcheck(y, inputs)
    # Each of the other outputs is a true function of the inputs, too.
    assert torch.autograd.gradcheck(lambda x, w: Block.apply(x, w, offset)[1:], (x, weight))


def test_blocks_side_by_side_are_each_alone():
    x, weights, offsets = draw(2, 4, 5, 4, 2), draw(3, 3, 3, 2, 6, seed=1), draw(3, 6, seed=2)

    def y(x, weight, offset):
        return Block.apply(x, weight, offset)[0]

    # One set of images for all weights, and the other way round, nested and through a derivative
    nested = vmap(vmap(y, in_dims=(None, 0, 0)), in_dims=(0, None, None))(x, weights, offsets)

    def slope(offset, weight):
        return grad(lambda o, w: y(x[0], w, o).square().sum(), argnums=(0, 1))(offset, weight)

    slopes = vmap(slope)(offsets, weights)
    stacked = y(x[:, None].expand(2, 3, *x.shape[1:]), weights.expand(2, *weights.shape),
                offsets.expand(2, *offsets.shape))  # fmt: skip
    for i in range(2):
        for j in range(3):
            alone = y(x[i], weights[j], offsets[j])
            assert torch.allclose(nested[i, j], alone) and torch.allclose(stacked[i, j], alone)
            for many, one in zip(slopes, slope(offsets[j], weights[j]), strict=True):
                assert torch.allclose(many[j], one)


def test_stacked_parameters_give_each_tasks_logits():
    network, x = model().double(), draw(3, 4, 1, 28, 28).abs()
    theta = {n: p.detach() + 0.1 * draw(3, *p.shape) for n, p in network.named_parameters()}
    stacked = functional_call(network, theta, (x,))
    assert stacked.shape == (3, 4, 5)
    for i in range(3):
        alone = functional_call(network, {n: p[i] for n, p in theta.items()}, (x[i],))
        assert torch.allclose(stacked[i], alone)


def test_third_derivatives_are_refused_not_wrong():
    x, weight, offset = draw(2, 4, 4, 1), draw(3, 3, 1, 2), torch.zeros(2, dtype=torch.float64)

    def loss(x):
        return Block.apply(x, weight, offset)[0].pow(3).sum()

    def first(x):
        return grad(loss)(x).pow(2).sum()

    with pytest.raises(NotImplementedError, match="first and second derivatives"):
        grad(lambda x: grad(first)(x).pow(2).sum())(x)


def test_a_bias_of_the_convolution_would_have_no_effect():
    z, offset = draw(6, 4, 3, 3), torch.zeros(4, dtype=torch.float64)
    plain, biased = (
        F.batch_norm(z + bias, None, None, bias=offset, training=True) for bias in (0, 3.7)
    )
    assert torch.allclose(plain, biased, atol=1e-12)


def test_initialisation():
    network = model()
    for block in network.blocks:
        weight = block.weight
        bound = (6 / ((weight.shape[2] + weight.shape[3]) * 9)) ** 0.5  # Glorot and Bengio 2010
        assert weight.abs().max() <= bound and weight.abs().max() > 0.95 * bound
        assert not block.offset.any()
    assert 0.85 < network.linear.weight.std() < 1.15 and not network.linear.bias.any()
    same, other = model(seed=0), model(seed=1)
    assert torch.equal(same.linear.weight, network.linear.weight)
    assert not torch.equal(other.linear.weight, network.linear.weight)


@pytest.mark.parametrize(
    ("n_way", "error"), [(1, ValueError), (True, TypeError), ("5", TypeError), (2.5, TypeError)]
)
def test_wrong_n_way_is_refused(n_way, error):
    with pytest.raises(error, match=f"n_way.*{n_way}"):
        amaml.OmniglotCNN(n_way)
