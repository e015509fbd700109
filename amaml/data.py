"""The characters: Omniglot (Lake et al. 2011, 2015) as it lies on disk, and an embedded stand-in.

Both come as one uint8 array of 28x28 images with ink = 255. Packed arrays are cached under
`$XDG_CACHE_HOME/amaml` (else `~/.cache/amaml`).
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

N_DRAWINGS = 20
SIZE = 28
OMNIGLOT_PARTS = {"images_background": 964, "images_evaluation": 659}  # folder: characters
OMNIGLOT_FINGERPRINT = "75a36f7ce605ee617d0c45021613841aec979e079f71594e885aba52a7c003ce"
PACKED_VERSION = 1  # raised when the packed arrays change: older cache files are left alone
# What zipfile, Pillow and numpy raise on damaged files.
UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    OSError,
    SyntaxError,
    ValueError,
    RuntimeError,
)
HOW_TO_GET = (
    "Give the folder that holds images_background and images_evaluation (as .zip files or "
    "unpacked) as root=..., or in the environment variable AMAML_DATA, or call "
    "load_omniglot(download=True) once"
)


@dataclass(frozen=True)
class Characters:
    """Handwritten characters, each drawn 20 times.

    images  uint8 tensor (n_characters, 20, 28, 28), ink = 255, background = 0
    names   n_characters unique strings "Alphabet/characterNN"
    """

    images: Tensor
    names: tuple[str, ...]

    def __post_init__(self):
        object.__setattr__(self, "names", tuple(self.names))
        if not isinstance(self.images, Tensor):
            raise TypeError(f"images must be a tensor, not {type(self.images).__name__}")
        shape = tuple(self.images.shape)
        if self.images.dtype != torch.uint8 or len(shape) != 4 or shape[2] != shape[3]:
            raise ValueError(
                f"images must be uint8 of shape (n_characters, n_drawings, size, size), got "
                f"{self.images.dtype} {shape}"
            )
        if len(self.names) != shape[0] or len(set(self.names)) != shape[0]:
            raise ValueError(
                f"{shape[0]} characters need as many different names, got {len(self.names)} "
                f"names, {len(set(self.names))} of them different"
            )

    def __len__(self) -> int:
        """The number of characters."""
        return len(self.names)

    def __getitem__(self, index: slice | Sequence[int] | Tensor) -> Characters:
        """Some of the characters, in the order of `index` (a slice or a list of places)."""
        places = torch.arange(len(self))[index].reshape(-1)
        return Characters(
            self.images[places.to(self.images.device)], [self.names[i] for i in places.tolist()]
        )

    def to(self, device) -> Characters:
        """The same characters on another device."""
        return Characters(self.images.to(device), self.names)


@dataclass(frozen=True)
class Split:
    """Three disjoint sets of characters."""

    train: Characters
    validation: Characters
    test: Characters


def split_characters(characters: Characters, seed: int = 0) -> Split:
    """Shuffle the characters with `seed` and cut them into training, validation and test.

    For Omniglot's 1,623 characters: 1,100 / 100 / 423. The first 1,200 of the shuffle are the
    paper's training characters; their last 100 serve for validation, as in the original MAML
    code. Other sets are cut in the same proportions. Raises ValueError where a part would be
    empty; from 11 characters on none is.
    """
    n = len(characters)
    train, both = round(n * 1100 / 1623), round(n * 1200 / 1623)
    if not 0 < train < both < n:
        raise ValueError(f"{n} characters are too few to split into three sets; 11 are enough")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return Split(characters[order[:train]], characters[order[train:both]], characters[order[both:]])


def load_omniglot(root: str | os.PathLike | None = None, download: bool = False) -> Characters:
    """The 1,623 characters of Omniglot, 28x28.

    `root` is the folder that holds `images_background` and `images_evaluation`, each as a .zip
    file or unpacked, or that has them in a folder `omniglot-py`, as torchvision leaves them; None
    takes the environment variable AMAML_DATA, else the cache folder. With `download` files that
    are missing are fetched through `torchvision.datasets.Omniglot`.

    The drawings are converted to grey, resized once from 105x105 with the Lanczos filter, and
    inverted. Their content is verified (characters, drawings, a fingerprint over all pixels), and
    the result is cached for the next call. Raises FileNotFoundError where the data is not there,
    ValueError where it is not Omniglot's, ConnectionError where a download fails.
    """
    if root is None:
        root = os.environ.get("AMAML_DATA") or cache_folder()
    root = Path(root).expanduser()
    if download and find_parts(root) is None:
        download_omniglot(root)
    parts = find_parts(root)
    if parts is None:
        raise FileNotFoundError(
            f"no Omniglot in {root}: {' and '.join(OMNIGLOT_PARTS)} are not both there, neither as "
            f".zip nor as folder. {HOW_TO_GET}"
        )

    cached = cache_folder() / f"omniglot-{PACKED_VERSION}-{source_key(parts)}.npz"
    packed = read_packed(cached)
    if packed is None:
        packed = pack_omniglot(parts)
        write_packed(cached, *packed)
    images, names = packed
    return Characters(torch.from_numpy(images), names)


def load_glyphs(seed: int = 0) -> Characters:
    """An embedded stand-in for Omniglot, drawn from the letters of matplotlib's fonts.

    Several hundred letters of more than ten scripts, each drawn 20 times by "writers" with their
    own font style, stroke weight, slant and distortion; the same arrays on every machine from one
    `seed`. Drawn within seconds by the first call, then cached. It is for trying things out: its
    results are never mixed with Omniglot's.
    """
    cached = cache_folder() / f"glyphs-{PACKED_VERSION}-{seed}.npz"
    packed = read_packed(cached)
    if packed is None:
        from amaml.glyphs import draw_glyphs  # needs matplotlib, the cached array does not

        packed = draw_glyphs(seed)
        write_packed(cached, *packed)
    images, names = packed
    return Characters(torch.from_numpy(images), names)


LOADERS = {"omniglot": load_omniglot, "glyphs": load_glyphs}


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/amaml`, else `~/.cache/amaml`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "amaml"


def find_parts(root: Path) -> list[Path] | None:
    """The zip file or folder of each part of Omniglot below `root`; None unless both are there."""
    for folder in (root, root / "omniglot-py"):
        found = []
        for part in OMNIGLOT_PARTS:
            options = (folder / f"{part}.zip", folder / part)
            found += [path for path in options if path.exists()][:1]
        if len(found) == len(OMNIGLOT_PARTS):
            return found
    return None


def download_omniglot(root: Path) -> None:
    """Fetch both parts into `root` with torchvision, which verifies their checksums."""
    try:
        from torchvision.datasets import Omniglot
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"torchvision could not be imported ({error}); the installed torch is "
            f"{torch.__version__}, and the two must be matching builds (both for the CPU or both "
            "for the same CUDA). Or get images_background.zip and images_evaluation.zip of "
            f"Omniglot by hand and put them into {root}"
        ) from error
    try:
        for background in (True, False):
            Omniglot(str(root), background=background, download=True)
    except (OSError, RuntimeError, zipfile.BadZipFile) as error:
        raise ConnectionError(
            f"Omniglot could not be downloaded into {root}: {error}. Where there is no network, "
            "get images_background.zip and images_evaluation.zip by hand and put them there"
        ) from error


def source_key(parts: list[Path]) -> str:
    """A short key of the source as it lies on disk, cheap enough for every call.

    Of a zip all bytes count; of a folder each file's name, size and time of change.
    """
    digest = hashlib.sha256()
    for part in parts:
        if part.is_dir():
            for path in sorted(part.glob("*/*/*.png")):
                stat = path.stat()
                digest.update(
                    f"{path.relative_to(part)} {stat.st_size} {stat.st_mtime_ns}".encode()
                )
        else:
            with part.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def read_drawings(part: Path) -> Iterator[tuple[str, bytes]]:
    """The drawings of one part in sorted order: ("Alphabet/characterNN/NNNN_NN.png", its bytes)."""
    if part.is_dir():
        for path in sorted(part.glob("*/*/*.png")):
            yield path.relative_to(part).as_posix(), path.read_bytes()
        return
    with zipfile.ZipFile(part) as archive:
        for name in sorted(n for n in archive.namelist() if n.endswith(".png")):
            yield name.partition("/")[2], archive.read(name)


def pack_omniglot(parts: list[Path]) -> tuple[np.ndarray, list[str]]:
    """Read, verify and shrink both parts: (uint8 (1623, 20, 28, 28), names)."""
    from PIL import Image

    digest = hashlib.sha256()
    drawings: dict[str, list[np.ndarray]] = {}
    for part, (folder, n_characters) in zip(parts, OMNIGLOT_PARTS.items(), strict=True):
        before = len(drawings)
        try:
            for name, content in read_drawings(part):
                picture = Image.open(io.BytesIO(content)).convert("L")
                grey = np.asarray(picture)
                digest.update(np.packbits(grey == 0).tobytes())
                # Of one-bit files Pillow would take the nearest pixel; of grey ones it filters.
                small = picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
                drawings.setdefault(name.rpartition("/")[0], []).append(255 - np.asarray(small))
        except UNREADABLE as error:
            raise ValueError(
                f"{part} is damaged ({error}); remove it and get it again. {HOW_TO_GET}"
            ) from error
        if len(drawings) - before != n_characters:
            raise ValueError(
                f"{part} holds {len(drawings) - before} characters, {folder} of Omniglot has "
                f"{n_characters}. {HOW_TO_GET}"
            )
    for name, images in drawings.items():
        if len(images) != N_DRAWINGS:
            raise ValueError(
                f"{name} has {len(images)} drawings in {parts[0].parent}, Omniglot has "
                f"{N_DRAWINGS} of each. {HOW_TO_GET}"
            )
    if digest.hexdigest() != OMNIGLOT_FINGERPRINT:
        raise ValueError(
            f"the drawings in {parts[0].parent} are not Omniglot's: the fingerprint of their "
            f"pixels is {digest.hexdigest()}, Omniglot's is {OMNIGLOT_FINGERPRINT}. {HOW_TO_GET}"
        )
    return np.stack([np.stack(images) for images in drawings.values()]), list(drawings)


def write_packed(path: Path, images: np.ndarray, names: Sequence[str]) -> None:
    """Cache a packed array, replaced as a whole so that no reader sees half a file."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    arrays = {"images": images, "names": np.array(names), "sha256": packed_digest(images, names)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            np.savez_compressed(file, **arrays)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise type(error)(
            error.errno,
            f"the packed images cannot be cached ({error.strerror}); give a folder that can be "
            "written in the environment variable XDG_CACHE_HOME",
            str(path),
        ) from error


def read_packed(path: Path) -> tuple[np.ndarray, list[str]] | None:
    """A cached array; None where there is none or where it is damaged (it is then made again)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            images, names = file["images"], file["names"].tolist()
            intact = str(file["sha256"]) == packed_digest(images, names)
    except (KeyError, *UNREADABLE):
        return None
    return (images, names) if intact else None


def packed_digest(images: np.ndarray, names: Sequence[str]) -> str:
    return hashlib.sha256(images.tobytes() + "\n".join(names).encode()).hexdigest()
