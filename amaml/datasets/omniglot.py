"""Omniglot (Lake et al. 2011, 2015) on disk: found, read safely, verified and packed."""

from __future__ import annotations

import glob
import hashlib
import io
import os
import re
import stat
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

N_DRAWINGS = 20
SCAN, SIZE = 105, 28  # pixels of a drawing each way, on disk and packed
OMNIGLOT_PARTS = {"images_background": 964, "images_evaluation": 659}  # folder: characters
OMNIGLOT_FINGERPRINT = "75a36f7ce605ee617d0c45021613841aec979e079f71594e885aba52a7c003ce"
MOST_BYTES = 100_000  # of a file in a zip: a drawing has about 200, a .DS_Store some thousand
# In folders of any name but hidden ones; the names of hidden files do not match.
DRAWING = re.compile(r"(?!__MACOSX/)(?:[^./][^/]*/)*([^./][^/]*/character\d+/\d+_\d+\.png)")
HOW_TO_GET = (
    "Give the folder that holds images_background and images_evaluation (.zip files or unpacked) "
    "as root=..., or in AMAML_DATA, or call load_omniglot(download=True) once"
)


def find_parts(root: Path) -> list[Path] | None:
    """The zip file or folder of each part, at most two folders below `root`; None without both.

    That finds torchvision's `omniglot-py`, the authors' `python` and a folder in a folder.
    """
    for pattern in ("./", "*/", "*/*/"):
        for folder in sorted(glob.glob(pattern, root_dir=root)):  # without hidden ones
            parts = [root / folder / part for part in OMNIGLOT_PARTS]
            found = [z if (z := part.with_suffix(".zip")).exists() else part for part in parts]
            if all(path.exists() for path in found) and "__MACOSX" not in folder:
                return found
    return None


def download_omniglot(root: Path) -> None:
    """Fetch both parts into `root` with torchvision, which verifies their checksums."""
    failed = f"Omniglot could not be downloaded into {root}"
    by_hand = "get images_background.zip and images_evaluation.zip by hand and put them there"
    try:
        from torchvision.datasets import Omniglot
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"{failed}: torchvision could not be imported ({error}); it must match the build of "
            f"torch, which is {torch.__version__} (CPU, or the same CUDA), or {by_hand}"
        ) from error
    try:
        for background in (True, False):
            Omniglot(str(root), background=background, download=True)
    except (OSError, RuntimeError, zipfile.BadZipFile) as error:
        raise ConnectionError(f"{failed} ({error}); {by_hand}") from error


def source_key(parts: list[Path]) -> str:
    """A short key of a zip's bytes, or of the names, sizes and times of change in a folder."""
    digest = hashlib.sha256()
    for part in parts:
        if part.is_dir():
            for name, path in drawings_among(glob.glob("**/*.png", root_dir=part, recursive=True)):
                status = (part / path).stat()
                digest.update(f"{name} {status.st_size} {status.st_mtime_ns}".encode())
        else:
            with part.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def pack_omniglot(parts: list[Path]) -> tuple[np.ndarray, list[str]]:
    """Read, verify and shrink both parts: uint8 images (1623, 20, 28, 28), and their names.

    Raises ValueError where a file is damaged or the drawings are not Omniglot's.
    """
    from PIL import Image, UnidentifiedImageError

    digest = hashlib.sha256()
    characters: dict[str, list[np.ndarray]] = {}
    for part, (folder, expected) in zip(parts, OMNIGLOT_PARTS.items(), strict=True):
        before, name = len(characters), part.name
        try:
            for name, open_drawing in drawings_of(part):
                with open_drawing() as file:
                    content = file.read(MOST_BYTES + 1)  # whatever it would unpack to
                picture = Image.open(io.BytesIO(content), formats=["PNG"])
                if picture.size != (SCAN, SCAN):
                    raise ValueError(f"{picture.size} pixels, Omniglot has {SCAN} x {SCAN}")
                grey = picture.convert("L")
                digest.update(np.packbits(np.asarray(grey) == 0).tobytes())
                # Of one-bit files Pillow would take the nearest pixel; of grey ones it filters.
                small = grey.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
                characters.setdefault(name.rpartition("/")[0], []).append(255 - np.asarray(small))
        except Exception as error:  # damage makes zipfile and Pillow raise nine kinds
            reason = "not a PNG image" if isinstance(error, UnidentifiedImageError) else error
            raise ValueError(f"{part} is damaged ({name}: {reason}). {HOW_TO_GET}") from error
        if (n := len(characters) - before) != expected:
            raise ValueError(f"{part} holds {n} characters, {folder} has {expected}. {HOW_TO_GET}")
    place = parts[0].parent
    for name, images in characters.items():
        if (n := len(images)) != N_DRAWINGS:
            raise ValueError(f"{name} has {n} drawings in {place}, not {N_DRAWINGS}. {HOW_TO_GET}")
    if digest.hexdigest() != OMNIGLOT_FINGERPRINT:
        raise ValueError(
            f"the pixels in {place} have another fingerprint than Omniglot's. {HOW_TO_GET}"
        )
    return np.stack([np.stack(images) for images in characters.values()]), list(characters)


def drawings_of(part: Path) -> Iterator[tuple[str, Callable]]:
    """Name and opener of each drawing of a zip or folder, sorted by name."""
    if part.is_dir():
        for name, path in drawings_among(glob.glob("**/*.png", root_dir=part, recursive=True)):
            yield name, partial(open, part / path, "rb")
        return
    with zipfile.ZipFile(part) as archive:
        check_entries(archive)
        for name, path in drawings_among(archive.namelist()):
            yield name, partial(archive.open, path)


def drawings_among(paths: list[str]) -> list[tuple[str, str]]:
    """("Alphabet/characterNN/NNNN_NN.png", path) of each drawing, sorted; the rest is skipped."""
    found = ((DRAWING.fullmatch(path.replace(os.sep, "/")), path) for path in paths)
    return sorted((match[1], path) for match, path in found if match)


def check_entries(archive: zipfile.ZipFile) -> None:
    """ValueError for what no zip of Omniglot holds, before anything in it is unpacked."""
    for entry in archive.infolist():
        name, kind = entry.orig_filename, stat.S_IFMT(entry.external_attr >> 16)
        if re.search(r"^/|[\\:]|(^|/)\.\.(/|$)", name):
            raise ValueError(f"its entry {name!r} leads out of the folder")
        if not entry.is_dir() and kind not in (0, stat.S_IFREG):
            raise ValueError(f"its entry {name!r} is a link or another thing that is not a file")
        if (size := entry.file_size) > MOST_BYTES:
            raise ValueError(f"its entry {name!r} has {size} bytes, at most {MOST_BYTES} expected")
