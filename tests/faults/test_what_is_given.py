"""What is given is used, and what is returned is said.

Reports: an edited sampler, and the old run comes back without a word; an object whose `len()` is 0
is replaced by a default; memory that only a function's argument can save; numpy's integers; a run
wanted longer; a run's end that no function reads.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from helpers import SMALL
from torch import nn
from torch.nn import functional as F

import amaml


class Lines:
    """Tasks of one's own, straight lines; a list of episodes that is still empty."""

    slope = 1.0

    def __len__(self):
        return 0

    def sample(self, meta_batch_size, generator):
        x = torch.randn(meta_batch_size, 10, 1, generator=generator)
        return amaml.Tasks(x[:, :5], self.slope * x[:, :5], x[:, 5:], self.slope * x[:, 5:])


class Steep(Lines):
    slope = 3.0


class Empty(nn.Linear):
    """A module whose `len()` is 0."""

    def __len__(self):
        return 0


def line(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Empty(1, 1)


def squared(prediction, y):
    return (prediction - y).square().mean()


CONFIG = amaml.RunConfig(
    alpha=0.05, beta=0.05, hyper_alpha=1e-3, hyper_beta=1e-3, iterations=4, meta_batch_size=2,
    validation_every=2, validation_tasks=3,
)  # fmt: skip
OWN = {"name": "lines", "model": line(), "sampler": Lines(), "loss": squared, "progress": False}


def train(out, config=CONFIG, **changed) -> amaml.Run:
    return amaml.train(config, out, **(OWN | changed))


def test_a_finished_run_that_is_read_says_so(tmp_path, capsys):
    assert not train(tmp_path).read and not capsys.readouterr().out
    run = train(tmp_path, progress=True)
    assert run.read
    assert f"{run.folder} is finished: read, not made again" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"sampler": Steep()}, "sampler"),
        ({"loss": F.mse_loss}, "loss"),
        ({"model": line(1)}, "model"),
        ({"model": nn.Linear(1, 1, bias=False)}, "model"),
        ({"validation_sampler": Steep()}, "validation_sampler"),
        ({"step": lambda *words, **more: amaml.meta_step(*words, **more)}, "step"),
    ],
)
def test_other_parts_under_the_same_name_are_refused_by_name(tmp_path, changed, part):
    train(tmp_path)
    with pytest.raises(ValueError, match=f"made with another {part} than the one given"):
        train(tmp_path, **changed)
    assert train(tmp_path, name="other", **changed).status == "done"


def test_what_a_dataclass_or_a_partial_holds_counts(tmp_path):
    @dataclass(frozen=True)
    class Noisy(Lines):
        amplitude: float = 1.0

    def power(prediction, y, exponent):
        return (prediction - y).abs().pow(exponent).mean()

    given = {"sampler": Noisy(), "loss": partial(power, exponent=2)}
    train(tmp_path, **given)
    assert train(tmp_path, **given).read
    for part, other in (("sampler", Noisy(3.0)), ("loss", partial(power, exponent=3))):
        with pytest.raises(ValueError, match=f"made with another {part} than the one given"):
            train(tmp_path, **(given | {part: other}))


def test_only_none_means_not_given(tmp_path):
    """A sampler or a model of length 0 is used, not replaced by the config's."""
    run = train(tmp_path, validation_sampler=Steep())
    assert run.metrics["query_loss"].iloc[0] < 50 and "query_accuracy" not in run.metrics
    assert set(run.state.theta) == {"weight", "bias"}
    assert run.metrics["validation_loss"].max() > 2 * run.metrics["query_loss"].max()


def test_a_model_may_be_a_function_of_the_seed(tmp_path):
    configs = [amaml.RunConfig(**SMALL, iterations=1, seed=seed) for seed in (0, 1)]
    runs = [train(tmp_path, config, model=line, name="by-seed") for config in configs]
    first = [run.state.theta["weight"].item() for run in runs]
    assert first[0] != first[1]
    parts = {"name": "by-seed", "model": line, "sampler": Lines(), "loss": squared}
    table = amaml.run_all(configs, tmp_path / "b", None, 2, minutes=1, progress=False, **parts)
    together = table.groupby("seed")["query_loss"].first().tolist()
    alone = [run.metrics["query_loss"].iloc[0] for run in runs]
    assert together == pytest.approx(alone, rel=1e-6)


def test_networks_that_differ_in_what_is_not_learned_are_not_made_together(tmp_path):
    def frozen(seed):
        model = nn.Sequential(nn.Linear(1, 1), line(seed))
        model[0].weight.data.fill_(float(seed)), model[0].requires_grad_(False)
        return model

    configs = [amaml.RunConfig(**SMALL, iterations=1, seed=seed) for seed in (0, 1)]
    parts = {"name": "frozen", "model": frozen, "sampler": Lines(), "loss": squared}
    with pytest.raises(RuntimeError, match="differ in buffers or frozen parameters"):
        amaml.run_all(configs, tmp_path, None, 2, minutes=1, progress=False, **parts)
    assert len(amaml.run_all(configs, tmp_path, None, 1, minutes=1, progress=False, **parts)) == 2


