"""Other ways to compute the same meta-gradient: what `amaml` is measured beside.

All of them train the same network on the same tasks. The network is `OmniglotCNN` again, written
as one would with torch's own layers; the meta-gradients are a loop over the tasks, two orders of
`torch.func` transforms, and two libraries: learn2learn (Arnold et al. 2020) and higher
(Grefenstette et al. 2019). A library that is not installed is left out.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

import amaml

EPSILON = 1e-3  # of batch normalisation, as in amaml
Gradient = Callable[[amaml.Tasks], dict[str, Tensor]]


def composed_norm(x: Tensor, offset: Tensor) -> Tensor:
    """Batch normalisation from elementary operations."""
    variance, mean = torch.var_mean(x, (0, 2, 3), keepdim=True, correction=0)
    return (x - mean) * (variance + EPSILON).rsqrt() + offset[:, None, None]


def torch_norm(x: Tensor, offset: Tensor) -> Tensor:
    """torch's own batch normalisation, with the statistics of the batch."""
    return F.batch_norm(x, None, None, bias=offset, training=True, eps=EPSILON)


NORMS = {"composed": composed_norm, "torch": torch_norm}


class PlainCNN(nn.Module):
    """`OmniglotCNN` from torch's conv2d, one of the NORMS and ReLU, with the parameters of `model`.

    Images and filters are (..., channels, height, width), as torch's layers take them.
    """

    def __init__(self, model: amaml.OmniglotCNN, norm: str):
        super().__init__()
        self.norm = NORMS[norm]
        self.blocks = nn.Sequential(*(PlainBlock(block, self.norm) for block in model.blocks))
        self.linear = nn.Linear(model.linear.in_features, model.linear.out_features)
        self.to(model.linear.weight)
        self.linear.load_state_dict(model.linear.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.blocks(x).mean((-2, -1)))


