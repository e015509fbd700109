"""Of a machine without Omniglot nbval does not ask for Omniglot's numbers.

The chapters' cells tagged `omniglot` show what depends on the images. There they are executed on
the embedded glyphs, and their outputs are not compared; those of all other cells are.
"""

from __future__ import annotations

import pytest

from amaml.paper.characters import omniglot_is_missing

NOT_COMPARED = pytest.StashKey[int]()


def pytest_collection_modifyitems(config, items):
    tagged = [
        item
        for item in items
        if hasattr(item, "cell") and "omniglot" in item.cell.metadata.get("tags", [])
    ]
    if not omniglot_is_missing():
        tagged = []
    for item in tagged:
        item.options["check"] = False
    config.stash[NOT_COMPARED] = len(tagged)


def pytest_terminal_summary(terminalreporter, config):
    if n := config.stash.get(NOT_COMPARED, 0):
        terminalreporter.write_line(
            f"NOT COMPARED: the outputs of {n} cells that show Omniglot; without AMAML_DATA they "
            "were executed on the embedded glyphs"
        )
