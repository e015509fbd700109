"""Random damage for as long as AMAML_FUZZ_SECONDS says (`make fuzz`: longer than `make test`).

Whatever happens to a file, what it held is read, or it is refused by name; never a bare error of a
library, and never other numbers. A failure gives the seed and round that make it again.
"""

import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import OWN, bits

import amaml
from amaml import data
from amaml.datasets import omniglot
from amaml.paper import records
from amaml.runs import store
from amaml.sweep import tabulate

SECONDS = float(os.environ.get("AMAML_FUZZ_SECONDS", "12"))
SEED = int(os.environ.get("AMAML_FUZZ_SEED", "0"))


def damage(content: bytes, rng) -> bytes:
    """One of the ways in which files suffer."""
    size, flipped = len(content), bytearray(content)
    a, b = sorted(rng.integers(0, size + 1, 2).tolist())
    b = min(b, a + int(rng.choice([1, 4, 64, 512, size])))
    for place in rng.integers(0, size, rng.integers(1, 9)):
        flipped[place] ^= 1 << rng.integers(8)
    ways = {
        "cut": content[:a],
        "bits": bytes(flipped),
        "zeros": content[:a] + bytes(b - a) + content[b:],
        "noise": content[:a] + rng.bytes(b - a) + content[b:],
        "twice": content[:b] + content[a:],
        "gone": content[:a] + content[b:],
        "more": content + rng.bytes(rng.integers(1, 100)),
    }
    return ways[rng.choice(list(ways))]


def check(path: Path, read: Callable, words: str, seconds: float) -> None:
    """Damage a file again and again: `read` gives what it held, or a ValueError with `words`."""
    intact, whole = path.read_bytes(), read()
    end, number, refused = time.monotonic() + seconds, 0, 0
    while number < 100 or time.monotonic() < end:
        place = f"seed {SEED}, round {number}"
        path.write_bytes(damage(intact, np.random.default_rng((SEED, number))))
        try:
            found = read()
        except ValueError as error:
            assert words in str(error), f"{place}: {error}"
            refused += 1
        except Exception as error:
            pytest.fail(f"{place}: {error!r}")
        else:
            assert found == whole, place
        number += 1
    assert refused > 0.8 * number  # some changes are none: a block of no bytes, zeros for zeros


@pytest.fixture
def run(tmp_path) -> amaml.Run:
    return amaml.train(amaml.RunConfig(iterations=5), tmp_path, progress=False, **OWN)


def test_damaged_runs(run, tmp_path):
    folder = tmp_path / run.id
    check(folder / store.NAME, lambda: bits(folder), "run.safetensors is damaged", 0.3 * SECONDS)


def test_damaged_records(run, tmp_path):
    path = records.write_records("figure_9", "small", tabulate(run), [run.maker], tmp_path)

    def read() -> tuple[str, list]:
        table, made_by = records.read_records("figure_9", "small", tmp_path)
        return table.to_csv(), made_by

    check(path, read, f"{path.name} is damaged", 0.3 * SECONDS)


def test_damaged_zips(small_omniglot):
    parts = omniglot.find_parts(small_omniglot)

    def read() -> tuple[bytes, list[str]]:
        images, names = omniglot.pack_omniglot(parts)
        return images.tobytes(), names

    check(parts[0], read, str(small_omniglot), 0.3 * SECONDS)


def test_damaged_caches(tmp_path):
    path = tmp_path / "packed.npz"
    images = np.random.default_rng(0).integers(0, 255, (3, 20, 28, 28), np.uint8)
    data.write_packed(path, images, ["a", "b", "c"])

    def read() -> tuple[bytes, list[str]]:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            packed = data.read_packed(path)
        if packed is None:
            raise ValueError(said[0].message)
        return packed[0].tobytes(), packed[1]

    check(path, read, "packed.npz is damaged; it is made again", 0.1 * SECONDS)
