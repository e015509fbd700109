"""The shapes in all signatures are true: jaxtyping and beartype check them in true calls."""

import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import ROOT, SMALL
from torch import nn
from torch.func import vmap
from torch.nn import functional as F

import amaml
from amaml.fast.meta_gradients import derivatives
from amaml.fast.omniglot_cnn import prepare
from amaml.training import train_together

CHECKED = """
from jaxtyping import install_import_hook

with install_import_hook("amaml", "beartype.beartype"):  # before anything imports amaml
    import test_shapes

    test_shapes.true_calls()
    test_shapes.false_calls()
print("done")
"""


def test_true_calls_pass_and_false_ones_are_refused():
    pytest.importorskip("jaxtyping")
    pytest.importorskip("beartype")
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, (ROOT, here.parent, here)))
    given = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    run = subprocess.run([sys.executable, "-c", CHECKED], env=given, capture_output=True, text=True)
    assert (run.returncode, run.stdout.split()[-1:]) == (0, ["done"]), run.stderr[-3000:]


def true_calls() -> None:
    characters = amaml.load_glyphs()
    for n_way, k_shot, dtype in ((5, 1, "float32"), (20, 1, "float32"), (3, 2, "float64")):
        sampler = amaml.TaskSampler(characters, n_way, k_shot)
        tasks = sampler.sample(3, torch.Generator().manual_seed(0)).to(dtype=getattr(torch, dtype))
        own = nn.Sequential(nn.Flatten(), nn.Linear(784, n_way))
        for model in (amaml.OmniglotCNN(n_way, filters=4), own):
            of_one_setting(model.to(tasks.support_x.dtype), tasks)
    config = amaml.RunConfig(**SMALL | {"iterations": 3, "validation_every": 2, "test_tasks": 4})
    with tempfile.TemporaryDirectory() as folder:
        amaml.train(config, folder, progress=False)
        train_together([replace(config, seed=seed) for seed in (1, 2)], folder)
        amaml.run_all([config], folder, minutes=1.0, progress=False)  # here: workers are not hooked


def of_one_setting(model: nn.Module, tasks: amaml.Tasks) -> None:
    model(tasks.support_x[0])
    state = amaml.init_state(model, 0.1, 0.1, meta_optimizer="adam")
    task = (value[0] for value in vars(tasks).values())
    amaml.predict(model, state.theta, state.alpha, *list(task)[:3], inner_steps=2)
    for loss in (F.cross_entropy, lambda prediction, y: (prediction.sum(-1) - y).square().mean()):
        amaml.evaluate(model, state, tasks, inner_steps=2, loss=loss)
        for options in ({}, {"inner_steps": 3}, {"first_order": True}, {"recompute": True}):
            step = partial(amaml.meta_step, model, hyper_beta=0.1, loss=loss, **options)
            step(state, tasks)
            alphas = torch.stack([state.alpha] * 2)
            vmap(lambda alpha, step=step: step(state._replace(alpha=alpha), tasks))(alphas)


def false_calls() -> None:
    logits, labels = torch.rand(2, 5, 3), torch.zeros(2, 5, dtype=torch.int64)
    for call, *arguments in (
        (prepare, torch.rand(2, 5, 2, 28, 28)),  # a channel too many
        (derivatives, F.cross_entropy, logits, labels[:1]),  # labels of another number of tasks
        (derivatives, F.cross_entropy, labels[..., None], labels),  # logits that are integers
    ):
        with pytest.raises(TypeError, match="Type-check error"):
            call(*arguments)
