"""The rules that were tried, each against the core or a computation by hand."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers import batches, relative_error, small_model

import amaml
from amaml.paper import experiments, tried_rules
from amaml.paper.tried_rules import ELASTICITY, TriedRule, adagrad

RATES = {"hyper_alpha": 0.7, "hyper_beta": 1.3}


def three_steps(step, state, **hyper_rates):
    for tasks in batches(3):
        state, metrics = step(small_model(), state, tasks, **hyper_rates)
    return state, metrics


def steps_of(normalise, slopes):
    memory, steps = torch.zeros(2, dtype=torch.float64), []
    for t, slope in enumerate(slopes, 1):
        one = torch.tensor(1.0, dtype=torch.float64)
        step, memory = normalise(slope * one, memory, t * one)
        steps.append(float(step))
    return steps


def test_a_rule_is_told_alike_in_every_process_so_that_its_runs_are_resumed():
    words = "from amaml.paper.experiments import PARTS; from amaml.runs.parts import Parts;"
    words += "print(Parts('RMS', **PARTS['RMS']).in_words(None))"
    told = {subprocess.check_output([sys.executable, "-c", words], text=True) for _ in range(2)}
    assert len(told) == 1 and "function running" in told.pop()


def test_its_parts_put_together_are_the_scale_free_rule():
    start = amaml.init_state(small_model(), 0.3, 0.2, rule="scale-free")
    expected, metrics = three_steps(amaml.meta_step, start, **RATES)
    rule = TriedRule(ELASTICITY, ("summed cosine", adagrad))
    state, found = three_steps(rule, rule.begin(start, amaml.RunConfig()), **RATES)
    assert relative_error(state.theta, expected.theta) < 1e-9
    assert relative_error(state.direction, expected.direction) < 1e-9
    for name in metrics:
        assert found[name].item() == pytest.approx(metrics[name].item(), rel=1e-9), name


def test_the_additive_one_without_the_bound_is_the_papers():
    start = amaml.init_state(small_model(), 0.3, 0.2)
    rates = {"hyper_alpha": 0.01, "hyper_beta": 0.02}
    expected, _ = three_steps(amaml.meta_step, start, **rates)
    rule = TriedRule(additive=True, bounded=False)
    state, _ = three_steps(rule, rule.begin(start, amaml.RunConfig()), **rates)
    assert relative_error(state.theta, expected.theta) < 1e-9
    assert state.alpha.item() == pytest.approx(expected.alpha.item(), rel=1e-9)


def test_the_bound_holds_theta_to_a_tenth_of_its_norm():
    rule, (tasks,) = tried_rules.TRIED["MAML-bounded"], batches(1)
    start = amaml.init_state(small_model(), 0.3, 1e4)
    state, _ = rule(
        small_model(), rule.begin(start, amaml.RunConfig()), tasks, hyper_alpha=0.0, hyper_beta=0.0
    )
    moved = sum(((state.theta[n] - p) ** 2).sum() for n, p in start.theta.items())
    whole = sum((p**2).sum() for p in start.theta.values())
    assert math.sqrt(moved / whole) == pytest.approx(0.1, rel=1e-9)
    assert state.alpha.item() == start.alpha.item()


def test_normalisers_by_hand():
    assert steps_of(adagrad, [3, 4]) == pytest.approx([1, 4 / 5])
    # the mean of squares, unbiased: 9, then (0.09 * 9 + 0.1 * 16) / 0.19
    second = 4 / math.sqrt((0.09 * 9 + 0.1 * 16) / 0.19) / math.sqrt(2)
    assert steps_of(tried_rules.running, [3, 4]) == pytest.approx([1, second])
    expected = [0, 1, 1, -0.5, -0.6]  # from the first slope on; at most 1; halved at a turn
    assert steps_of(tried_rules.rprop, [0, 2, 5, -1, -3]) == pytest.approx(expected)
    opposed = (0.09 * 2 - 0.1 * 2) / 0.19 / math.sqrt((0.09 * 4 + 0.1 * 4) / 0.19)
    expected = [1, -(opposed**2)]
    assert steps_of(tried_rules.signal_to_noise, [2, -2]) == pytest.approx(expected)
    assert steps_of(tried_rules.plain, [0.3]) == [pytest.approx(0.3)]


def test_every_rule_makes_a_run(tmp_path):
    for figure, problem in (("rules", ""), ("rules_sinusoids", "sinusoids-")):
        config = replace(experiments.runs_of(figure, "quick")[0].config, iterations=3)
        for rule in tried_rules.TRIED:
            own = experiments.PARTS[problem + rule]
            run = amaml.train(config, tmp_path, name=problem + rule, progress=False, **own)
            assert run.status in ("done", "diverged") and len(run.metrics) <= 3
