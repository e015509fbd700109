"""What the study's runs are made with, as plain data; `experiments` turns it into runs."""

from __future__ import annotations

PROFILES: dict[str, dict] = {
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

# Rows of a run that are published, at most
MAX_ROWS, MAX_ROWS_IN_A_GRID, MAX_ROWS_OF_A_START = 500, 40, 20

# Starting rates (alpha, beta), for the mean cross-entropy and the mean over the tasks
Pair = tuple[float, float]
CASES: dict[str, Pair] = {"good": (0.4, 0.3), "too small": (1e-3, 1e-3), "too large": (0.4, 3.0)}
FAR_TOO_LARGE: dict[str, Pair] = {"far too large": (100.0, 0.3)}
HYPER_RATE = 1e-3  # of alpha and of beta, in all figures that do not vary it
ONE, SEEDS, FIVE_SEEDS = (0,), (0, 1, 2), (0, 1, 2, 3, 4)
FIGURE_1_SEEDS = {"quick": SEEDS, "medium": FIVE_SEEDS, "paper": FIVE_SEEDS}

# With Adam beta is the step of each parameter, so other rates are good, too small and too large.
ADAM_CASES: dict[str, Pair] = {
    "good": (0.4, 1e-2),
    "too small": (1e-3, 1e-5),
    "too large": (0.4, 1.0),
}
ADAM_HYPER_RATES = (HYPER_RATE, 1e-5)

# Figures 2 and 3 and those like them count the iterations until the validation loss is first at
# most this. All of them are 5-way: guessing is at ln 5 = 1.61.
THRESHOLD = 1.0

# What sets the runs of a figure apart from those of Figure 1, in every profile
COUNTING = {"validation_every": 5}
FIVE_SHOT = {"k_shot": 5, "k_query": 5}
FULL_LENGTH = {"validation_every": 100}
LONG = ("accuracy", "accuracy_settings")  # hours a run: published also before it is finished
FIELDS: dict[str, dict] = {
    "figure_1_scale_free": {"rule": "scale-free"},
    "figures_2_3": COUNTING,
    "appendix_1": FIVE_SHOT,
    "appendix_2": {"n_way": 20},
    "appendix_3": FIVE_SHOT | COUNTING,
    "appendix_4": COUNTING,
    "appendix_6": {"inner_steps": 5},
    "appendix_7": {"meta_optimizer": "adam"},
    "accuracy": FULL_LENGTH,
    "accuracy_settings": FULL_LENGTH,
    "starts_glyphs": {"data": "glyphs"},
    "starts_sinusoids": {"k_shot": 10, "k_query": 10},
    "rules_sinusoids": {"k_shot": 10, "k_query": 10},
    "starts_5_steps": {"inner_steps": 5},
    "starts_5_shot": FIVE_SHOT,
    "starts_20_way": {"n_way": 20},
}

# Their sizes by profile: meta-batch, iterations at most, validation tasks, seeds. The medium ones
# are made for two cores, the paper's for a GPU.
SIZES = {
    figure: dict(zip(PROFILES, sizes, strict=True))
    for figure, sizes in {
        "figures_2_3": ((8, 70, 32, (0, 1)), (8, 200, 32, FIVE_SEEDS), (32, 1000, 64, FIVE_SEEDS)),
        "appendix_1": ((4, 40, 16, ONE), (8, 200, 16, SEEDS), (32, 2000, 64, SEEDS)),
        "appendix_2": ((4, 40, 16, ONE), (8, 200, 16, SEEDS), (16, 2000, 64, SEEDS)),
        "appendix_3": ((4, 20, 16, ONE), (4, 100, 16, SEEDS), (16, 500, 64, SEEDS)),
        "appendix_4": ((8, 40, 32, ONE), (8, 200, 32, SEEDS), (32, 1000, 64, SEEDS)),
        "appendix_5": ((8, 60, 32, ONE), (8, 400, 32, SEEDS), (32, 4000, 64, SEEDS)),
        "appendix_6": ((4, 40, 32, ONE), (8, 200, 32, SEEDS), (32, 2000, 64, SEEDS)),
        "appendix_7": ((8, 60, 32, ONE), (8, 300, 32, SEEDS), (32, 3000, 64, SEEDS)),
        "accuracy": ((4, 20, 16, ONE), (32, 60_000, 64, (0, 1)), (32, 60_000, 64, SEEDS)),
        "accuracy_settings": ((4, 10, 8, ONE), (4, 200, 16, ONE), (16, 60_000, 64, SEEDS)),
        "starts": ((4, 40, 16, ()), (8, 200, 32, ()), (32, 1000, 64, ())),
        "choice": ((4, 40, 16, ()), (8, 200, 32, ()), (32, 1000, 64, ())),
        "rules": ((4, 20, 16, ()), (8, 200, 32, ()), (32, 1000, 64, ())),
        "rules_sinusoids": ((8, 50, 64, ()), (8, 400, 64, ()), (8, 400, 64, ())),
        "starts_glyphs": ((4, 40, 16, ()), (8, 200, 32, ()), (32, 1000, 64, ())),
        "starts_sinusoids": ((8, 100, 64, ()), (8, 400, 64, ()), (8, 400, 64, ())),
        "starts_5_steps": ((4, 20, 16, ()), (4, 100, 16, ()), (32, 1000, 64, ())),
        "starts_5_shot": ((4, 20, 16, ()), (4, 100, 16, ()), (32, 1000, 64, ())),
        "starts_20_way": ((4, 20, 16, ()), (4, 100, 16, ()), (16, 1000, 64, ())),
    }.items()
}

# The grids by profile and figure: their rates, each as alpha_0 and as beta_0, and their hyper
# rates, each that of alpha and of beta alike
FOUR = (1e-3, 1e-2, 0.1, 1.0)
FIVE = (1e-4, 1e-3, 1e-2, 0.1, 1.0)
SEVEN = (1e-4, 6.8e-4, 4.6e-3, 3.2e-2, 0.22, 1.5, 10.0)
ELEVEN = (1e-4, 3.2e-4, 1e-3, 3.2e-3, 1e-2, 3.2e-2, 0.1, 0.32, 1.0, 3.2, 10.0)
WIDE = (1e-4, 1e-3, 1e-2)
GRIDS: dict[str, dict[str, tuple]] = {
    "quick": {"figures_2_3": (FOUR, (1e-3,)), "appendix_3": (FOUR, (1e-3,))},
    "medium": {"figures_2_3": (SEVEN, WIDE), "appendix_3": (FIVE, (1e-3, 1e-2))},
    "paper": {"figures_2_3": (ELEVEN, WIDE), "appendix_3": (SEVEN, (1e-3, 1e-2))},
}
VARIED_HYPER_RATES = {
    "quick": (0.0, 1e-3, 1e-2),
    "medium": (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
    "paper": (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
}
PATH_STARTS = {"quick": (1e-3, 1e-2, 0.5), "medium": FIVE[1:], "paper": FIVE[1:]}

# Accuracy on the test characters, of (n_way, k_shot): over how many tasks, and the inner steps by
# the number of ways, in training and in the test, as in Finn et al. (2017)
TEST_SETTINGS = {"accuracy": ((5, 1),), "accuracy_settings": ((5, 5), (20, 1), (20, 5))}
TEST_TASKS = {"quick": 16, "medium": 1000, "paper": 1000}
INNER_STEPS = {5: 1, 20: 5}
TEST_INNER_STEPS = {5: 3, 20: 5}
# Of MAML as published: with the loss of its code, n_way times ours, alpha is 0.4 (5-way) or 0.1
# (20-way). Adam's step does not depend on the scale of the loss.
PUBLISHED = (2.0, 1e-3)
PUBLISHED_ACCURACY = (98.7, 0.4)  # of 5-way 1-shot, and the half width of its interval, in percent

# Random starts: all methods from the same ones, each with a seed of its own
RATES = (1e-4, 10.0)
ADAM_BETAS = (1e-6, 0.1)
DRAWN_HYPER_RATES = (1e-5, 1.0)
TRIED_HYPER_RATES = (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0)  # of alpha and of beta alike
TRIED_WITH_ADAM = (1e-7, 1e-6, 1e-5, 1e-4)  # of beta; that of alpha is HYPER_RATE
# The seed of the first start and the stream of the starts: what is chosen is chosen on starts and
# seeds of its own
FIRST_SEED = {"choice": 100_000, "rules": 100_000, "rules_sinusoids": 100_000}
STREAM = {"choice": 2, "rules": 3, "rules_sinusoids": 3}
# How many starts in each profile: of the slow methods, of all others, of the main ones
N_STARTS = {
    figure: dict(zip(PROFILES, numbers, strict=True))
    for figure, numbers in {
        "starts": ((4, 12, 12), (64, 128, 256), (256, 256, 1024)),
        "choice": ((0, 4, 4), (0, 32, 32), (0, 32, 32)),
        "rules": ((0, 2, 2), (0, 32, 32), (0, 32, 32)),
        "rules_sinusoids": ((0, 2, 2), (0, 32, 32), (0, 32, 32)),
        "starts_glyphs": ((0, 2, 2), (0, 64, 64), (0, 64, 64)),
        "starts_sinusoids": ((0, 4, 4), (0, 64, 64), (0, 256, 256)),
        "starts_5_steps": ((0, 2, 2), (0, 64, 64), (0, 64, 64)),
        "starts_5_shot": ((0, 2, 2), (0, 32, 32), (0, 64, 64)),
        "starts_20_way": ((0, 2, 2), (0, 32, 32), (0, 64, 64)),
    }.items()
}
# Of the tried rules that have a hyper rate: those of alpha and of beta; of all others 1
TRIED_CONSTANTS: dict[str, Pair] = {
    "MAML-bounded": (0.0, 0.0),
    "additive-bounded": (HYPER_RATE, HYPER_RATE),
}
DRAWN_CONSTANTS = (0.1, 10.0)  # of the scale-free rule
NARROW_HYPER_RATES = (1e-4, 1e-2)  # as wide, around HYPER_RATE
CLIP = 10.0  # of the norm of the meta-gradient, or of the size of each hypergradient
MAIN = ("plain", "null", "h = 0.001", "h = 0.01", "h drawn")  # lines with more starts than others
SLOW = ("Meta-SGD", "LSLR")  # without the fast passes
ELSEWHERE = ("plain", "h = 0.001", "h drawn", "null", "scale-free")  # beside the main setting
