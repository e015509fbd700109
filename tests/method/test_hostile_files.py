"""Files from elsewhere cannot do harm: zips are looked through first, and nothing is unpickled."""

import hashlib
import io
import re
import stat
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

import amaml
from amaml import data
from amaml.datasets import omniglot

PLACE = "images_background/Latin/character01/0001_99.png"


def png(width: int, height: int) -> bytes:
    """A small file with a picture of any size in it: black, one bit deep."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        summed = kind + content
        return struct.pack(">I", len(content)) + summed + struct.pack(">I", zlib.crc32(summed))

    rows = zlib.compress(bytes((width // 8 + 1) * min(height, 2000)))
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def entry(name: str, mode: int = stat.S_IFREG | 0o644) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, mode << 16
    info.compress_type = zipfile.ZIP_DEFLATED
    return info


REFUSED_BY_NAME = [
    (entry("../../../etc/evil.png"), b"", "'../../../etc/evil.png' leads out of the folder"),
    (entry("images_background/../../evil.txt"), b"", "evil.txt' leads out"),
    (entry("/etc/evil.png"), b"", "'/etc/evil.png' leads out"),
    (entry("..\\evil.png"), b"", "leads out"),
    (entry("C:/evil.png"), b"", "leads out"),
    (entry(PLACE, stat.S_IFLNK | 0o777), b"/etc/passwd", "0001_99.png' is a link"),
    (entry(PLACE, stat.S_IFIFO | 0o644), b"", "not a file"),
    (entry(PLACE), bytes(10**7), "has 10000000 bytes, at most"),
    (entry("bomb.txt"), bytes(10**7), "bomb.txt' has 10000000 bytes"),
]
REFUSED_BY_CONTENT = [
    (entry(PLACE), png(30_000, 30_000), "0001_99.png: .*(pixels|decompression bomb|limit)"),
    (entry(PLACE), png(1000, 1000), "0001_99.png: .1000, 1000. pixels, Omniglot has 105 x 105"),
    (entry(PLACE), b"GIF89a" + bytes(20), "0001_99.png: not a PNG image"),
]


@pytest.mark.parametrize(("info", "content", "words"), REFUSED_BY_NAME + REFUSED_BY_CONTENT)
def test_hostile_zips_are_refused_before_they_are_unpacked(
    cache, small_omniglot, monkeypatch, info, content, words
):
    path = small_omniglot / "images_background.zip"
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(info, content)
    if (info, content, words) in REFUSED_BY_NAME:
        monkeypatch.setattr(zipfile.ZipFile, "open", lambda *a, **k: pytest.fail("unpacked"))
    before = sorted(small_omniglot.parent.rglob("*"))
    with pytest.raises(ValueError, match=rf"(?s)images_background.zip is damaged \(.*({words})"):
        amaml.load_omniglot(small_omniglot)
    assert sorted(small_omniglot.parent.rglob("*")) == before


def test_an_entry_that_lies_about_its_size_is_not_unpacked_beyond_it(cache, small_omniglot):
    path = small_omniglot / "images_background.zip"
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(entry(PLACE), bytes(9_000))
    whole = path.read_bytes()
    assert whole.count(struct.pack("<I", 9_000)) == 2
    path.write_bytes(whole.replace(struct.pack("<I", 9_000), struct.pack("<I", 500)))
    with pytest.raises(ValueError, match=r"is damaged .*0001_99.png: Bad CRC"):
        omniglot.pack_omniglot(omniglot.find_parts(small_omniglot))


def test_a_cache_that_holds_pickled_objects_is_refused(tmp_path):
    file = io.BytesIO()
    np.savez(file, images=np.array([{"an": "object"}], dtype=object), names=np.array(["a"]))
    content = file.getvalue()
    path = tmp_path / "packed.npz"
    path.write_bytes(content + hashlib.sha256(content).digest())
    with pytest.raises(ValueError, match="allow_pickle=False"):
        data.read_packed(path)


def test_nothing_is_unpickled_and_nothing_run_as_code():
    forbidden = re.compile(
        r"\bimport pickle|\bfrom pickle|\bcloudpickle|\bjoblib|\bmarshal\b|\bshelve\b|\bdill\b|"
        r"read_pickle|to_pickle|allow_pickle=True|(?<![\w.])eval\(|(?<![\w.])exec\(|"
        r"torch\.(load|save)\((?!.*weights_only=True)|extractall|shell=True"
    )
    sources = list(Path(amaml.__file__).parent.rglob("*.py"))
    assert len({source.parent for source in sources}) >= 5 and len(sources) > 20
    lines = [(s.name, line) for s in sources for line in s.read_text("utf-8").splitlines()]
    assert not [(name, line) for name, line in lines if forbidden.search(line)]
    loads = [line for _, line in lines if "np.load(" in line]
    assert loads and all("allow_pickle=False" in line for line in loads)
