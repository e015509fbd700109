"""The network of the paper's experiments, from a layer made for meta-gradients on small images.

Most of a meta-iteration's time goes into convolutions of per-task weights and into the second
derivatives of batch normalisation. Here a convolution is a matrix product over patches, and a whole
block of [convolution, batch normalisation, ReLU] is one operation whose first and second
derivatives are written out. Images are `(..., height, width, channels)` inside the network.
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

    `stackable` says that the network also takes parameters and images with the same further
    dimensions in front of all of them: `(tasks, ...)` parameters, one set a task, with images
    `(tasks, batch, 1, 28, 28)` give logits `(tasks, batch, n_way)`.
    """

    stackable = True

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
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, not {type(x).__name__}")
        if x.ndim < 4 or x.shape[-3] != 1 or not x.numel() or not x.is_floating_point():
            raise ValueError(
                f"x is {x.dtype} {tuple(x.shape)}; it must be of a floating-point dtype and of "
                "shape (batch, 1, height, width)"
            )
        features = self.blocks(x.movedim(-3, -1)).mean((-3, -2))
        return features @ self.linear.weight.mT + self.linear.bias.unsqueeze(-2)


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
        y, _, _ = Block.apply(x, self.weight, self.offset)
        return y


class Block(Function):
    """y = relu(x_hat + offset), x_hat = (z - mean) r, r = (variance + EPSILON)^(-1/2), z = conv(x).

    x (..., n, h, w, c), weight (..., 3, 3, c, k) and offset (..., k) with the same dimensions in
    front; mean and variance are over a set's images and pixels. Gives y (..., n, rows, columns, k),
    and for the derivatives x_hat (..., n*rows*columns, k) and r (..., 1, k).

    It works under `torch.func` transforms and in plain autograd, up to second derivatives.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        stack, (x, weight, offset) = flatten_stack((x, 4), (weight, 4), (offset, 1))
        x_hat = torch.bmm(patches(x), weight.flatten(1, 3))
        x_hat -= x_hat.mean(1, keepdim=True)
        r = x_hat.square().mean(1, keepdim=True).add_(EPSILON).rsqrt_()
        x_hat *= r
        y = (x_hat + offset.unsqueeze(1)).relu_()
        n, h, w, _ = x.shape[1:]
        return unflatten_stack(stack, y.unflatten(1, (n, -(-h // 2), -(-w // 2))), x_hat, r)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2], *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, d_y: Tensor | None, d_x_hat: Tensor | None, d_r: Tensor | None) -> tuple:
        d_y = torch.zeros_like(ctx.saved_tensors[2]) if d_y is None else d_y
        d_x, d_weight, d_offset, _ = BlockBackward.apply(
            d_y, d_x_hat, d_r, *ctx.saved_tensors, ctx.needs_input_grad[0]
        )
        return d_x, d_weight, d_offset

    @staticmethod
    def vmap(info, in_dims, *tensors):
        return batched(Block, info, in_dims, tensors)


class BlockBackward(Function):
    """First derivative of `Block`. With g = d_y where y > 0, plus d_x_hat, over m rows, and

    P(g) = g - mean(g) - x_hat mean(g x_hat): d_z = r P(g) - r^2 x_hat d_r / m, d_offset is the sum
    over rows of d_y where y > 0, and d_x and d_weight are those of the convolution. Gives also d_z.

    d_x_hat and d_r are there only in the second pass of a meta-gradient, else None. The first
    layer's d_x is not asked for, and then None.
    """

    @staticmethod
    def forward(d_y, d_x_hat, d_r, x, weight, y, x_hat, r, d_x_needed: bool):
        stack, (d_y, d_x_hat, d_r, x, weight, y, x_hat, r) = flatten_stack(
            *((d_y, 4), (d_x_hat, 2), (d_r, 2), (x, 4), (weight, 4), (y, 4), (x_hat, 2), (r, 2))
        )
        g = where_positive(d_y, y).flatten(1, 3)
        d_offset = g.sum(1)
        if d_x_hat is not None:
            g += d_x_hat
        d_z = project(g, x_hat).mul_(r)
        if d_r is not None:
            d_z.addcmul_(x_hat, r * r * d_r, value=-1 / d_z.shape[1])
        d_weight = torch.bmm(patches(x).mT, d_z).view(weight.shape)
        d_x = None
        if d_x_needed:
            d_x = sum_of_patches(torch.bmm(d_z, weight.flatten(1, 3).mT), y.shape, x.shape)
        return unflatten_stack(stack, d_x, d_weight, d_offset, d_z)

    @staticmethod
    def setup_context(ctx, inputs, output):
        d_y, _, _, x, weight, y, x_hat, r, _ = inputs
        ctx.mark_non_differentiable(output[3])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(d_y, x, weight, y, x_hat, r, output[3])
        ctx.is_first = inputs[1] is None and inputs[2] is None
        ctx.d_x_needed = inputs[-1]

    @staticmethod
    def backward(ctx, v_x: Tensor | None, v_weight: Tensor | None, v_offset: Tensor | None, _):
        if not ctx.is_first:
            raise NotImplementedError(THIRD)
        if v_weight is None:
            v_weight = torch.zeros_like(ctx.saved_tensors[2])
        d_d_y, d_x, d_weight, d_x_hat, d_r = BlockSecond.apply(
            v_x, v_weight, v_offset, *ctx.saved_tensors, ctx.d_x_needed
        )
        return d_d_y, None, None, d_x, d_weight, None, d_x_hat, d_r, None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return batched(BlockBackward, info, in_dims, inputs)


class BlockSecond(Function):
    """Second derivative: of v_x . d_x + v_weight . d_weight + v_offset . d_offset, with respect to

    d_y, x, weight, x_hat and r. The derivative by d_z is v = patches(x) v_weight + patches(v_x)
    weight. P is symmetric, so that by g is r P(v) + v_offset, and with a = mean(v x_hat) and
    c = mean(g x_hat) those by x_hat and r are -r (c v + a g) and the sum over rows of v P(g).
    """

    @staticmethod
    def forward(v_x, v_weight, v_offset, d_y, x, weight, y, x_hat, r, d_z, d_x_needed: bool):
        stack, (v_x, v_weight, v_offset, d_y, x, weight, y, x_hat, r, d_z) = flatten_stack(
            *((v_x, 4), (v_weight, 4), (v_offset, 1), (d_y, 4), (x, 4), (weight, 4)),
            *((y, 4), (x_hat, 2), (r, 2), (d_z, 2)),
        )
        v = torch.bmm(patches(x), v_weight.flatten(1, 3))
        d_x = d_weight = None
        if v_x is not None:
            v_patches = patches(v_x)
            v.baddbmm_(v_patches, weight.flatten(1, 3))
            d_weight = torch.bmm(v_patches.mT, d_z).view(weight.shape)
        if d_x_needed:
            d_x = sum_of_patches(torch.bmm(d_z, v_weight.flatten(1, 3).mT), y.shape, x.shape)
        g = where_positive(d_y, y).flatten(1, 3)
        mean_v, mean_g = v.mean(1, keepdim=True), g.mean(1, keepdim=True)
        a, c = (v * x_hat).mean(1, keepdim=True), (g * x_hat).mean(1, keepdim=True)
        d_r = ((v * g).mean(1, keepdim=True) - mean_v * mean_g - a * c) * g.shape[1]
        d_x_hat = (v * (-r * c)).addcmul_(g, r * a, value=-1)
        d_g = (v - mean_v).addcmul_(x_hat, a, value=-1).mul_(r)
        if v_offset is not None:
            d_g += v_offset.unsqueeze(1)
        d_d_y = where_positive(d_g.view(y.shape), y)
        return unflatten_stack(stack, d_d_y, d_x, d_weight, d_x_hat, d_r)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(THIRD)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return batched(BlockSecond, info, in_dims, inputs)


THIRD = (
    "OmniglotCNN has first and second derivatives; for third ones write the network with torch's "
    "own layers"
)


def patches(x: Tensor) -> Tensor:
    """The 3x3 patches of images, with stride 2 and SAME padding.

    (b, n, h, w, c) -> (b, n*rows*columns, 9*c), the last dimension ordered as (3, 3, c).
    """
    b, _, h, w, c = x.shape
    windows = F.pad(x, (0, 0, w % 2, 1, h % 2, 1)).unfold(2, 3, 2).unfold(3, 3, 2)
    return windows.movedim(-3, -1).reshape(b, -1, 9 * c)


def sum_of_patches(p: Tensor, y_shape: torch.Size, x_shape: torch.Size) -> Tensor:
    """The adjoint of `patches`: each pixel's sum over the patches that it is part of.

    p (b, n*rows*columns, 9*c), y_shape (b, n, rows, columns, k) -> x_shape (b, n, h, w, c)
    """
    (b, n, rows, columns, _), (h, w, c) = y_shape, x_shape[2:]
    p = p.view(b, n, rows, columns, 3, 3, c)
    # Neighbouring patches share a row and a column. The first 2x2 pixels of each patch tile the
    # image; the third row and column of a patch lie on the first ones of the next.
    total = p.new_empty(b, n, rows, 2, columns, 2, c)
    total[:] = p[..., :2, :2, :].transpose(-4, -3)
    total[:, :, 1:, 0] += p[:, :, :-1, :, 2, :2]
    total[:, :, :, :, 1:, 0] += p[:, :, :, :-1, :2, 2].transpose(-3, -2)
    total[:, :, 1:, 0, 1:, 0] += p[:, :, :-1, :-1, 2, 2]
    total = total.view(b, n, 2 * rows, 2 * columns, c)
    return total[:, :, h % 2 : h % 2 + h, w % 2 : w % 2 + w]


def where_positive(g: Tensor, y: Tensor) -> Tensor:
    """g where y > 0, else 0."""
    return torch.ops.aten.threshold_backward(g, y, 0)


def project(g: Tensor, x_hat: Tensor) -> Tensor:
    """P(g) = g - mean(g) - x_hat mean(g x_hat), over the rows."""
    mean, along = g.mean(1, keepdim=True), (g * x_hat).mean(1, keepdim=True)
    return (g - mean).addcmul_(x_hat, along, value=-1)


def flatten_stack(*tensors: tuple[Tensor | None, int]) -> tuple[torch.Size, list[Tensor | None]]:
    """Tensors with all that stands before their own so many dimensions as one; and its shape."""
    stack = next(t.shape[: t.ndim - own] for t, own in tensors if t is not None)
    flat = [None if t is None else t.reshape(-1, *t.shape[t.ndim - own :]) for t, own in tensors]
    return stack, flat


def unflatten_stack(stack: torch.Size, *tensors: Tensor | None) -> tuple:
    return tuple(None if t is None else t.reshape(*stack, *t.shape[1:]) for t in tensors)


def batched(function: type[Function], info, in_dims: tuple, inputs: tuple) -> tuple:
    """The vmap rule of the operations above: they take any dimensions in front.

    What has no batch dimension is repeated, as a view.
    """

    def batch_first(x, dim):
        if not isinstance(x, Tensor):
            return x
        return x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)

    outputs = function.apply(*(batch_first(*pair) for pair in zip(inputs, in_dims, strict=True)))
    return outputs, tuple(None if output is None else 0 for output in outputs)
