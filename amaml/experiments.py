"""Each figure's runs as plain data, by profile.

An experiment is a pair (labels, config): the labels say where in the figure a run stands, the
config says all that determines its numbers.
"""

from __future__ import annotations

from amaml.training import RunConfig

PROFILES = {
    "quick": {
        "data": "glyphs",
        "meta_batch_size": 8,
        "filters": 32,
        "iterations": 200,
        "validation_tasks": 32,
    },
    "medium": {"data": "omniglot", "meta_batch_size": 32, "iterations": 1000},
}

FIGURE_1_CASES = {  # starting rates (alpha, beta), for the mean cross-entropy and the mean of tasks
    "good": (0.4, 0.3),
    "too small": (0.001, 0.001),
    "too large": (100.0, 0.3),
}
FIGURE_1_SEEDS = {"quick": (0, 1, 2), "medium": (0, 1, 2)}
HYPER_RATES = {"quick": (1e-3, 1e-3), "medium": (1e-3, 1e-3)}  # (hyper_alpha, hyper_beta)
METHODS = ("MAML", "Alpha MAML")


def figure_1(profile: str) -> list[tuple[dict, RunConfig]]:
    """A good and two bad pairs of starting rates; MAML beside Alpha MAML, several seeds."""
    check_profile(profile)
    runs = []
    for case, (alpha, beta) in FIGURE_1_CASES.items():
        for method in METHODS:
            hyper_alpha, hyper_beta = HYPER_RATES[profile] if method == "Alpha MAML" else (0, 0)
            for seed in FIGURE_1_SEEDS[profile]:
                config = RunConfig(
                    **PROFILES[profile],
                    alpha=alpha,
                    beta=beta,
                    hyper_alpha=hyper_alpha,
                    hyper_beta=hyper_beta,
                    seed=seed,
                )
                runs.append(({"case": case, "method": method}, config))
    return runs


FIGURES = {"figure_1": figure_1}


def runs_of(figure: str, profile: str) -> list[tuple[dict, RunConfig]]:
    """The experiments of a figure by its name; ValueError for an unknown figure or profile."""
    if figure not in FIGURES:
        raise ValueError(f"figure={figure!r}: known are {', '.join(FIGURES)}")
    return FIGURES[figure](profile)


def check_profile(profile: str) -> None:
    if profile not in PROFILES:
        raise ValueError(f"profile={profile!r}: known are {', '.join(PROFILES)}")
