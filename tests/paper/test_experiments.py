"""The figures' runs as data: what is promised of them, and that they stay the same."""

import hashlib
import json
from collections import Counter
from dataclasses import asdict

import pytest

from amaml.paper import experiments, settings

SHAPES = ("data", "n_way", "k_shot", "k_query", "filters", "meta_batch_size", "inner_steps")
# Of ids and labels, by figure, in the profiles quick, medium and paper: who means to change a
# figure's runs changes its hashes here.
FROZEN = {
    "figure_1": "f82133af2eeb610d 2d43178fa58c1e12 7512cb601025c093",
    "figure_1_scale_free": "38dbfa526726a97a 050461913c7a45e8 1b1c03b623779496",
    "far_too_large": "2f826a3138630c16 f2614b912292cacf 1208be731cc56866",
    "figures_2_3": "2ab3c3d52e134494 46992741ce4e7169 4a2b79ddb8c72125",
    "choice": "e9e7f587718e2574 16d72ed117678a24 e678100830943bb8",
    "appendix_1": "2f6973fc851c59c5 1d85f59d285f0e88 5a11e7c5ce18407d",
    "appendix_2": "809a5b44753f776f 02122cb8920b74f3 f6a2e6046d74006e",
    "appendix_3": "50fda2750d02388b 2efa120324c53b54 133b72e2ff3acd22",
    "appendix_4": "d4bfeedc4eba75f2 0cb11effd77461b3 5e79472f6052f04c",
    "appendix_5": "4af55f953e6c4759 ddb5fdc0b4e69805 cc5391313b1f240b",
    "appendix_6": "985b69f8f38c04e2 20823fae2a433c8d d420138cc1f04a49",
    "appendix_7": "774f1137d32b7e89 8ddc742463f118b7 b9b8ba8e9818b704",
    "accuracy": "39dc82df8261a714 80405511ea99f1b6 05ddbbbf2cbeaf5f",
    "accuracy_settings": "cae827071143653c f88ff2ec0b280752 932510f6e81a227a",
    "rules": "f796766cc546cacb f65a321ca33272b1 4f741d011f3f53c6",
    "rules_sinusoids": "b3ebd21535c48d22 1b3bc78261cb1306 1b3bc78261cb1306",
    "starts": "0429e14c40a90aae 1a8ea5dc3d3e28d7 7218c445a2bc167d",
    "starts_glyphs": "88f21d5249c027a8 33f54ecccd51b679 22c87bbfed99a36d",
    "starts_sinusoids": "15374403b2b14293 f6511eee86b57324 5aebaeb36c6880be",
    "starts_5_steps": "f74a1a3ecf0adb9d 49eac159a8d3bb3f 744ecc195b29c8e8",
    "starts_5_shot": "147768e3ea9ce32e 34c24d6f50479400 9595f33f814b8b56",
    "starts_20_way": "9adf6b85abbdeee4 e99b7ed31c0698bf 1a866a5b17957be3",
}
EVERY = [(figure, profile) for figure in experiments.FIGURES for profile in settings.PROFILES]


def configs_of(figure, profile):
    return [run.config for run in experiments.runs_of(figure, profile)]


@pytest.mark.parametrize("figure, profile", EVERY)
def test_the_runs_of_a_figure_stay_the_same(figure, profile):
    runs = experiments.runs_of(figure, profile)
    told = [(run.config.id, dict(sorted(run.labels.items()))) for run in runs]
    place = list(settings.PROFILES).index(profile)
    digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    assert digest[:16] == FROZEN[figure].split()[place]


@pytest.mark.parametrize("figure, profile", EVERY)
def test_no_run_is_listed_twice_and_those_of_a_figure_share_their_shapes(figure, profile):
    runs = experiments.runs_of(figure, profile)
    assert len({(run.config, run.parts) for run in runs}) == len(runs)
    shapes = {tuple(asdict(run.config)[name] for name in SHAPES) for run in runs}
    assert len(shapes) == (3 if figure == "accuracy_settings" else 1)
    for labels, config, parts in runs:
        still = config.hyper_alpha == config.hyper_beta == 0
        assert still == (labels["method"] == "MAML" or labels["method"] in experiments.PARTS)
        glyphs = profile == "quick" or figure == "starts_glyphs"
        assert config.data == ("glyphs" if glyphs else "omniglot")
        assert (config.seed >= 100_000) == figure.startswith(
            ("choice", "rules")
        )  # what is chosen is chosen on starts of its own
        assert parts == "" or parts in experiments.PARTS


@pytest.mark.parametrize("figure", ["figures_2_3", "appendix_3"])
@pytest.mark.parametrize("profile", settings.PROFILES)
def test_a_grid_has_all_its_cells_for_each_pair_of_hyper_rates_and_each_seed(profile, figure):
    configs = configs_of(figure, profile)
    sides = [{config.alpha for config in configs}, {config.beta for config in configs}]
    pairs = {(config.hyper_alpha, config.hyper_beta) for config in configs}
    seeds = {config.seed for config in configs}
    assert sides[0] == sides[1] and (0.0, 0.0) in pairs
    assert len(configs) == len(sides[0]) ** 2 * len(pairs) * len(seeds)
    assert {config.threshold for config in configs} == {None}  # no run stops at it
    first = configs[: len(configs) // len(seeds)]
    assert {config.seed for config in first} == {0}  # a part of the runs is a whole grid


@pytest.mark.parametrize("profile", settings.PROFILES)
def test_the_appendix_varies_what_its_captions_say(profile):
    configs = {number: configs_of(f"appendix_{number}", profile) for number in range(1, 8)}
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
        labels = [run.labels for run in experiments.runs_of(f"appendix_{number}", profile)]
        assert {(label["case"], label["method"]) for label in labels} == {
            (case, method)
            for case in ("good", "too small", "too large")
            for method in ("MAML", "Alpha MAML")
        }


@pytest.mark.parametrize("profile", settings.PROFILES)
@pytest.mark.parametrize("figure", settings.N_STARTS)
def test_random_starts_are_paired_by_start_and_seed(figure, profile):
    runs = experiments.runs_of(figure, profile)
    slow, first, last = settings.N_STARTS[figure][profile]
    counts = Counter(run.labels["variant"] for run in runs)
    more = settings.MAIN if last > first else counts
    assert all(
        counts[v] == (slow if v in settings.SLOW else last if v in more else first) for v in counts
    )
    plain = {r.labels["start"]: r.config for r in runs if r.labels["variant"] == "plain"}
    for run in runs:
        paired = plain[run.labels["start"]]
        assert run.config.seed == paired.seed
        assert run.config.alpha == pytest.approx(paired.alpha, rel=2e-6)
        assert run.config.beta == paired.beta or run.config.meta_optimizer == "adam"
        assert all(1e-4 <= rate <= 10 for rate in (paired.alpha, paired.beta))


def test_grids_publish_fewer_rows_of_a_run_and_starts_the_fewest():
    rows = [experiments.max_rows(figure) for figure in ("figure_1", "figures_2_3", "starts")]
    assert rows[0] > rows[1] > rows[2]


def test_an_unknown_figure_or_profile_is_refused_by_name():
    with pytest.raises(ValueError, match="figure='figure_9': known are figure_1, "):
        experiments.runs_of("figure_9", "quick")
    with pytest.raises(ValueError, match="profile='large': known are quick, medium, paper"):
        experiments.runs_of("figure_1", "large")
