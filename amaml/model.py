"""The network of the paper's experiments, from layers made for meta-gradients on small images.

Most of a meta-iteration's time goes into convolutions of per-task weights and into the second
derivatives of batch normalisation. Here a convolution is a matrix product over patches, and batch
normalisation with its ReLU is one operation whose first and second derivatives are written out.
Images are `(..., height, width, channels)` inside the network. Both layers work under
`torch.func.vmap` and `grad`, in any nesting up to second derivatives.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.autograd import Function
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
        for name, value, least in (("n_way", n_way, 2), ("filters", filters, 1)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be a whole number, not {value!r}")
            if value < least:
                raise ValueError(f"{name}={value}: at least {least} is needed")
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
        return self.linear(self.blocks(x.movedim(-3, -1)).mean((-3, -2)))


class ConvBlock(nn.Module):
    """3x3 convolution with stride 2, batch normalisation, ReLU: (batch, h, w, c) to half the size.

    weight  (3, 3, in_channels, channels), as in TensorFlow
    offset  (channels,): what batch normalisation adds; it has no scale

    The padding is TensorFlow's SAME, as in the original code: one row and column at the end only
    for even sizes, one on each side for odd sizes. The convolution has no bias, since batch
    normalisation would take it away again.
    """

    def __init__(self, in_channels: int, channels: int, generator: torch.Generator | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, 3, in_channels, channels))
        self.offset = nn.Parameter(torch.zeros(channels))
        bound = (6 / (9 * in_channels + 9 * channels)) ** 0.5  # Glorot and Bengio (2010)
        nn.init.uniform_(self.weight, -bound, bound, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        patches = Patches.apply(x)
        convolved = patches.flatten(0, 2) @ self.weight.flatten(0, 2)
        y, _, _ = BatchNormReLU.apply(convolved, self.offset)
        return y.unflatten(0, patches.shape[:3])


def batch_first(batch_size: int, in_dims: tuple, tensors: tuple) -> list[Tensor]:
    """A vmap rule's arguments with the batch in front; what has none is repeated, as a view."""
    return [
        tensor.expand(batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, in_dims, strict=True)
    ]


class Patches(Function):
    """The 3x3 patches of images, with stride 2 and SAME padding.

    (..., h, w, c) -> (..., ceil(h/2), ceil(w/2), 9*c), the last dimension ordered as (3, 3, c).
    """

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        *_batch, h, w, c = x.shape
        padded = F.pad(x, (0, 0, w % 2, 1, h % 2, 1))
        windows = padded.unfold(-3, 3, 2).unfold(-3, 3, 2)  # (..., h/2, w/2, c, 3, 3), a view
        return windows.movedim(-3, -1).reshape(*windows.shape[:-3], 9 * c)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.size = inputs[0].shape[-3:-1]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return SumOfPatches.apply(gradient, ctx.size)

    @staticmethod
    def vmap(info, in_dims, x):
        return Patches.apply(x.movedim(in_dims[0], 0)), 0


class SumOfPatches(Function):
    """The adjoint of `Patches`: each pixel's sum over the patches that it is part of."""

    @staticmethod
    def forward(patches: Tensor, size: tuple[int, int]) -> Tensor:
        (h, w), (*batch, rows, columns, nine_c) = size, patches.shape
        c = nine_c // 9
        p = patches.reshape(*batch, rows, columns, 3, 3, c)
        # Neighbouring patches share a row and a column. The first 2x2 pixels of each patch tile
        # the image; the third row and column of a patch lie on the first ones of the next.
        total = patches.new_zeros(*batch, rows + 1, 2, columns + 1, 2, c)
        total[..., :-1, :, :-1, :, :] = p[..., :2, :2, :].transpose(-4, -3)
        total[..., 1:, 0, :-1, :, :] += p[..., 2, :2, :]
        total[..., :-1, :, 1:, 0, :] += p[..., :2, 2, :].transpose(-3, -2)
        total[..., 1:, 0, 1:, 0, :] += p[..., 2, 2, :]
        total = total.reshape(*batch, 2 * rows + 2, 2 * columns + 2, c)
        return total[..., h % 2 : h % 2 + h, w % 2 : w % 2 + w, :]

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        return Patches.apply(gradient), None

    @staticmethod
    def vmap(info, in_dims, patches, size):
        return SumOfPatches.apply(patches.movedim(in_dims[0], 0), size), 0


