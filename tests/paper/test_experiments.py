"""The figures' runs as data: what is promised of them, and that they stay the same."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

import pytest

from amaml.paper import experiments, settings

SHAPES = ("data", "n_way", "k_shot", "k_query", "filters", "meta_batch_size", "inner_steps")
# Of ids and labels, by figure, in the profiles quick, medium and paper: who means to change a
# figure's runs changes its hashes here.
FROZEN = {
    "figure_1": "f82133af2eeb610d b46622028ba6a875 7512cb601025c093",
    "far_too_large": "2f826a3138630c16 2c668c0b9e4e8679 1208be731cc56866",
    "figures_2_3": "25fd7f9de1c24ae8 80f0ab4378984c9e 850563942dcb9b9c",
    "hyper_rates": "5587162eef04433c 1616415c75a2df20 1616415c75a2df20",
    "adam_hyper_rates": "d8de51e1fbb2797e 33cd2f5b803c1d5a 40059cb7c86c5c5c",
    "too_large": "b6e09aa99f080e8f 136ded5924ace320 136ded5924ace320",
    "appendix_1": "2f6973fc851c59c5 1d85f59d285f0e88 5a11e7c5ce18407d",
    "appendix_2": "809a5b44753f776f 7d4a3f14569620cc f6a2e6046d74006e",
    "appendix_3": "a5da7377a3644b33 c6c817ed7259bf4e 8bcd86f91f4222c0",
    "appendix_4": "cf65e4559ddeb448 7294c33ec1c45361 88037e80ef6d08b0",
    "appendix_5": "4af55f953e6c4759 fd36d0f251d0bd52 b417bcf3fa9f6727",
    "appendix_6": "985b69f8f38c04e2 2ee464609fb0ab51 d420138cc1f04a49",
    "appendix_7": "774f1137d32b7e89 8ddc742463f118b7 b9b8ba8e9818b704",
    "accuracy": "d4b118bb68745ba9 bf22b62d7a0273f0 96a7ec1539a9c6a9",
    "accuracy_settings": "cae827071143653c f88ff2ec0b280752 932510f6e81a227a",
    "starts": "850a8286176706ef b26e2d23d2dcbd11 f4717c62cabbd659",
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
        assert config.data == ("glyphs" if profile == "quick" else "omniglot")
        assert (config.seed in settings.TRIAL) == (figure in settings.TRIALS)
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
    assert {config.threshold for config in configs} == {settings.THRESHOLD}
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
def test_random_starts_are_paired_by_start_and_seed(profile):
    runs = [
        run for run in experiments.runs_of("starts", profile) if run.labels["variant"] != "Adam"
    ]
    _, last = settings.N_STARTS[profile]
    assert len({run.config.seed for run in runs}) == last
    plain = {r.labels["start"]: r.config for r in runs if r.labels["variant"] == "plain"}
    for run in runs:
        paired = plain[run.labels["start"]]
        assert (run.config.seed, run.config.beta) == (paired.seed, paired.beta)
        assert run.config.alpha == pytest.approx(paired.alpha, rel=2e-6)
        assert all(1e-4 <= rate <= 10 for rate in (paired.alpha, paired.beta))


def test_grids_publish_fewer_rows_of_a_run_and_starts_the_fewest():
    rows = [experiments.max_rows(figure) for figure in ("figure_1", "figures_2_3", "starts")]
    assert rows[0] > rows[1] > rows[2]


def test_an_unknown_figure_or_profile_is_refused_by_name():
    with pytest.raises(ValueError, match="figure='figure_9': known are figure_1, "):
        experiments.runs_of("figure_9", "quick")
    with pytest.raises(ValueError, match="profile='large': known are quick, medium, paper"):
        experiments.runs_of("figure_1", "large")