class PlainBlock(nn.Module):
    def __init__(self, block: nn.Module, norm: Callable):
        super().__init__()
        self.norm = norm
        self.weight = nn.Parameter(block.weight.detach().permute(3, 2, 0, 1).contiguous())
        self.offset = nn.Parameter(block.offset.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        padded = F.pad(x, (width % 2, 1, height % 2, 1))  # TensorFlow's SAME padding
        return F.relu(self.norm(F.conv2d(padded, self.weight, stride=2), self.offset))


def in_amaml_layout(gradient: dict[str, Tensor]) -> dict[str, Tensor]:
    """A gradient of PlainCNN as one of OmniglotCNN, whose filters are (3, 3, in, out)."""
    return {n: g.permute(2, 3, 1, 0) if g.ndim == 4 else g for n, g in gradient.items()}


def inner_parameters(network: nn.Module) -> dict[str, Tensor]:
    """What the inner loop adapts: all but the offsets of batch normalisation."""
    return {n: p for n, p in network.named_parameters() if not n.endswith("offset")}


# -- meta-gradients: each makes, for a network, a function from tasks to a mean meta-gradient ---


def autograd_loop(network: nn.Module, alpha: float, inner_steps: int) -> Gradient:
    """A loop over the tasks, by torch.autograd."""
    theta = dict(network.named_parameters())
    moving = list(inner_parameters(network))

    def gradient(tasks: amaml.Tasks) -> dict[str, Tensor]:
        total = {name: torch.zeros_like(value) for name, value in theta.items()}
        for task in zip(*vars(tasks).values(), strict=True):
            support_x, support_y, query_x, query_y = task
            adapted = dict(theta)
            for _ in range(inner_steps):
                loss = F.cross_entropy(functional_call(network, adapted, (support_x,)), support_y)
                slopes = torch.autograd.grad(loss, [adapted[n] for n in moving], create_graph=True)
                for name, slope in zip(moving, slopes, strict=True):
                    adapted[name] = adapted[name] - alpha * slope
            loss = F.cross_entropy(functional_call(network, adapted, (query_x,)), query_y)
            for part, slope in zip(
                total.values(), torch.autograd.grad(loss, list(theta.values())), strict=True
            ):
                part += slope / len(tasks)
        return total

    return gradient


def functional_task_loss(network: nn.Module, alpha: float, inner_steps: int) -> Callable:
    """The query loss of one task after adaptation, in torch.func."""
    moving = list(inner_parameters(network))

    def task_loss(theta, support_x, support_y, query_x, query_y):
        def support_loss(adapted):
            prediction = functional_call(network, {**theta, **adapted}, (support_x,))
            return F.cross_entropy(prediction, support_y)

        adapted = {name: theta[name] for name in moving}
        for _ in range(inner_steps):
            slopes = grad(support_loss)(adapted)
            adapted = {name: adapted[name] - alpha * slopes[name] for name in moving}
        prediction = functional_call(network, {**theta, **adapted}, (query_x,))
        return F.cross_entropy(prediction, query_y)

    return task_loss


def detached(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in network.named_parameters()}


def vmap_of_grad(network: nn.Module, alpha: float, inner_steps: int) -> Gradient:
    """torch.func: the meta-gradient of each task, side by side, averaged afterwards."""
    per_task = vmap(
        grad(functional_task_loss(network, alpha, inner_steps)), in_dims=(None, 0, 0, 0, 0)
    )

    def gradient(tasks: amaml.Tasks) -> dict[str, Tensor]:
        gradients = per_task(detached(network), *vars(tasks).values())
        return {name: value.mean(0) for name, value in gradients.items()}

    return gradient


def grad_of_vmap(network: nn.Module, alpha: float, inner_steps: int) -> Gradient:
    """torch.func: the gradient of the mean loss of all tasks side by side."""
    losses = vmap(functional_task_loss(network, alpha, inner_steps), in_dims=(None, 0, 0, 0, 0))
    of_mean = grad(lambda theta, *tasks: losses(theta, *tasks).mean())
    return lambda tasks: of_mean(detached(network), *vars(tasks).values())


def by_learn2learn(network: nn.Module, alpha: float, inner_steps: int) -> Gradient:
    """learn2learn's MAML. It adapts all parameters, so the offsets are made buffers, which it
    clones with their gradients and does not adapt."""
    for module in network.modules():
        if "offset" in module._parameters:
            module.register_buffer("offset", module._parameters.pop("offset"))
    maml = learn2learn_maml()(network, lr=alpha)
    theta = theta_of(network)

    def gradient(tasks: amaml.Tasks) -> dict[str, Tensor]:
        for task in zip(*vars(tasks).values(), strict=True):
            support_x, support_y, query_x, query_y = task
            learner = maml.clone()
            for _ in range(inner_steps):
                learner.adapt(F.cross_entropy(learner(support_x), support_y))
            (F.cross_entropy(learner(query_x), query_y) / len(tasks)).backward()
        return take_gradients(theta)

    return gradient


def by_higher(network: nn.Module, alpha: float, inner_steps: int) -> Gradient:
    """higher's functional modules and differentiable SGD."""
    higher = importlib.import_module("higher")
    optimizer = torch.optim.SGD(inner_parameters(network).values(), lr=alpha)
    theta = dict(network.named_parameters())

    def gradient(tasks: amaml.Tasks) -> dict[str, Tensor]:
        for task in zip(*vars(tasks).values(), strict=True):
            support_x, support_y, query_x, query_y = task
            with higher.innerloop_ctx(network, optimizer, copy_initial_weights=False) as inner:
                learner, differentiable = inner
                for _ in range(inner_steps):
                    differentiable.step(F.cross_entropy(learner(support_x), support_y))
                (F.cross_entropy(learner(query_x), query_y) / len(tasks)).backward()
        return take_gradients(theta)

    return gradient


def take_gradients(theta: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients that backward() has added up, taken away from their parameters."""
    taken = {name: value.grad for name, value in theta.items()}
    for value in theta.values():
        value.grad = None
    return taken


def learn2learn_maml() -> type:
    """learn2learn's class MAML, as it stands in the library.

    `import learn2learn` also loads its data sets and games, which need compiled extensions and
    gym. MAML needs none of them: the packages are entered without running what loads the rest.
    """
    for package in ("learn2learn", "learn2learn.algorithms"):
        if package not in sys.modules:
            found = importlib.util.find_spec(package)
            if found is None:
                raise ModuleNotFoundError("learn2learn is not installed", name="learn2learn")
            bare = types.ModuleType(package)
            bare.__path__, bare.__spec__ = list(found.submodule_search_locations), found
            sys.modules[package] = bare
    return importlib.import_module("learn2learn.algorithms.maml").MAML


# name: (how the meta-gradient is computed, batch normalisation, library that it needs)
PEERS = {
    "learn2learn": (by_learn2learn, "torch", "learn2learn"),
    "higher": (by_higher, "torch", "higher"),
    "autograd loop": (autograd_loop, "torch", None),
    "vmap(grad)": (vmap_of_grad, "torch", None),
    "vmap(grad), composed": (vmap_of_grad, "composed", None),
    "grad(vmap)": (grad_of_vmap, "torch", None),
    "grad(vmap), composed": (grad_of_vmap, "composed", None),
}


def installed(name: str) -> bool:
    """Whether a peer can be run here."""
    library = PEERS[name][2]
    return library is None or importlib.util.find_spec(library) is not None


def peer(name: str, model: amaml.OmniglotCNN, alpha: float, inner_steps: int):
    """A peer's network, with the parameters of `model`, and its meta-gradient of tasks."""
    method, norm, _ = PEERS[name]
    network = PlainCNN(model, norm)
    return network, method(network, alpha, inner_steps)


def peer_step(name: str, model, alpha: float, beta: float, inner_steps: int) -> Callable:
    """One MAML iteration of a peer as a function of the tasks: meta-gradient and plain SGD."""
    network, gradient = peer(name, model, alpha, inner_steps)
    return sgd_step(network, gradient, beta)


def sgd_step(network: nn.Module, gradient: Gradient, beta: float) -> Callable:
    theta = theta_of(network)

    def step(tasks: amaml.Tasks) -> None:
        slopes = gradient(tasks)
        with torch.no_grad():
            for name, value in theta.items():
                value -= beta * slopes[name]

    return step


def theta_of(network: nn.Module) -> dict[str, Tensor]:
    """All that the meta-step learns; learn2learn's offsets are buffers."""
    return dict(network.named_parameters()) | dict(network.named_buffers())
