"""The core gives its numbers also with the oldest torch that is promised (see pyproject.toml).

To run this test give AMAML_OLDEST_PYTHON: the python of an environment with that torch, and with
numpy, pandas, safetensors and tqdm.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OLDEST = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text()).group(1)
PYTHON = os.environ.get("AMAML_OLDEST_PYTHON")
needs_oldest = pytest.mark.skipif(
    not PYTHON,
    reason="AMAML_OLDEST_PYTHON is not set: give the python of an environment with "
    f"torch {OLDEST}, numpy, pandas, safetensors and tqdm to run this test",
)

CORE = """
import tempfile
from dataclasses import replace

import torch

import amaml

def noise(*shape):
    return torch.sin(torch.arange(torch.Size(shape).numel(), dtype=torch.float64)).view(shape)

def numbers(meta_optimizer, inner_steps, first_order):
    model = amaml.OmniglotCNN(3, filters=2).double()
    for name, value in model.named_parameters():
        value.data = 0.3 * noise(*value.shape)
    x, y = noise(8, 3, 1, 28, 28), torch.arange(3).repeat(4, 1)
    tasks = amaml.Tasks(support_x=x[:4], support_y=y, query_x=x[4:], query_y=y)
    state, seen = amaml.init_state(model, 0.1, 0.05, meta_optimizer=meta_optimizer), []
    for _ in range(3):
        state, metrics = amaml.meta_step(
            model, state, tasks, hyper_alpha=1e-3, hyper_beta=1e-3, inner_steps=inner_steps,
            first_order=first_order,
        )
        seen += [value.item() for value in metrics.values()]
    return seen + list(amaml.evaluate(model, state, tasks).values())

class Lines:
    def sample(self, meta_batch_size, generator):
        x = noise(meta_batch_size, 10, 1)
        return amaml.Tasks(x[:, :5], 2 * x[:, :5], x[:, 5:], 2 * x[:, 5:])

def squared_error(prediction, y):
    return (prediction - y).square().mean()

def run():
    model = torch.nn.Linear(1, 1).double()
    for value in model.parameters():
        value.data.fill_(0.5)
    config = amaml.RunConfig(iterations=12, alpha=0.1, beta=0.1, meta_batch_size=3)
    own = {"name": "lines", "model": model, "sampler": Lines(), "loss": squared_error}
    with tempfile.TemporaryDirectory() as out:
        made, read = (amaml.train(config, out, progress=False, **own) for _ in range(2))
    assert made.metrics.equals(read.metrics) and made.status == "done"
    return read.metrics["query_loss"].tolist() + [read.state.alpha.item()]

def everything():
    settings = (("sgd", 1, False), ("adam", 2, False), ("sgd", 2, True))
    return [*(numbers(*setting) for setting in settings), run()]
"""


@needs_oldest
def test_the_oldest_torch_gives_the_same_numbers():
    code = f"{CORE}\nimport json; print(json.dumps([torch.__version__, everything()]))"
    place = {"cwd": ROOT, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    said = subprocess.run([PYTHON, "-c", code], **place, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    version, theirs = json.loads(said.stdout)
    assert version.startswith(f"{OLDEST}."), f"{PYTHON} has torch {version}, not {OLDEST}"
    here: dict = {}
    exec(CORE, here)
    for ours, others in zip(here["everything"](), theirs, strict=True):
        assert others == pytest.approx(ours, rel=1e-8, abs=1e-12)
