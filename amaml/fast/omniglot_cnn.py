"""The passes of `OmniglotCNN` written out, for the images of many tasks at once.

A meta-gradient asks three things of a network: the logits, the gradient of a loss with respect to
the parameters, and the product of that loss's Hessian with a vector. Automatic differentiation
gives all three, in some hundred small operations for each of the tasks; here each is one sweep
through the layers, of few large operations. The network itself, `amaml.model`, stays the plain
version that these are tested against.

All tensors have the tasks in front: images `(tasks, n, ...)`, and parameters `(tasks, ...)`, one
set a task. Inside, the pixels of a task's n images are rows, `(tasks, n*height*width, channels)`.
With v a vector like theta, t_x is the derivative of x when theta moves along v (Pearlmutter 1994).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from amaml.checks import Theta
from amaml.model import EPSILON, ConvBlock, OmniglotCNN, check_images, padding

MODULES = [OmniglotCNN, nn.Sequential, *4 * [ConvBlock], nn.Linear]


def apply_to(model: nn.Module, theta: Theta, fixed: set[str]) -> bool:
    """Whether these are the passes of `model`: an `OmniglotCNN` as it was made, all its parameters
    in theta, and `fixed` in the inner loop what it says itself."""
    names = {name for name, _ in model.named_parameters()}
    return (
        [type(module) for module in model.modules()] == MODULES
        and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        and theta.keys() == names
        and fixed == {name for name in names if name.endswith("offset")}
    )


class Images(NamedTuple):
    """Images made ready for the first block; done once for all passes over them.

    patches  (tasks, rows, 9): of each pixel of the block's output, less their mean over the rows
    moments  (tasks, 9, 9): the mean of patches patches'
    shape    (tasks, n, height, width) of the block's output
    """

    patches: Tensor
    moments: Tensor
    shape: tuple[int, int, int, int]


def prepare(x: Tensor) -> Images:
    """Images (tasks, n, 1, height, width)."""
    check_images(x[0])
    tasks, n, _, height, width = x.shape
    rows = patches(x.reshape(tasks, n, height, width, 1))
    rows = rows - rows.mean(1, keepdim=True)
    exact = rows.double()  # rounding here would be in all that follows
    moments = (torch.bmm(exact.mT, exact) / rows.shape[1]).to(x)
    return Images(rows, moments, (tasks, n, -(-height // 2), -(-width // 2)))


class OmniglotPass:
    """`OmniglotCNN` at theta on prepared images: its logits, and its derivatives there.

    The methods are called in the order in which they stand: each goes on from what those before it
    have left.
    """

    def __init__(self, theta: Theta, images: Images):
        self.blocks = []
        y, shape = None, images.shape
        for i in range(4):
            weight, offset = theta[f"blocks.{i}.weight"], theta[f"blocks.{i}.offset"]
            if i == 0:
                block = FirstBlock(images, weight, offset)
            else:
                block = Block(y.view(*shape, -1), weight, offset)
            y, shape = block.y, block.shape
            self.blocks.append(block)
        self.head = Head(y, shape, theta["linear.weight"], theta["linear.bias"])
        self.logits = self.head.logits  # (tasks, n, n_way)

    def gradient(self, d_logits: Tensor) -> dict[str, Tensor]:
        """The gradient of each task's loss, like theta, from that with respect to its logits."""
        self.d_logits = d_logits
        d_y, gradient = self.head.backward(d_logits)
        for i, block in reversed(list(enumerate(self.blocks))):
            d_y, d_weight, d_offset = block.backward(d_y)
            gradient |= {f"blocks.{i}.weight": d_weight, f"blocks.{i}.offset": d_offset}
        return gradient

    def push(self, v: Theta) -> Tensor:
        """The tangent of the logits when theta moves along v; the offsets do not move."""
        t_y = None
        for i, block in enumerate(self.blocks):
            t_y = block.push(t_y, v[f"blocks.{i}.weight"])
        return self.head.push(t_y, v["linear.weight"], v["linear.bias"])

    def pull(self, t_d_logits: Tensor) -> dict[str, Tensor]:
        """The tangent of the gradient: each task's Hessian times v.

        `t_d_logits` is that of `d_logits`: the loss's own second derivative times `push(v)`.
        """
        t_d_y, product = self.head.pull(t_d_logits)
        for i, block in reversed(list(enumerate(self.blocks))):
            t_d_y, t_d_weight, t_d_offset = block.pull(t_d_y)
            product |= {f"blocks.{i}.weight": t_d_weight, f"blocks.{i}.offset": t_d_offset}
        return product


# The parts have the same four passes: the output; `backward`, its derivative; `push` and `pull`,
# the tangents of the two.


