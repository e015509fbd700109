"""The network of the paper's experiments, plain; training spends its time in `amaml.fast`."""

from __future__ import annotations

import itertools
import operator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from amaml.shapes import Float

EPSILON = 1e-3  # added to the variance, as in the original MAML code


class OmniglotCNN(nn.Module):
    """The convolutional network of Finn et al. (2017) for 28x28 characters.

    Four blocks and a linear layer. Convolutions are initialised after Glorot, the linear layer's
    weights with standard deviation 1, biases and offsets with 0, from `generator` (None: torch's
    global one). Support and query sets are each normalised by themselves, in evaluation too, so
    every accuracy of this network is transductive. `meta_only` names the parameters that the
    inner loop leaves alone: the offsets of batch normalisation, as in the original code.
    """

    def __init__(
        self, n_way: int = 5, generator: torch.Generator | None = None, *, filters: int = 64
    ):
        super().__init__()
        n_way, filters = operator.index(n_way), operator.index(filters)  # numpy's, too
        if n_way < 2 or filters < 1:
            raise ValueError(f"n_way={n_way} must be at least 2, and filters={filters} at least 1")
        pairs = itertools.pairwise([1, *4 * [filters]])
        self.blocks = nn.Sequential(*(ConvBlock(*pair, generator) for pair in pairs))
        # skip_init: nn.Linear's own initialisation would draw from torch's global generator.
        self.linear = nn.utils.skip_init(nn.Linear, filters, n_way)
        nn.init.normal_(self.linear.weight, std=1.0, generator=generator)
        nn.init.zeros_(self.linear.bias)
        names = (name for name, _ in self.named_parameters())
        self.meta_only = frozenset(name for name in names if name.endswith("offset"))

    def forward(self, x: Float[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch n_way"]:
        check_images(x)
        return self.linear(self.blocks(x).mean((-2, -1)))


class ConvBlock(nn.Module):
    """3x3 convolution with stride 2 and no bias, batch normalisation without scale, ReLU."""

    def __init__(self, in_channels: int, channels: int, generator: torch.Generator | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, 3, in_channels, channels))  # as in TensorFlow
        self.offset = nn.Parameter(torch.zeros(channels))
        bound = (6 / (9 * in_channels + 9 * channels)) ** 0.5  # Glorot and Bengio (2010)
        nn.init.uniform_(self.weight, -bound, bound, generator=generator)

    def forward(self, x: Float[Tensor, "batch in_channels h w"]) -> Float[Tensor, "batch c h2 w2"]:
        z = F.conv2d(F.pad(x, padding(*x.shape[-2:])), self.weight.permute(3, 2, 0, 1), stride=2)
        # torch's own batch normalisation has wrong second derivatives in the gradient of a vmap.
        variance, mean = torch.var_mean(z, (0, 2, 3), correction=0, keepdim=True)
        return F.relu((z - mean) * (variance + EPSILON).rsqrt() + self.offset[:, None, None])


def padding(height: int, width: int) -> tuple[int, int, int, int]:
    """TensorFlow's SAME padding for 3x3 filters with stride 2, in the order of `F.pad`."""
    return width % 2, 1, height % 2, 1  # of even sizes only at the end, else on both sides


def check_images(x: Tensor) -> None:
    """ValueError unless these are images that the network takes."""
    if x.ndim != 4 or x.shape[1] != 1 or not x.numel() or not x.is_floating_point():
        shape = tuple(x.shape)
        raise ValueError(f"x is {x.dtype} {shape}, not floating-point (batch, 1, height, width)")
