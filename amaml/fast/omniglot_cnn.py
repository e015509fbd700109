"""The passes of `OmniglotCNN` written out, for the images of many tasks at once.

A meta-gradient asks three things of a network: the logits, the gradient of a loss, and the product
of that loss's Hessian with a vector. Automatic differentiation takes some hundred small operations
per task for them; here each is one sweep of few large operations through the layers.

All tensors have the tasks in front, parameters too. Inside, the pixels of a task's n images are
rows, `(tasks, n*height*width, channels)`. With v a vector like theta, t_x is the derivative of x
when theta moves along v (Pearlmutter 1994).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from amaml.checks import Theta
from amaml.model import EPSILON, check_images, padding
from amaml.shapes import Float

BLOCKS = [(f"blocks.{i}.weight", f"blocks.{i}.offset") for i in range(4)]
HEAD = ("linear.weight", "linear.bias")


class Images(NamedTuple):
    """Images made ready for the first block; done once for all passes over them."""

    patches: Float[Tensor, "tasks rows 9"]  # around each pixel of its output, less their mean
    moments: Float[Tensor, "tasks 9 9"]  # the mean of patches patches'
    shape: tuple[int, int, int, int]  # (tasks, n, height, width) of its output


def prepare(x: Float[Tensor, "tasks n 1 height width"]) -> Images:
    """The patches of images and their moments; TypeError or ValueError for other tensors."""
    check_images(x[0])
    tasks, n, _, height, width = x.shape
    rows = patches(x.reshape(tasks, n, height, width, 1))
    rows = rows - rows.mean(1, keepdim=True)
    # A rounding error here would be in all that follows; Apple's MPS has no float64.
    exact = rows if x.device.type == "mps" else rows.double()
    moments = (torch.bmm(exact.mT, exact) / rows.shape[1]).to(x)
    return Images(rows, moments, (tasks, n, -(-height // 2), -(-width // 2)))


class OmniglotPass:
    """`OmniglotCNN` at theta on images: its `logits`, `(tasks, n, n_way)`, and derivatives there.

    Call the methods in this order; each uses what the previous ones cached.
    """

    def __init__(self, theta: Theta, images: Images):
        self.parts: list = [FirstBlock(theta, BLOCKS[0], images)]
        for names in (*BLOCKS[1:], HEAD):
            x = self.parts[-1].y.view(*self.parts[-1].shape, -1)
            self.parts.append((Head if names == HEAD else Block)(theta, names, x))
        self.logits = self.parts[-1].logits

    def gradient(self, d_logits: Float[Tensor, "tasks n n_way"]) -> dict[str, Tensor]:
        """Each task's gradient of the loss by theta, from that by the logits."""
        self.d_logits, d_y, gradient = d_logits, d_logits, dict[str, Tensor]()
        for part in reversed(self.parts):
            d_y, *slopes = part.backward(d_y)
            gradient |= zip(part.names, slopes, strict=True)
        return gradient

    def jvp(self, v: Theta) -> Float[Tensor, "tasks n n_way"]:
        """The tangent of the logits when theta moves along v; the offsets do not move."""
        t_y = self.parts[0].jvp(v)
        for part in self.parts[1:]:
            t_y = part.jvp(t_y, v)
        return t_y

    def hvp(self, t_d_logits: Float[Tensor, "tasks n n_way"]) -> dict[str, Tensor]:
        """The tangent of the gradient, each task's Hessian times v, from that of `d_logits`: the
        loss's own second derivative times `jvp(v)`."""
        t_d_y, product = t_d_logits, dict[str, Tensor]()
        for part in reversed(self.parts):
            t_d_y, *slopes = part.hvp(t_d_y)
            product |= zip(part.names, slopes, strict=True)
        return product


# The parts have the same four passes: the output; `backward`, its derivatives by the input and by
# the parameters; and `jvp` and `hvp`, the tangents of the two. In their shapes m counts the tasks,
# and b and c the channels of the input and of the output.


