"""The network of the paper's experiments."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 1e-3  # added to the variance, as in the original MAML code


class BatchNorm(nn.Module):
    """Batch normalisation by the statistics of the batch at hand, with an offset and no scale.

    `(batch, channels, height, width)` in and out. There are no running statistics: support and
    query sets are each normalised by themselves, in training and in evaluation alike (so every
    accuracy of a network with this layer is transductive). It is composed of elementary
    operations because the second derivatives of torch's own layer are wrong under some
    combinations of `torch.func` transforms, and need more operations where they are right.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean((0, 2, 3), keepdim=True)
        variance = centred.square().mean((0, 2, 3), keepdim=True)
        return centred * torch.rsqrt(variance + EPSILON) + self.offset[:, None, None]


class ConvBlock(nn.Module):
    """3x3 convolution with stride 2, batch normalisation, ReLU: a map of half the size.

    The padding is TensorFlow's SAME, as in the original code: one row and column at the end only
    for even sizes, one on each side for odd sizes. The convolution has no bias, since batch
    normalisation would take it away again.
    """

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel_size=3, stride=2, bias=False)
        self.norm = BatchNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        before_h, before_w = x.shape[-2] % 2, x.shape[-1] % 2
        return F.relu(self.norm(self.conv(F.pad(x, (before_w, 1, before_h, 1)))))


class OmniglotCNN(nn.Module):
    """The convolutional network of Finn et al. (2017) for 28x28 characters.

    Four blocks of [3x3 convolution with 64 filters and stride 2, batch normalisation, ReLU], the
    mean over the 2x2 map that is left, and a linear layer: `(batch, 1, 28, 28)` in, logits
    `(batch, n_way)` out. Convolutions are initialised after Glorot, the linear layer's weights
    from a normal distribution with standard deviation 1, biases and offsets with 0, from
    `generator` (None: torch's global one).

    `meta_only` names the parameters that the meta-step learns and the inner loop leaves alone:
    the offsets of batch normalisation, as in the original code.
    """

    def __init__(
        self, n_way: int = 5, generator: torch.Generator | None = None, *, filters: int = 64
    ):
        super().__init__()
        for name, value, least in (("n_way", n_way, 2), ("filters", filters, 1)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be a whole number, not {value!r}")
            if value < least:
                raise ValueError(f"{name}={value}: at least {least} is needed")
        channels = [1, filters, filters, filters, filters]
        self.blocks = nn.Sequential(*map(ConvBlock, channels[:-1], channels[1:]))
        self.linear = nn.Linear(filters, n_way)
        for block in self.blocks:
            nn.init.xavier_uniform_(block.conv.weight, generator=generator)
        nn.init.normal_(self.linear.weight, std=1.0, generator=generator)
        nn.init.zeros_(self.linear.bias)
        self.meta_only = frozenset(
            name for name, _ in self.named_parameters() if name.endswith("norm.offset")
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.blocks(x).mean((2, 3)))
