"""Each figure's runs as plain data, by profile.

An experiment is a list of pairs (labels, config): the labels say where in the figure a run stands,
the config says all that determines its numbers.
"""

from __future__ import annotations

from amaml.config import RunConfig

Experiment = list[tuple[dict, RunConfig]]

PROFILES = {
    "quick": {
        "data": "glyphs",
        "meta_batch_size": 8,
        "filters": 32,
        "iterations": 150,
        "validation_tasks": 32,
    },
    "medium": {"data": "omniglot", "meta_batch_size": 32, "iterations": 1000},
}

# Starting rates (alpha, beta), for the mean cross-entropy and the mean over the tasks
CASES = {"good": (0.4, 0.3), "too small": (0.001, 0.001), "too large": (100.0, 0.3)}
HYPER_RATE = 1e-3  # of alpha and of beta, in all figures that do not vary it
SEEDS = (0, 1, 2)

TRIED_HYPER_RATES = (1e-4, 1e-3, 1e-2)
TRIAL_SEED = 100  # hyper rates are chosen on a seed that no figure shows
TRIAL_ITERATIONS = 100

TOO_LARGE = (
    *((0.4, 1.0), (0.4, 3.0), (0.4, 5.0), (0.4, 10.0), (0.4, 30.0)),  # beta
    *((10.0, 0.3), (30.0, 0.3), (100.0, 0.3)),  # alpha
    (10.0, 3.0),  # both
)
TOO_LARGE_ITERATIONS = 300


def figure_1(profile: str) -> Experiment:
    """A good and two bad pairs of starting rates; MAML beside Alpha MAML, several seeds."""
    return [
        run(profile, case, hyper_rate, seed=seed)
        for case in CASES
        for hyper_rate in (0.0, HYPER_RATE)
        for seed in SEEDS
    ]


def hyper_rates(profile: str) -> Experiment:
    """The trials that the hyper rates were chosen by: short runs on a seed of their own."""
    trial = {"seed": TRIAL_SEED, "iterations": TRIAL_ITERATIONS}
    return [
        run(profile, case, hyper_rate, **trial)
        for case in ("good", "too small")
        for hyper_rate in (0.0, *TRIED_HYPER_RATES)
    ]


def too_large(profile: str) -> Experiment:
    """Trials of many too large starts, on the trials' seed: where does Alpha MAML help?"""
    trial = {"seed": TRIAL_SEED, "iterations": TOO_LARGE_ITERATIONS}
    return [
        run(profile, "too large", hyper_rate, alpha=alpha, beta=beta, **trial)
        for alpha, beta in TOO_LARGE
        for hyper_rate in (0.0, HYPER_RATE)
    ]


def run(profile: str, case: str, hyper_rate: float, **fields) -> tuple[dict, RunConfig]:
    """One run of a profile from one of the CASES; a hyper rate of 0 is MAML."""
    alpha, beta = CASES[case]
    rates = {"alpha": alpha, "beta": beta, "hyper_alpha": hyper_rate, "hyper_beta": hyper_rate}
    labels = {"case": case, "method": "Alpha MAML" if hyper_rate else "MAML"}
    return labels, RunConfig(**PROFILES[profile] | rates | fields)


FIGURES = {"figure_1": figure_1, "hyper_rates": hyper_rates, "too_large": too_large}


def runs_of(figure: str, profile: str) -> Experiment:
    """The experiment of a figure by its name; ValueError for an unknown figure or profile."""
    for name, given, known in (("figure", figure, FIGURES), ("profile", profile, PROFILES)):
        if given not in known:
            raise ValueError(f"{name}={given!r}: known are {', '.join(known)}")
    return FIGURES[figure](profile)
