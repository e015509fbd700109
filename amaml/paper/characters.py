"""The characters that chapters 1 to 4 show: Omniglot, or the glyphs that stand in for it."""

from __future__ import annotations

import os

from amaml.data import Characters, cache_folder, load_glyphs, load_omniglot
from amaml.datasets import omniglot

STAND_IN = (
    "Omniglot is not on this machine, so the embedded glyphs stand in. All code below runs as it "
    "is, but numbers and pictures differ from those that the text describes. To see Omniglot, "
    "give its folder in AMAML_DATA; the README says where to get it."
)


def omniglot_is_missing() -> bool:
    """Whether nobody has said where Omniglot is and the cache folder does not hold it either."""
    return not os.environ.get("AMAML_DATA") and omniglot.find_parts(cache_folder()) is None


def load_characters(profile: str) -> tuple[Characters, str, str]:
    """(characters, what titles call them, their profile): "quick" has the glyphs, others Omniglot.

    Downloads nothing: where `omniglot_is_missing` the glyphs stand in, and a sentence says so.
    """
    if profile != "quick" and not omniglot_is_missing():
        return load_omniglot(), "Omniglot", profile
    if profile != "quick":
        print(STAND_IN)
    return load_glyphs(), "embedded glyphs", "quick"