def test_numpys_integers_are_taken_everywhere(tmp_path):
    three, glyphs = np.int64(3), amaml.load_glyphs(seed=np.int64(0))
    sampler = amaml.TaskSampler(glyphs, n_way=three, k_shot=np.int32(1), k_query=np.uint8(1))
    tasks = sampler.sample(np.int64(4), torch.Generator().manual_seed(0))
    model = amaml.OmniglotCNN(three, filters=np.int64(4))
    state = amaml.init_state(model, np.float64(0.1), np.float32(0.1))
    state, _ = amaml.meta_step(model, state, tasks, inner_steps=np.int64(2))
    amaml.evaluate(model, state, tasks[np.int64(1)], inner_steps=np.int64(2))
    amaml.split_characters(glyphs, seed=np.int64(1))
    fields = {n: np.int64(v) if type(v) is int else v for n, v in SMALL.items()}
    config = amaml.RunConfig(**fields, iterations=np.int64(2), seed=np.int64(3))
    run = amaml.train(config, tmp_path, checkpoint_every=np.int64(1), progress=False)
    assert run.config == amaml.RunConfig(**SMALL, iterations=2, seed=3)
    many = amaml.run_all([config], tmp_path, None, np.int64(2), minutes=1, progress=False)
    assert len(many) == 2


def test_a_run_can_save_memory_by_its_config(tmp_path):
    fields = SMALL | {"iterations": 3, "inner_steps": 4}
    plain, saving = (
        amaml.train(amaml.RunConfig(**fields, recompute=recompute), tmp_path, progress=False)
        for recompute in (False, True)
    )
    assert plain.id != saving.id
    losses = [run.metrics["query_loss"].tolist() for run in (plain, saving)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_run_made_longer_is_the_long_run(tmp_path, one_thread):
    short, whole = (amaml.RunConfig(**SMALL, iterations=n) for n in (6, 12))
    parent = amaml.train(short, tmp_path, progress=False)
    run = amaml.train(whole, tmp_path, start=parent, progress=False)
    expected = amaml.train(whole, tmp_path, progress=False)
    assert run.id != expected.id and run.iteration == 12
    assert run.metrics["query_loss"].equals(expected.metrics["query_loss"])
    assert all(torch.equal(v, expected.state.theta[n]) for n, v in run.state.theta.items())
    again = amaml.train(whole, tmp_path, start=parent.folder, progress=False)
    assert again.read and again.id == run.id
    with pytest.raises(ValueError, match=r"ended at iteration 6 \(done\); iterations=6 must be"):
        amaml.train(short, tmp_path, start=parent, progress=False)
    wider = amaml.RunConfig(**SMALL | {"filters": 8}, iterations=12)
    with pytest.raises(ValueError, match="another network or meta-optimiser"):
        amaml.train(wider, tmp_path, start=parent, progress=False)
    with pytest.raises(FileNotFoundError, match="holds no run: there is no run.safetensors"):
        amaml.train(whole, tmp_path, start=tmp_path / "nothing", progress=False)


def test_a_run_goes_on_from_rates_that_no_config_may_start_from(tmp_path):
    rates = {"alpha": 0.0, "hyper_alpha": 3.0}
    parent = amaml.train(amaml.RunConfig(**SMALL | rates, iterations=12), tmp_path, progress=False)
    negative = parent.metrics["alpha"] < 0
    assert negative.any()
    longer = amaml.RunConfig(**SMALL | rates, iterations=14)
    run = amaml.train(longer, tmp_path, start=parent, progress=False)
    assert run.metrics["alpha"].iloc[12] == parent.state.alpha.item()


def test_a_run_is_loaded_used_and_saved_by_the_usual_means(tmp_path):
    import safetensors.torch

    run = amaml.train(amaml.RunConfig(**SMALL, iterations=3), tmp_path, progress=False)
    loaded = amaml.load_run(tmp_path / run.id)
    assert loaded.config == run.config and loaded.metrics.equals(run.metrics)
    model = amaml.OmniglotCNN(3, filters=4)
    sampler = amaml.TaskSampler(amaml.load_glyphs(), n_way=3)
    task = sampler.sample(1, torch.Generator().manual_seed(0))
    x, y, query_x, query_y = (value[0] for value in vars(task).values())
    logits = amaml.predict(model, loaded.state.theta, loaded.state.alpha, x, y, query_x)
    accuracy = (logits.argmax(1) == query_y).double().mean().item()
    assert accuracy == pytest.approx(amaml.evaluate(model, run.state, task)["query_accuracy"])

    torch.save(loaded.state.theta, tmp_path / "theta.pt")
    safetensors.torch.save_file(loaded.state.theta, tmp_path / "theta.safetensors")
    for theta in (
        torch.load(tmp_path / "theta.pt", weights_only=True),
        safetensors.torch.load_file(tmp_path / "theta.safetensors"),
    ):
        again = amaml.predict(model, theta, loaded.state.alpha, x, y, query_x)
        assert torch.allclose(again, logits, atol=1e-5)
        model.load_state_dict(theta)
