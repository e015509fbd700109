"""The figures' runs as data: what is promised of them, whatever their sizes."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from amaml.paper import experiments

GRIDS = [(profile, figure) for profile, grids in experiments.GRIDS.items() for figure in grids]
FIGURES = [(figure, profile) for figure in experiments.FIGURES for profile in experiments.PROFILES]
SHAPES = ("data", "n_way", "k_shot", "k_query", "filters", "meta_batch_size", "inner_steps")


@pytest.mark.parametrize("figure, profile", FIGURES)
def test_no_run_is_listed_twice_and_those_of_a_figure_share_their_shapes(figure, profile):
    labelled = experiments.runs_of(figure, profile)
    assert len({config.id for _, config in labelled}) == len(labelled)
    n_shapes = 3 if figure == "accuracy_settings" else 1
    shapes = {tuple(asdict(config)[name] for name in SHAPES) for _, config in labelled}
    assert len(shapes) == n_shapes
    for labels, config in labelled:
        assert (labels["method"] == "MAML") == (config.hyper_alpha == config.hyper_beta == 0)
        assert config.data == ("glyphs" if profile == "quick" else "omniglot")
        trial = figure in ("hyper_rates", "adam_hyper_rates", "too_large")
        assert (config.seed == experiments.TRIAL_SEED) == trial


@pytest.mark.parametrize("profile, figure", GRIDS)
def test_a_grid_has_all_its_cells_for_each_pair_of_hyper_rates_and_each_seed(profile, figure):
    configs = [config for _, config in experiments.runs_of(figure, profile)]
    sides = [{config.alpha for config in configs}, {config.beta for config in configs}]
    hypers = {(config.hyper_alpha, config.hyper_beta) for config in configs}
    seeds = {config.seed for config in configs}
    assert sides[0] == sides[1] and (0.0, 0.0) in hypers
    assert len(configs) == len(sides[0]) ** 2 * len(hypers) * len(seeds)
    assert {config.threshold for config in configs} == {experiments.THRESHOLD}
    first = configs[: len(configs) // len(seeds)]
    assert {config.seed for config in first} == {0}  # a part of the runs is a whole grid


def test_the_grids_are_as_large_as_promised():
    for profile, cells, pairs in (("quick", 4, 2), ("medium", 7, 4), ("paper", 9, 4)):
        grid = experiments.GRIDS[profile]["figures_2_3"]
        assert len(grid["rates"]) >= cells and len(set(grid["hyper_rates"])) >= pairs
    rates = experiments.GRIDS["medium"]["figures_2_3"]["rates"]
    assert (min(rates), max(rates)) == (1e-4, 1.0)


@pytest.mark.parametrize("profile", experiments.PROFILES)
def test_the_appendix_varies_what_its_captions_say(profile):
    configs = {
        number: [config for _, config in experiments.runs_of(f"appendix_{number}", profile)]
        for number in range(1, 8)
    }
    for number in (1, 3):
        assert {(c.n_way, c.k_shot, c.k_query) for c in configs[number]} == {(5, 5, 5)}
    assert {(c.n_way, c.k_shot) for c in configs[2]} == {(20, 1)}
    assert len({(c.alpha, c.beta) for c in configs[4]}) == 1
    varied = {c.hyper_alpha for c in configs[4]}
    assert {(c.hyper_alpha, c.hyper_beta) for c in configs[4]} == {
        (a, b) for a in varied for b in varied
    }
    assert len({(c.alpha, c.beta) for c in configs[5]}) >= 9
    assert all(c.hyper_alpha > 0 and c.threshold is None for c in configs[5])
    assert {c.inner_steps for c in configs[6]} == {5}
    assert {c.meta_optimizer for c in configs[7]} == {"adam"}
    for number in (1, 2, 6, 7):
        labels = [label for label, _ in experiments.runs_of(f"appendix_{number}", profile)]
        assert {(label["case"], label["method"]) for label in labels} == {
            (case, method)
            for case in ("good", "too small", "too large")
            for method in ("MAML", "Alpha MAML")
        }
