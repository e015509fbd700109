"""Any `nn.Module`: what users of such software bring, against plain autograd written out.

Reports: a module reachable by two names is destroyed or left adapted; tied weights; dense
predictions; recurrent layers and branches on data under vmap; outputs that are no tensors; several
dtypes; frozen running statistics; attention's second derivative.
"""

import warnings
from copy import deepcopy

import pytest
import torch
from helpers import leaves, relative_error
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import amaml

ALPHA, BETA = 0.3, 0.2


class Aliased(nn.Module):
    """A body and a head that can also be reached through a Sequential of the two."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.Linear(6, 3)
        self.net = nn.Sequential(self.body, self.head)
        self.again = nn.ModuleList([self.head, self.body])

    def forward(self, x):
        return self.net(x)


class Tied(nn.Module):
    """One matrix for the way in and the way out."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 4), nn.Linear(4, 4)
        self.decode.weight = self.encode.weight
        self.listed = nn.ParameterList([self.encode.weight, nn.Parameter(torch.ones(4))])

    def forward(self, x):
        return self.decode(torch.tanh(self.encode(x))) * self.listed[1]


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer, self.head = kind(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1])


class Branching(nn.Module):
    """Goes one way or the other by what it sees."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.left(x) if x.sum() > 0 else torch.tanh(self.right(x))


class Several(nn.Module):
    """An output that is no tensor."""

    def __init__(self, kind):
        super().__init__()
        self.mean, self.scale, self.kind = nn.Linear(4, 1), nn.Linear(4, 1), kind

    def forward(self, x):
        mean, scale = self.mean(x), F.softplus(self.scale(x)) + 0.1
        if self.kind == "distribution":
            return torch.distributions.Normal(mean, scale, validate_args=False)
        return (mean, scale) if self.kind == "tuple" else {"mean": mean, "scale": scale}


def likelihood(output, y):
    if isinstance(output, dict):
        output = (output["mean"], output["scale"])
    if isinstance(output, tuple):
        output = torch.distributions.Normal(*output, validate_args=False)
    return -output.log_prob(y).mean()


class TwoTypes(nn.Module):
    """A float32 body and a float64 head."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3).double()

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)).double())


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(x, x, x, need_weights=False)[0].mean(1))


def in_eval_mode() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    model(torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5)))
    return model.eval()


# The model, the shape of an example, the loss and, where labels are no classes, their shape
CASES = {
    "aliases": (lambda: Aliased().double(), (4,), F.cross_entropy, None),
    "tied weights": (lambda: Tied().double(), (4,), F.cross_entropy, None),
    "dense predictions": (
        lambda: nn.Conv1d(2, 5, 3, padding=1).double(), (2, 5), F.cross_entropy, (5,)
    ),
    "dense, other length": (
        lambda: nn.Conv1d(2, 5, 3, padding=1).double(), (2, 7), F.cross_entropy, (7,)
    ),
    "GRU": (lambda: Recurrent(nn.GRU).double(), (3, 4), F.cross_entropy, None),
    "LSTM": (lambda: Recurrent(nn.LSTM).double(), (3, 4), F.cross_entropy, None),
    "RNN": (lambda: Recurrent(nn.RNN).double(), (3, 4), F.cross_entropy, None),
    "a branch on data": (lambda: Branching().double(), (4,), F.cross_entropy, None),
    "a tuple": (lambda: Several("tuple").double(), (4,), likelihood, (1,)),
    "a dict": (lambda: Several("dict").double(), (4,), likelihood, (1,)),
    "a distribution": (lambda: Several("distribution").double(), (4,), likelihood, (1,)),
    "two dtypes": (TwoTypes, (4,), F.cross_entropy, None),
    "running statistics in eval mode": (in_eval_mode, (4,), F.cross_entropy, None),
    "attention": (lambda: Attending().double(), (3, 4), F.cross_entropy, None),
}  # fmt: skip


def tasks_of(shape, loss, y_shape, dtype) -> amaml.Tasks:
    """Two tasks of six support and six query examples."""
    generator = torch.Generator().manual_seed(1)
    x = [torch.randn(2, 6, *shape, dtype=dtype, generator=generator) for _ in range(2)]
    if loss is F.cross_entropy:
        size, high = (2, 6, *(y_shape or ())), 5 if y_shape else 3
        y = [torch.randint(high, size, generator=generator) for _ in range(2)]
    else:
        y = [torch.randn(2, 6, *y_shape, dtype=dtype, generator=generator) for _ in range(2)]
    return amaml.Tasks(x[0], y[0], x[1], y[1])


