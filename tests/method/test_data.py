"""Omniglot is read right and verified, from wherever it lies; splits are disjoint."""

import hashlib
import http.server
import io
import re
import shutil
import sys
import threading
import zipfile
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import OMNIGLOT, needs_omniglot
from PIL import Image

import amaml
from amaml.datasets import glyphs, omniglot


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
    with monkeypatch.context() as patch:
        patch.setattr(omniglot, "pack_omniglot", lambda parts: pytest.fail("packed again"))
        assert torch.equal(amaml.load_omniglot(small_omniglot).images, first.images)
    (packed,) = cache.glob("omniglot-*.npz")
    whole = packed.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:200] + b"?" + whole[201:], b""):
        packed.write_bytes(damaged)
        with pytest.warns(UserWarning, match="is damaged; it is made again") as warned:
            assert torch.equal(amaml.load_omniglot(small_omniglot).images, first.images)
        assert warned[0].filename == __file__ and packed.read_bytes() == whole


def test_the_embedded_set_is_cached(cache, monkeypatch):
    first = amaml.load_glyphs()
    monkeypatch.setattr(glyphs, "draw_glyphs", lambda seed: pytest.fail("drawn again"))
    assert torch.equal(amaml.load_glyphs().images, first.images)
    assert torch.equal(first[5:7].to("cpu").images, first.images[5:7])


def test_download_goes_through_torchvision(
    cache, small_omniglot, tmp_path, monkeypatch, torchvision_datasets
):
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(small_omniglot))
    monkeypatch.setattr(handler.func, "log_message", lambda *args: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    theirs = torchvision_datasets.Omniglot
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(theirs, "download_url_prefix", address)
    sums = {p.stem: hashlib.md5(p.read_bytes()).hexdigest() for p in small_omniglot.glob("*.zip")}
    monkeypatch.setattr(theirs, "zips_md5", sums)
    try:
        fetched = amaml.load_omniglot(tmp_path / "new", download=True)
        monkeypatch.setattr(theirs, "zips_md5", dict.fromkeys(sums, "0" * 32))
        with pytest.raises(ConnectionError, match="could not be downloaded"):
            amaml.load_omniglot(tmp_path / "wrong", download=True)
    finally:
        server.shutdown()
        server.server_close()
    assert torch.equal(fetched.images, amaml.load_omniglot(small_omniglot).images)
    monkeypatch.setattr(theirs, "zips_md5", sums)
    with pytest.raises(ConnectionError, match="by hand and put them there"):  # the server is gone
        amaml.load_omniglot(tmp_path / "none", download=True)


def test_a_torchvision_that_cannot_be_imported_is_explained(cache, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ImportError, match=re.escape(torch.__version__) + ".*by hand"):
        amaml.load_omniglot(tmp_path, download=True)


BACKGROUND, EVALUATION = "images_background.zip", "images_evaluation.zip"


def rewrite(folder: Path, name: str, keep: slice = slice(None), order: int = 1):
    """Write a zip again with some of its entries, and their contents in this order."""
    with zipfile.ZipFile(folder / name) as archive:
        content = {entry: archive.read(entry) for entry in archive.namelist()[keep]}
    with zipfile.ZipFile(folder / name, "w") as archive:
        for entry, source in zip(content, list(content)[::order], strict=True):
            archive.writestr(entry, content[source])


def change_one_byte(folder: Path):
    content = bytearray((folder / BACKGROUND).read_bytes())
    content[content.find(b"IDAT") + 30] ^= 0xFF
    (folder / BACKGROUND).write_bytes(content)


def truncate(folder: Path):
    (folder / BACKGROUND).write_bytes((folder / BACKGROUND).read_bytes()[:-5000])


def put_in_text(folder: Path):
    unpack(folder, folder)
    (folder / BACKGROUND).unlink()
    (folder / "images_background/Latin/character02/0002_07.png").write_bytes(b"hello")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / EVALUATION).unlink(), "no Omniglot in .*AMAML_DATA"),
        (truncate, "images_background.zip is damaged"),
        (change_one_byte, "zip is damaged .Latin/character01/0001_01.png"),
        (put_in_text, "is damaged .Latin/character02/0002_07.png: not a PNG image"),
        (lambda f: rewrite(f, BACKGROUND, slice(1, None)), "Latin/character01 has 19 drawings"),
        (
            lambda f: rewrite(f, EVALUATION, slice(20, None)),
            "1 characters, images_evaluation has 2",
        ),
        (lambda f: rewrite(f, BACKGROUND, order=-1), "another fingerprint than Omniglot's"),
    ],
)
def test_altered_data_is_refused_also_where_a_cache_exists(cache, small_omniglot, damage, words):
    amaml.load_omniglot(small_omniglot)
    damage(small_omniglot)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        amaml.load_omniglot(small_omniglot)


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
