"""The configuration of a run: everything that determines its numbers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, get_type_hints

NUMERICS = 1  # raised whenever a change alters results: older runs are then not taken for new ones
LARGEST = 3.4028234663852886e38  # of float32: a larger rate would be infinite in the network
LEAST = {"n_way": 2, "seed": 0, "test_tasks": 0}  # of whole numbers; else 1
CHOICES = {
    "data": ("omniglot", "glyphs"),
    "meta_optimizer": ("sgd", "adam"),
    "rule": ("additive", "scale-free"),
}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that determines a run's numbers; every field has a default.

    Attributes:
        data: "omniglot" or "glyphs".
        n_way: classes of a task.
        k_shot: support images per class.
        k_query: query images per class.
        rotate: whether classes are turned by multiples of 90 degrees.
        filters: channels of the network's convolutions.
        meta_batch_size: tasks per iteration.
        inner_steps: gradient steps of the inner loop, in training and validation.
        first_order: leave out the second-order term.
        recompute: compute inner steps again on the way back, in less memory and more time.
        alpha: starting inner rate.
        beta: starting meta rate.
        hyper_alpha: hyper learning rate of alpha.
        hyper_beta: hyper learning rate of beta; both 0 is MAML.
        meta_optimizer: "sgd", as in the paper, or "adam".
        rule: how the rates move: "additive", as in the paper, or "scale-free".
        iterations: how many at most.
        threshold: stop once the validation loss is at most this (None: never).
        validation_every: iterations between two validations.
        validation_tasks: number of fixed tasks to validate on.
        test_tasks: number of tasks of the test characters to measure a finished run on.
        test_inner_steps: gradient steps of the inner loop on these.
        seed: fixes initialisation, training tasks and validation tasks.

    Raises:
        TypeError, ValueError: naming the field, what was given and what is allowed.
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
    recompute: bool = False
    alpha: float = 0.01
    beta: float = 0.01
    hyper_alpha: float = 0.01
    hyper_beta: float = 0.01
    meta_optimizer: str = "sgd"
    rule: str = "additive"
    iterations: int = 1000
    threshold: float | None = None
    validation_every: int = 10
    validation_tasks: int = 64
    test_tasks: int = 0
    test_inner_steps: int = 1
    seed: int = 0

    def __post_init__(self):
        for name, kind in HINTS.items():
            object.__setattr__(self, name, checked(name, getattr(self, name), kind))

    @property
    def id(self) -> str:
        """A hash of the fields that differ from their defaults and of the numerics' version.

        It names the run's folder. A new field with a default thus leaves the ids of older runs as
        they are; who changes a default raises NUMERICS.
        """
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {f.name: given[f.name] for f in fields(self) if given[f.name] != f.default}
        return hashed({"numerics": NUMERICS, **changed})


HINTS = get_type_hints(RunConfig)  # read once: grids and starts make thousands of configs


def checked(name: str, value: Any, kind: Any):
    """A field's value as a plain int, float, bool or string, so that equal configs are equal."""
    if kind == float | None and value is None:
        return None
    if name in CHOICES:
        if not isinstance(value, str) or value not in CHOICES[name]:
            raise ValueError(f"{name}={value!r}: must be one of {CHOICES[name]}")
        return value
    if kind is bool:
        if not isinstance(value, bool):
            raise TypeError(f"{name}={value!r}: must be True or False")
        return value
    whole = kind is int
    number: Any = Integral if whole else Real
    if isinstance(value, bool) or not isinstance(value, number):
        raise TypeError(f"{name}={value!r}: must be {'a whole number' if whole else 'a number'}")
    least = LEAST.get(name, 1) if whole else 0
    if not value >= least or (not whole and value > LARGEST):  # nor a NaN
        raise ValueError(f"{name}={value!r}: must be finite and at least {least}")
    return int(value) if whole else float(value) + 0.0  # -0.0 is 0.0


def hashed(content: dict) -> str:
    """A short hash of plain data."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
