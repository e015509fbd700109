"""What `maml` and `alpha_maml` are given: arguments that would give wrong numbers are refused."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import wraps
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from amaml.tasks import Tasks

Theta = Mapping[str, Tensor]
Loss = Callable[[Any, Tensor], Tensor]


def check_call(model, theta, inner_steps, first_order, loss, tasks=None) -> None:
    """Raise TypeError or ValueError for arguments that do not go with the model."""
    check_module(model)
    if not isinstance(theta, Mapping):
        raise TypeError(f"theta must be a dict by parameter name, not {type(theta).__name__}")
    parameters = dict(model.named_parameters())
    needed = {name for name, value in parameters.items() if value.requires_grad}
    if not needed <= theta.keys() <= parameters.keys():
        wrong = sorted(needed - theta.keys()) or sorted(theta.keys() - parameters.keys())
        raise ValueError(
            f"theta must hold the model's parameters {', '.join(parameters)}; "
            f"{', '.join(wrong)} is missing or too much"
        )
    for name, value in theta.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"theta[{name!r}] must be a tensor, not {type(value).__name__}")
        if value.shape != parameters[name].shape:
            raise ValueError(
                f"theta[{name!r}] must have the shape {tuple(parameters[name].shape)} of the "
                f"model's parameter, not {tuple(value.shape)}"
            )
    whole_number("inner_steps", inner_steps)
    if not isinstance(first_order, bool):
        raise TypeError(f"first_order={first_order!r}: must be True or False")
    if not callable(loss):
        raise TypeError(f"loss must be a function of (prediction, y), not {loss!r}")
    if tasks is not None and not isinstance(tasks, Tasks):
        raise TypeError(f"tasks must be amaml.Tasks, not {type(tasks).__name__}")


def check_module(model: nn.Module) -> None:
    """Raise unless `model` is a function of its parameters and its input alone.

    Running statistics that are updated would tie the tasks of a meta-batch together and leak from
    training to evaluation; dropout draws from no generator of ours, so no run could be repeated.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise TypeError("model is what torch.compile gave; give the module itself")
    for name, module in model.named_modules():
        kind = type(module).__name__
        if getattr(module, "running_mean", None) is not None and module.training:
            raise ValueError(
                f"{name or 'the model'} is a {kind} with running statistics; build it with "
                "track_running_stats=False, so that each set is normalised by itself, or call "
                "model.eval() to keep the statistics as they are"
            )
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ValueError(
                f"{name or 'the model'} is a {kind} with p={module.p}; its random draws cannot be "
                "repeated from a seed: take it out, set p=0 or call model.eval()"
            )


def checked_loss(loss: Loss, **labels: Tensor) -> Loss:
    """`loss` with a check of what it gives and, for the cross-entropy, of the labels.

    Their range is looked at where that is cheap and possible: on the CPU, outside of `vmap`.
    """
    limits = {}
    if loss is F.cross_entropy:
        for name, y in labels.items():
            if y.dtype != torch.int64:
                raise TypeError(f"{name} must be int64 for the cross-entropy, not {y.dtype}")
            if y.device.type == "cpu" and not is_transformed(y):
                limits[name] = int(y.min()), int(y.max())

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


def check_examples(x, y) -> None:
    """Raise TypeError or ValueError unless these are the inputs and targets of one task."""
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")
    examples = [len(value) if value.ndim else 0 for value in (x, y)]
    if examples[0] != examples[1] or 0 in examples:
        raise ValueError(
            f"x has {examples[0]} examples, y has {examples[1]}; they must have the same number, "
            "at least one example"
        )


def whole_number(name: str, value, least: int = 1) -> int:
    """An integer, of numpy's as well, as an int; TypeError or ValueError for anything else."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, not {value!r}") from None
    if number < least:
        raise ValueError(f"{name}={number}: must be at least {least}")
    return number


def as_scalar(name: str, value, like: Tensor) -> Tensor:
    """A rate as a tensor without dimensions; raises for anything but one number."""
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name}={value!r}: must be a number")
        return torch.tensor(float(value), dtype=like.dtype, device=like.device)
    if value.ndim != 0:
        raise ValueError(
            f"{name} must be one number, as in the paper; got a tensor of shape "
            f"{tuple(value.shape)}"
        )
    return value.to(like)


def as_hyper_rate(name: str, value: Any, like: Tensor) -> Tensor:
    """A hyper learning rate as a tensor; ValueError for numbers that are negative or not finite.

    What a tensor holds is not looked at: it may be on a GPU, or one of many under `vmap`.
    """
    outside = isinstance(value, Real) and not 0 <= float(value) <= torch.finfo(like.dtype).max
    if outside:
        raise ValueError(f"{name}={value}: a hyper learning rate must be finite and >= 0")
    return as_scalar(name, value, like)


def is_transformed(tensor: Tensor) -> bool:
    """Whether a `torch.func` transform is at work on it."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def is_differentiated(*tensors: Tensor) -> bool:
    """Whether a `torch.func` derivative is at work on any of these, beneath whatever `vmap`."""
    functorch = torch._C._functorch
    for tensor in tensors:
        while functorch.is_functorch_wrapped_tensor(tensor):
            if functorch.is_gradtrackingtensor(tensor):
                return True
            tensor = functorch.get_unwrapped(tensor)
    return False
