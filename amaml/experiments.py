"""Each figure's runs as plain data, by profile.

An experiment is a list of pairs (labels, config): the labels say where in the figure a run stands,
the config says all that determines its numbers.
"""

from __future__ import annotations

from itertools import product

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

RUNS_PER_BATCH = {"quick": 8, "medium": 1}  # small runs gain from being made together

# Starting rates (alpha, beta), for the mean cross-entropy and the mean over the tasks
CASES = {"good": (0.4, 0.3), "too small": (0.001, 0.001), "too large": (0.4, 3.0)}
FAR_TOO_LARGE = (100.0, 0.3)
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

# Figures 2 and 3 and those like them count the iterations until the validation loss is first at
# most this. All of them are 5-way: guessing is at ln 5 = 1.61.
THRESHOLD = 1.0

# What sets the figures after Figure 1 apart, in every profile
COUNTING = {"threshold": THRESHOLD, "validation_every": 5}
FIVE_SHOT = {"k_shot": 5, "k_query": 5, "validation_tasks": 16}  # of 25 query images each
SETTINGS = {
    "figures_2_3": COUNTING,
    "appendix_1": FIVE_SHOT,
    "appendix_2": {"n_way": 20, "validation_tasks": 16},
    "appendix_3": FIVE_SHOT | COUNTING,
    "appendix_4": COUNTING,
    "appendix_5": {},
    "appendix_6": {"inner_steps": 5},
    "appendix_7": {"meta_optimizer": "adam"},
}

# Their sizes: meta-batch, iterations at most, seeds. The medium ones are made for two cores.
SIZES = {
    "quick": {
        "figures_2_3": (8, 70, (0, 1)),
        "appendix_1": (4, 40, (0,)),
        "appendix_2": (4, 40, (0,)),
        "appendix_3": (4, 20, (0,)),
        "appendix_4": (8, 40, (0,)),
        "appendix_5": (8, 60, (0,)),
        "appendix_6": (4, 40, (0,)),
        "appendix_7": (8, 60, (0,)),
    },
    "medium": {
        "figures_2_3": (8, 200, SEEDS),
        "appendix_1": (8, 200, SEEDS),
        "appendix_2": (8, 200, SEEDS),
        "appendix_3": (4, 100, (0,)),
        "appendix_4": (8, 200, SEEDS),
        "appendix_5": (8, 400, (0,)),
        "appendix_6": (8, 200, SEEDS),
        "appendix_7": (8, 300, SEEDS),
    },
}

