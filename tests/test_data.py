"""Omniglot is read right and verified, from wherever it lies; splits are disjoint."""

from __future__ import annotations

import hashlib
import http.server
import io
import os
import shutil
import threading
import zipfile
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import OMNIGLOT, needs_omniglot
from PIL import Image

import amaml
from amaml import data


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
    monkeypatch.setattr(data, "OMNIGLOT_PARTS", {"images_background": 2, "images_evaluation": 2})
    monkeypatch.setattr(data, "OMNIGLOT_FINGERPRINT", digest.hexdigest())
    return folder


def unpack(folder: Path, to: Path) -> Path:
    for path in folder.glob("*.zip"):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(to)
    return to


@needs_omniglot
def test_the_real_omniglot(cache):
    characters = amaml.load_omniglot(OMNIGLOT)
    assert characters.images.shape == (1623, 20, 28, 28)
    assert characters.images.dtype == torch.uint8
    assert len({name.partition("/")[0] for name in characters.names}) == 50
    assert characters.names[0] == "Alphabet_of_the_Magi/character01"
    assert characters.names[964] == "Angelic/character01"
    ink = characters.images.double().mean() / 255
    assert 0.05 < ink < 0.15  # ink is bright, and a small part of the image
    split = amaml.split_characters(characters)
    assert [len(part) for part in vars(split).values()] == [1100, 100, 423]
    # One drawing by another way: the mean of each pixel's neighbourhood in the big image.
    with zipfile.ZipFile(OMNIGLOT / "images_background.zip") as archive:
        big = archive.read("images_background/Greek/character01/0394_01.png")
    big = 255.0 * (np.asarray(Image.open(io.BytesIO(big))) == 0)
    coarse = torch.nn.functional.adaptive_avg_pool2d(torch.tensor(big)[None], 28)[0]
    mine = characters.images[characters.names.index("Greek/character01"), 0].double()
    assert np.corrcoef(coarse.flatten(), mine.flatten())[0, 1] > 0.95
    again = amaml.load_omniglot(OMNIGLOT)
    assert torch.equal(again.images, characters.images) and again.names == characters.names


def test_zips_tree_and_torchvisions_folder_give_the_same(cache, small_omniglot, tmp_path):
    zips = amaml.load_omniglot(small_omniglot)
    tree = amaml.load_omniglot(unpack(small_omniglot, tmp_path / "tree"))
    nested = amaml.load_omniglot(unpack(small_omniglot, tmp_path / "tv" / "omniglot-py").parent)
    assert zips.names == (
        "Latin/character01", "Latin/character02", "Tengwar/character01", "Tengwar/character02",
    )  # fmt: skip
    for other in (tree, nested):
        assert torch.equal(zips.images, other.images) and zips.names == other.names


def test_root_comes_from_argument_then_environment_then_cache(cache, small_omniglot, monkeypatch):
    with pytest.raises(FileNotFoundError, match=str(cache)):
        amaml.load_omniglot()
    monkeypatch.setenv("AMAML_DATA", str(small_omniglot))
    assert len(amaml.load_omniglot()) == 4
    monkeypatch.delenv("AMAML_DATA")
    shutil.copytree(small_omniglot, cache, dirs_exist_ok=True)
    assert len(amaml.load_omniglot()) == 4


def test_the_cache_is_used_and_a_damaged_one_made_again(cache, small_omniglot, monkeypatch):
    first = amaml.load_omniglot(small_omniglot)
    (packed,) = cache.glob("omniglot-*.npz")
    monkeypatch.setattr(data, "pack_omniglot", lambda parts: pytest.fail("packed again"))
    assert torch.equal(amaml.load_omniglot(small_omniglot).images, first.images)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    whole = packed.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:200] + b"?" + whole[201:], b""):
        packed.write_bytes(damaged)
        assert data.read_packed(packed) is None


