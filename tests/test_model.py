"""OmniglotCNN is the network of the original code."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import amaml


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


def test_convolution_pads_as_tensorflow_does():
    # On 4 pixels with stride 2 SAME padding adds one row and column at the end only.
    block = model().blocks[0]
    x = torch.rand(2, 1, 4, 4)
    padded = torch.zeros(2, 1, 5, 5)
    padded[:, :, :4, :4] = x
    expected = torch.stack(
        [
            torch.stack(
                [
                    (padded[:, 0, None, i : i + 3, j : j + 3] * block.conv.weight[:, 0]).sum((2, 3))
                    for j in (0, 2)
                ],
                -1,
            )
            for i in (0, 2)
        ],
        -2,
    )
    block.norm = torch.nn.Identity()
    assert torch.allclose(block(x), expected.relu(), atol=1e-6)


def test_a_bias_of_the_convolution_would_have_no_effect():
    block = model().blocks[0].double()
    x = torch.rand(3, 1, 28, 28, dtype=torch.float64)
    plain = block(x)
    block.conv.bias = torch.nn.Parameter(torch.randn(64, dtype=torch.float64))
    assert torch.allclose(block(x), plain, atol=1e-12)


def test_normalisation_is_torchs_without_scale_and_running_statistics():
    norm = model().blocks[0].norm.double()
    x = torch.randn(6, 64, 5, 5, dtype=torch.float64) * 3 + 1
    torch.nn.init.normal_(norm.offset)
    expected = F.batch_norm(x, None, None, bias=norm.offset, training=True, eps=1e-3)
    assert torch.allclose(norm(x), expected, atol=1e-12)


def test_initialisation():
    network = model()
    for block in network.blocks:
        weight = block.conv.weight
        bound = (6 / ((weight.shape[0] + weight.shape[1]) * 9)) ** 0.5  # Glorot and Bengio 2010
        assert weight.abs().max() <= bound and weight.abs().max() > 0.95 * bound
        assert not block.norm.offset.any()
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
