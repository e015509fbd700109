"""Random damage for as long as AMAML_FUZZ_SECONDS says (`make fuzz`: longer than `make test`).

Whatever happens to a file, what it held is read, or it is refused by name; never a bare error of a
library, and never other numbers. A failure gives the seed and round that make it again.
"""

# ruff: noqa: F401, F811 (fixtures are imported to be asked for by name)
from __future__ import annotations

import os
import time
import warnings

import numpy as np
import pytest
import torch
from test_data import cache, small_omniglot
from test_records import RECORD_FILES, RUN_FILES, check_damaged, read, written

from amaml import data

SECONDS = float(os.environ.get("AMAML_FUZZ_SECONDS", "12"))
SEED = int(os.environ.get("AMAML_FUZZ_SEED", "0"))


def damage(content: bytes, rng) -> bytes:
    """One of the ways in which files suffer: cut, bits, a block of zeros, noise, twice or gone."""
    changed = bytearray(content)
    size = len(changed)
    a, b = sorted(rng.integers(0, size + 1, 2).tolist())
    b = min(b, a + int(rng.choice([1, 4, 64, 512, size])))
    kind = rng.integers(7)
    if kind == 0:
        del changed[a:]
    elif kind == 1:
        for place in rng.integers(0, size, rng.integers(1, 9)):
            changed[place] ^= 1 << rng.integers(8)
    elif kind == 2:
        changed[a:b] = bytes(b - a)
    elif kind == 3:
        changed[a:b] = rng.bytes(b - a)
    elif kind == 4:
        changed[a:a] = changed[a:b]
    elif kind == 5:
        del changed[a:b]
    else:
        changed += rng.bytes(rng.integers(1, 100))
    return bytes(changed)


def rounds(share: float):
    """Generators of random numbers, one a round, until this share of the time is over."""
    end, number = time.monotonic() + share * SECONDS, 0
    while number < 20 or time.monotonic() < end:
        yield number, np.random.default_rng((SEED, number))
        number += 1


def test_damaged_runs_and_records(written):
    names = [*RECORD_FILES, *RUN_FILES]
    whole = {}
    for name in names:
        path = written[name]
        whole[name] = read(path.parent if name in RECORD_FILES else path.parent.parent)
    for number, rng in rounds(0.6):
        name = names[rng.integers(len(names))]
        content = damage(written[name].read_bytes(), rng)
        try:
            check_damaged(written[name], content, whole[name])
        except Exception as error:
            pytest.fail(f"seed {SEED}, round {number}, {name}: {error!r}")


def test_damaged_zips(cache, small_omniglot):
    path = small_omniglot / "images_background.zip"
    parts = data.find_parts(small_omniglot)
    intact, (images, names) = path.read_bytes(), data.pack_omniglot(parts)
    for number, rng in rounds(0.3):
        path.write_bytes(damage(intact, rng))
        try:
            again = data.pack_omniglot(parts)
        except ValueError as error:
            assert str(small_omniglot) in str(error), f"seed {SEED}, round {number}: {error}"
        except Exception as error:
            pytest.fail(f"seed {SEED}, round {number}: {error!r}")
        else:
            assert np.array_equal(again[0], images) and again[1] == names, (SEED, number)


def test_damaged_caches(tmp_path):
    path = tmp_path / "packed.npz"
    images = torch.randint(0, 255, (3, 20, 28, 28), dtype=torch.uint8).numpy()
    data.write_packed(path, images, ["a", "b", "c"])
    intact = path.read_bytes()
    for number, rng in rounds(0.1):
        content = damage(intact, rng)
        path.write_bytes(content)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            back = data.read_packed(path)
        if content == intact:
            assert np.array_equal(back[0], images)
        else:
            assert back is None and "is damaged" in str(said[0].message), (SEED, number)
