"""What the functions of `maml` and `alpha_maml` take: wrong arguments are refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from numbers import Real

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from amaml.tasks import Tasks

Theta = Mapping[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def check_call(
    model: nn.Module,
    theta: Theta,
    inner_steps: int,
    first_order: bool,
    loss: Loss,
    tasks: Tasks | None = None,
) -> None:
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
    if isinstance(inner_steps, bool) or not isinstance(inner_steps, int):
        raise TypeError(f"inner_steps must be a whole number, not {inner_steps!r}")
    if inner_steps < 1:
        raise ValueError(f"inner_steps={inner_steps}: at least 1 is needed")
    if not isinstance(first_order, bool):
        raise TypeError(f"first_order={first_order!r}: must be True or False")
    if not callable(loss):
        raise TypeError(f"loss must be a function of (prediction, y), not {loss!r}")
    if tasks is not None and not isinstance(tasks, Tasks):
        raise TypeError(f"tasks must be amaml.Tasks, not {type(tasks).__name__}")


def check_module(model: nn.Module) -> None:
    """Raise unless `model` is a function of its parameters and its input alone.

    TypeError for anything but an `nn.Module`; ValueError for running statistics (they would tie
    the tasks of a meta-batch together and leak from training to evaluation) and for dropout
    (its random numbers come from no generator of ours, so a run could not be repeated).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    for name, module in model.named_modules():
        kind = type(module).__name__
        if getattr(module, "running_mean", None) is not None:
            raise ValueError(
                f"{name or 'the model'} is a {kind} with running statistics; build it with "
                "track_running_stats=False, so that each set is normalised by itself"
            )
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ValueError(
                f"{name or 'the model'} is a {kind} with p={module.p}; its random draws cannot be "
                "repeated from a seed: take it out, set p=0 or call model.eval()"
            )


def checked_loss(loss: Loss, **labels: Tensor) -> Loss:
    """`loss` with checks of what it gives and, for the cross-entropy, of the labels.

    Their range is looked at where that is cheap and possible: on the CPU, and outside of `vmap`.
    """
    limits = {}
    if loss is F.cross_entropy:
        for name, y in labels.items():
            if y.dtype != torch.int64:
                raise TypeError(f"{name} must be int64 for the cross-entropy, not {y.dtype}")
            if y.device.type == "cpu" and not is_transformed(y):
                limits[name] = int(y.min()), int(y.max())

    @wraps(loss)
    def checked(prediction: Tensor, target: Tensor) -> Tensor:
        classes = prediction.shape[-1]
        for name, (least, most) in limits.items():
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


def is_transformed(*tensors: Tensor) -> bool:
    """Whether a `torch.func` transform is at work on any of these."""
    return any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors)


def as_scalar(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """A rate as a tensor without dimensions; raises for anything but one number."""
    if not isinstance(value, Tensor):  # by way of float64: float32 would cut a Python number short
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name}={value!r}: must be a number")
        try:
            value = torch.tensor(float(value), dtype=torch.float64)
        except OverflowError as error:
            raise ValueError(f"{name} is too large a number: it must be finite") from error
    if value.ndim != 0:
        raise ValueError(
            f"{name} must be one number, as in the paper; got a tensor of shape "
            f"{tuple(value.shape)}"
        )
    return value.to(like)


def as_hyper_rate(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """A hyper learning rate as a tensor; ValueError for numbers that are negative or not finite.

    What a tensor holds is not looked at: it may be on a GPU, or one of many under `vmap`.
    """
    rate = as_scalar(name, value, like)
    if not isinstance(value, Tensor) and not 0 <= float(value) <= torch.finfo(like.dtype).max:
        raise ValueError(f"{name}={value}: a hyper learning rate must be finite and >= 0")
    return rate


def check_examples(x: Tensor, y: Tensor) -> None:
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


def is_differentiated(*tensors: Tensor) -> bool:
    """Whether a `torch.func` derivative is at work on any of these, beneath whatever `vmap`."""
    functorch = torch._C._functorch
    for tensor in tensors:
        while functorch.is_functorch_wrapped_tensor(tensor):
            if functorch.is_gradtrackingtensor(tensor):
                return True
            tensor = functorch.get_unwrapped(tensor)
    return False
