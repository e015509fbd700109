"""Every wrong call is refused where it enters: by the argument's name, what was given, what may be.

One row a call: the call, the error, and a pattern for its message.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn

import amaml

NAN, INF = math.nan, math.inf
HUGE = 10**400  # larger than any float
META = torch.device("meta")  # a second device, on every machine
CPU = torch.Generator()


def characters(n: int = 12, **changed) -> amaml.Characters:
    names = [f"A/character{i:02d}" for i in range(n)]
    given = {"images": torch.zeros(n, 20, 28, 28, dtype=torch.uint8), "names": names} | changed
    return amaml.Characters(**given)


def sampler(**changed) -> amaml.TaskSampler:
    return amaml.TaskSampler(**({"characters": characters(), "n_way": 3} | changed))


def images(*shape: int, **kind) -> torch.Tensor:
    return torch.zeros(*shape, **({"dtype": torch.uint8} | kind))


def tasks(**changed) -> amaml.Tasks:
    """Two tasks of three classes, one image each."""
    x, y = torch.rand(2, 3, 1, 28, 28), torch.arange(3).repeat(2, 1)
    return amaml.Tasks(**({"support_x": x, "support_y": y, "query_x": x, "query_y": y} | changed))


def network(**changed) -> amaml.OmniglotCNN:
    return amaml.OmniglotCNN(**({"n_way": 3, "generator": CPU, "filters": 4} | changed))


MODEL = network()
STATE = amaml.init_state(MODEL, 0.1, 0.1)
THETA = STATE.theta
TASKS = tasks()
TINY = amaml.RunConfig(data="glyphs", n_way=3, filters=2, iterations=2)
X, Y = TASKS.support_x[0], TASKS.support_y[0]


def start(**changed):
    return amaml.init_state(**({"model": MODEL, "alpha": 0.1, "beta": 0.1} | changed))


def step(**changed):
    return amaml.meta_step(**({"model": MODEL, "state": STATE, "tasks": TASKS} | changed))


def gradient(**changed):
    given = {"model": MODEL, "theta": THETA, "alpha": 0.1, "tasks": TASKS}
    return amaml.meta_gradient(**(given | changed))


def adapt(**changed):
    given = {"model": MODEL, "theta": THETA, "alpha": 0.1, "x": X, "y": Y}
    return amaml.adapt(**(given | changed))


def evaluate(**changed):
    return amaml.evaluate(**({"model": MODEL, "state": STATE, "tasks": TASKS} | changed))


class Sampler:
    """One's own, giving what it is told to give."""

    def __init__(self, given):
        self.given = given

    def sample(self, meta_batch_size, generator):
        return self.given


def train(**changed):
    return amaml.train(**({"config": TINY, "progress": False} | changed))


def run_all(configs=(), **changed):
    return amaml.run_all(configs, progress=False, **changed)


def squared_error(prediction, y):
    return (prediction - y).square()


