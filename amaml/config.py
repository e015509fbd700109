"""The configuration of a run, and digests that tell runs apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType

import torch
from torch import Tensor, nn

from amaml.alpha_maml import META_OPTIMIZERS
from amaml.data import LOADERS
from amaml.inner_loop import meta_only

LARGEST = torch.finfo(torch.float32).max  # a larger rate would be infinite in the network's dtype
LIBRARIES = {"amaml", "builtins", "collections", "functools", "numpy", "pandas", "pathlib", "torch"}
NUMERICS = 1  # raised whenever a change alters results: older runs are then not taken for new ones


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that determines a run's numbers. Every field has a default.

    data                    "omniglot" or "glyphs"
    n_way, k_shot, k_query  classes, support and query images of each, in a task
    rotate                  whether classes are turned by multiples of 90 degrees
    filters                 channels of the network's convolutions
    meta_batch_size         tasks an iteration
    inner_steps             gradient steps of the inner loop, in training and validation
    first_order             leave out the second-order term
    alpha, beta             starting rates, inner and meta
    hyper_alpha, hyper_beta hyper learning rates; both 0 is MAML
    meta_optimizer          "sgd" or "adam"
    iterations              how many at most
    threshold               stop once the validation loss is at most this (None: never)
    validation_every        iterations between two validations
    validation_tasks        number of fixed tasks to validate on
    test_tasks              number of tasks of the test characters to measure a finished run on
    test_inner_steps        gradient steps of the inner loop on these
    seed                    fixes initialisation, training tasks and validation tasks

    Raises TypeError or ValueError, naming the field, what was given and what is allowed.
    """

    data: str = "omniglot"
    n_way: int = 5
    k_shot: int = 1
    k_query: int = 1
    rotate: bool = True
    filters: int = 64
    meta_batch_size: int = 32
    inner_steps: int = 1
    first_order: bool = False
    alpha: float = 0.01
    beta: float = 0.01
    hyper_alpha: float = 0.01
    hyper_beta: float = 0.01
    meta_optimizer: str = "sgd"
    iterations: int = 1000
    threshold: float | None = None
    validation_every: int = 10
    validation_tasks: int = 64
    test_tasks: int = 0
    test_inner_steps: int = 1
    seed: int = 0

    def __new__(cls, *args, **given):
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise TypeError(f"unknown field {name!r}; RunConfig has {', '.join(known)}")
        return super().__new__(cls)

    def __post_init__(self):
        least, most = {"n_way": 2, "seed": 0, "test_tasks": 0}, {"seed": 2**63 - 1}
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if field.type == "int":
                self._number(name, value, Integral, least.get(name, 1), most.get(name, 10**9))
            elif field.type == "float" or (field.type == "float | None" and value is not None):
                self._number(name, value, Real, 0, LARGEST)
            elif field.type == "bool" and not isinstance(value, bool):
                raise TypeError(f"{name}={value!r}: must be True or False")
        for name, allowed in (("data", tuple(LOADERS)), ("meta_optimizer", META_OPTIMIZERS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {allowed}")

    def _number(self, name: str, value, kind: type, least: int, most: float) -> None:
        """Check a number and store it as plain int or float, so that equal configs are equal."""
        what = "a whole number" if kind is Integral else "a number"
        if isinstance(value, bool) or not isinstance(value, kind):
            raise TypeError(f"{name}={value!r}: must be {what}")
        if not least <= value <= most:  # nor a NaN
            shown = repr(value) if isinstance(value, float) or value < 1e300 else "over 1e300"
            raise ValueError(f"{name}={shown}: must be finite, at least {least}, at most {most:g}")
        plain = int(value) if kind is Integral else float(value) + 0.0  # -0.0 is 0.0
        object.__setattr__(self, name, plain)

    @property
    def id(self) -> str:
        """A hash of the fields that differ from their defaults, and of the version of the numerics.

        It names the run's folder. A new field with a default thus leaves the ids of older runs as
        they are; who changes a default raises NUMERICS.
        """
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = {f.name: given[f.name] for f in fields(self) if given[f.name] != f.default}
        return digest({"numerics": NUMERICS, **changed})


def digest(content) -> str:
    """A hash of nested data, tensors, modules, functions and objects, by what they hold.

    A function counts by its code, its defaults, what it closes over and the plain globals it names;
    an object by its class, with the methods of one's own classes, and by what it would be copied
    from. Raises TypeError for what cannot be copied, since runs with it could not be told apart.
    """
    try:
        described = json.dumps(describe(content), sort_keys=True)
    except RecursionError as error:
        raise TypeError(
            f"{type(content).__name__} refers to itself, so runs with it cannot be told apart"
        ) from error
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def describe(content):
    """What `digest` hashes, as data for json."""
    if content is None or isinstance(content, bool | int | float | str):
        return content
    if isinstance(content, bytes | bytearray):
        return ["bytes", content.hex()]
    if isinstance(content, Mapping):
        if all(isinstance(key, str) for key in content):
            return {key: describe(value) for key, value in content.items()}
        return sorted(([describe(k), describe(v)] for k, v in content.items()), key=repr)
    if isinstance(content, list | tuple | set | frozenset):
        items = [describe(value) for value in content]
        return sorted(items, key=repr) if isinstance(content, set | frozenset) else items
    if isinstance(content, Tensor):
        values = content.detach().cpu().contiguous().view(-1).view(torch.uint8)
        hashed = hashlib.sha256(values.numpy().tobytes()).hexdigest()
        return [str(content.dtype), list(content.shape), content.requires_grad, hashed]
    if isinstance(content, nn.Module):
        values = dict(content.named_parameters()) | dict(content.named_buffers())
        parts = [[name, describe_class(type(m)), public(m)] for name, m in content.named_modules()]
        return [repr(content), describe(values), parts, sorted(meta_only(content))]
    if isinstance(content, FunctionType):
        closure = [cell.cell_contents for cell in content.__closure__ or ()]
        plain = {
            name: content.__globals__[name]
            for name in content.__code__.co_names
            if isinstance(content.__globals__.get(name), bool | int | float | str)
        }
        parts = [content.__defaults__, content.__kwdefaults__, closure, plain]
        return [content.__qualname__, describe_code(content.__code__), describe(parts)]
    if isinstance(content, MethodType):
        return [describe(content.__func__), describe(content.__self__)]
    if isinstance(content, ModuleType):
        return content.__name__
    if isinstance(content, type | BuiltinFunctionType):
        return [str(content.__module__), content.__qualname__]
    try:
        copied_from = content.__reduce_ex__(4)
    except TypeError as error:
        raise TypeError(
            f"runs with a {type(content).__name__} cannot be told apart ({error}); leave it out of "
            "what is given to train, or give it a __reduce__ that says what it holds"
        ) from error
    parts = (
        copied_from
        if isinstance(copied_from, str)
        else [list(part) if isinstance(part, Iterator) else part for part in copied_from]
    )
    return [describe_class(type(content)), describe(parts)]


def describe_code(code: CodeType) -> list:
    constants = [
        describe_code(c) if isinstance(c, CodeType) else describe(c) for c in code.co_consts
    ]
    return [code.co_code.hex(), list(code.co_names), constants]


def describe_class(kind: type) -> list:
    """A class by its name; those of one's own by their methods too, since they are edited."""
    own = [c for c in kind.__mro__ if c.__module__.partition(".")[0] not in LIBRARIES]
    methods = [value for c in own for value in vars(c).values() if isinstance(value, FunctionType)]
    return [kind.__qualname__, describe(methods)]


def public(module: nn.Module) -> list:
    """A module's own settings, such as a scale that no parameter holds."""
    return describe({name: value for name, value in vars(module).items() if name[0] != "_"})
