"""Few-shot classification tasks, drawn in batches.

A task (elsewhere also called an episode) is a small classification problem: `n_way` characters,
`k_shot` drawings of each to adapt to (the support set, D^train in the paper) and `k_query` others
to be judged on (the query set, D^test). A `TaskSampler` draws a whole meta-batch of them at once,
on the device that the drawings are on, and takes every random number from the generator it is
given.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from numbers import Integral

import torch
from torch import Tensor

from amaml.data import Characters, as_device


@dataclass(frozen=True)
class Tasks:
    """A meta-batch of tasks: four tensors whose first dimension counts the tasks.

    For the characters of Omniglot the shapes are

        support_x  (meta_batch_size, n_way*k_shot, 1, 28, 28)    in [0, 1], ink = 1
        support_y  (meta_batch_size, n_way*k_shot)               int64 in 0..n_way-1
        query_x    (meta_batch_size, n_way*k_query, 1, 28, 28)
        query_y    (meta_batch_size, n_way*k_query)

    and for one's own tasks whatever one's model and loss take, as long as the first two dimensions
    are (meta_batch_size, examples). Raises TypeError for anything but tensors, ValueError where
    the four do not fit together.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor

    def __post_init__(self):
        for name, value in vars(self).items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")
            if value.ndim < 2:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}; its first two dimensions must be "
                    "(meta_batch_size, examples): one task alone is given as a batch of one"
                )
        if len({value.device for value in vars(self).values()}) != 1:
            devices = {name: str(value.device) for name, value in vars(self).items()}
            raise ValueError(f"the four tensors must be on the same device, got {devices}")
        if len({len(value) for value in vars(self).values()}) != 1:
            shapes = {name: tuple(value.shape) for name, value in vars(self).items()}
            raise ValueError(f"the four tensors must hold the same number of tasks, got {shapes}")
        for name, x, y in (
            ("support", self.support_x, self.support_y),
            ("query", self.query_x, self.query_y),
        ):
            if x.shape[1] != y.shape[1]:
                raise ValueError(
                    f"{name}_x has {x.shape[1]} examples a task, {name}_y has {y.shape[1]}; "
                    "they must be the same"
                )
        if 0 in (*self.support_x.shape[:2], self.query_x.shape[1]):
            raise ValueError(
                "a meta-batch needs at least one task with at least one support and one query "
                f"example, got support_x {tuple(self.support_x.shape)} and "
                f"query_x {tuple(self.query_x.shape)}"
            )

    def __len__(self) -> int:
        """The number of tasks."""
        return len(self.support_x)

    def __getitem__(self, index: slice | Tensor) -> Tasks:
        """Some of the tasks, as a meta-batch: `tasks[:8]`; a single index keeps its dimension."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"task {index} of {len(self)}, which are counted from 0")
            index = slice(index, index + 1 or None)
        return Tasks(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def double(self) -> Tasks:
        """The same tasks in float64; labels stay integers."""
        return self.to(dtype=torch.float64)

    def to(self, device=None, dtype: torch.dtype | None = None) -> Tasks:
        """The same tasks on another device, or with floating-point tensors of another dtype."""
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(
                f"dtype={dtype!r}: must be a floating-point dtype such as torch.float64"
            )
        device = None if device is None else as_device(device)
        moved = {}
        for name, value in vars(self).items():
            kind = dtype if value.is_floating_point() else None
            moved[name] = value.to(device=device, dtype=kind)
        return replace(self, **moved)


@dataclass(frozen=True)
class TaskSampler:
    """Draws tasks from `characters`: section 5 of the paper, after Vinyals et al. (2016).

    Each task has `n_way` different characters; of each, `k_shot` drawings go to the support set
    and `k_query` other ones to the query set. With `rotate`, each character of a task is turned
    by 0, 90, 180 or 270 degrees, all its images alike. Labels are 0..n_way-1 in the order in
    which the characters were drawn; the images of a set stand label by label.

    Raises ValueError where the characters or their drawings do not suffice.
    """

    characters: Characters
    n_way: int = 5
    k_shot: int = 1
    k_query: int = 1
    rotate: bool = True

    def __post_init__(self):
        for name in ("n_way", "k_shot", "k_query"):
            object.__setattr__(self, name, whole(name, getattr(self, name)))
        if not isinstance(self.rotate, bool):
            raise TypeError(f"rotate={self.rotate!r}: must be True or False")
        if not isinstance(self.characters, Characters):
            raise TypeError(
                "characters must be amaml.Characters (from load_omniglot, load_glyphs or "
                f"split_characters), not {type(self.characters).__name__}"
            )
        n_characters, n_drawings = self.characters.images.shape[:2]
        if self.n_way < 2:
            raise ValueError(f"n_way={self.n_way}: a task needs at least 2 characters")
        if self.n_way > n_characters:
            raise ValueError(
                f"n_way={self.n_way} needs {self.n_way} characters, the split has {n_characters}; "
                "lower n_way or give more characters"
            )
        if self.k_shot < 1 or self.k_query < 1:
            raise ValueError(
                f"k_shot={self.k_shot}, k_query={self.k_query}: both must be at least 1"
            )
        if self.k_shot + self.k_query > n_drawings:
            raise ValueError(
                f"k_shot={self.k_shot} and k_query={self.k_query} need "
                f"{self.k_shot + self.k_query} drawings of a character, there are {n_drawings}; "
                "lower one of the two"
            )

    def sample(self, meta_batch_size: int, generator: torch.Generator) -> Tasks:
        """A meta-batch of `meta_batch_size` tasks (see `Tasks` for the shapes), float32.

        The generator must be on the device that the characters are on; the same state of the
        generator gives the same tasks. No loop runs over the tasks.
        """
        meta_batch_size = whole("meta_batch_size", meta_batch_size)
        if meta_batch_size < 1:
            raise ValueError(f"meta_batch_size={meta_batch_size}: at least 1 task is needed")
        if not isinstance(generator, torch.Generator):
            raise TypeError(
                f"generator must be a torch.Generator, not {type(generator).__name__}: every "
                "random draw has to come from a generator with a known seed"
            )
        images = self.characters.images
        n_characters, n_drawings, height, width = images.shape
        batch, n_way, k = meta_batch_size, self.n_way, self.k_shot + self.k_query
        terabytes = 4 * batch * max(n_characters, n_way * k * height * width) / 1e12
        if terabytes > 1:
            raise ValueError(
                f"meta_batch_size={batch} needs {terabytes:.3g} terabytes of memory; give fewer "
                "tasks at a time"
            )
        if generator.device.type != images.device.type:
            raise ValueError(
                f"the generator is on {generator.device}, the characters are on {images.device}; "
                f"make it with torch.Generator({str(images.device)!r})"
            )

        def draw(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, device=images.device)

        # The places of the k largest of n random numbers are k different items of n.
        character = draw(batch, n_characters).topk(n_way).indices
        drawing = draw(batch, n_way, n_drawings).topk(k).indices
        x = images[character[..., None], drawing]  # (batch, n_way, k, height, width)
        if self.rotate:
            turn = torch.randint(4, (batch, n_way), generator=generator, device=images.device)
            pixel = quarter_turns(height, width, images.device)[turn]  # (batch, n_way, h*w)
            source = pixel[:, :, None].expand(-1, -1, k, -1)
            x = x.flatten(-2).gather(-1, source).unflatten(-1, (height, width))
        x = x.to(torch.float32).div_(255)

        labels = torch.arange(n_way, device=images.device)
        return Tasks(
            support_x=x[:, :, : self.k_shot].reshape(batch, -1, 1, height, width),
            support_y=labels.repeat_interleave(self.k_shot).repeat(batch, 1),
            query_x=x[:, :, self.k_shot :].reshape(batch, -1, 1, height, width),
            query_y=labels.repeat_interleave(self.k_query).repeat(batch, 1),
        )


def whole(name: str, value: int) -> int:
    """A whole number, of numpy's as well, as an int; TypeError for anything else."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    return int(value)


def quarter_turns(height: int, width: int, device=None) -> Tensor:
    """Where each pixel comes from in an image turned by 0, 90, 180 or 270 degrees.

    Returns (4, height*width): row q lists, for the image turned counter-clockwise by q*90 degrees
    and read row by row, the flat index of its pixels in the upright image. `height` must equal
    `width`.
    """
    upright = torch.arange(height * width, device=device).view(height, width)
    return torch.stack([torch.rot90(upright, q).flatten() for q in range(4)])
