"""A run's id stands for exactly one set of numbers; wrong fields are named."""

import math
from dataclasses import FrozenInstanceError, asdict, fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import amaml
from amaml import config

BY_TYPE = {
    "int": st.integers(2, 10**9),
    "float": st.floats(0, 1e38),
    "float | None": st.none() | st.floats(0, 1e38),
    "bool": st.booleans(),
}
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        f.name: st.sampled_from(config.CHOICES[f.name])
        if f.name in config.CHOICES
        else BY_TYPE[f.type]
        for f in fields(amaml.RunConfig)
    },
)


@settings(max_examples=200)
@given(FIELDS, FIELDS)
def test_ids_are_equal_where_the_configs_are_and_only_there(first, second):
    a, b = amaml.RunConfig(**first), amaml.RunConfig(**second)
    assert (a.id == b.id) == (a == b)
    assert a.id == amaml.RunConfig(**asdict(a)).id
    assert a.id == amaml.RunConfig(**dict(reversed(asdict(a).items()))).id
    for name in first:  # any one field on its own changes the id
        other = amaml.RunConfig(**{**first, name: second.get(name, first[name])})
        assert (other.id == a.id) == (other == a)


def test_ids_stay_what_they_are(monkeypatch):
    """So that runs and records of earlier versions are found; who means it raises NUMERICS."""
    monkeypatch.setattr(config, "NUMERICS", 1)
    assert amaml.RunConfig().id == "e7c7278e158188f4"
    assert amaml.RunConfig(data="glyphs", alpha=0.4, threshold=0.5, seed=3).id == "7c2a7e208bb1604e"
    monkeypatch.setattr(config, "NUMERICS", 2)
    assert amaml.RunConfig().id != "e7c7278e158188f4"


def test_a_config_is_frozen_and_equal_numbers_make_equal_configs():
    given = amaml.RunConfig(alpha=1, iterations=np.int64(5), beta=np.float32(0.5))
    assert given == amaml.RunConfig(alpha=1.0, iterations=5, beta=0.5)
    assert given.id == amaml.RunConfig(alpha=1.0, iterations=5, beta=0.5).id
    assert amaml.RunConfig(alpha=-0.0).id == amaml.RunConfig(alpha=0.0).id
    with pytest.raises(FrozenInstanceError):
        given.alpha = 2.0
    assert amaml.RunConfig(**asdict(given)) == given


@pytest.mark.parametrize(
    ("names", "value", "error", "words"),
    [
        ("n_way k_shot filters meta_batch_size inner_steps iterations", 0, ValueError, "=0: .*at"),
        ("validation_every validation_tasks k_query", -1, ValueError, "=-1: .*at least 1"),
        ("n_way", 1, ValueError, "n_way=1: .*at least 2"),
        ("n_way seed iterations", 2.0, TypeError, "=2.0: must be a whole number"),
        ("seed k_shot alpha", True, TypeError, "=True: must be"),
        ("seed alpha beta hyper_alpha hyper_beta threshold", -1, ValueError, "=-1.*at least 0"),
        ("alpha beta hyper_alpha hyper_beta threshold", math.nan, ValueError, "=nan.*finite"),
        ("alpha beta threshold", math.inf, ValueError, "=inf.*finite"),
        ("beta hyper_beta", 10**40, ValueError, "=1000.*finite"),
        ("alpha hyper_alpha iterations", "1", TypeError, "='1': must be a"),
        ("beta seed", None, TypeError, "=None: must be a"),
        ("rotate first_order recompute", 0, TypeError, "=0: must be True or False"),
        ("data meta_optimizer", "other", ValueError, "='other': must be one of"),
        ("data meta_optimizer", ["sgd"], ValueError, "must be one of"),
        ("learning_rate", 0.1, TypeError, "learning_rate"),
    ],
)
def test_wrong_fields_are_named(names, value, error, words):
    for name in names.split():
        with pytest.raises(error, match=words) as raised:
            amaml.RunConfig(**{name: value})
        assert name in str(raised.value)
