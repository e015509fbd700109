"""OmniglotCNN is the network of the original code."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, vmap
from torch.nn import functional as F

import amaml
from amaml.model import BatchNormReLU, Patches, SumOfPatches


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


@pytest.mark.parametrize(("h", "w"), [(28, 28), (7, 7), (6, 9), (2, 3)])
def test_patches_are_those_of_a_padded_convolution(h, w):
    x = torch.randn(2, h, w, 3, dtype=torch.float64)
    weight = torch.randn(3, 3, 3, 5, dtype=torch.float64)
    padded = F.pad(x.movedim(-1, 1), (w % 2, 1, h % 2, 1))
    expected = F.conv2d(padded, weight.permute(3, 2, 0, 1), stride=2).movedim(1, -1)
    assert torch.allclose(Patches.apply(x) @ weight.flatten(0, 2), expected, atol=1e-12)


def test_convolution_pads_as_tensorflow_does():
    # On 4 pixels with stride 2 SAME padding adds one row and column at the end only.
    x = torch.arange(1.0, 17.0).view(1, 4, 4, 1)
    patches = Patches.apply(x)
    assert patches[0, 0, 0].tolist() == [1, 2, 3, 5, 6, 7, 9, 10, 11]
    assert patches[0, 0, 1].tolist() == [3, 4, 0, 7, 8, 0, 11, 12, 0]
    assert patches[0, 1, 1].tolist() == [11, 12, 0, 15, 16, 0, 0, 0, 0]


@pytest.mark.parametrize(("h", "w"), [(28, 28), (7, 7), (6, 9)])
def test_patches_and_their_adjoint(h, w):
    x = torch.randn(2, h, w, 3, dtype=torch.float64)
    patches = Patches.apply(x)
    other = torch.randn_like(patches)
    back = SumOfPatches.apply(other, (h, w))
    assert torch.allclose((patches * other).sum(), (x * back).sum())  # <Px, z> = <x, P'z>
    x.requires_grad_()
    assert torch.autograd.gradgradcheck(Patches.apply, (x[:, :3, :3],))


def test_normalisation_is_torchs_without_scale_and_running_statistics():
    x = torch.randn(6, 7, dtype=torch.float64) * 3 + 1
    offset = torch.randn(7, dtype=torch.float64)
    expected = F.batch_norm(x, None, None, bias=offset, training=True, eps=1e-3).relu()
    assert torch.allclose(BatchNormReLU.apply(x, offset)[0], expected, atol=1e-12)


def test_derivatives_of_the_normalisation():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, dtype=torch.float64, generator=generator).requires_grad_()
    offset = torch.randn(4, dtype=torch.float64, generator=generator).requires_grad_()

    def y(x, offset):
        return BatchNormReLU.apply(x, offset)[0]

    assert torch.autograd.gradcheck(y, (x, offset))
    assert torch.autograd.gradgradcheck(y, (x, offset))
    batched = torch.randn(2, 3, 6, 4, dtype=torch.float64, generator=generator)
    offsets = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    nested = vmap(vmap(y), in_dims=(0, None))(batched, offsets)
    for i in range(2):
        for j in range(3):
            assert torch.allclose(nested[i, j], y(batched[i, j], offsets[j]))
    # Batched over one of the two arguments alone, through a derivative
    by_offset = vmap(grad(lambda o: y(x.detach(), o).square().sum()))(offsets)
    one = grad(lambda o: y(x.detach(), o).square().sum())(offsets[1])
    assert torch.allclose(by_offset[1], one)


def test_third_derivatives_are_refused_not_wrong():
    x = torch.randn(6, 4, dtype=torch.float64)

    def loss(x):
        return BatchNormReLU.apply(x, torch.zeros(4, dtype=torch.float64))[0].pow(3).sum()

    def first(x):
        return grad(loss)(x).pow(2).sum()

    with pytest.raises(NotImplementedError, match="first and second derivatives"):
        grad(lambda x: grad(first)(x).pow(2).sum())(x)


def test_a_bias_of_the_convolution_would_have_no_effect():
    x, offset = torch.randn(6, 4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    plain, with_bias = (BatchNormReLU.apply(x + bias, offset)[0] for bias in (0, 3.7))
    assert torch.allclose(plain, with_bias, atol=1e-12)


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
