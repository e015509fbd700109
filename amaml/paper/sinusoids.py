"""Sinusoid regression (section 5.1 of Finn et al. 2017): the study's problem without images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from amaml.tasks import Tasks

AMPLITUDES, PHASES, INPUTS = (0.1, 5.0), (0.0, math.pi), (-5.0, 5.0)
# The mean squared error of predicting 0: E[A^2] / 2 (the mean of all tasks, -1.62 cos x, has 3.0)
GUESSING = (AMPLITUDES[1] ** 3 - AMPLITUDES[0] ** 3) / (AMPLITUDES[1] - AMPLITUDES[0]) / 6


@dataclass(frozen=True)
class Sinusoids:
    """Tasks y = A sin(x - phase), with A, phase and x uniform over their ranges.

    Attributes:
        k_shot: support points of a task.
        k_query: its query points.
    """

    k_shot: int = 10
    k_query: int = 10

    def sample(self, meta_batch_size: int, generator: torch.Generator) -> Tasks:
        """Tasks with inputs and targets (meta_batch_size, k_shot or k_query, 1)."""

        def uniform(bounds: tuple[float, float], *shape: int) -> torch.Tensor:
            random = torch.rand(shape, generator=generator, device=generator.device)
            return bounds[0] + (bounds[1] - bounds[0]) * random

        amplitude = uniform(AMPLITUDES, meta_batch_size, 1, 1)
        phase = uniform(PHASES, meta_batch_size, 1, 1)
        x = uniform(INPUTS, meta_batch_size, self.k_shot + self.k_query, 1)
        y, k = amplitude * torch.sin(x - phase), self.k_shot
        return Tasks(support_x=x[:, :k], support_y=y[:, :k], query_x=x[:, k:], query_y=y[:, k:])


def network(seed: int) -> nn.Sequential:
    """Two hidden layers of 40 units, with torch's usual initial values drawn from the seed."""
    generator = torch.Generator().manual_seed(seed)
    layers = [nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1)]
    for layer in layers:
        if isinstance(layer, nn.Linear):
            bound = 1 / math.sqrt(layer.in_features)
            for value in layer.parameters():
                nn.init.uniform_(value, -bound, bound, generator=generator)
    return nn.Sequential(*layers)


PARTS = {"model": network, "sampler": Sinusoids(), "loss": F.mse_loss}
