"""Few-shot classification tasks, drawn in batches.

A task (elsewhere also called an episode) is a small classification problem: `n_way` characters,
`k_shot` drawings of each to adapt to (the support set, D^train in the paper) and `k_query` others
to be judged on (the query set, D^test).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from amaml.data import Characters, as_device, whole_number
from amaml.shapes import Int, Shaped


@dataclass(frozen=True)
class Tasks:
    """A meta-batch of tasks: four tensors whose first two dimensions are (tasks, examples).

    For one's own tasks they hold whatever one's model and loss take. For Omniglot:

    Args:
        support_x: (meta_batch_size, n_way*k_shot, 1, 28, 28), float32 in [0, 1], ink = 1.
        support_y: (meta_batch_size, n_way*k_shot), int64 in 0..n_way-1.
        query_x: (meta_batch_size, n_way*k_query, 1, 28, 28), like support_x.
        query_y: (meta_batch_size, n_way*k_query), like support_y.

    Raises:
        ValueError: the four do not fit together.
    """

    support_x: Shaped[Tensor, "tasks support ..."]
    support_y: Shaped[Tensor, "tasks support ..."]
    query_x: Shaped[Tensor, "tasks query ..."]
    query_y: Shaped[Tensor, "tasks query ..."]

    def __post_init__(self):
        for name, value in vars(self).items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")
        shapes = {name: tuple(value.shape) for name, value in vars(self).items()}
        support_x, support_y, query_x, query_y = (shape[:2] for shape in shapes.values())
        alike = support_x == support_y and query_x == query_y and support_x[:1] == query_x[:1]
        if not alike or len(support_x + query_x) < 4 or 0 in support_x + query_x:
            raise ValueError(
                "the four tensors must begin with the same number of tasks, then of examples in x "
                "and y, at least one of each (a single task is a batch of one), not with "
                + ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            )

    def __len__(self) -> int:
        return len(self.support_x)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Tasks:
        """Some of the tasks, as a meta-batch: `tasks[:8]`; a single index keeps its dimension."""
        if not isinstance(index, slice):
            index = np.arange(len(self))[index].reshape(-1).tolist()
        return Tasks(*(value[index] for value in vars(self).values()))

    def double(self) -> Tasks:
        """The same tasks in float64; labels stay integers."""
        return self.to(dtype=torch.float64)

    def to(
        self, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Tasks:
        """The same tasks on another device, or with floating-point tensors of another dtype."""
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype={dtype} must be a floating-point dtype such as torch.float64")
        device = None if device is None else as_device(device)
        kinds = (
            (value, dtype if value.is_floating_point() else None) for value in vars(self).values()
        )
        return Tasks(*(value.to(device=device, dtype=kind) for value, kind in kinds))


@dataclass(frozen=True)
class TaskSampler:
    """Draws tasks from `characters`: section 5 of the paper, after Vinyals et al. (2016).

    Labels are 0..n_way-1 in the order in which a task's characters were drawn; the images of a
    set stand label by label.

    Args:
        characters: what to draw from, on any device.
        n_way: different characters per task.
        k_shot: drawings of each in the support set.
        k_query: other drawings of each in the query set.
        rotate: turn each character of a task, all its images alike, by 0, 90, 180 or 270 degrees.

    Raises:
        ValueError: the characters or their drawings do not suffice.
    """

    characters: Characters
    n_way: int = 5
    k_shot: int = 1
    k_query: int = 1
    rotate: bool = True

    def __post_init__(self):
        for name, least in (("n_way", 2), ("k_shot", 1), ("k_query", 1)):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least))
        n, each = self.characters.images.shape[:2]
        if (n_way := self.n_way) > n:
            raise ValueError(f"n_way={n_way} needs {n_way} characters, the split has {n}")
        if (k := self.k_shot + self.k_query) > each:
            raise ValueError(f"k_shot + k_query need {k} drawings of a character, there are {each}")

    def sample(self, meta_batch_size: int, generator: torch.Generator) -> Tasks:
        """A meta-batch of `meta_batch_size` tasks, float32, drawn without a loop over the tasks.

        Args:
            meta_batch_size: at least 1.
            generator: on the characters' device; its state alone decides which tasks are drawn.
        """
        if not isinstance(generator, torch.Generator):  # for None torch would take its global one
            raise TypeError(f"generator must be a seeded torch.Generator, not {generator!r}")
        images = self.characters.images
        n_characters, n_drawings, height, width = images.shape
        batch = whole_number("meta_batch_size", meta_batch_size)
        n_way, k = self.n_way, self.k_shot + self.k_query

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
            support_x=x[:, :, : self.k_shot].flatten(1, 2).unsqueeze(2),
            support_y=labels.repeat_interleave(self.k_shot).repeat(batch, 1),
            query_x=x[:, :, self.k_shot :].flatten(1, 2).unsqueeze(2),
            query_y=labels.repeat_interleave(self.k_query).repeat(batch, 1),
        )


def quarter_turns(height: int, width: int, device=None) -> Int[Tensor, "4 pixels"]:
    """Where each pixel comes from in a square image turned by 0, 90, 180 or 270 degrees.

    Row q lists, for the image turned counter-clockwise by q*90 degrees and read row by row, the
    flat index of its pixels in the upright image.
    """
    upright = torch.arange(height * width, device=device).view(height, width)
    return torch.stack([torch.rot90(upright, q).flatten() for q in range(4)])