class FirstBlock:
    """y = relu(patches A + offset) with A = r weight, r = (variance + EPSILON)^(-1/2).

    The patches have mean zero, so their convolution has too, and its variance follows from their
    moments without a pass over it. There is no derivative by the images.
    """

    def __init__(self, theta: Theta, names: tuple[str, str], images: Images):
        self.names, self.images, self.shape = names, images, images.shape
        weight, offset = (theta[name] for name in names)
        self.weight = weight.flatten(1, 3)
        self.m_weight = torch.bmm(images.moments, self.weight)
        self.r = (self.weight * self.m_weight).sum(1, keepdim=True).add_(EPSILON).rsqrt_()
        self.y = torch.baddbmm(offset.unsqueeze(1), images.patches, self.r * self.weight).relu_()

    def backward(
        self, d_y: Float[Tensor, "m rows c"]
    ) -> tuple[None, Float[Tensor, "m 3 3 1 c"], Float[Tensor, "m c"]]:
        g = where_positive_(d_y, self.y)
        self.d_a = torch.bmm(self.images.patches.mT, g)
        self.s = (self.weight * self.d_a).sum(1, keepdim=True)
        d_weight = self.r * self.d_a - self.r**3 * self.s * self.m_weight
        return None, d_weight.unflatten(1, (3, 3, 1)), g.sum(1)

    def jvp(self, v: Theta) -> Float[Tensor, "m rows c"]:
        self.v_weight = v[self.names[0]].flatten(1, 3)
        self.m_v = torch.bmm(self.images.moments, self.v_weight)
        self.t_r = -(self.r**3) * (self.weight * self.m_v).sum(1, keepdim=True)
        t_a = self.r * self.v_weight + self.t_r * self.weight
        return where_positive_(torch.bmm(self.images.patches, t_a), self.y)

    def hvp(
        self, t_d_y: Float[Tensor, "m rows c"]
    ) -> tuple[None, Float[Tensor, "m 3 3 1 c"], Float[Tensor, "m c"]]:
        t_g = where_positive_(t_d_y, self.y)
        t_d_a = torch.bmm(self.images.patches.mT, t_g)
        t_s = (self.v_weight * self.d_a).sum(1, keepdim=True)
        t_s += (self.weight * t_d_a).sum(1, keepdim=True)
        r_3, t_r_3 = self.r**3, 3 * self.r**2 * self.t_r
        t_d_weight = self.t_r * self.d_a + self.r * t_d_a - r_3 * self.s * self.m_v
        t_d_weight -= (t_r_3 * self.s + r_3 * t_s) * self.m_weight
        return None, t_d_weight.unflatten(1, (3, 3, 1)), t_g.sum(1)