@sdpa_kernel(SDPBackend.MATH)  # the one attention that torch can differentiate twice
def plain(model, tasks, loss, inner_steps):
    """(theta_prime of the first task, gradient, d_alpha, mean query loss) by plain autograd."""
    own = deepcopy(model)  # functional_call alone may leave its module changed
    theta = leaves(dict(own.named_parameters()))
    alpha, losses, first = torch.tensor(ALPHA, dtype=torch.float64, requires_grad=True), [], None
    for i in range(2):
        adapted = dict(theta)
        for _ in range(inner_steps):
            value = loss(functional_call(own, adapted, tasks.support_x[i]), tasks.support_y[i])
            gradient = torch.autograd.grad(
                value, list(adapted.values()), create_graph=True, allow_unused=True
            )
            gradient = [0 if g is None else g for g in gradient]
            adapted = {
                n: p - (alpha * g).to(p.dtype) if torch.is_tensor(g) else p
                for (n, p), g in zip(adapted.items(), gradient, strict=True)
            }
        first = first or {n: p.detach() for n, p in adapted.items()}
        losses.append(loss(functional_call(own, adapted, tasks.query_x[i]), tasks.query_y[i]))
    mean = torch.stack(losses).mean()
    *gradient, d_alpha = torch.autograd.grad(mean, [*theta.values(), alpha], allow_unused=True)
    gradient = {
        n: torch.zeros_like(theta[n]) if g is None else g
        for n, g in zip(theta, gradient, strict=True)
    }
    return first, gradient, d_alpha, mean.detach()


def content(model) -> list:
    return [(n, v.clone()) for n, v in model.state_dict().items()]


@pytest.mark.parametrize("inner_steps", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_numbers_are_those_of_plain_autograd_and_the_model_is_left_alone(
    name, inner_steps, tmp_path
):
    make, shape, loss, y_shape = CASES[name]
    torch.manual_seed(0)
    model = make()
    dtype = torch.float32 if name == "two dtypes" else torch.float64
    tasks, before = tasks_of(shape, loss, y_shape, dtype), content(model)
    close = 1e-5 if name == "two dtypes" else 1e-8
    theta = {n: p.detach() for n, p in model.named_parameters()}
    first, gradient, d_alpha, mean = plain(model, tasks, loss, inner_steps)
    options = {"inner_steps": inner_steps, "loss": loss}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of models that go task by task
        theta_prime = amaml.adapt(
            model, theta, ALPHA, tasks.support_x[0], tasks.support_y[0], **options
        )
        state = amaml.init_state(model, ALPHA, BETA)
        found = [amaml.meta_gradient(model, theta, ALPHA, tasks, **options)]
        found += [amaml.meta_gradient(model, theta, ALPHA, tasks, recompute=True, **options)]
        stepped, metrics = amaml.meta_step(model, state, tasks, **options)
        measured = amaml.evaluate(model, state, tasks, **options)

        class Given:
            def sample(self, meta_batch_size, generator):
                return tasks

        config = amaml.RunConfig(
            alpha=ALPHA, beta=BETA, hyper_alpha=0.0, hyper_beta=0.0, iterations=2,
            inner_steps=inner_steps, meta_batch_size=2, validation_tasks=2,
        )  # fmt: skip
        own = {"name": "given", "model": model, "sampler": Given(), "loss": loss}
        run = amaml.train(config, tmp_path, progress=False, **own)
    for found_gradient, found_d_alpha, _ in found:
        assert relative_error(found_gradient, gradient) < close
        assert found_d_alpha.item() == pytest.approx(d_alpha.item(), rel=close)
    assert relative_error(theta_prime, first) < close
    expected = {n: theta[n] - BETA * gradient[n] for n in theta}
    assert relative_error(stepped.theta, expected) < close
    assert {n: p.dtype for n, p in stepped.theta.items()} == {n: p.dtype for n, p in theta.items()}
    assert metrics["query_loss"].item() == pytest.approx(mean.item(), rel=close)
    assert measured["query_loss"] == pytest.approx(mean.item(), rel=close)

    after = deepcopy(model)
    for name_, value in expected.items():
        after.get_parameter(name_).data = value
    second = plain(after, tasks, loss, inner_steps)
    losses = [mean.item(), second[3].item()]
    assert run.metrics["query_loss"].tolist() == pytest.approx(losses, rel=close)

    assert [n for n, _ in before] == list(model.state_dict())
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in before)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert type(model(tasks.support_x[0])) is type(deepcopy(model)(tasks.support_x[0]))


