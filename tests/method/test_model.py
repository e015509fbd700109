"""OmniglotCNN is the network of the original code."""

import pytest
import torch
from helpers import relative_error
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

import amaml
from amaml.model import ConvBlock


def model(n_way: int = 5, seed: int = 0) -> amaml.OmniglotCNN:
    return amaml.OmniglotCNN(n_way, torch.Generator().manual_seed(seed))


def test_shapes_and_sizes():
    x = torch.rand(10, 1, 28, 28)
    network, sizes = model(), []
    for block in network.blocks:
        x = block(x)
        sizes.append(tuple(x.shape[1:]))
    assert sizes == [(64, 14, 14), (64, 7, 7), (64, 4, 4), (64, 2, 2)]
    assert network(torch.rand(10, 1, 28, 28)).shape == (10, 5)
    # 3x3 convolutions, offsets, a linear layer of 64 inputs with its bias
    expected = 9 * 64 + 3 * 9 * 64 * 64 + 4 * 64 + 64 * 5 + 5
    assert sum(p.numel() for p in network.parameters()) == expected
    assert not list(network.buffers())  # no running statistics


def block_of_torch(x, weight, offset):
    """The same block by torch's own normalisation, with TensorFlow's padding."""
    h, w = x.shape[-2:]
    z = F.conv2d(F.pad(x, (w % 2, 1, h % 2, 1)), weight.permute(3, 2, 0, 1), stride=2)
    return F.batch_norm(z, None, None, bias=offset, training=True, eps=1e-3).relu()


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def block_with(weight, offset):
    block = ConvBlock(*weight.shape[2:]).double()
    return lambda x: functional_call(block, {"weight": weight, "offset": offset}, (x,))


@pytest.mark.parametrize(("h", "w"), [(28, 28), (7, 7), (6, 9), (2, 3)])
def test_a_block_is_torchs_convolution_and_normalisation(h, w):
    x, weight, offset = draw(4, 3, h, w), draw(3, 3, 3, 5, seed=1), draw(5, seed=2)
    y = block_with(weight, offset)(x)
    assert torch.allclose(y, block_of_torch(x, weight, offset), atol=1e-12)


def test_convolution_pads_as_tensorflow_does():
    # On 4 pixels with stride 2 SAME padding adds one row and column at the end only: of a filter
    # that takes the last pixel of its patch, two of four outputs lie on the padding.
    x, weight = torch.arange(1.0, 17.0).double().view(1, 1, 4, 4), torch.zeros(3, 3, 1, 1).double()
    weight[1, 2] = 1  # the middle row's right end: pixels 7 and 15, and 0 and 0 beyond the edge
    z = torch.tensor([[7.0, 0.0], [15.0, 0.0]]).double()
    expected = (z - z.mean()) / (z.var(correction=0) + 1e-3).sqrt()
    y = block_with(weight, torch.ones(1).double())(x)[0, 0]
    assert torch.allclose(y, (expected + 1).relu())


def test_derivatives_of_a_block():
    x, weight, offset = draw(2, 2, 5, 4), draw(3, 3, 2, 3, seed=1), draw(3, seed=2)
    inputs = [t.requires_grad_() for t in (x, weight, offset)]

    def y(x, weight, offset):
        return block_with(weight, offset)(x)

    assert torch.autograd.gradcheck(y, inputs)
    assert torch.autograd.gradgradcheck(y, inputs)


def test_second_derivatives_are_right_in_any_order_of_transforms():
    """torch's own batch normalisation is wrong in the gradient of a vmap of a gradient."""
    network, x = model().double(), draw(3, 4, 1, 12, 12).abs()
    theta = {name: p.detach() for name, p in network.named_parameters()}

    def slope(theta, x):
        loss = grad(lambda th: functional_call(network, th, (x,)).square().mean())
        return sum(g.square().sum() for g in loss(theta).values())

    of_mean = grad(lambda th: vmap(slope, (None, 0))(th, x).mean())(theta)
    mean = {n: g.mean(0) for n, g in vmap(grad(slope), (None, 0))(theta, x).items()}
    assert relative_error(of_mean, mean) < 1e-10


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
