"""The experiments over random starts: their pictures, and the problem without images."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import amaml
from amaml.paper import characters, claims, experiments, sinusoids, starts_figures


@pytest.fixture
def table() -> pd.DataFrame:
    """Two lines from six starts, with two rows per run; one run diverged."""
    rows = []
    for line, hyper_rate in (("plain", 0.0), ("h = 0.001", 1e-3)):
        for start in range(6):
            lost = line == "plain" and start == 0
            loss = math.inf if lost else 0.5 + 0.2 * start + (line == "plain")
            first = (f"{line}{start}", line, start, 0.01, 0.1 * 2.0**start, hyper_rate)
            status = "diverged" if lost else "finished"
            rows += [(*first, 1, math.nan, 0.01, 0.1, -100.0, status)]
            rows += [(*first, 200, loss, 0.01 + 100 * hyper_rate, 0.1, 1.0, status)]
    names = ["run", "variant", "start", "alpha_0", "beta_0", "hyper_alpha", "iteration"]
    names += ["validation_loss", "alpha", "beta", "d_alpha", "status"]
    return pd.DataFrame(rows, columns=names)


def test_profiles_rise_and_the_best_of_more_trials_is_lower(table):
    losses = claims.final_losses(table, math.log(5))
    figure = starts_figures.tuning(losses, ["plain", "h = 0.001"], math.log(5))
    profiles, trials = figure.axes
    for line in profiles.lines[:2]:
        assert (np.diff(line.get_ydata()) >= 0).all()
    for line in trials.lines[:2]:
        assert (np.diff(line.get_ydata()) <= 0).all()
    ours, theirs = trials.lines[1].get_ydata(), trials.lines[0].get_ydata()
    assert ours[0] == pytest.approx(1.0) and (ours < theirs).all()


def test_a_map_has_a_dot_per_start_and_a_cross_where_a_run_diverged(table):
    ends = claims.final_validation(table, 50)
    figure = starts_figures.maps(ends, ["plain", "h = 0.001"], math.log(5))
    plain, ours, _ = figure.axes
    assert len(plain.collections[0].get_offsets()) == 6
    assert plain.lines[0].get_ydata().tolist() == [0.1] and len(ours.lines[0].get_ydata()) == 0


def test_the_first_jump_of_alpha_by_hand(table):
    jumped = starts_figures.first_jump(table[table["variant"] == "h = 0.001"])
    assert jumped["jumped"].tolist() == pytest.approx([0.01 + 1e-3 * 100] * 6)
    (axis,) = starts_figures.jumps(table, ["h = 0.001"]).axes
    assert sum(len(dots.get_xdata()) for dots in axis.lines[1:]) == 6


def test_a_positive_hypergradient_lowers_alpha_and_a_diverged_run_has_no_end(table):
    table.loc[table["iteration"] == 1, "d_alpha"] = 4.0
    assert starts_figures.first_jump(table)["jumped"].iloc[-1] == pytest.approx(0.01 - 0.004)
    ends = starts_figures.first_jump(table)["alpha"]
    assert np.isnan(ends["plain0"]) and ends.notna().sum() == 11


def test_paths_have_alpha_of_the_second_iteration_also_where_it_is_not_on_record(table):
    alpha, beta = starts_figures.paths(table.assign(beta=table["beta_0"]), "h = 0.001").axes
    assert alpha.lines[0].get_xdata().tolist() == [1, 2, 200]
    assert alpha.lines[0].get_ydata()[1] == pytest.approx(0.11)
    assert beta.lines[0].get_xdata().tolist() == [1, 200]
    start = dict(zip(("small", "middle", "large"), starts_figures.GROUPS.values(), strict=True))
    colours = [line.get_color() for line in beta.lines]  # from 0.1, 0.2, ... 3.2
    assert colours == [start["middle"]] * 4 + [start["large"]] * 2


def test_shares_by_bins_by_hand():
    x = pd.Series([1.0, 2.0, 10.0, *[50.0] * 10])
    hits = pd.Series([True, False, True, *[True] * 8, False, False])
    binned = starts_figures.binned_shares(x, hits, (1, 10, 100, 1000))
    # The first x is at the lower edge, outside; the last bin is empty
    assert binned["runs"].tolist() == [2, 10] and binned["share"].tolist() == [0.5, 0.8]
    assert binned.index.tolist() == pytest.approx([10**0.5, 10**1.5])
    assert binned["low"].iloc[1] == pytest.approx(0.4439, abs=1e-4)  # Clopper and Pearson (1934)
    assert binned["high"].iloc[1] == pytest.approx(0.9748, abs=1e-4)


def test_rank_correlation_by_hand_and_along_an_axis():
    x, y = np.array([1.0, 5.0, 7.0, 100.0]), np.array([3.0, 2.0, 8.0, 9.0])
    # Ranks 1 2 3 4 and 2 1 3 4: 1 - 6 (1 + 1) / (4 (16 - 1)) = 0.8
    assert starts_figures.rank_correlation(x, y) == pytest.approx(0.8)
    both = starts_figures.rank_correlation(np.stack([x, x]), np.stack([y, -y]))
    assert both.tolist() == pytest.approx([0.8, -0.8])


def test_sinusoids_lie_on_one_curve_per_task_and_guessing_is_their_mean_square():
    tasks = sinusoids.Sinusoids().sample(5000, torch.Generator().manual_seed(0))
    x = torch.cat([tasks.support_x, tasks.query_x], 1)[:20].double()
    y = torch.cat([tasks.support_y, tasks.query_y], 1)[:20].double()
    waves = torch.cat([torch.sin(x), torch.cos(x)], -1)  # A sin(x - phase) is a sum of the two
    fitted = waves @ torch.linalg.lstsq(waves, y).solution
    torch.testing.assert_close(fitted, y, rtol=0, atol=1e-4)
    assert float(tasks.query_y.square().mean()) == pytest.approx(sinusoids.GUESSING, rel=0.05)
    first, again = sinusoids.network(3), sinusoids.network(3)
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)
    )
    assert not torch.equal(first[0].weight, sinusoids.network(4)[0].weight)


def test_a_sinusoid_run_of_the_study_goes_by_its_rule(tmp_path):
    plans = experiments.runs_of("starts_sinusoids", "quick")
    (plan, *_) = [plan for plan in plans if plan.labels["variant"] == "scale-free"]
    config = replace(plan.config, iterations=4)
    run = amaml.train(config, tmp_path, name=plan.parts, **experiments.PARTS[plan.parts])
    assert run.status == "done" and "slopes" in run.state.moments
    steps = np.diff(np.log(run.metrics["alpha"]))
    assert abs(steps[0]) == pytest.approx(1, rel=1e-5) and (np.abs(steps) <= 1.0001).all()


def test_without_omniglot_the_glyphs_stand_in_and_say_so(monkeypatch, capsys):
    monkeypatch.setattr(characters, "omniglot_is_missing", lambda: True)
    given, _, profile = characters.load_characters("medium")
    assert profile == "quick" and given.names == amaml.load_glyphs().names
    assert capsys.readouterr().out.strip()
