"""Other people's machines: their caches, zips, folders and kinds of numbers."""

import codecs
import multiprocessing
import os
import pwd
import resource
import shutil
import tempfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import amaml
from amaml.datasets import glyphs

NOBODY = 65534


@pytest.fixture
def one_glyph(monkeypatch):
    """A set that is drawn in no time."""
    codecs.lookup("cp437")  # zipfile's; nobody may not be able to read the standard library
    drawn = np.ones((1, 20, 28, 28), np.uint8), ["A/character01"]
    monkeypatch.setattr(glyphs, "draw_glyphs", lambda seed: drawn)


@pytest.fixture
def place():
    """A folder that other users can reach, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def made(folder: Path, mode: int, *, cached: bytes | None = None) -> str:
    """A folder of this mode, with a cache file in it that only its owner may read."""
    (folder / "amaml").mkdir(parents=True)
    if cached is not None:
        (folder / "amaml" / "glyphs-2-0.npz").write_bytes(cached)
        (folder / "amaml" / "glyphs-2-0.npz").chmod(0o000)
    for each in (folder / "amaml", folder):
        each.chmod(mode)
    return str(folder)


def a_file(path: Path) -> str:
    path.write_text("")
    return str(path)


def load(environment: dict[str, str], limit: int | None, answer) -> None:
    for name in ("HOME", "XDG_CACHE_HOME"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    if os.geteuid() == 0:  # who may read and write everything
        os.setuid(NOBODY)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        characters = amaml.load_glyphs()
    answer.send((int(characters.images.sum()), [str(warning.message) for warning in said]))


def load_as_nobody(environment: dict[str, str], limit: int | None = None) -> tuple[int, list[str]]:
    """The ink of `load_glyphs()` and what it warns of, for a user without special rights."""
    context = multiprocessing.get_context("fork")
    answer, sender = context.Pipe(duplex=False)
    process = context.Process(target=load, args=(environment, limit, sender))
    process.start()
    sender.close()
    try:
        return answer.recv()
    finally:
        process.join()


CACHES = {
    "a read-only home": lambda place: ({"HOME": made(place / "home", 0o555)}, ".cache/amaml"),
    "/ as the home": lambda place: ({"HOME": "/"}, "/.cache/amaml"),
    "no home for the user": lambda place: ({}, "/dev/null/amaml"),
    "a file": lambda place: ({"XDG_CACHE_HOME": a_file(place / "file")}, "file/amaml"),
    "a closed folder": lambda place: ({"XDG_CACHE_HOME": made(place / "c", 0o000)}, "c/amaml"),
    "another user's file": lambda place: (
        {"XDG_CACHE_HOME": made(place / "c", 0o555, cached=b"theirs")}, "c/amaml"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CACHES)
def test_without_a_cache_the_data_loads_with_a_warning(kind, place, one_glyph, monkeypatch):
    if kind == "no home for the user":
        monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # raises KeyError, as for a stranger
    environment, folder = CACHES[kind](place)
    ink, (warning,) = load_as_nobody(environment)
    assert ink == 20 * 28 * 28
    assert f"{folder} cannot serve as a cache" in warning and "XDG_CACHE_HOME" in warning


def test_a_full_disk_is_a_warning_and_leaves_nothing_behind(place, one_glyph):
    folder = made(place / "cache", 0o777)
    ink, (warning,) = load_as_nobody({"XDG_CACHE_HOME": folder}, limit=100)
    assert ink == 20 * 28 * 28 and "cannot serve as a cache (File too large)" in warning
    assert not list((place / "cache" / "amaml").iterdir())


def test_a_file_that_cannot_be_read_is_replaced_where_that_can_be(place, one_glyph):
    folder = made(place / "cache", 0o777, cached=b"theirs")
    for _ in range(2):  # made anew, then read
        assert load_as_nobody({"XDG_CACHE_HOME": folder}) == (20 * 28 * 28, [])
    assert (place / "cache" / "amaml" / "glyphs-2-0.npz").read_bytes() != b"theirs"


def test_a_cache_that_can_only_be_read_is_read_without_a_word(place, one_glyph, monkeypatch):
    folder = made(place / "cache", 0o777)
    assert load_as_nobody({"XDG_CACHE_HOME": folder}) == (20 * 28 * 28, [])
    (place / "cache" / "amaml").chmod(0o555)
    monkeypatch.setattr(glyphs, "draw_glyphs", lambda seed: pytest.fail("drawn again"))
    assert load_as_nobody({"XDG_CACHE_HOME": folder}) == (20 * 28 * 28, [])


def test_without_a_home_omniglot_is_asked_for(monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME", "AMAML_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    with pytest.raises(FileNotFoundError, match="Give the folder .* as root=.*AMAML_DATA"):
        amaml.load_omniglot()


HIDDEN = (
    "images_background/._Latin",
    "images_background/.DS_Store",
    "images_background/Latin/character01/._0001_01.png",
    "images_background/Latin/character01/.ipynb_checkpoints/0001_01-checkpoint.png",
    "images_background/.Trash/Latin/character01/0001_01.png",
    "images_background/Latin/character01/Thumbs.db",
    "__MACOSX/images_background/Latin/character01/._0001_01.png",
    "__MACOSX/images_background/Latin/character01/0001_01.png",
)


def unpack(folder: Path, to: Path, prefix: str = "") -> Path:
    """Both parts unpacked into `to`, each into a folder of its own name and this prefix."""
    for path in folder.glob("*.zip"):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(to / prefix.format(path.stem))
    return to


def pack(folder: Path, to: Path, strip: int = 0, prefix: str = "") -> Path:
    """The zips with other names for their entries: without the first folders, after a prefix."""
    to.mkdir(parents=True)
    for path in folder.glob("*.zip"):
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(to / path.name, "w") as new:
            for name in old.namelist():
                place = prefix.format(path.stem) + name.split("/", strip)[-1]
                new.writestr(place, old.read(name))
    return to


def with_hidden_files(root: Path) -> Path:
    for name in HIDDEN:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"\x00\x05\x16\x07" + bytes(12_000))
    return root


def with_hidden_entries(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "images_background.zip", "a") as archive:
        for name in HIDDEN:
            archive.writestr(name, b"\x00\x05\x16\x07" + bytes(12_000))
    return folder


LAYOUTS = {
    "folders with hidden files": lambda f, to: with_hidden_files(unpack(f, to)),
    "zips packed by the Finder": lambda f, to: with_hidden_entries(pack(f, to)),
    "a folder in a folder": lambda f, to: unpack(f, to, "{}"),
    "three deep": lambda f, to: unpack(f, to, "{0}/{0}"),
    "zips of a folder in a folder": lambda f, to: pack(f, to, prefix="{}/"),
    "zips without their own folder": lambda f, to: pack(f, to, strip=1),
    "unpacked one folder down": lambda f, to: unpack(f, to / "omniglot").parent,
    "the authors' repository": lambda f, to: shutil.copytree(f, to / "omniglot-master/python")
    and to,
    "beside the Finder's": lambda f, to: unpack(f, with_hidden_files(to) / "omniglot").parent,
    "one a zip, one a folder": lambda f, to: (
        unpack(f, to), shutil.rmtree(to / "images_evaluation"),
        shutil.copy(f / "images_evaluation.zip", to),
    ) and to,
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_omniglot_is_found_however_it_was_packed(layout, cache, small_omniglot, tmp_path):
    expected = amaml.load_omniglot(small_omniglot)
    shutil.rmtree(cache)
    characters = amaml.load_omniglot(LAYOUTS[layout](small_omniglot, tmp_path / "other"))
    assert torch.equal(characters.images, expected.images) and characters.names == expected.names


def test_a_damaged_file_is_named(cache, small_omniglot, tmp_path):
    tree = unpack(small_omniglot, tmp_path / "tree")
    damaged = tree / "images_evaluation/Tengwar/character02/0002_20.png"
    for content in (b"", b"hello", damaged.read_bytes()[:60], damaged.read_bytes()[:-30]):
        damaged.write_bytes(content)
        with pytest.raises(ValueError, match=r"images_evaluation is damaged .* Give the") as raised:
            amaml.load_omniglot(tree)
        assert "(Tengwar/character02/0002_20.png: " in str(raised.value)
        assert "BytesIO" not in str(raised.value)


def test_an_empty_root_is_a_root(small_omniglot, tmp_path, monkeypatch):
    """Not the environment's: None alone means that it is not given."""
    monkeypatch.setenv("AMAML_DATA", str(small_omniglot))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").rename(tmp_path.parent / f"{tmp_path.name}-elsewhere")
    with pytest.raises(FileNotFoundError, match=r"no Omniglot in \."):
        amaml.load_omniglot(root="")


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_numpys_whole_numbers_are_taken_everywhere(kind, glyphs):
    one, two, three = kind(1), kind(2), kind(3)
    assert amaml.split_characters(glyphs, three).test.names == (
        amaml.split_characters(glyphs, 3).test.names
    )
    assert amaml.load_glyphs(kind(0)).names == glyphs.names
    for index in (two, [two], np.array([2], kind)):
        assert glyphs[index].names == glyphs[2].names
    sampler = amaml.TaskSampler(glyphs, n_way=three, k_shot=two, k_query=one)
    assert type(sampler.n_way) is type(sampler.k_shot) is type(sampler.k_query) is int
    tasks = sampler.sample(two, torch.Generator().manual_seed(0))
    for index in (one, [one], np.array([1], kind)):
        assert torch.equal(tasks[index].query_x, tasks[1].query_x)
    model = amaml.OmniglotCNN(three, torch.Generator().manual_seed(0), filters=two)
    assert model(tasks.support_x[0]).shape == (6, 3)


class NoFloat64(TorchDispatchMode):
    """Stands for a device without float64, such as Apple's."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return result


def test_tasks_and_the_network_need_no_float64(glyphs):
    with NoFloat64():
        split = amaml.split_characters(glyphs)
        tasks = amaml.TaskSampler(split.train).sample(2, torch.Generator().manual_seed(0))
        model = amaml.OmniglotCNN(5, torch.Generator().manual_seed(0), filters=4)
        model(tasks[0].to("cpu", torch.float32).query_x[0]).sum().backward()
        with pytest.raises(TypeError, match="float64"):
            tasks.double()
