"""Fixtures that several tests ask for."""

import hashlib
import io
import sys
import types
import zipfile
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from PIL import Image

import amaml
from amaml.datasets import omniglot

# No example is judged by its time
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def glyphs() -> amaml.Characters:
    return amaml.load_glyphs()


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def torchvision_datasets(monkeypatch):
    """torchvision's data sets, also beside a torch whose build torchvision does not match.

    Its compiled operators then cannot be loaded, and the data sets need none of them.
    """
    try:
        import torchvision.datasets
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            monkeypatch.delitem(sys.modules, name)
        stand_in = types.ModuleType("torchvision._meta_registrations")
        monkeypatch.setitem(sys.modules, "torchvision._meta_registrations", stand_in)
    import torchvision.datasets

    return torchvision.datasets


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("AMAML_DATA", raising=False)
    return tmp_path / "cache" / "amaml"


@pytest.fixture
def small_omniglot(tmp_path, monkeypatch) -> Path:
    """A folder with two zips of Omniglot's layout, small, that pass for the real ones."""
    rng = np.random.default_rng(0)
    digest = hashlib.sha256()
    folder = tmp_path / "data"
    folder.mkdir()
    for part, alphabet in (("images_background", "Latin"), ("images_evaluation", "Tengwar")):
        with zipfile.ZipFile(folder / f"{part}.zip", "w") as archive:
            for character in (1, 2):
                for drawing in range(1, 21):
                    ink = rng.random((105, 105)) < 0.2
                    digest.update(np.packbits(ink).tobytes())
                    file = io.BytesIO()
                    Image.fromarray(~ink).convert("1").save(file, "PNG")
                    name = f"character{character:02d}/{character:04d}_{drawing:02d}.png"
                    archive.writestr(f"{part}/{alphabet}/{name}", file.getvalue())
    parts = {"images_background": 2, "images_evaluation": 2}
    monkeypatch.setattr(omniglot, "OMNIGLOT_PARTS", parts)
    monkeypatch.setattr(omniglot, "OMNIGLOT_FINGERPRINT", digest.hexdigest())
    return folder
