"""The drawn set: its form, that its letters can be told apart, and that a seed fixes it."""

import hashlib

import numpy as np
import pytest

from amaml.datasets import glyphs

matplotlib = pytest.importorskip("matplotlib")

MADE_WITH = "3.11.2"  # the version of matplotlib whose drawings have this digest
SHA256 = "42f00eba1ab5201d389cdf849235dfd310e1e5d9ce3b010db21671bd8ebab6fb"


@pytest.fixture(scope="module")
def drawn():
    return glyphs.draw_glyphs()


@pytest.fixture(scope="module")
def flat(drawn):
    """(characters, writers, pixels) from 0 to 1."""
    images, _ = drawn
    return images.reshape(*images.shape[:2], -1) / 255


def distances(a, b):
    """Squared distances of all rows of a to all rows of b."""
    return (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T


def test_names_count_the_characters_of_each_script(drawn):
    images, names = drawn
    assert images.dtype == np.uint8 and images.shape == (len(names), 20, 28, 28)
    assert 500 <= len(names) <= 900
    owners = [name.split("/")[0] for name in names]
    scripts = list(dict.fromkeys(owners))
    assert scripts == glyphs.SCRIPTS and len(scripts) >= 10
    counts = [owners.count(script) for script in scripts]
    assert max(counts) <= glyphs.CAP
    assert names == [
        f"{script}/character{i + 1:02d}"
        for script, count in zip(scripts, counts, strict=True)
        for i in range(count)
    ]


@pytest.mark.parametrize(
    ("letter", "name"),
    [
        ("A", "Latin/character01"),
        ("Ж", "Cyrillic/character22"),
        ("ש", "Hebrew/character17"),
        ("ⵣ", "Tifinagh/character27"),
    ],
)
def test_names_go_with_their_images(drawn, flat, letter, name):
    from matplotlib.ft2font import FT2Font, LoadFlags

    font = FT2Font(f"{matplotlib.get_data_path()}/fonts/ttf/{glyphs.REFERENCE}.ttf")
    font.load_char(ord(letter), flags=LoadFlags.NO_SCALE)
    points, codes = glyphs.thinned(glyphs.outline(*font.get_path()))
    printed = glyphs.rendered([(20 * points, codes, 2.0)]).ravel() / 255
    means = flat.mean(1)
    likeness = means @ printed / np.linalg.norm(means, axis=1)
    assert drawn[1][likeness.argmax()] == name


def test_ink_is_thin_and_off_the_border(drawn):
    images, _ = drawn
    assert (images.max((2, 3)) == 255).all()
    assert 0.1 < images.mean() / 255 < 0.25
    border = np.ones((28, 28), bool)
    border[1:-1, 1:-1] = False
    assert (images[:, :, border] > 0).any(-1).mean() < 0.02


def test_no_two_characters_look_the_same(flat):
    apart = distances(flat.mean(1), flat.mean(1)) / flat.shape[-1]
    np.fill_diagonal(apart, np.inf)
    assert np.sqrt(apart.min()) > 0.05


def test_no_two_writers_draw_a_letter_the_same(flat):
    closest = min(
        np.abs(flat[:, i] - flat[:, j]).mean(1).min() for i in range(20) for j in range(i)
    )
    assert closest > 0.01


def test_letters_can_be_told_in_spite_of_the_hands(flat):
    total, n = flat.sum(1), len(flat)
    own, others, hits = [], [], []
    for drawing in flat.swapaxes(0, 1):
        apart = distances(drawing, total / 20)
        others.append(apart[~np.eye(n, dtype=bool)].mean())
        # Its own character's mean leaves this drawing out.
        np.fill_diagonal(apart, ((drawing - (total - drawing) / 19) ** 2).sum(1))
        own.append(apart.diagonal().mean())
        hits.append((apart.argmin(1) == np.arange(n)).mean())
    assert np.mean(own) < 0.8 * np.mean(others)
    assert 0.15 < np.mean(hits) < 0.6  # chance is 1 in 602, and pixels alone must not do


def test_default_set_is_always_the_same(drawn):
    images, names = drawn
    digest = hashlib.sha256(images.tobytes() + "\n".join(names).encode()).hexdigest()
    assert digest == SHA256, (
        f"The digest is of matplotlib {MADE_WITH}, this is {matplotlib.__version__}: another "
        "version may bring other fonts or render them otherwise."
    )


def test_another_seed_draws_the_same_characters_otherwise(drawn):
    images, names = drawn
    others, same_names = glyphs.draw_glyphs(seed=1)
    assert same_names == names
    assert (others != images).any((2, 3)).all()
    # The same letters all the same: their means are closer than those of different letters.
    apart = distances(*(x.mean(1).reshape(len(x), -1) for x in (images / 255, others / 255)))
    assert (apart.argmin(1) == np.arange(len(names))).mean() > 0.9