def test_download_goes_through_torchvision(
    cache, small_omniglot, tmp_path, monkeypatch, torchvision_datasets
):
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(small_omniglot))
    monkeypatch.setattr(handler.func, "log_message", lambda *args: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    omniglot = torchvision_datasets.Omniglot
    monkeypatch.setattr(
        omniglot, "download_url_prefix", f"http://127.0.0.1:{server.server_address[1]}"
    )
    sums = {p.stem: hashlib.md5(p.read_bytes()).hexdigest() for p in small_omniglot.glob("*.zip")}
    monkeypatch.setattr(omniglot, "zips_md5", sums)
    try:
        fetched = amaml.load_omniglot(tmp_path / "new", download=True)
        monkeypatch.setattr(omniglot, "zips_md5", dict.fromkeys(sums, "0" * 32))
        with pytest.raises(ConnectionError, match="could not be downloaded"):
            amaml.load_omniglot(tmp_path / "wrong", download=True)
    finally:
        server.shutdown()
        server.server_close()
    assert torch.equal(fetched.images, amaml.load_omniglot(small_omniglot).images)
    monkeypatch.setattr(omniglot, "zips_md5", sums)
    with pytest.raises(ConnectionError, match="by hand and put them there"):  # the server is gone
        amaml.load_omniglot(tmp_path / "none", download=True)


def test_a_torchvision_that_cannot_be_imported_is_explained(cache, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchvision.datasets", None)
    with pytest.raises(ImportError, match="matching builds.*by hand"):
        amaml.load_omniglot(tmp_path, download=True)


def damage_missing_part(folder: Path):
    (folder / "images_evaluation.zip").unlink()


def damage_truncated(folder: Path):
    path = folder / "images_background.zip"
    path.write_bytes(path.read_bytes()[:-5000])


def damage_one_byte(folder: Path):
    path = folder / "images_background.zip"
    content = bytearray(path.read_bytes())
    content[content.find(b"IDAT") + 30] ^= 0xFF
    path.write_bytes(content)


def damage_missing_drawing(folder: Path):
    rewrite(folder / "images_background.zip", lambda names: names[1:])


def damage_missing_character(folder: Path):
    rewrite(folder / "images_evaluation.zip", lambda names: names[20:])


def damage_swapped_drawings(folder: Path):
    rewrite(folder / "images_background.zip", lambda names: names, swap=True)


def damage_not_an_image(folder: Path):
    unpack(folder, folder)
    for path in folder.glob("*.zip"):
        path.unlink()
    next(folder.glob("*/*/*/*.png")).write_bytes(b"hello")


def rewrite(path: Path, keep, swap: bool = False):
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    names = keep(list(content))
    with zipfile.ZipFile(path, "w") as archive:
        for name, source in zip(names, names[::-1] if swap else names, strict=True):
            archive.writestr(name, content[source])


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (damage_missing_part, FileNotFoundError, "no Omniglot in .*AMAML_DATA"),
        (damage_truncated, ValueError, r"images_background.zip is damaged"),
        (damage_one_byte, ValueError, r"images_background.zip is damaged"),
        (damage_missing_drawing, ValueError, "Latin/character01 has 19 drawings"),
        (damage_missing_character, ValueError, "holds 1 characters, images_evaluation.* has 2"),
        (damage_swapped_drawings, ValueError, "not Omniglot's: the fingerprint"),
        (damage_not_an_image, ValueError, "is damaged"),
    ],
)
def test_altered_data_is_refused_also_where_a_cache_exists(
    cache, small_omniglot, damage, error, words
):
    amaml.load_omniglot(small_omniglot)
    damage(small_omniglot)
    with pytest.raises(error, match=words):
        amaml.load_omniglot(small_omniglot)


def test_the_embedded_set_is_cached(cache, monkeypatch):
    first = amaml.load_glyphs()
    assert len(first) >= 400 and first.images.shape[1:] == (20, 28, 28)
    assert len({name.partition("/")[0] for name in first.names}) >= 8
    assert os.listdir(cache)
    monkeypatch.setattr("amaml.glyphs.draw_glyphs", lambda seed: pytest.fail("drawn again"))
    assert torch.equal(amaml.load_glyphs().images, first.images)


@pytest.mark.parametrize("n", [11, 100, 1623])
def test_splits_are_disjoint_complete_and_of_the_right_sizes(n):
    characters = amaml.Characters(
        torch.arange(n).remainder(256).to(torch.uint8).view(n, 1, 1, 1).expand(n, 20, 1, 1),
        [f"A/character{i:04d}" for i in range(n)],
    )
    split = amaml.split_characters(characters, seed=3)
    parts = [split.train, split.validation, split.test]
    assert sorted(chain(*(part.names for part in parts))) == list(characters.names)
    if n == 1623:
        assert [len(part) for part in parts] == [1100, 100, 423]
    for part in parts:  # images go with their names
        for image, name in zip(part.images, part.names, strict=True):
            assert image[0, 0, 0] == int(name[-4:]) % 256
    same, other = amaml.split_characters(characters, 3), amaml.split_characters(characters, 4)
    assert same.test.names == split.test.names != other.test.names


def test_characters_that_do_not_fit_are_refused(glyphs):
    with pytest.raises(ValueError, match="4 characters are too few"):
        amaml.split_characters(glyphs[:4])
    with pytest.raises(ValueError, match="as many different names, got 2"):
        amaml.Characters(torch.zeros(3, 20, 28, 28, dtype=torch.uint8), ["a", "b"])
    with pytest.raises(ValueError, match="2 of them different"):
        amaml.Characters(torch.zeros(3, 20, 28, 28, dtype=torch.uint8), ["a", "b", "b"])
    with pytest.raises(ValueError, match=r"must be uint8.*float32"):
        amaml.Characters(torch.zeros(3, 20, 28, 28), ["a", "b", "c"])
