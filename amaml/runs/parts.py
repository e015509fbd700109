"""What a run is made of: amaml's own network, tasks, loss and step, or the user's."""

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


class Samplers(NamedTuple):
    """Where a run's tasks come from: objects with `sample(meta_batch_size, generator) -> Tasks`."""

    train: Any
    validation: Any
    test: Any


def own_parts(parts: Parts) -> dict[str, Any]:
    """The parts that are the user's; TypeError or ValueError for what cannot be used."""
    usual = Parts()._asdict()
    own = {kind: part for kind, part in parts._asdict().items() if part is not usual[kind]}
    own.pop("name", None)
    for kind, part in own.items():
        if "sampler" in kind and not callable(getattr(part, "sample", None)):
            raise TypeError(
                f"{kind} must have a method sample(meta_batch_size, generator) -> Tasks; "
                f"{type(part).__name__} has none"
            )
        if "sampler" not in kind and not callable(part):
            module = "a torch.nn.Module or " if kind == "model" else ""
            raise TypeError(f"{kind} must be {module}a function, not {type(part).__name__}")
    if own and not parts.name:
        raise TypeError(
            f"a run with {' and '.join(own)} of your own needs a name, such as name='sinusoids': "
            "its folder is named after it"
        )
    if parts.name and not re.fullmatch(r"[\w.-]+", parts.name):
        raise ValueError(f"name={parts.name!r}: must be of letters, digits, '_', '.' and '-'")
    return own


def run_id(config: RunConfig, name: str = "", start: str = "") -> str:
    """The name of a run's folder; `start` is the id of the run that it goes on from."""
    if not name and not start:
        return config.id
    told = hashed({"config": config.id, "name": name} | ({"start": start} if start else {}))
    return f"{name}-{told}" if name else told


def described(own: dict[str, Any], network: nn.Module) -> dict[str, str]:
    """What parts of one's own are compared by: names of classes and functions, what a dataclass or
    a partial holds; the network's text and a hash of its initial parameters."""
    described = {}
    for kind, part in own.items():
        function = part.func if isinstance(part, partial) else part
        of = function if hasattr(function, "__qualname__") else type(function)
        described[kind] = f"{of.__module__}.{of.__qualname__}"
        if isinstance(part, partial):
            described[kind] += f" {part.args} {part.keywords}"
        elif is_dataclass(part):
            described[kind] += f" {part}"
    if "model" in own:
        digest = hashlib.sha256()
        for key, value in network.state_dict(keep_vars=True).items():
            digest.update(f"{key} {value.dtype} {value.requires_grad}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        described["model"] = f"{network!r} {digest.hexdigest()[:16]}"
    return described


def network_of(config: RunConfig, model=None) -> nn.Module:
    """A run's network before its first iteration, for the run to keep."""
    if model is None:
        generator = seeded_generator(config.seed, "initialisation")
        return OmniglotCNN(config.n_way, generator, filters=config.filters)
    network = deepcopy(model) if isinstance(model, nn.Module) else model(config.seed)
    check_module(network)
    return network


def check_alike(networks: list[nn.Module]) -> None:
    """ValueError where networks of runs that are made together differ in what theta leaves out."""
    constants = [
        [value for value in network.state_dict(keep_vars=True).values() if not value.requires_grad]
        for network in networks
    ]
    for other in constants[1:]:
        if not all(torch.equal(a, b) for a, b in zip(constants[0], other, strict=True)):
            raise ValueError(
                "the networks of runs that are made together differ in buffers or frozen "
                "parameters; make these runs one at a time"
            )


def samplers_of(config: RunConfig, parts: Parts, root, device) -> Samplers:
    """A run's samplers: one's own, or those of the characters that its config names."""
    if parts.sampler is None:
        omniglot = config.data == "omniglot"
        characters = load_omniglot(root) if omniglot else load_glyphs()
        split = split_characters(characters.to(device))
        sizes = (config.n_way, config.k_shot, config.k_query, config.rotate)
        samplers = Samplers(*(TaskSampler(some, *sizes) for some in vars(split).values()))
    else:
        samplers = Samplers(parts.sampler, parts.sampler, parts.sampler)
    if (other := parts.validation_sampler) is not None:
        samplers = samplers._replace(validation=other, test=other)
    return samplers


def seeded_generator(seed: int, purpose: str, device="cpu") -> torch.Generator:
    """A generator of its own for each purpose, all fixed by one seed."""
    digest = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