class BatchNormReLU(Function):
    """y = relu(x_hat + offset), x_hat = (x - mean) * r, r = (variance + EPSILON)^(-1/2).

    x (..., m, channels), offset (..., channels); mean and variance are over the m rows. Gives y,
    and for the derivatives x_hat and r.
    """

    @staticmethod
    def forward(x: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_hat = x - x.mean(-2, keepdim=True)
        r = x_hat.square().mean(-2, keepdim=True).add_(EPSILON).rsqrt_()
        x_hat *= r
        return (x_hat + offset.unsqueeze(-2)).relu_(), x_hat, r

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(inputs[0], *output)

    @staticmethod
    def backward(ctx, gradient: Tensor, *_) -> tuple[Tensor, Tensor]:
        d_x, d_offset, _ = BatchNormReLUBackward.apply(gradient, *ctx.saved_tensors)
        return d_x, d_offset

    @staticmethod
    def vmap(info, in_dims, *tensors):
        tensors = batch_first(info.batch_size, in_dims, tensors)
        return BatchNormReLU.apply(*tensors), (0, 0, 0)


class BatchNormReLUBackward(Function):
    """First derivative. With g = gradient where y > 0 and P(g) = g - mean(g) - x_hat mean(g x_hat):

    d_x = r P(g), d_offset = sum(g). Gives also g. x is there only to be differentiated by.
    """

    @staticmethod
    def forward(gradient: Tensor, x: Tensor, y: Tensor, x_hat: Tensor, r: Tensor):
        g = torch.ops.aten.threshold_backward(gradient, y, 0)
        mean = g.mean(-2, keepdim=True)
        return project(g, mean, x_hat) * r, mean.squeeze(-2) * g.shape[-2], g

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*inputs[2:], output[2])

    @staticmethod
    def backward(ctx, v: Tensor, u: Tensor, _) -> tuple:
        d_gradient, d_x = BatchNormReLUSecond.apply(v, u, *ctx.saved_tensors)
        return d_gradient, d_x, None, None, None

    @staticmethod
    def vmap(info, in_dims, *tensors):
        tensors = batch_first(info.batch_size, in_dims, tensors)
        return BatchNormReLUBackward.apply(*tensors), (0, 0, 0)


class BatchNormReLUSecond(Function):
    """Second derivative: of v . d_x + u . d_offset, with respect to `gradient` and x.

    P is symmetric and r P is x_hat's own derivative, so the sum over rows of v . r P(g) is r S
    with S = sum(v g) - m (mean(v) mean(g) + a c), a = mean(v x_hat), c = mean(g x_hat), and its
    derivative by x is -r^2 (x_hat S / m + a P(g) + c P(v)).
    """

    @staticmethod
    def forward(v: Tensor, u: Tensor, y: Tensor, x_hat: Tensor, r: Tensor, g: Tensor):
        mean_v, mean_g = v.mean(-2, keepdim=True), g.mean(-2, keepdim=True)
        p_v, p_g = project(v, mean_v, x_hat), project(g, mean_g, x_hat)
        a, c = (v * x_hat).mean(-2, keepdim=True), (g * x_hat).mean(-2, keepdim=True)
        s = (v * g).mean(-2, keepdim=True) - mean_v * mean_g - a * c  # S / m
        d_x = (x_hat * s).addcmul_(a, p_g).addcmul_(c, p_v).mul_(-r * r)
        d_gradient = torch.addcmul(u.unsqueeze(-2), r, p_v)
        return torch.ops.aten.threshold_backward(d_gradient, y, 0), d_x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            "OmniglotCNN has first and second derivatives; for third ones write the network with "
            "torch's own layers"
        )

    @staticmethod
    def vmap(info, in_dims, *tensors):
        tensors = batch_first(info.batch_size, in_dims, tensors)
        return BatchNormReLUSecond.apply(*tensors), (0, 0)


def project(g: Tensor, mean: Tensor, x_hat: Tensor) -> Tensor:
    """P(g) = g - mean(g) - x_hat mean(g x_hat), over the rows."""
    return (g - mean).addcmul_(x_hat, (g * x_hat).mean(-2, keepdim=True), value=-1)
