"""Each figure's runs as plain data, by profile.

An experiment is a list of pairs (labels, config): the labels say where in the figure a run stands,
the config says all that determines its numbers.
"""

from __future__ import annotations

from itertools import product

import torch
from torch.quasirandom import SobolEngine

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
    "paper": {"data": "omniglot", "meta_batch_size": 32, "iterations": 10_000},
}

# Small runs gain from being made together, and so do those on a GPU, which is the paper profile's.
RUNS_PER_BATCH = {"quick": 8, "medium": 1, "paper": 64}
MADE_ON_GPU = ("paper",)

# Starting rates (alpha, beta), for the mean cross-entropy and the mean over the tasks
CASES = {"good": (0.4, 0.3), "too small": (0.001, 0.001), "too large": (0.4, 3.0)}
FAR_TOO_LARGE = (100.0, 0.3)
HYPER_RATE = 1e-3  # of alpha and of beta, in all figures that do not vary it
SEEDS = (0, 1, 2)
FIGURE_1_SEEDS = {"quick": SEEDS, "medium": SEEDS, "paper": (0, 1, 2, 3, 4)}

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
FIVE_SHOT = {"k_shot": 5, "k_query": 5}
FULL_LENGTH = {"validation_every": 100}
SETTINGS = {
    "figures_2_3": COUNTING,
    "appendix_1": FIVE_SHOT,
    "appendix_2": {"n_way": 20},
    "appendix_3": FIVE_SHOT | COUNTING,
    "appendix_4": COUNTING,
    "appendix_5": {},
    "appendix_6": {"inner_steps": 5},
    "appendix_7": {"meta_optimizer": "adam"},
    "accuracy": FULL_LENGTH,
    "accuracy_settings": FULL_LENGTH,
}

