"""The sinusoids of the chapter on one's own tasks: the chapter's own code, through the module."""

import math
from pathlib import Path

import jupytext
import pytest
import torch
from torch.nn import functional as F

import amaml

CHAPTER = Path(__file__).resolve().parents[2] / "book" / "11_your_own.md"


@pytest.fixture(scope="module")
def chapter() -> dict:
    """`Sinusoids` and `network` as the chapter defines them, after its imports."""
    code = [cell.source for cell in jupytext.read(CHAPTER).cells if cell.cell_type == "code"]
    wanted = [
        source
        for source in code
        if source.startswith("import") or "class Sinusoids" in source or "def network" in source
    ]
    assert len(wanted) == 3
    namespace = {"__name__": "chapter"}
    exec(compile("\n".join(wanted), str(CHAPTER), "exec", dont_inherit=True), namespace)
    return namespace


def test_support_and_query_lie_on_one_sinusoid(chapter):
    sampler = chapter["Sinusoids"](k_shot=10, k_query=30)
    tasks = sampler.sample(200, torch.Generator().manual_seed(0)).double()
    # A sin(x - phi) = a sin x + b cos x: a line in (a, b), which two points would determine.
    support, query = (
        torch.cat([x.sin(), x.cos()], dim=-1) for x in (tasks.support_x, tasks.query_x)
    )
    solution = torch.linalg.lstsq(support, tasks.support_y).solution
    torch.testing.assert_close(query @ solution, tasks.query_y, rtol=0, atol=1e-4)
    amplitude, phase = solution.norm(dim=1), torch.atan2(-solution[:, 1], solution[:, 0])
    assert 0.1 - 1e-4 < amplitude.min() < 0.3 and 4.8 < amplitude.max() < 5 + 1e-4
    assert -1e-3 < phase.min() < 0.1 and math.pi - 0.1 < phase.max() < math.pi + 1e-3
    assert -5 <= tasks.support_x.min() < -4.9 and 4.9 < tasks.query_x.max() <= 5


def test_gradients_of_the_regression_are_those_of_finite_differences(chapter):
    model = chapter["network"](0).double()
    tasks = chapter["Sinusoids"](k_shot=5).sample(3, torch.Generator().manual_seed(1)).double()
    theta = {name: p.detach() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(2)
    direction = {
        name: torch.randn(p.shape, dtype=p.dtype, generator=generator) for name, p in theta.items()
    }

    def query_loss(step_theta: float, step_alpha: float) -> float:
        at = {name: p + step_theta * direction[name] for name, p in theta.items()}
        losses = []
        for x, y, query_x, query_y in zip(*vars(tasks).values(), strict=True):
            theta_prime = amaml.adapt(
                model, at, 0.01 + step_alpha, x, y, inner_steps=2, loss=F.mse_loss
            )
            prediction = torch.func.functional_call(model, theta_prime, (query_x,))
            losses.append(float((prediction - query_y).square().mean()))
        return sum(losses) / len(losses)

    gradient, d_alpha, _ = amaml.meta_gradient(
        model, theta, 0.01, tasks, inner_steps=2, loss=F.mse_loss
    )
    step = 1e-7
    slopes = [
        (query_loss(step, 0) - query_loss(-step, 0)) / (2 * step),
        (query_loss(0, step) - query_loss(0, -step)) / (2 * step),
    ]
    along = float(sum((gradient[name] * direction[name]).sum() for name in theta))
    assert along == pytest.approx(slopes[0], rel=1e-5)
    assert float(d_alpha) == pytest.approx(slopes[1], rel=1e-5)


class DoubleSinusoids:
    def __init__(self, sampler):
        self.sampler = sampler

    def sample(self, meta_batch_size, generator):
        return self.sampler.sample(meta_batch_size, generator).double()


def test_a_run_in_float64_is_one_throughout_and_is_read_as_one(chapter, tmp_path):
    config = amaml.RunConfig(
        alpha=0.001, beta=0.001, hyper_alpha=1e-4, hyper_beta=1e-5, meta_optimizer="adam",
        meta_batch_size=4, iterations=5, validation_tasks=3,
    )  # fmt: skip

    def run() -> amaml.Run:
        return amaml.train(
            config, tmp_path, name="double", model=lambda seed: chapter["network"](seed).double(),
            sampler=DoubleSinusoids(chapter["Sinusoids"]()), loss=F.mse_loss, progress=False,
        )  # fmt: skip

    for made_or_read in (run(), run()):
        state, metrics = made_or_read.state, made_or_read.metrics
        assert {p.dtype for p in (*state.theta.values(), state.alpha, state.beta)} == {
            torch.float64
        }
        assert metrics["alpha"].iloc[0] == 0.001  # which float32 does not hold
        assert metrics["alpha"].nunique() == len(metrics) == 5