class FirstBlock:
    """y = relu(patches A + offset) with A = r weight, r = (variance + EPSILON)^(-1/2).

    The patches have no mean, so neither has their convolution, and its variance follows from their
    moments M: the batch normalisation of a convolution of so few inputs costs no pass over its
    output. Nothing is differentiated with respect to the images.
    """

    def __init__(self, images: Images, weight: Tensor, offset: Tensor):
        self.images, self.shape = images, images.shape
        self.weight = weight.flatten(1, 3)
        self.m_weight = torch.bmm(images.moments, self.weight)
        self.r = over_rows(self.weight, self.m_weight).add_(EPSILON).rsqrt_()
        y = torch.baddbmm(offset.unsqueeze(1), images.patches, self.r * self.weight)
        self.y = y.relu_()

    def backward(self, d_y: Tensor) -> tuple[None, Tensor, Tensor]:
        g = where_positive_(d_y, self.y)
        self.d_a = torch.bmm(self.images.patches.mT, g)
        self.s = over_rows(self.weight, self.d_a)
        d_weight = self.r * self.d_a - self.r**3 * self.s * self.m_weight
        return None, d_weight.view(len(g), 3, 3, 1, -1), g.sum(1)

    def push(self, _: None, v_weight: Tensor) -> Tensor:
        self.v_weight = v_weight.flatten(1, 3)
        self.m_v = torch.bmm(self.images.moments, self.v_weight)
        self.t_r = -(self.r**3) * over_rows(self.weight, self.m_v)
        t_a = self.r * self.v_weight + self.t_r * self.weight
        return where_positive_(torch.bmm(self.images.patches, t_a), self.y)

    def pull(self, t_d_y: Tensor) -> tuple[None, Tensor, Tensor]:
        t_g = where_positive_(t_d_y, self.y)
        t_d_a = torch.bmm(self.images.patches.mT, t_g)
        t_s = over_rows(self.v_weight, self.d_a) + over_rows(self.weight, t_d_a)
        r_3, t_r_3 = self.r**3, 3 * self.r**2 * self.t_r
        t_d_weight = self.t_r * self.d_a + self.r * t_d_a - r_3 * self.s * self.m_v
        t_d_weight -= (t_r_3 * self.s + r_3 * t_s) * self.m_weight
        return None, t_d_weight.view(len(t_g), 3, 3, 1, -1), t_g.sum(1)


