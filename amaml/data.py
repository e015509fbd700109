"""The characters: Omniglot, and glyphs to try things out on; their split, and the cache."""

from __future__ import annotations

import hashlib
import io
import operator
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from amaml.datasets import glyphs, omniglot
from amaml.shapes import UInt8

PACKED_VERSION = 2  # raised when the packed arrays change: older cache files are left alone


@dataclass(frozen=True)
class Characters:
    """Handwritten characters, each drawn 20 times.

    Args:
        images: of shape (n_characters, 20, 28, 28), ink = 255, background = 0.
        names: n_characters unique strings "Alphabet/characterNN".
    """

    images: UInt8[Tensor, "characters drawings size size"]
    names: Sequence[str]

    def __post_init__(self):
        object.__setattr__(self, "names", tuple(self.names))
        shape, kind = tuple(self.images.shape), self.images.dtype
        counts = shape[0], len(self.names), len(set(self.names))
        if kind != torch.uint8 or len(shape) != 4 or shape[2] != shape[3] or len(set(counts)) != 1:
            raise ValueError(
                "images must be a torch.uint8 tensor (n_characters, n_drawings, size, size) with "
                f"as many different names, not {kind} {shape} with {counts[2]} different names"
            )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Characters:
        """Some of the characters, in the order of `index`: a place, a slice or a list of places."""
        places = np.arange(len(self))[index].reshape(-1).tolist()
        return Characters(self.images[places], [self.names[place] for place in places])

    def to(self, device: str | torch.device) -> Characters:
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

    Omniglot's 1,623 give 1,100 / 100 / 423: the last 100 of the paper's 1,200 training characters
    serve for validation, as in the original MAML code. Other sets are cut in these proportions.
    """
    n = len(characters)
    train, both = round(n * 1100 / 1623), round(n * 1200 / 1623)
    if not 0 < train < both < n:
        raise ValueError(f"{n} characters are too few to split into three sets; 11 are enough")
    generator = torch.Generator().manual_seed(whole_number("seed", seed, 0))
    order = torch.randperm(n, generator=generator)
    return Split(characters[order[:train]], characters[order[train:both]], characters[order[both:]])


def load_omniglot(root: str | os.PathLike | None = None, download: bool = False) -> Characters:
    """The 1,623 characters of Omniglot, resized from 105x105 to 28x28 (Lanczos), and verified.

    Args:
        root: the folder that holds `images_background` and `images_evaluation`, zipped or not, or
            a folder with both; None: that of the variable AMAML_DATA, else the cache folder.
        download: fetch missing files through `torchvision.datasets.Omniglot`.

    Raises:
        FileNotFoundError: the data is not there.
        ValueError: the data is damaged, or not Omniglot's.
        ConnectionError: the download fails.
    """
    given = os.environ.get("AMAML_DATA") or cache_folder() if root is None else root
    root = Path(given).expanduser()
    if download and omniglot.find_parts(root) is None:
        omniglot.download_omniglot(root)
    parts = omniglot.find_parts(root)
    if parts is None:
        raise FileNotFoundError(f"no Omniglot in {root}. {omniglot.HOW_TO_GET}")
    return cached("omniglot", omniglot.source_key(parts), lambda: omniglot.pack_omniglot(parts))


def load_glyphs(seed: int = 0) -> Characters:
    """602 letters of 15 scripts from matplotlib's fonts, in the hands of 20 "writers".

    An embedded stand-in for Omniglot: never mix the results on the two. The seed is for the hands;
    the arrays are the same on every machine, drawn within seconds by the first call, then cached.
    """
    seed = whole_number("seed", seed, 0)
    return cached("glyphs", seed, lambda: glyphs.draw_glyphs(seed))


def whole_number(name: str, value, least: int = 1) -> int:
    """An integer, of numpy's as well, as an int; TypeError or ValueError for anything else."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, not {value!r}") from None
    if number < least:
        raise ValueError(f"{name}={number}: must be at least {least}")
    return number


def as_device(device: str | torch.device) -> torch.device:
    """A device by its name; ValueError where torch cannot use it here."""
    try:
        return torch.empty(0, device=torch.device(device)).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={str(device)!r} cannot be used here; 'cpu' can") from error


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/amaml`, else `~/.cache/amaml`; a user without a home has none."""
    folder = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(os.devnull if folder.startswith("~") else folder, "amaml")


def cached(name: str, key: str | int, pack: Callable[[], tuple]) -> Characters:
    """The characters cached under this name and key, else those that `pack` gives."""
    path = cache_folder() / f"{name}-{PACKED_VERSION}-{key}.npz"
    packed = read_packed(path)
    if packed is None:
        packed = pack()
        write_packed(path, *packed)
    return Characters(torch.from_numpy(packed[0]), packed[1])


def write_packed(path: Path, images: np.ndarray, names: Sequence[str]) -> None:
    """Cache a packed array and its SHA-256, as a whole or not at all; warn where that fails."""
    file = io.BytesIO()
    np.savez_compressed(file, images=images, names=np.array(names))
    content = file.getvalue()
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(content + hashlib.sha256(content).digest())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        reason = f"{path.parent} cannot serve as a cache ({error.strerror})"
        warnings.warn(f"{reason}; name another folder in XDG_CACHE_HOME", stacklevel=4)


def read_packed(path: Path) -> tuple[np.ndarray, list[str]] | None:
    """A cached array; None where there is none to read, with a warning where it is damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    content, written = content[:-32], content[-32:]
    if hashlib.sha256(content).digest() != written:
        warnings.warn(f"{path} is damaged; it is made again", stacklevel=4)
        return None
    with np.load(io.BytesIO(content), allow_pickle=False) as packed:
        return packed["images"], packed["names"].tolist()
