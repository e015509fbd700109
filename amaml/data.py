"""The characters: Omniglot (Lake et al. 2011, 2015) as it lies on disk, and an embedded stand-in.

Both come as one uint8 array of 28x28 images with ink = 255. Packed arrays are cached under
`$XDG_CACHE_HOME/amaml` (else `~/.cache/amaml`).
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

N_DRAWINGS = 20
SCAN, SIZE = 105, 28  # pixels of a drawing each way, as it lies on disk and as it is used here
OMNIGLOT_PARTS = {"images_background": 964, "images_evaluation": 659}  # folder: characters
OMNIGLOT_FINGERPRINT = "75a36f7ce605ee617d0c45021613841aec979e079f71594e885aba52a7c003ce"
MOST_BYTES, MOST_FILES = 10_000, 100_000  # a drawing has about 200 bytes, Omniglot 32,460 drawings
PACKED_VERSION = 2  # raised when the packed arrays change: older cache files are left alone
# What zipfile and Pillow raise on damaged files.
UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    OSError,
    SyntaxError,
    struct.error,
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
        if not isinstance(self.images, Tensor):
            raise TypeError(f"images must be a tensor, not {type(self.images).__name__}")
        shape = tuple(self.images.shape)
        if (
            self.images.dtype != torch.uint8
            or len(shape) != 4
            or shape[2] != shape[3]
            or 0 in shape[1:]
        ):
            raise ValueError(
                f"images must be uint8 of shape (n_characters, n_drawings, size, size), got "
                f"{self.images.dtype} {shape}"
            )
        if isinstance(self.names, str) or not isinstance(self.names, Sequence):
            raise TypeError(f"names must be a list of strings, not {self.names!r}")
        for name in self.names:
            if not isinstance(name, str):
                raise TypeError(f"names must be strings, one of them is {name!r}")
        object.__setattr__(self, "names", tuple(self.names))
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
        return Characters(self.images.to(as_device(device)), self.names)


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
    if not isinstance(characters, Characters):
        raise TypeError(f"characters must be amaml.Characters, not {type(characters).__name__}")
    check_seed(seed)
    n = len(characters)
    train, both = round(n * 1100 / 1623), round(n * 1200 / 1623)
    if not 0 < train < both < n:
        raise ValueError(f"{n} characters are too few to split into three sets; 11 are enough")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(int(seed)))
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
    if not isinstance(root, str | os.PathLike | None):
        raise TypeError(f"root={root!r}: must be the path of a folder, or None")
    if not isinstance(download, bool):
        raise TypeError(f"download={download!r}: must be True or False")
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
    check_seed(seed)
    cached = cache_folder() / f"glyphs-{PACKED_VERSION}-{seed}.npz"
    packed = read_packed(cached)
    if packed is None:
        from amaml.datasets.glyphs import draw_glyphs  # needs matplotlib, the cached array does not

        packed = draw_glyphs(int(seed))
        write_packed(cached, *packed)
    images, names = packed
    return Characters(torch.from_numpy(images), names)


LOADERS = {"omniglot": load_omniglot, "glyphs": load_glyphs}


def check_seed(seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"seed={seed!r}: must be a whole number")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed}: must be from 0 to 2**63 - 1")


def as_device(device) -> torch.device:
    """A device by its name; TypeError or ValueError where there is none of that name here."""
    if not isinstance(device, str | torch.device):
        raise TypeError(f"device={device!r}: must be a name such as 'cpu' or 'cuda'")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device={str(device)!r} cannot be used ({reason}); 'cpu' can, and 'cuda' where torch "
            "finds a GPU"
        ) from error
    return found


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
        check_entries(archive)
        for name in sorted(n for n in archive.namelist() if n.endswith(".png")):
            with archive.open(name) as file:
                yield name.partition("/")[2], file.read(MOST_BYTES + 1)  # not what it unpacks to


def check_entries(archive: zipfile.ZipFile) -> None:
    """ValueError for what no zip of Omniglot holds, before anything in it is unpacked.

    Nothing is written to disk from a zip; a reader who unpacks it by hand is to be safe as well.
    """
    entries = archive.infolist()
    if len(entries) > MOST_FILES:
        raise ValueError(f"it has {len(entries)} entries, at most {MOST_FILES} are expected")
    for entry in entries:
        name = entry.orig_filename
        if name.startswith("/") or "\\" in name or ":" in name or ".." in PurePosixPath(name).parts:
            raise ValueError(f"its entry {name!r} leads out of the folder")
        if not (entry.is_dir() or stat.S_IFMT(entry.external_attr >> 16) in (0, stat.S_IFREG)):
            raise ValueError(f"its entry {name!r} is a link or another thing that is not a file")
        if max(entry.file_size, entry.compress_size) > MOST_BYTES:
            raise ValueError(
                f"its entry {name!r} unpacks from {entry.compress_size} to {entry.file_size} "
                f"bytes; at most {MOST_BYTES} are expected"
            )


def pack_omniglot(parts: list[Path]) -> tuple[np.ndarray, list[str]]:
    """Read, verify and shrink both parts: (uint8 (1623, 20, 28, 28), names)."""
    from PIL import Image

    digest = hashlib.sha256()
    drawings: dict[str, list[np.ndarray]] = {}
    for part, (folder, n_characters) in zip(parts, OMNIGLOT_PARTS.items(), strict=True):
        before = len(drawings)
        try:
            for name, content in read_drawings(part):
                picture = Image.open(io.BytesIO(content), formats=["PNG"])
                if picture.size != (SCAN, SCAN):
                    size = "{} x {} pixels".format(*picture.size)
                    raise ValueError(f"{name} has {size}, Omniglot's drawings {SCAN} x {SCAN}")
                picture = picture.convert("L")
                grey = np.asarray(picture)
                digest.update(np.packbits(grey == 0).tobytes())
                # Of one-bit files Pillow would take the nearest pixel; of grey ones it filters.
                small = picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
                drawings.setdefault(name.rpartition("/")[0], []).append(255 - np.asarray(small))
        except (Image.DecompressionBombError, *UNREADABLE) as error:
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
    """Cache a packed array and its SHA-256, replaced as a whole: no reader sees half a file."""
    file = io.BytesIO()
    np.savez_compressed(file, images=images, names=np.array(names))
    content = file.getvalue()
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(content + hashlib.sha256(content).digest())
            os.replace(part, path)
        except OSError:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OSError(
            error.errno,
            f"the packed images cannot be cached ({error.strerror}); make room there, or give a "
            "folder that can be written in the environment variable XDG_CACHE_HOME",
            str(path),
        ) from error


def read_packed(path: Path) -> tuple[np.ndarray, list[str]] | None:
    """A cached array; None where there is none, and with a warning where it is damaged."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    content, written = content[:-32], content[-32:]
    if hashlib.sha256(content).digest() != written:
        warnings.warn(f"{path} is damaged; it is made again", stacklevel=3)
        return None
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        return file["images"], file["names"].tolist()