class Block:
    """y = relu(x_hat + offset), x_hat = r (z - mean(z)), r = (variance + EPSILON)^(-1/2), with

    z = patches(x) weight. With P(g) = g - mean(g) - x_hat mean(g x_hat), means over the rows, the
    derivative of x_hat is r P in both directions: P is symmetric.
    """

    def __init__(self, theta: Theta, names: tuple[str, str], x: Float[Tensor, "m n h w b"]):
        self.names, self.x_shape = names, x.shape
        self.shape = (*x.shape[:2], -(-x.shape[2] // 2), -(-x.shape[3] // 2))
        weight, offset = (theta[name] for name in names)
        self.weight, self.patches = weight.flatten(1, 3), patches(x)
        x_hat = torch.bmm(self.patches, self.weight)
        x_hat -= x_hat.mean(1, keepdim=True)
        self.r = (x_hat * x_hat).mean(1, keepdim=True).add_(EPSILON).rsqrt_()
        self.x_hat = x_hat.mul_(self.r)
        self.y = (x_hat + offset.unsqueeze(1)).relu_()

    def backward(
        self, d_y: Float[Tensor, "m rows c"]
    ) -> tuple[Float[Tensor, "m x_rows b"], Float[Tensor, "m 3 3 b c"], Float[Tensor, "m c"]]:
        self.g = where_positive_(d_y, self.y)
        d_offset, self.along = self.g.sum(1), (self.g * self.x_hat).mean(1, keepdim=True)
        d_z = self.g - d_offset.unsqueeze(1) / self.g.shape[1]
        self.d_z = d_z.addcmul_(self.x_hat, self.along, value=-1).mul_(self.r)
        d_weight = torch.bmm(self.patches.mT, self.d_z)
        d_x = sum_of_patches(torch.bmm(self.d_z, self.weight.mT), self.shape, self.x_shape)
        return d_x, d_weight.unflatten(1, (3, 3, -1)), d_offset

    def jvp(self, t_x: Float[Tensor, "m x_rows b"], v: Theta) -> Float[Tensor, "m rows c"]:
        self.v_weight = v[self.names[0]].flatten(1, 3)
        self.t_patches = patches(t_x.view(self.x_shape))
        t_z = torch.bmm(self.patches, self.v_weight).baddbmm_(self.t_patches, self.weight)
        self.t_along = (t_z * self.x_hat).mean(1, keepdim=True)  # times -r^2: the tangent of r
        t_z -= t_z.mean(1, keepdim=True)
        self.t_x_hat = t_z.addcmul_(self.x_hat, self.t_along, value=-1).mul_(self.r)
        return torch.ops.aten.threshold_backward(self.t_x_hat, self.y, 0)

    def hvp(
        self, t_d_y: Float[Tensor, "m rows c"]
    ) -> tuple[Float[Tensor, "m x_rows b"], Float[Tensor, "m 3 3 b c"], Float[Tensor, "m c"]]:
        t_g = where_positive_(t_d_y, self.y)
        t_d_offset = t_g.sum(1)
        t_along = (t_g * self.x_hat).mean(1, keepdim=True)
        t_along += (self.g * self.t_x_hat).mean(1, keepdim=True)
        t_d_z = t_g - t_d_offset.unsqueeze(1) / t_g.shape[1]
        t_d_z.addcmul_(self.x_hat, t_along, value=-1).addcmul_(self.t_x_hat, self.along, value=-1)
        t_d_z.addcmul_(self.d_z, self.t_along, value=-1).mul_(self.r)
        t_d_weight = torch.bmm(self.patches.mT, t_d_z).baddbmm_(self.t_patches.mT, self.d_z)
        t_p = torch.bmm(t_d_z, self.weight.mT).baddbmm_(self.d_z, self.v_weight.mT)
        t_d_x = sum_of_patches(t_p, self.shape, self.x_shape)
        return t_d_x, t_d_weight.unflatten(1, (3, 3, -1)), t_d_offset


class Head:
    """logits = features weight' + bias, where the features are means over an image's pixels."""

    def __init__(self, theta: Theta, names: tuple[str, str], x: Float[Tensor, "m n h w b"]):
        self.names, self.shape = names, (*x.shape[:2], x.shape[2] * x.shape[3], -1)
        self.weight, bias = (theta[name] for name in names)
        self.features = x.view(self.shape).mean(2)
        self.logits = torch.baddbmm(bias.unsqueeze(1), self.features, self.weight.mT)

    def backward(
        self, d_logits: Float[Tensor, "m n n_way"]
    ) -> tuple[Float[Tensor, "m rows b"], Float[Tensor, "m n_way b"], Float[Tensor, "m n_way"]]:
        self.d_logits = d_logits
        d_y = self.spread(torch.bmm(d_logits, self.weight))
        return d_y, torch.bmm(d_logits.mT, self.features), d_logits.sum(1)

    def jvp(self, t_y: Float[Tensor, "m rows b"], v: Theta) -> Float[Tensor, "m n n_way"]:
        self.v_weight, v_bias = (v[name] for name in self.names)
        self.t_features = t_y.view(self.shape).mean(2)
        t_logits = torch.baddbmm(v_bias.unsqueeze(1), self.features, self.v_weight.mT)
        return t_logits.baddbmm_(self.t_features, self.weight.mT)

    def hvp(
        self, t_d_logits: Float[Tensor, "m n n_way"]
    ) -> tuple[Float[Tensor, "m rows b"], Float[Tensor, "m n_way b"], Float[Tensor, "m n_way"]]:
        t_d_y = torch.bmm(t_d_logits, self.weight).baddbmm_(self.d_logits, self.v_weight)
        t_d_weight = torch.bmm(t_d_logits.mT, self.features)
        t_d_weight.baddbmm_(self.d_logits.mT, self.t_features)
        return self.spread(t_d_y), t_d_weight, t_d_logits.sum(1)

    def spread(self, d_features: Float[Tensor, "m n b"]) -> Float[Tensor, "m rows b"]:
        """The adjoint of the mean."""
        return (d_features / self.shape[2]).unsqueeze(2).expand(self.shape).flatten(1, 2)


def patches(x: Float[Tensor, "tasks n height width c"]) -> Float[Tensor, "tasks rows 9*c"]:
    """The 3x3 patches of images, with stride 2 and SAME padding; each is ordered as (3, 3, c)."""
    height, width, c = x.shape[2:]
    windows = F.pad(x, (0, 0, *padding(height, width))).unfold(2, 3, 2).unfold(3, 3, 2)
    return windows.movedim(-3, -1).reshape(len(x), -1, 9 * c)


def sum_of_patches(
    p: Float[Tensor, "tasks rows patch"], shape: tuple[int, ...], x_shape: tuple[int, ...]
) -> Float[Tensor, "tasks x_rows patch//9"]:
    """The adjoint of `patches`: each pixel's sum over the patches that it is part of, where
    `shape` is (tasks, n, height, width) of the patches and `x_shape` that of the images, and c."""
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
    return tiles[:, :, height % 2 :, width % 2 :].reshape(len(p), -1, c)


def where_positive_(g: Float[Tensor, "m rows c"], y: Float[Tensor, "m rows c"]) -> Tensor:
    """g, overwritten with 0 where y is not positive: the derivative of ReLU."""
    return torch.ops.aten.threshold_backward.grad_input(g, y, 0, grad_input=g)
