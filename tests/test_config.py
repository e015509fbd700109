"""A run's id stands for exactly one set of numbers."""

from __future__ import annotations

from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import amaml
from amaml import config
from amaml.config import digest

BY_TYPE = {
    "int": st.integers(2, 10**9),
    "float": st.floats(0, 1e38),
    "float | None": st.none() | st.floats(0, 1e38),
    "bool": st.booleans(),
}
CHOICES = {"data": ["omniglot", "glyphs"], "meta_optimizer": ["sgd", "adam"]}
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        f.name: st.sampled_from(CHOICES[f.name]) if f.name in CHOICES else BY_TYPE[f.type]
        for f in fields(amaml.RunConfig)
    },
)


@settings(max_examples=200, deadline=None)
@given(FIELDS, FIELDS)
def test_ids_are_equal_where_the_configs_are_and_only_there(first, second):
    a, b = amaml.RunConfig(**first), amaml.RunConfig(**second)
    assert (a.id == b.id) == (a == b)
    assert a.id == amaml.RunConfig(**asdict(a)).id
    assert a.id == amaml.RunConfig(**dict(reversed(asdict(a).items()))).id
    for name in first:  # any one field on its own changes the id
        other = amaml.RunConfig(**{**first, name: second.get(name, first[name])})
        assert (other.id == a.id) == (other == a)


class Noise:
    """Tasks of one's own, made of something that is kept outside of __dict__ or in an array."""

    def __init__(self, kept):
        self.kept = kept


class Slots:
    __slots__ = ("kept",)

    def __init__(self, kept):
        self.kept = kept


class Scaled(nn.Linear):
    def __init__(self, scale):
        super().__init__(1, 1)
        self.scale = scale
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x):
        return self.scale * super().forward(x)


def power(prediction, y, exponent=2):
    return (prediction - y).abs().pow(exponent).mean()


def nested(constant):
    source = f"def loss(p, y):\n    return sum((lambda d: {constant} * d)(p - y))"
    space = {}
    exec(source, space)
    return space["loss"]


PAIRS = {
    "arrays": (Noise(np.zeros(3)), Noise(np.ones(3))),
    "scalars of numpy": (Noise(np.float32(1)), Noise(np.float32(2))),
    "slots": (Slots(1), Slots(2)),
    "partial": (partial(power, exponent=2), partial(power, exponent=3)),
    "paths": (Noise(Path("a")), Noise(Path("b"))),
    "methods": (Noise(1).__init__, Noise(2).__init__),
    "builtins": (torch.sin, torch.cos),
    "classes": (Noise, Slots),
    "keys": (Noise({1: "a"}), Noise({"1": "a"})),
    "bytes": (Noise(b"a"), Noise("a")),
    "ranges": (Noise(range(3)), Noise(range(4))),
    "generators": (
        Noise(np.random.default_rng(0)),
        Noise(np.random.default_rng(1)),
    ),
    "modules": (Scaled(1.0), Scaled(2.0)),
    "functions within functions": (nested(2), nested(3)),
    "keywords": (lambda p, y, *, s=1: s, lambda p, y, *, s=2: s),
}


@pytest.mark.parametrize("name", PAIRS)
def test_parts_of_ones_own_that_differ_make_other_runs(name):
    first, second = PAIRS[name]
    assert digest(first) != digest(second)
    assert digest(first) == digest(first)


def test_a_method_that_was_edited_makes_another_run():
    def sampler(factor: int):
        class Edited:
            def sample(self, meta_batch_size, generator):
                return factor

        return Edited()

    assert digest(sampler(1)) != digest(sampler(2))
    assert digest(sampler(1)) == digest(sampler(1))


def test_a_global_that_a_loss_names_counts(monkeypatch):
    monkeypatch.setitem(globals(), "FACTOR", 2.0)

    def loss(prediction, y):
        return FACTOR * (prediction - y)  # noqa: F821

    before = digest(loss)
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    assert digest(loss) != before


def test_what_cannot_be_told_apart_is_refused():
    with pytest.raises(TypeError, match="runs with a generator cannot be told apart"):
        digest(Noise(i for i in range(3)))
    circle = Noise(None)
    circle.kept = circle
    with pytest.raises(TypeError, match="Noise refers to itself"):
        digest(circle)


def test_ids_stay_what_they_are(monkeypatch):
    """So that runs and records of earlier versions are found; who means it raises NUMERICS."""
    monkeypatch.setattr(config, "NUMERICS", 1)
    assert amaml.RunConfig().id == "e7c7278e158188f4"
    assert amaml.RunConfig(data="glyphs", alpha=0.4, threshold=0.5, seed=3).id == "7c2a7e208bb1604e"