def test_accuracy_counts_every_position_of_a_dense_prediction():
    """Classes are dimension 1, as in torch: also where there are as many positions as classes."""
    for length in (5, 7):
        model = nn.Conv1d(2, 5, 3, padding=1).double()
        tasks = tasks_of((2, length), F.cross_entropy, (length,), torch.float64)
        measured = amaml.evaluate(model, amaml.init_state(model, 0.0, 0.0), tasks)
        right = model(tasks.query_x.flatten(0, 1)).argmax(1) == tasks.query_y.flatten(0, 1)
        assert measured["query_accuracy"] == pytest.approx(right.double().mean().item())


def test_a_model_that_goes_task_by_task_says_so_once():
    model, tasks = Recurrent(nn.LSTM), tasks_of((3, 4), F.cross_entropy, None, torch.float32)
    state = amaml.init_state(model, ALPHA, BETA)
    with pytest.warns(UserWarning, match="Recurrent goes task by task, since vmap cannot map it"):
        amaml.meta_step(model, state, tasks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        amaml.meta_step(model, state, tasks)
        amaml.evaluate(model, state, tasks)


def test_a_lack_of_memory_is_told_and_not_taken_for_a_model_that_cannot_be_mapped():
    class Greedy(nn.Linear):
        greedy = True

        def forward(self, x):
            return super().forward(x + (torch.ones(2**50).sum() if self.greedy else 0))

    model, tasks = Greedy(4, 3), tasks_of((4,), F.cross_entropy, None, torch.float32)
    state = amaml.init_state(model, ALPHA, BETA)
    with pytest.raises(RuntimeError, match="allocate"):
        amaml.meta_step(model, state, tasks)
    model.greedy = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        amaml.meta_step(model, state, tasks)


@pytest.mark.parametrize(
    "layer",
    [nn.LSTM(4, 5, 2, dropout=0.3), nn.MultiheadAttention(4, 2, 0.3), nn.Dropout2d(0.3)],
    ids=["LSTM", "attention", "dropout"],
)
def test_dropout_is_refused_wherever_it_is_but_in_eval_mode(layer):
    model = nn.Sequential(nn.Linear(4, 4), layer)
    with pytest.raises(ValueError, match=rf"1 is a {type(layer).__name__} with dropout, p=0.3"):
        amaml.init_state(model, ALPHA, BETA)
    amaml.init_state(model.eval(), ALPHA, BETA)


def test_an_error_of_the_users_own_model_is_told_as_it_is():
    class Broken(nn.Linear):
        def forward(self, x):
            raise RuntimeError("this is the user's own error")

    tasks = tasks_of((4,), F.cross_entropy, None, torch.float32)
    with pytest.raises(RuntimeError, match=r"^this is the user's own error$"):
        amaml.meta_step(Broken(4, 3), amaml.init_state(Broken(4, 3), ALPHA, BETA), tasks)


def test_what_fails_in_validation_fails_before_the_first_iteration(tmp_path):
    class Wide:
        def sample(self, meta_batch_size, generator):
            return tasks_of((5,), F.cross_entropy, None, torch.float32)

    class Narrow(Wide):
        def sample(self, meta_batch_size, generator):
            return tasks_of((4,), F.cross_entropy, None, torch.float32)

    own = {"name": "own", "model": nn.Linear(4, 3), "sampler": Narrow(), "progress": False}
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        amaml.train(amaml.RunConfig(), tmp_path, validation_sampler=Wide(), **own)
    assert not list(tmp_path.rglob("run.safetensors"))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("loss", [F.cross_entropy, lambda p, y: F.cross_entropy(2 * p, y)])
def test_evaluation_without_gradients_gives_the_same_numbers(mode, loss):
    network = amaml.OmniglotCNN(3, torch.Generator().manual_seed(0), filters=4)
    sampler = amaml.TaskSampler(amaml.load_glyphs(), n_way=3)
    for model in (network, nn.Sequential(nn.Flatten(), nn.Linear(784, 3))):
        state = amaml.init_state(model, ALPHA, BETA)
        tasks = sampler.sample(4, torch.Generator().manual_seed(0))
        expected = amaml.evaluate(model, state, tasks, loss=loss)
        with mode():
            tasks = sampler.sample(4, torch.Generator().manual_seed(0))
            assert amaml.evaluate(model, state, tasks, loss=loss) == pytest.approx(expected)
