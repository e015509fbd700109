"""The network of the paper's experiments.

This is the plain version, for any use of it; `amaml.passes` has what training spends its time on.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 1e-3  # added to the variance, as in the original MAML code


class OmniglotCNN(nn.Module):
    """The convolutional network of Finn et al. (2017) for 28x28 characters.

    Four blocks of [3x3 convolution with 64 filters and stride 2, batch normalisation, ReLU], the
    mean over the 2x2 map that is left, and a linear layer: `(batch, 1, 28, 28)` in, logits
    `(batch, n_way)` out. Convolutions are initialised after Glorot, the linear layer's weights
    from a normal distribution with standard deviation 1, biases and offsets with 0, from
    `generator` (None: torch's global one).

    There are no running statistics: support and query sets are each normalised by themselves, in
    training and in evaluation alike, so every accuracy of this network is transductive.
    `meta_only` names the parameters that the meta-step learns and the inner loop leaves alone:
    the offsets of batch normalisation, as in the original code.
    """

    def __init__(
        self, n_way: int = 5, generator: torch.Generator | None = None, *, filters: int = 64
    ):
        super().__init__()
        for name, value, least, most in (("n_way", n_way, 2, 10**6), ("filters", filters, 1, 4096)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be a whole number, not {value!r}")
            if not least <= value <= most:
                raise ValueError(f"{name}={value}: must be at least {least} and at most {most}")
        if not isinstance(generator, torch.Generator | None):
            raise TypeError(f"generator must be a torch.Generator or None, not {generator!r}")
        channels = [1, filters, filters, filters, filters]
        self.blocks = nn.Sequential(
            *(ConvBlock(*pair, generator) for pair in itertools.pairwise(channels))
        )
        # skip_init: nn.Linear's own initialisation would draw from torch's global generator.
        self.linear = nn.utils.skip_init(nn.Linear, filters, n_way)
        nn.init.normal_(self.linear.weight, std=1.0, generator=generator)
        nn.init.zeros_(self.linear.bias)
        self.meta_only = frozenset(
            name for name, _ in self.named_parameters() if name.endswith("offset")
        )

    def forward(self, x: Tensor) -> Tensor:
        check_images(x)
        return self.linear(self.blocks(x).mean((-2, -1)))


class ConvBlock(nn.Module):
    """3x3 convolution with stride 2, batch normalisation, ReLU: (batch, c, h, w) to half the size.

    weight  (3, 3, in_channels, channels), as in TensorFlow
    offset  (channels,): what batch normalisation adds; it has no scale

    The convolution has no bias, since batch normalisation would take it away again.
    """

    def __init__(self, in_channels: int, channels: int, generator: torch.Generator | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, 3, in_channels, channels))
        self.offset = nn.Parameter(torch.zeros(channels))
        bound = (6 / (9 * in_channels + 9 * channels)) ** 0.5  # Glorot and Bengio (2010)
        nn.init.uniform_(self.weight, -bound, bound, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        z = F.conv2d(F.pad(x, padding(*x.shape[-2:])), self.weight.permute(3, 2, 0, 1), stride=2)
        # Of elementary operations: torch's own batch normalisation has wrong second derivatives in
        # the gradient of a vmap.
        variance, mean = torch.var_mean(z, (0, 2, 3), correction=0, keepdim=True)
        x_hat = (z - mean) * (variance + EPSILON).rsqrt()
        return F.relu(x_hat + self.offset[:, None, None])


def padding(height: int, width: int) -> tuple[int, int, int, int]:
    """TensorFlow's SAME padding for 3x3 filters with stride 2, as in the original code, in the
    order of `F.pad`: one row and column at the end only for even sizes, else one on each side."""
    return width % 2, 1, height % 2, 1


def check_images(x: Tensor) -> None:
    """Raise TypeError or ValueError unless these are images that the network takes."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, not {type(x).__name__}")
    if x.ndim != 4 or x.shape[1] != 1 or not x.numel() or not x.is_floating_point():
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)}; it must be of a floating-point dtype and of "
            "shape (batch, 1, height, width)"
        )
