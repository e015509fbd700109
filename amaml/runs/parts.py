"""What runs are made of: amaml's own network, tasks, loss and step, or the user's."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import is_dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from amaml.alpha_maml import meta_step
from amaml.checks import Loss, check_module
from amaml.config import RunConfig, hashed
from amaml.data import load_glyphs, load_omniglot, split_characters
from amaml.model import OmniglotCNN
from amaml.tasks import TaskSampler


class Parts(NamedTuple):
    """The parts of a run; see `amaml.train` for what each may be."""

    name: str = ""
    model: Any = None
    sampler: Any = None
    validation_sampler: Any = None
    loss: Loss = F.cross_entropy
    step: Callable = meta_step

    def own(self) -> dict[str, Any]:
        """Those of the user's own; TypeError or ValueError for what cannot be used."""
        usual = Parts(self.name)._asdict()
        own = {kind: part for kind, part in self._asdict().items() if part is not usual[kind]}
        for kind, part in own.items():
            needed = "a torch.nn.Module or a function" if kind == "model" else "a function"
            if is_sampler := kind.endswith("sampler"):
                needed = "an object with a method sample(meta_batch_size, generator) -> Tasks"
            if not callable(getattr(part, "sample", None) if is_sampler else part):
                raise TypeError(f"{kind} must be {needed}, not {type(part).__name__}")
        if own and not self.name:
            raise TypeError(
                f"a run with {' and '.join(own)} of your own needs a name, such as "
                "name='sinusoids': its folder is named after it"
            )
        if self.name and not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(f"name={self.name!r}: must be of letters, digits, '_', '.' and '-'")
        return own

    def in_words(self, network: nn.Module) -> dict[str, str]:
        """What the user's own parts are compared by when a run is found on the disk.

        The names of classes and functions, with what a dataclass or a partial holds; for the
        model the network's repr and a hash of its initial parameters.
        """
        told = {}
        for kind, part in self.own().items():
            function = part.func if isinstance(part, partial) else part
            of = function if hasattr(function, "__qualname__") else type(function)
            told[kind] = f"{of.__module__}.{of.__qualname__}"
            if isinstance(part, partial):
                told[kind] += f" {part.args} {part.keywords}"
            elif is_dataclass(part):
                told[kind] += f" {part}"
            told[kind] = re.sub(r" at 0x\w+", "", told[kind])  # of a function: another each time
        if "model" in told:
            digest = hashlib.sha256()
            for key, value in network.state_dict(keep_vars=True).items():
                digest.update(f"{key} {value.dtype} {value.requires_grad}".encode())
                digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
            told["model"] = f"{network!r} {digest.hexdigest()[:16]}"
        return told

    def network(self, config: RunConfig) -> nn.Module:
        """A run's network before its first iteration, for the run to keep."""
        if self.model is None:
            generator = seeded_generator(config.seed, "initialisation")
            return OmniglotCNN(config.n_way, generator, filters=config.filters)
        own = isinstance(self.model, nn.Module)
        network = deepcopy(self.model) if own else self.model(config.seed)
        check_module(network)
        return network

    def samplers(self, config: RunConfig, root, device) -> dict[str, Any]:
        """Where tasks come from, by what they are for: "training", "validation" and "test"."""
        samplers = 3 * [self.sampler]
        if self.sampler is None:
            characters = load_omniglot(root) if config.data == "omniglot" else load_glyphs()
            split = split_characters(characters.to(device))
            sizes = (config.n_way, config.k_shot, config.k_query, config.rotate)
            samplers = [TaskSampler(some, *sizes) for some in vars(split).values()]
        if self.validation_sampler is not None:
            samplers[1:] = 2 * [self.validation_sampler]
        return dict(zip(("training", "validation", "test"), samplers, strict=True))


def run_id(config: RunConfig, name: str = "", start: str = "") -> str:
    """The name of a run's folder; `start` is the id of the run that it goes on from."""
    if not name and not start:
        return config.id
    told = hashed({"config": config.id, "name": name} | ({"start": start} if start else {}))
    return f"{name}-{told}" if name else told


def check_alike(networks: list[nn.Module]) -> None:
    """ValueError where networks of runs that are made together differ in what theta leaves out."""
    first, *others = (
        [value for value in network.state_dict(keep_vars=True).values() if not value.requires_grad]
        for network in networks
    )
    if not all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True)):
        raise ValueError(
            "the networks of runs that are made together differ in buffers or frozen parameters; "
            "make these runs one at a time"
        )


def seeded_generator(seed: int, purpose: str, device="cpu") -> torch.Generator:
    """A generator of its own for each purpose, all fixed by one seed."""
    digest = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