# Their sizes: meta-batch, iterations at most, validation tasks, seeds. The medium ones are made for
# two cores, the paper's for a GPU.
SIZES = {
    "quick": {
        "figures_2_3": (8, 70, 32, (0, 1)),
        "appendix_1": (4, 40, 16, (0,)),
        "appendix_2": (4, 40, 16, (0,)),
        "appendix_3": (4, 20, 16, (0,)),
        "appendix_4": (8, 40, 32, (0,)),
        "appendix_5": (8, 60, 32, (0,)),
        "appendix_6": (4, 40, 32, (0,)),
        "appendix_7": (8, 60, 32, (0,)),
        "accuracy": (4, 20, 16, (0,)),
        "accuracy_settings": (4, 10, 8, (0,)),
    },
    "medium": {
        "figures_2_3": (8, 200, 32, SEEDS),
        "appendix_1": (8, 200, 16, SEEDS),
        "appendix_2": (8, 200, 16, (0,)),
        "appendix_3": (4, 100, 16, (0,)),
        "appendix_4": (8, 200, 32, (0,)),
        "appendix_5": (8, 400, 32, (0,)),
        "appendix_6": (8, 200, 32, (0,)),
        "appendix_7": (8, 300, 32, SEEDS),
        "accuracy": (8, 1000, 32, (0,)),
        "accuracy_settings": (4, 200, 16, (0,)),
    },
    "paper": {
        "figures_2_3": (32, 1000, 64, SEEDS),
        "appendix_1": (32, 2000, 64, SEEDS),
        "appendix_2": (16, 2000, 64, SEEDS),
        "appendix_3": (16, 500, 64, (0,)),
        "appendix_4": (32, 1000, 64, SEEDS),
        "appendix_5": (32, 4000, 64, (0,)),
        "appendix_6": (32, 2000, 64, SEEDS),
        "appendix_7": (32, 3000, 64, SEEDS),
        "accuracy": (32, 60_000, 64, SEEDS),
        "accuracy_settings": (16, 60_000, 64, SEEDS),
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
    "paper": {
        "figures_2_3": {
            "rates": (1e-4, 3.2e-4, 1e-3, 3.2e-3, 1e-2, 3.2e-2, 0.1, 0.32, 1.0),
            "hyper_rates": (1e-4, 1e-3, 1e-2, 1e-1),
        },
        "appendix_3": {
            "rates": (1e-4, 4.6e-4, 2.2e-3, 1e-2, 4.6e-2, 0.22, 1.0),
            "hyper_rates": (1e-3, 1e-2),
        },
    },
}
ONE_START = CASES["too small"]  # of the figure that varies h_alpha and h_beta apart
VARIED_HYPER_RATES = {
    "quick": (0.0, 1e-4, 1e-3, 1e-2),
    "medium": (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
    "paper": (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
}
PATH_STARTS = {"quick": (1e-3, 1e-2, 0.5), "medium": DECADES[1:], "paper": DECADES[1:]}

# With Adam beta is the step of each parameter, so other rates are good, too small and too large.
ADAM_CASES = {"good": (0.4, 1e-2), "too small": (1e-3, 1e-5), "too large": (0.4, 1.0)}
ADAM_HYPER_RATES = (HYPER_RATE, 1e-5)
TRIED_ADAM_HYPER_RATES = (1e-7, 1e-6, 1e-5, 1e-4)  # of beta

# Accuracy on the test characters: over how many tasks, and the inner steps by the number of ways,
# in the test and in training, as in Finn et al. (2017)
TEST_TASKS = {"quick": 16, "medium": 1000, "paper": 1000}
TEST_INNER_STEPS = {5: 3, 20: 5}
INNER_STEPS = {5: 1, 20: 5}
# Of MAML as published: with the loss of its code, n_way times ours, alpha is 0.4 (5-way) or 0.1
# (20-way). Adam's step does not depend on the scale of the loss.
PUBLISHED = (2.0, 1e-3)

POINTS = 500  # rows a run that are published, at most
POINTS_IN_A_GRID = 40
POINTS_OF_A_START = 20

# Random starts: all methods from the same ones, each with a seed of its own
RATES = (1e-4, 10.0)
ADAM_BETAS = (1e-6, 0.1)
DRAWN_HYPER_RATES = (1e-5, 1.0)
FIRST_SEED = 1000  # of the starts: apart from those that hyper rates were chosen by
N_STARTS = {"quick": (12, 12), "medium": (128, 256), "paper": (256, 1024)}  # at first, and of some
MAIN_VARIANTS = ("plain", "null", "h = 0.001", "h = 0.01", "h drawn")
STARTS_SIZE = {
    "quick": {"meta_batch_size": 4, "iterations": 40, "validation_tasks": 16},
    "medium": {"meta_batch_size": 8, "iterations": 200, "validation_tasks": 32},
    "paper": {"meta_batch_size": 32, "iterations": 1000, "validation_tasks": 64},
}


def figure_1(profile: str) -> Experiment:
    """A good and two bad pairs of starting rates; MAML beside Alpha MAML, several seeds."""
    return behaviour(profile, seeds=FIGURE_1_SEEDS[profile])


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


def accuracy(profile: str) -> Experiment:
    """Test accuracy after a whole training, 5-way 1-shot: MAML as published, and others."""
    none, sgd = (0.0, 0.0), (HYPER_RATE, HYPER_RATE)
    size = sizes("accuracy", profile) | testing(5, profile)
    return [
        run(profile, start, rates, {"case": case}, meta_optimizer=optimizer, seed=seed, **size)
        for seed in size.pop("seeds")
        for optimizer, case, start, rates in (
            ("adam", "published", PUBLISHED, none),
            ("sgd", "good", CASES["good"], none),
            ("sgd", "good", CASES["good"], sgd),
            ("sgd", "too small", CASES["too small"], sgd),
            ("adam", "published", PUBLISHED, ADAM_HYPER_RATES),
            ("adam", "too small", ADAM_CASES["too small"], ADAM_HYPER_RATES),
        )
    ]


def accuracy_settings(profile: str) -> Experiment:
    """The same in the three other settings: MAML as published, Alpha MAML from a bad start."""
    size = sizes("accuracy_settings", profile) | {"meta_optimizer": "adam"}
    return [
        run(
            *(profile, start, rates, {"case": case}),
            **size | testing(n_way, profile),
            **{"n_way": n_way, "k_shot": k, "k_query": k, "seed": seed},
        )
        for seed in size.pop("seeds")
        for n_way, k in ((5, 5), (20, 1), (20, 5))
        for case, start, rates in (
            ("published", PUBLISHED, (0.0, 0.0)),
            ("too small", ADAM_CASES["too small"], ADAM_HYPER_RATES),
        )
    ]


def testing(n_way: int, profile: str) -> dict:
    """The fields of a run whose test accuracy is measured, as Finn et al. (2017) measure it."""
    return {
        "inner_steps": INNER_STEPS[n_way],
        "test_tasks": TEST_TASKS[profile],
        "test_inner_steps": TEST_INNER_STEPS[n_way],
    }


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
    return behaviour(profile, seeds=FIGURE_1_SEEDS[profile], cases={"far too large": FAR_TOO_LARGE})


def too_large(profile: str) -> Experiment:
    """Trials of many too large starts, on the trials' seed: where does Alpha MAML help?"""
    trial = {"seed": TRIAL_SEED, "iterations": TOO_LARGE_ITERATIONS}
    return [
        run(profile, start, (rate, rate), {"case": "too large"}, **trial)
        for start in TOO_LARGE
        for rate in (0.0, HYPER_RATE)
    ]


def log_uniform(n: int, seed: int, *ranges: tuple[float, float]) -> list[tuple[float, ...]]:
    """The first `n` points of a scrambled Sobol sequence, log-uniform over the ranges.

    Rounded to six significant digits, so that the ids of runs are the same everywhere.
    """
    unit = SobolEngine(len(ranges), scramble=True, seed=seed).draw(n, dtype=torch.float64)
    return [
        tuple(
            float(f"{low * (high / low) ** u:.6g}")
            for u, (low, high) in zip(point, ranges, strict=True)
        )
        for point in unit.tolist()
    ]


def starts(profile: str) -> Experiment:
    """All methods from random starts (alpha_0, beta_0), paired by start, seed and tasks.

    The first starts of every method stand first, then the others of the main ones.
    """
    first, last = N_STARTS[profile]
    rates, adam = log_uniform(last, 0, RATES, RATES), log_uniform(last, 0, RATES, ADAM_BETAS)
    drawn, h = log_uniform(last, 1, DRAWN_HYPER_RATES, DRAWN_HYPER_RATES), HYPER_RATE

    def lines(i: int):
        (alpha, beta), none = rates[i], (0.0, 0.0)
        yield "plain", (alpha, beta), none, {}
        yield "h = 0.001", (alpha, beta), (h, h), {}
        yield "h drawn", (alpha, beta), drawn[i], {}
        yield "null", (alpha * (1 + 1e-6), beta), none, {}
        yield "h = 0.01", (alpha, beta), (1e-2, 1e-2), {}
        yield "h = 0.0001", (alpha, beta), (1e-4, 1e-4), {}
        yield "h = 0.1", (alpha, beta), (0.1, 0.1), {}
        yield "alpha alone", (alpha, beta), (h, 0.0), {}
        yield "beta alone", (alpha, beta), (0.0, h), {}
        yield "Adam", adam[i], none, {"meta_optimizer": "adam"}
        yield "Adam", adam[i], ADAM_HYPER_RATES, {"meta_optimizer": "adam"}

    fields = STARTS_SIZE[profile] | {"validation_every": 10}
    by_line: dict = {}
    for i in range(last):
        for variant, at, hyper_rates, other in lines(i):
            labels = {"variant": variant, "start": i}
            labelled = run(profile, at, hyper_rates, labels, seed=FIRST_SEED + i, **fields | other)
            later, method = i >= first, labelled[0]["method"]
            if not later or variant in MAIN_VARIANTS:
                by_line.setdefault((later, method, variant), []).append(labelled)
    return [labelled for line in by_line.values() for labelled in line]


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
    names = ("meta_batch_size", "iterations", "validation_tasks", "seeds")
    return dict(zip(names, SIZES[profile][figure], strict=True)) | SETTINGS[figure]


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
        *(accuracy, accuracy_settings, starts),
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
    if figure == "starts":
        return POINTS_OF_A_START
    counting = SETTINGS.get(figure, {}).get("threshold") is not None
    return POINTS_IN_A_GRID if counting else POINTS
