"""What `maml` and `alpha_maml` are given: arguments that would give wrong numbers are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from amaml.data import whole_number
from amaml.tasks import Tasks

Theta = Mapping[str, Tensor]
Loss = Callable[[Any, Tensor], Tensor]


def check_call(model, theta: Theta, inner_steps, first_order, tasks=None) -> None:
    """Raise TypeError or ValueError for arguments that do not go with the model."""
    check_module(model)
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    needed = {name for name, value in model.named_parameters() if value.requires_grad}
    if wrong := sorted((needed - theta.keys()) | (theta.keys() - shapes.keys())):
        raise ValueError(
            f"theta must hold the model's parameters, {', '.join(shapes)}; missing or unknown: "
            f"{', '.join(wrong)}"
        )
    for name, shape in ((name, tuple(value.shape)) for name, value in theta.items()):
        if shape != shapes[name]:
            raise ValueError(f"theta[{name!r}] must have the shape {shapes[name]}, not {shape}")
    whole_number("inner_steps", inner_steps)
    if not isinstance(first_order, bool):
        raise TypeError(f"first_order={first_order!r}: must be True or False")
    if tasks is not None and not isinstance(tasks, Tasks):
        raise TypeError(f"tasks must be amaml.Tasks, not {type(tasks).__name__}")


def check_module(model: nn.Module) -> None:
    """Raise unless `model` is a function of its parameters and its input alone.

    Statistics that are updated would leak from task to task; no run with dropout can be repeated.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise TypeError("model is what torch.compile gave; give the module itself")
    for name, module in model.named_modules():
        what = f"{name or 'the model'} is a {type(module).__name__}"
        if getattr(module, "running_mean", None) is not None and module.training:
            raise ValueError(
                f"{what} that updates running statistics; build it with track_running_stats=False, "
                "or call model.eval() to keep them as they are"
            )
        is_dropout = isinstance(module, nn.modules.dropout._DropoutNd)
        p = getattr(module, "p" if is_dropout else "dropout", 0)  # an attribute of nn.LSTM as well
        if module.training and isinstance(p, Real) and float(p) > 0:
            raise ValueError(
                f"{what} with dropout, p={p}, whose draws cannot be repeated from a seed; take it "
                "out, set p=0 or call model.eval()"
            )


def checked_loss(loss: Loss, **labels: Tensor) -> Loss:
    """`loss` with a check of what it gives and, for the cross-entropy, of the labels.

    Their range is looked at on the CPU alone: on a GPU that would wait for all that is under way.
    """
    limits = {}
    if loss is F.cross_entropy:
        for name, y in labels.items():
            if y.dtype != torch.int64:
                raise TypeError(f"{name} must be int64 for the cross-entropy, not {y.dtype}")
            if y.device.type == "cpu":
                *_, plain = layers(y)
                limits[name] = int(plain.min()), int(plain.max())

    @wraps(loss)
    def checked(prediction, target: Tensor) -> Tensor:
        for name, (least, most) in limits.items():
            classes = prediction.shape[1]
            if not 0 <= least <= most < classes:
                raise ValueError(
                    f"{name} holds labels from {least} to {most}; the model has {classes} outputs, "
                    f"so they must be 0 to {classes - 1}"
                )
        value = loss(prediction, target)
        if not isinstance(value, Tensor) or value.ndim:
            given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss must give one number a task, a tensor of shape (), not {given}")
        return value

    return checked


def is_cross_entropy(loss: Loss) -> bool:
    """Whether it is torch's, plain or as `checked_loss` gives it, and not one built around it."""
    return getattr(loss, "__wrapped__", loss) is F.cross_entropy


def check_examples(x: Tensor, y: Tensor) -> None:
    """Raise ValueError unless these are the inputs and targets of one task."""
    if len(x) != len(y) or not len(x):
        raise ValueError(
            f"x has {len(x)} examples, y has {len(y)}; they must have the same number, at least one"
        )


def as_scalar(name: str, value: Any, like: Tensor) -> Tensor:
    """A rate as a tensor without dimensions; raises for anything but one number."""
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name}={value!r}: must be a number")
        return torch.tensor(float(value), dtype=like.dtype, device=like.device)
    if value.ndim != 0:
        raise ValueError(f"{name} must be one number, not a tensor of shape {tuple(value.shape)}")
    return value.to(like)


def as_hyper_rate(name: str, value: Any, like: Tensor) -> Tensor:
    """A hyper learning rate as a tensor; the value of a tensor is not looked at (it may wait)."""
    if isinstance(value, Real) and not 0 <= float(value) <= torch.finfo(like.dtype).max:
        raise ValueError(f"{name}={value}: a hyper learning rate must be finite and >= 0")
    return as_scalar(name, value, like)


def layers(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor and, one by one, what lies beneath the `torch.func` transforms at work on it."""
    yield tensor
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
        yield tensor


def is_differentiated(*tensors: Tensor) -> bool:
    """Whether a `torch.func` derivative is at work on any of these, beneath whatever `vmap`."""
    is_tracked = torch._C._functorch.is_gradtrackingtensor
    return any(is_tracked(layer) for tensor in tensors for layer in layers(tensor))