# The grids: each of these rates as alpha_0 and as beta_0, under each hyper rate, which is that of
# alpha and of beta alike
DECADES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
GRIDS = {
    "quick": {
        "figures_2_3": {"rates": (1e-3, 1e-2, 0.1, 0.5), "hyper_rates": (1e-3, 1e-2)},
        "appendix_3": {"rates": (1e-3, 1e-2, 0.1, 0.5), "hyper_rates": (1e-3,)},
    },
    "medium": {
        "figures_2_3": {
            "rates": (1e-4, 4.6e-4, 2.2e-3, 1e-2, 4.6e-2, 0.22, 1.0),
            "hyper_rates": (1e-4, 1e-3, 1e-2, 1e-1),
        },
        "appendix_3": {"rates": DECADES, "hyper_rates": (1e-3, 1e-2)},
    },
}
ONE_START = CASES["too small"]  # of the figure that varies h_alpha and h_beta apart
VARIED_HYPER_RATES = {
    "quick": (0.0, 1e-4, 1e-3, 1e-2),
    "medium": (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
}
PATH_STARTS = {"quick": (1e-3, 1e-2, 0.5), "medium": DECADES[1:]}

# With Adam beta is the step of each parameter, so other rates are good, too small and too large.
ADAM_CASES = {"good": (0.4, 1e-2), "too small": (1e-3, 1e-5), "too large": (0.4, 1.0)}
ADAM_HYPER_RATES = (HYPER_RATE, 1e-5)
TRIED_ADAM_HYPER_RATES = (1e-7, 1e-6, 1e-5, 1e-4)  # of beta

POINTS = 500  # rows a run that are published, at most
POINTS_IN_A_GRID = 40


def figure_1(profile: str) -> Experiment:
    """A good and two bad pairs of starting rates; MAML beside Alpha MAML, several seeds."""
    return behaviour(profile, seeds=SEEDS)


def figures_2_3(profile: str) -> Experiment:
    """Iterations until the threshold, over a grid of starting rates; 5-way 1-shot."""
    return grid("figures_2_3", profile)


def appendix_1(profile: str) -> Experiment:
    """Figure 1 for 5-way 5-shot."""
    return behaviour(profile, **sizes("appendix_1", profile))


def appendix_2(profile: str) -> Experiment:
    """Figure 1 for 20-way 1-shot."""
    return behaviour(profile, **sizes("appendix_2", profile))


def appendix_3(profile: str) -> Experiment:
    """The grid for 5-way 5-shot."""
    return grid("appendix_3", profile)


def appendix_4(profile: str) -> Experiment:
    """From one bad start: all pairs of h_alpha and h_beta, with zeros; both zero is MAML."""
    size, varied = sizes("appendix_4", profile), VARIED_HYPER_RATES[profile]
    return [
        run(profile, ONE_START, hyper_rates, seed=seed, **size)
        for seed in size.pop("seeds")
        for hyper_rates in product(varied, varied)
    ]


def appendix_5(profile: str) -> Experiment:
    """The paths of alpha and beta from many starts."""
    size, starts = sizes("appendix_5", profile), PATH_STARTS[profile]
    return [
        run(profile, start, (HYPER_RATE, HYPER_RATE), seed=seed, **size)
        for seed in size.pop("seeds")
        for start in product(starts, starts)
    ]


def appendix_6(profile: str) -> Experiment:
    """Figure 1 with five inner steps."""
    return behaviour(profile, **sizes("appendix_6", profile))


def appendix_7(profile: str) -> Experiment:
    """Figure 1 with Adam as the meta-optimiser, of MAML and Alpha MAML alike."""
    size = sizes("appendix_7", profile)
    return behaviour(profile, cases=ADAM_CASES, hyper_rates=ADAM_HYPER_RATES, **size)


def hyper_rates(profile: str) -> Experiment:
    """The trials that the hyper rates were chosen by: short runs on a seed of their own."""
    trial = {"seed": TRIAL_SEED, "iterations": TRIAL_ITERATIONS}
    return [
        run(profile, CASES[case], (rate, rate), {"case": case}, **trial)
        for case in ("good", "too small")
        for rate in (0.0, *TRIED_HYPER_RATES)
    ]


def adam_hyper_rates(profile: str) -> Experiment:
    """The same trials for the hyper rate of beta with Adam."""
    size = sizes("appendix_7", profile)
    del size["seeds"]
    trial = {"seed": TRIAL_SEED, "iterations": min(TRIAL_ITERATIONS, size["iterations"])}
    return [
        run(profile, ADAM_CASES[case], rates, {"case": case}, **size | trial)
        for case in ("good", "too small")
        for rates in ((0.0, 0.0), *((HYPER_RATE, rate) for rate in TRIED_ADAM_HYPER_RATES))
    ]


def far_too_large(profile: str) -> Experiment:
    """Figure 1 once more, from a still larger start."""
    return behaviour(profile, seeds=SEEDS, cases={"far too large": FAR_TOO_LARGE})


def too_large(profile: str) -> Experiment:
    """Trials of many too large starts, on the trials' seed: where does Alpha MAML help?"""
    trial = {"seed": TRIAL_SEED, "iterations": TOO_LARGE_ITERATIONS}
    return [
        run(profile, start, (rate, rate), {"case": "too large"}, **trial)
        for start in TOO_LARGE
        for rate in (0.0, HYPER_RATE)
    ]


def behaviour(
    profile: str, *, seeds, cases=CASES, hyper_rates=(HYPER_RATE, HYPER_RATE), **fields
) -> Experiment:
    """MAML beside Alpha MAML from each case: the runs of Figure 1, and of those like it."""
    return [
        run(profile, start, rates, {"case": case}, seed=seed, **fields)
        for case, start in cases.items()
        for rates in ((0.0, 0.0), hyper_rates)
        for seed in seeds
    ]


def grid(figure: str, profile: str) -> Experiment:
    """MAML and Alpha MAML over a grid of GRIDS; seed by seed, so that a part is a whole grid."""
    size, rates = sizes(figure, profile), GRIDS[profile][figure]["rates"]
    return [
        run(profile, start, (rate, rate), seed=seed, **size)
        for seed in size.pop("seeds")
        for rate in (0.0, *GRIDS[profile][figure]["hyper_rates"])
        for start in product(rates, rates)
    ]


def sizes(figure: str, profile: str) -> dict:
    """The fields of a figure's runs by SETTINGS and SIZES, and its seeds."""
    meta_batch_size, iterations, seeds = SIZES[profile][figure]
    size = {"meta_batch_size": meta_batch_size, "iterations": iterations, "validation_tasks": 32}
    return size | SETTINGS[figure] | {"seeds": seeds}


def run(
    profile: str,
    start: tuple[float, float],
    hyper_rates: tuple[float, float],
    labels: dict | None = None,
    **fields,
) -> tuple[dict, RunConfig]:
    """One run of a profile from (alpha, beta); hyper rates of 0 are MAML."""
    names = ("alpha", "beta", "hyper_alpha", "hyper_beta")
    rates = dict(zip(names, (*start, *hyper_rates), strict=True))
    method = {"method": "Alpha MAML" if any(hyper_rates) else "MAML"}
    return (labels or {}) | method, RunConfig(**PROFILES[profile] | rates | fields)


FIGURES = {
    experiment.__name__: experiment
    for experiment in (
        *(figure_1, far_too_large, figures_2_3, hyper_rates, adam_hyper_rates, too_large),
        *(appendix_1, appendix_2, appendix_3, appendix_4, appendix_5, appendix_6, appendix_7),
    )
}


def runs_of(figure: str, profile: str) -> Experiment:
    """The experiment of a figure by its name; ValueError for an unknown figure or profile."""
    for name, given, known in (("figure", figure, FIGURES), ("profile", profile, PROFILES)):
        if given not in known:
            raise ValueError(f"{name}={given!r}: known are {', '.join(known)}")
    return FIGURES[figure](profile)


def points(figure: str) -> int:
    """How many rows of each run of a figure are published, at most."""
    counting = SETTINGS.get(figure, {}).get("threshold") is not None
    return POINTS_IN_A_GRID if counting else POINTS