class Block:
    """y = relu(x_hat + offset), x_hat = r (z - mean(z)), r = (variance + EPSILON)^(-1/2), with

    z = patches(x) weight. With P(g) = g - mean(g) - x_hat mean(g x_hat), means over the rows, the
    derivative of x_hat is r P in both directions: P is symmetric.
    """

    def __init__(self, x: Tensor, weight: Tensor, offset: Tensor):
        tasks, n, height, width, _ = x.shape
        self.x_shape, self.shape = x.shape, (tasks, n, -(-height // 2), -(-width // 2))
        self.weight, self.patches = weight.flatten(1, 3), patches(x)
        x_hat = torch.bmm(self.patches, self.weight)
        x_hat -= x_hat.mean(1, keepdim=True)
        self.r = mean_of(x_hat, x_hat).add_(EPSILON).rsqrt_()
        self.x_hat = x_hat.mul_(self.r)
        self.y = (x_hat + offset.unsqueeze(1)).relu_()

    def backward(self, d_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.g = where_positive_(d_y, self.y)
        d_offset, self.along = self.g.sum(1), mean_of(self.g, self.x_hat)
        self.d_z = torch.addcmul(
            self.g - d_offset.unsqueeze(1) / self.g.shape[1], self.x_hat, self.along, value=-1
        ).mul_(self.r)
        d_weight = torch.bmm(self.patches.mT, self.d_z)
        d_x = sum_of_patches(torch.bmm(self.d_z, self.weight.mT), self.shape, self.x_shape)
        return d_x, d_weight.unflatten(1, (3, 3, -1)), d_offset

    def push(self, t_x: Tensor, v_weight: Tensor) -> Tensor:
        self.v_weight, self.t_patches = v_weight.flatten(1, 3), patches(t_x.view(self.x_shape))
        t_z = torch.bmm(self.patches, self.v_weight).baddbmm_(self.t_patches, self.weight)
        self.t_along = mean_of(t_z, self.x_hat)  # and the tangent of r is -r^2 times that
        t_z -= t_z.mean(1, keepdim=True)
        self.t_x_hat = t_z.addcmul_(self.x_hat, self.t_along, value=-1).mul_(self.r)
        return where_positive(self.t_x_hat, self.y)

    def pull(self, t_d_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t_g = where_positive_(t_d_y, self.y)
        t_d_offset = t_g.sum(1)
        t_along = mean_of(t_g, self.x_hat) + mean_of(self.g, self.t_x_hat)
        t_d_z = t_g - t_d_offset.unsqueeze(1) / t_g.shape[1]
        t_d_z.addcmul_(self.x_hat, t_along, value=-1).addcmul_(self.t_x_hat, self.along, value=-1)
        t_d_z.addcmul_(self.d_z, self.t_along, value=-1).mul_(self.r)
        t_d_weight = torch.bmm(self.patches.mT, t_d_z).baddbmm_(self.t_patches.mT, self.d_z)
        t_p = torch.bmm(t_d_z, self.weight.mT).baddbmm_(self.d_z, self.v_weight.mT)
        t_d_x = sum_of_patches(t_p, self.shape, self.x_shape)
        return t_d_x, t_d_weight.unflatten(1, (3, 3, -1)), t_d_offset


class Head:
    """logits = features weight' + bias, where the features are means over an image's pixels."""

    def __init__(self, y: Tensor, shape: tuple, weight: Tensor, bias: Tensor):
        self.shape, self.pixels, self.weight = shape, shape[2] * shape[3], weight
        self.features = self.mean(y)
        self.logits = torch.baddbmm(bias.unsqueeze(1), self.features, weight.mT)

    def backward(self, d_logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        self.d_logits = d_logits
        d_y = self.spread(torch.bmm(d_logits, self.weight))
        d_weight = torch.bmm(d_logits.mT, self.features)
        return d_y, {"linear.weight": d_weight, "linear.bias": d_logits.sum(1)}

    def push(self, t_y: Tensor, v_weight: Tensor, v_bias: Tensor) -> Tensor:
        self.v_weight, self.t_features = v_weight, self.mean(t_y)
        t_logits = torch.baddbmm(v_bias.unsqueeze(1), self.features, v_weight.mT)
        return t_logits.baddbmm_(self.t_features, self.weight.mT)

    def pull(self, t_d_logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        t_d_y = torch.bmm(t_d_logits, self.weight).baddbmm_(self.d_logits, self.v_weight)
        t_d_weight = torch.bmm(t_d_logits.mT, self.features)
        t_d_weight.baddbmm_(self.d_logits.mT, self.t_features)
        return self.spread(t_d_y), {"linear.weight": t_d_weight, "linear.bias": t_d_logits.sum(1)}

    def mean(self, y: Tensor) -> Tensor:
        return y.view(*self.shape[:2], self.pixels, -1).mean(2)

    def spread(self, d_features: Tensor) -> Tensor:
        """The adjoint of `mean`."""
        d_y = (d_features / self.pixels).unsqueeze(2).expand(-1, -1, self.pixels, -1)
        return d_y.flatten(1, 2)


def patches(x: Tensor) -> Tensor:
    """The 3x3 patches of images, with stride 2 and SAME padding.

    (tasks, n, height, width, c) -> (tasks, rows, 9*c), the last dimension ordered as (3, 3, c).
    """
    height, width, c = x.shape[2:]
    windows = F.pad(x, (0, 0, *padding(height, width))).unfold(2, 3, 2).unfold(3, 3, 2)
    return windows.movedim(-3, -1).reshape(len(x), -1, 9 * c)


def sum_of_patches(p: Tensor, shape: tuple, x_shape: tuple) -> Tensor:
    """The adjoint of `patches`: each pixel's sum over the patches that it is part of.

    p (tasks, rows, 9*c), where `shape` (tasks, n, height, width) says whose rows these are
    -> (tasks, pixels of x_shape, c)
    """
    height, width, c = x_shape[2:]
    p = p.view(*shape, 3, 3, c)
    # Neighbouring patches share a row and a column. The first 2x2 pixels of each patch tile the
    # image; the third row and column of a patch lie on the first ones of the next.
    tiles = p.new_empty(*shape[:3], 2, shape[3], 2, c)
    tiles[:] = p[..., :2, :2, :].transpose(-4, -3)
    tiles[:, :, 1:, 0] += p[:, :, :-1, :, 2, :2]
    tiles[:, :, :, :, 1:, 0] += p[:, :, :, :-1, :2, 2].transpose(-3, -2)
    tiles[:, :, 1:, 0, 1:, 0] += p[:, :, :-1, :-1, 2, 2]
    tiles = tiles.view(*shape[:2], 2 * shape[2], 2 * shape[3], c)
    tiles = tiles[:, :, height % 2 :, width % 2 :]
    return tiles.reshape(len(p), -1, c)


def where_positive(g: Tensor, y: Tensor) -> Tensor:
    """g where y > 0, else 0: the derivative of ReLU."""
    return torch.ops.aten.threshold_backward(g, y, 0)


def where_positive_(g: Tensor, y: Tensor) -> Tensor:
    """The same in place."""
    return torch.ops.aten.threshold_backward.grad_input(g, y, 0, grad_input=g)


def over_rows(a: Tensor, b: Tensor) -> Tensor:
    """The dot products of the columns of two matrices a task, (tasks, 1, columns)."""
    return (a * b).sum(1, keepdim=True)


def mean_of(a: Tensor, b: Tensor) -> Tensor:
    """The means of products over the rows, (tasks, 1, columns)."""
    return (a * b).mean(1, keepdim=True)