WRONG_THETA = {**THETA, "linear.weight": torch.zeros(3, 5)}
V, T = ValueError, TypeError
DATA = [
    (
        lambda: characters(images=np.zeros((12, 20, 28, 28))),
        V,
        "torch.uint8 tensor.*float64",
    ),
    (lambda: characters(images=images(12, 20, 28, 28, dtype=torch.float32)), V, "uint8.*float32"),
    (lambda: characters(images=images(12, 20, 28)), V, r"images.*\(12, 20, 28\)"),
    (lambda: characters(images=images(12, 20, 28, 27)), V, r"images.*28, 27"),
    (lambda: characters(names=["a"]), V, "12, 20, 28, 28.*with 1 different names"),
    (lambda: characters(names=["a"] * 12), V, "with 1 different names"),
    (lambda: characters().to("tpu9"), V, "device='tpu9'.*'cpu'"),
    (lambda: amaml.split_characters(characters(4)), V, "4 characters are too few.*11"),
    (lambda: amaml.split_characters(characters(0)), V, "0 characters are too few"),
    (lambda: amaml.split_characters(characters(), seed=-1), V, "seed=-1.*at least 0"),
    (
        lambda: amaml.split_characters(characters(), seed=1.5),
        T,
        "seed must be.*not 1.5",
    ),
    (lambda: amaml.split_characters(characters(), seed=None), T, "seed must be.*None"),
    (
        lambda: amaml.load_glyphs(seed="../../seed"),
        T,
        "seed must be.*not '../../seed'",
    ),
    (lambda: amaml.load_glyphs(seed=-3), V, "seed=-3"),
    (lambda: amaml.load_glyphs(seed=True), T, "seed must be a whole number, not True"),
]
TASK = [
    (lambda: sampler(n_way=1), V, "n_way=1.*at least 2"),
    (lambda: sampler(n_way=13), V, "n_way=13 needs 13 characters, the split has 12"),
    (lambda: sampler(n_way=HUGE), V, "n_way=1000"),
    (lambda: sampler(n_way=3.0), T, "n_way.*3.0"),
    (lambda: sampler(n_way="3"), T, "n_way.*'3'"),
    (lambda: sampler(n_way=True), T, "n_way.*True"),
    (lambda: sampler(n_way=NAN), T, "n_way.*nan"),
    (lambda: sampler(k_shot=0), V, "k_shot=0.*at least 1"),
    (lambda: sampler(k_query=-1), V, "k_query=-1.*at least 1"),
    (lambda: sampler(k_shot=15, k_query=6), V, "need 21 drawings of a character, there are 20"),
    (lambda: sampler().sample(0, CPU), V, "meta_batch_size=0.*at least 1"),
    (lambda: sampler().sample(-4, CPU), V, "meta_batch_size=-4"),
    (lambda: sampler().sample(2.0, CPU), T, "meta_batch_size.*2.0"),
    (lambda: sampler().sample(4, 0), T, "generator must be a seeded torch.Generator, not 0"),
    (lambda: sampler().sample(4, None), T, "generator must be a seeded torch.Generator, not None"),
    (lambda: tasks(support_x=[1.0]), T, "support_x.*list"),
    (lambda: tasks(query_y=np.zeros((2, 3))), T, "query_y.*ndarray"),
    (lambda: tasks(support_x=X), V, "support"),
    (lambda: tasks(support_y=Y), V, "same number of tasks"),
    (lambda: tasks(query_x=TASKS.query_x[:1]), V, "same number of tasks.*query_x.*1, 3"),
    (lambda: tasks(query_y=TASKS.query_y[:, :2]), V, "same number of tasks"),
    (lambda: TASKS[:0], V, "at least one of each"),
    (lambda: TASKS.to("tpu9"), V, "device='tpu9'"),
    (lambda: TASKS.to(dtype=torch.int64), T, "dtype=torch.int64.*floating-point"),
]
MODELS = [
    (lambda: network(n_way=1), V, "n_way=1.*at least 2"),
    (lambda: network(filters=0), V, "filters=0.*at least 1"),
    (lambda: network(n_way=2.5), T, "float"),
    (lambda: MODEL(X[:, 0]), V, r"x.*\(3, 28, 28\).*batch, 1, height, width"),
    (lambda: MODEL(X.expand(3, 3, 28, 28)), V, r"x.*\(3, 3, 28, 28\).*batch, 1"),
    (lambda: MODEL(X.to(torch.uint8)), V, "x.*uint8.*float"),
    (lambda: MODEL(X[:0]), V, r"x.*\(0, 1, 28, 28\)"),
    (lambda: start(model=None), T, "model.*NoneType"),
    (lambda: start(model=nn.Flatten()), V, "no trainable parameter"),
    (lambda: start(model=nn.BatchNorm1d(3)), V, "running statistics.*track_running_stats=False"),
    (lambda: start(alpha=-0.1), V, "alpha=-0.1.*>= 0"),
    (lambda: start(alpha=NAN), V, "alpha=nan.*finite"),
    (lambda: start(beta=INF), V, "beta=inf.*finite"),
    (lambda: start(beta=1e300), V, r"beta=1e\+300.*finite"),
    (lambda: start(alpha="0.1"), T, "alpha='0.1'.*number"),
    (lambda: start(beta=None), T, "beta=None.*number"),
    (lambda: start(beta=torch.ones(2)), V, r"beta must be one number.*\(2,\)"),
    (lambda: start(alpha=1j), T, "alpha=1j.*number"),
    (lambda: start(meta_optimizer="lion"), V, "meta_optimizer='lion'.*sgd, adam"),
    (lambda: start(meta_optimizer=["sgd"]), V, r"meta_optimizer=\['sgd'\].*sgd, adam"),
    (lambda: start(beta=0.0, rule="scale-free"), V, "beta=0: the scale-free rule moves its log"),
    (lambda: start(rule="free"), V, "rule='free': known are additive, scale-free"),
    (lambda: start(model=torch.compile(nn.ReLU())), T, "torch.compile gave; give the module"),
]
STEPS = [
    (lambda: step(model=lambda x: x), T, "model.*function"),
    (lambda: step(state=THETA), T, "state must be.*init_state.*dict"),
    (lambda: step(state=TASKS, tasks=STATE), T, "state must be.*Tasks"),
    (lambda: step(tasks=(X, Y)), T, "tasks must be amaml.Tasks.*tuple"),
    (lambda: step(hyper_alpha=-1e-3), V, "hyper_alpha=-0.001.*>= 0"),
    (lambda: step(hyper_alpha=NAN), V, "hyper_alpha=nan.*finite"),
    (lambda: step(hyper_beta=INF), V, "hyper_beta=inf.*finite"),
    (lambda: step(hyper_beta=1e300), V, r"hyper_beta=1e\+300.*finite"),
    (lambda: step(hyper_beta="0"), T, "hyper_beta='0'.*number"),
    (lambda: step(hyper_alpha=None), T, "hyper_alpha=None.*number"),
    (lambda: step(hyper_alpha=torch.zeros(2)), V, r"hyper_alpha.*one number.*\(2,\)"),
    (lambda: step(inner_steps=0), V, "inner_steps=0.*at least 1"),
    (lambda: step(inner_steps=1.0), T, "inner_steps.*1.0"),
    (lambda: step(first_order=1), T, "first_order=1.*True or False"),
    (
        lambda: step(loss=squared_error, tasks=tasks(support_y=torch.rand(2, 3, 3))),
        V,
        "loss.*one n",
    ),
    (lambda: step(state=STATE._replace(theta=WRONG_THETA)), V, r"theta.*linear.weight.*\(3, 5\)"),
    (lambda: step(state=STATE._replace(theta={})), V, "theta.*blocks"),
    (lambda: step(tasks=tasks(support_y=TASKS.support_y.float())), T, "support_y.*int64.*float32"),
    (
        lambda: step(tasks=tasks(query_y=TASKS.query_y + 1)),
        V,
        "query_y.*to 3; the model has 3.*0 to 2",
    ),
    (lambda: step(tasks=tasks(support_y=TASKS.support_y - 100)), V, "support_y.*-100.*0 to 2"),
    (lambda: step(tasks=tasks(support_x=torch.rand(2, 3, 28, 28))), V, r"3, 28, 28\)"),
    (lambda: step(tasks=tasks(query_x=images(2, 3, 1, 28, 28))), V, "uint8"),
    (lambda: gradient(model=nn.Sequential(nn.Dropout(), nn.Linear(1, 1))), V, "p=0.5"),
    (lambda: gradient(theta={}), V, "theta.*blocks"),
    (lambda: gradient(theta=WRONG_THETA), V, r"theta.*linear.weight.*\(3, 5\)"),
    (lambda: gradient(theta=amaml.init_state(network(filters=8), 1, 1).theta), V, "theta.*4.*8"),
    (lambda: gradient(theta={**THETA, "other": torch.zeros(1)}), V, "theta.*other"),
    (lambda: gradient(alpha=torch.ones(3)), V, r"alpha must be one number.*\(3,\)"),
    (lambda: gradient(alpha="0.4"), T, "alpha='0.4'.*number"),
    (lambda: gradient(alpha=None), T, "alpha=None.*number"),
    (lambda: gradient(tasks=X), T, "tasks must be amaml.Tasks.*Tensor"),
    (lambda: gradient(inner_steps=-1), V, "inner_steps=-1"),
    (lambda: gradient(first_order="no"), T, "first_order='no'"),
    (lambda: adapt(x=TASKS.support_x), V, "y.*examples|x.*examples"),
    (lambda: adapt(y=Y[:2]), V, r"x has 3 examples, y has 2"),
    (lambda: adapt(x=X[:0], y=Y[:0]), V, "at least one"),
    (lambda: adapt(y=Y.float()), T, "y.*int64.*float32"),
    (lambda: adapt(y=Y + 3), V, "y.*5.*0 to 2"),
    (lambda: adapt(alpha=torch.ones(2)), V, r"alpha must be one number.*\(2,\)"),
    (lambda: adapt(alpha="1"), T, "alpha='1'"),
    (lambda: adapt(theta={}), V, "theta.*blocks"),
    (lambda: adapt(inner_steps=0), V, "inner_steps=0"),
    (lambda: adapt(model=3), T, "model.*int"),
    (lambda: evaluate(model=None), T, "model.*NoneType"),
    (lambda: evaluate(state=None), T, "state must be.*NoneType"),
    (lambda: evaluate(tasks=sampler()), T, "tasks must be amaml.Tasks.*TaskSampler"),
    (lambda: evaluate(inner_steps=0), V, "inner_steps=0"),
    (lambda: evaluate(state=STATE._replace(theta=WRONG_THETA)), V, r"theta.*\(3, 5\)"),
    (lambda: evaluate(tasks=tasks(query_y=TASKS.query_y.float())), T, "query_y.*int64"),
    (lambda: evaluate(tasks=tasks(query_y=TASKS.query_y + 7)), V, "query_y.*9.*0 to 2"),
]
RUNS = [
    (lambda: train(config={"alpha": 1}), T, "config.*dict"),
    (lambda: train(model="cnn"), T, "model.*str"),
    (lambda: train(sampler=3), T, "sampler.*int"),
    (lambda: train(validation_sampler=TASKS), T, "validation_sampler.*Tasks"),
    (lambda: train(loss=None), T, "loss.*None"),
    (lambda: train(device="tpu9"), V, "device='tpu9'.*'cpu'"),
    (lambda: train(checkpoint_every=0), V, "checkpoint_every=0.*at least 1"),
    (lambda: train(checkpoint_every=2.5), T, "checkpoint_every.*2.5"),
    (lambda: train(name="own", sampler=Sampler(None)), T, "sampler.*Tasks.*NoneType"),
    (lambda: train(name="own", sampler=Sampler((X, Y, X, Y))), T, "sampler.*Tasks.*tuple"),
    (lambda: train(name="own", sampler=sampler(), model=network(n_way=2)), V, "2.*0 to 1"),
    (lambda: run_all(), V, "configs is empty"),
    (lambda: run_all(TINY), T, "configs.*RunConfig"),
    (lambda: run_all([TINY], client=8786), T, "client.*8786.*address"),
    (lambda: train(model=MODEL, loss=abs), T, "model and loss of your own needs a name"),
    (lambda: train(name="../x"), V, "name='../x': must be of letters"),
    (lambda: run_all([TINY], minutes=-1), V, "minutes=-1.*at least 0"),
    (lambda: run_all([TINY], minutes=NAN), V, "minutes=nan.*at least 0"),
]
CALLS = {
    "data": DATA,
    "tasks": TASK,
    "models": MODELS,
    "steps": STEPS,
    "runs": RUNS,
}


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        pytest.param(*row, id=f"{kind}-{i}")
        for kind, rows in CALLS.items()
        for i, row in enumerate(rows)
    ],
)
def test_a_wrong_call_is_refused_by_name(call, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=f"(?s){words}"):
        call()
    assert not [*tmp_path.rglob("run.safetensors")]  # nothing has been trained
