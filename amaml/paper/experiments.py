"""The runs that each figure needs, by its name and profile; their numbers stand in `settings`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch.quasirandom import SobolEngine

from amaml.config import RunConfig
from amaml.paper import rivals, settings, sinusoids, tried_rules
from amaml.paper.settings import HYPER_RATE, PROFILES, Pair

MAML: Pair = (0.0, 0.0)  # its hyper rates
ALPHA_MAML: Pair = (HYPER_RATE, HYPER_RATE)
SCALE_FREE: Pair = (1.0, 1.0)  # the constants of this rule

# What a run takes that is not amaml's own: the arguments of `train` (model, sampler, loss, step) by
# the name in PlannedRun.parts, which is also the run's name
PARTS: dict[str, dict] = {
    "frozen": {"step": rivals.FrozenRates()},
    "clipped": {"step": rivals.Clipped(gradient=settings.CLIP)},
    "hyper-clipped": {"step": rivals.Clipped(hypergradient=settings.CLIP)},
    "Meta-SGD": {"step": rivals.LearnedRates(per_element=True)},
    "LSLR": {"step": rivals.LearnedRates(per_element=False)},
    "sinusoids": sinusoids.PARTS,
    **{name: {"step": rule} for name, rule in tried_rules.TRIED.items()},
}
PARTS |= {f"sinusoids-{name}": sinusoids.PARTS | PARTS[name] for name in tried_rules.TRIED}


class PlannedRun(NamedTuple):
    """A run and its place in a figure."""

    labels: dict  # where in the figure it stands, such as its method and case
    config: RunConfig
    parts: str = ""  # the name in PARTS of what it is made with; "": amaml's own


def planned(
    profile: str, start: Pair, hyper_rates: Pair, labels: dict, parts: str = "", **fields
) -> PlannedRun:
    """One run of a profile from (alpha, beta); hyper rates of 0 are MAML, or a rival in PARTS."""
    names = ("alpha", "beta", "hyper_alpha", "hyper_beta")
    rates = dict(zip(names, (*start, *hyper_rates), strict=True))
    rival = parts.removeprefix("sinusoids-") if "step" in PARTS.get(parts, {}) else ""
    method = {"method": "Alpha MAML" if any(hyper_rates) else rival or "MAML"}
    return PlannedRun(method | labels, RunConfig(**PROFILES[profile] | rates | fields), parts)


def fields_and_seeds(figure: str, profile: str) -> tuple[dict, tuple[int, ...]]:
    """What a figure's runs have in common beside their profile, and the seeds of each."""
    fields, seeds = {}, settings.FIGURE_1_SEEDS[profile]
    if figure in settings.SIZES:
        *size, seeds = settings.SIZES[figure][profile]
        names = ("meta_batch_size", "iterations", "validation_tasks")
        fields = dict(zip(names, size, strict=True))
    return fields | settings.FIELDS.get(figure, {}), seeds


def behaviour(
    figure: str,
    profile: str,
    cases: Iterable[tuple[str, Pair]] = settings.CASES.items(),
    hyper_rates: tuple[Pair, ...] = (MAML, ALPHA_MAML),
) -> list[PlannedRun]:
    """Figure 1 and those like it: MAML beside Alpha MAML from each case."""
    fields, seeds = fields_and_seeds(figure, profile)
    return [
        planned(profile, start, rates, {"case": case}, seed=seed, **fields)
        for case, start in cases
        for rates in hyper_rates
        for seed in seeds
    ]


def crossed(figure: str, profile: str, starts: list[Pair], rates: list[Pair]) -> list[PlannedRun]:
    """Each pair of hyper rates from each start; seed by seed, so that a part is a whole grid."""
    fields, seeds = fields_and_seeds(figure, profile)
    return [
        planned(profile, start, hyper_rates, {}, seed=seed, **fields)
        for seed in seeds
        for hyper_rates in rates
        for start in starts
    ]


def grid(figure: str, profile: str) -> list[PlannedRun]:
    """Figures 2 and 3: iterations until the threshold, over a grid of starting rates."""
    rates, hyper_rates = settings.GRIDS[profile][figure]
    pairs = [MAML, *((hyper_rate, hyper_rate) for hyper_rate in hyper_rates)]
    return crossed(figure, profile, list(product(rates, rates)), pairs)


def sensitivity(figure: str, profile: str) -> list[PlannedRun]:
    """From one bad start: all pairs of h_alpha and h_beta, with zeros; both zero is MAML."""
    varied = settings.VARIED_HYPER_RATES[profile]
    return crossed(figure, profile, [settings.CASES["too small"]], list(product(varied, varied)))


def many_paths(figure: str, profile: str) -> list[PlannedRun]:
    """The paths of alpha and beta from many starts."""
    rates = settings.PATH_STARTS[profile]
    return crossed(figure, profile, list(product(rates, rates)), [ALPHA_MAML])


def accuracy(figure: str, profile: str) -> list[PlannedRun]:
    """Test accuracy after a whole training: of MAML as published, of Alpha MAML, and of others."""
    fields, seeds = fields_and_seeds(figure, profile)
    sgd, adam = settings.CASES, settings.ADAM_CASES | {"published": settings.PUBLISHED}
    lines = [
        ("adam", "published", adam, MAML),
        ("adam", "too small", adam, settings.ADAM_HYPER_RATES),
        ("sgd", "too small", sgd, ALPHA_MAML),
        ("sgd", "good", sgd, MAML),
        ("adam", "published", adam, settings.ADAM_HYPER_RATES),
        ("sgd", "too small", sgd, SCALE_FREE),
        ("sgd", "good", sgd, ALPHA_MAML),
    ]
    if figure == "accuracy_settings":
        lines = lines[:2]
    runs = []
    for seed, (n_way, k_shot) in product(seeds, settings.TEST_SETTINGS[figure]):
        tasks = {"n_way": n_way, "k_shot": k_shot, "k_query": k_shot}
        tasks |= {"inner_steps": settings.INNER_STEPS[n_way]}
        test = {"test_tasks": settings.TEST_TASKS[profile]}  # as Finn et al. (2017) measure it
        test |= {"test_inner_steps": settings.TEST_INNER_STEPS[n_way]}
        for optimizer, case, starts, rates in lines:
            own = fields | tasks | test | {"seed": seed}
            own |= {"meta_optimizer": optimizer}
            own |= {"rule": "scale-free" if rates == SCALE_FREE else "additive"}
            runs.append(planned(profile, starts[case], rates, {"case": case}, **own))
    return runs


def log_uniform(n: int, seed: int, first: Pair, second: Pair) -> list[Pair]:
    """The first `n` points of a scrambled Sobol sequence, log-uniform over two ranges."""

    def between(low: float, high: float, u: float) -> float:
        return float(f"{low * (high / low) ** u:.6g}")  # rounded: the same ids everywhere

    points = SobolEngine(2, scramble=True, seed=seed).draw(n, dtype=torch.float64)
    return [(between(*first, u), between(*second, v)) for u, v in points.tolist()]


class Line(NamedTuple):
    """One method, from every start."""

    variant: str  # its name among the lines of an experiment
    starts: list[Pair]  # (alpha_0, beta_0)
    hyper_rates: list[Pair]  # one for each start
    optimizer: str = "sgd"
    parts: str = ""
    method: str = ""  # where it is neither MAML nor Alpha MAML nor named by `parts`
    rule: str = "additive"


def lines_of(figure: str, profile: str, n: int) -> list[Line]:
    """The methods of an experiment, from the same `n` starts."""
    stream = settings.STREAM.get(figure, 0)
    sgd = log_uniform(n, stream, settings.RATES, settings.RATES)
    adam = log_uniform(n, stream, settings.RATES, settings.ADAM_BETAS)
    if figure == "choice":
        tried = [(rate, rate) for rate in settings.TRIED_HYPER_RATES]
        with_adam = [(HYPER_RATE, rate) for rate in settings.TRIED_WITH_ADAM]
        return [
            Line("plain", sgd, [MAML] * n),
            *(Line(f"h = {pair[1]:g}", sgd, [pair] * n) for pair in tried),
            Line("Adam", adam, [MAML] * n, "adam"),
            *(Line(f"Adam, h = {pair[1]:g}", adam, [pair] * n, "adam") for pair in with_adam),
        ]
    if figure in ("rules", "rules_sinusoids"):
        parts, rates = figure.removeprefix("rules").removeprefix("_"), settings.TRIED_CONSTANTS
        problem = f"{parts}-" if parts else ""
        names = list(tried_rules.TRIED)[: 2 if profile == "quick" else None]
        return [
            Line("plain", sgd, [MAML] * n, parts=parts),
            Line("h = 0.001", sgd, [ALPHA_MAML] * n, parts=parts),
            Line("scale-free", sgd, [SCALE_FREE] * n, parts=parts, rule="scale-free"),
            *(
                Line(name, sgd, [rates.get(name, SCALE_FREE)] * n, parts=f"{problem}{name}")
                for name in names
            ),
        ]
    drawn = log_uniform(n, 1, settings.DRAWN_HYPER_RATES, settings.DRAWN_HYPER_RATES)
    constants = log_uniform(n, 1, settings.DRAWN_CONSTANTS, settings.DRAWN_CONSTANTS)
    drawn_with_adam = [(h_alpha, float(f"{0.01 * h_beta:.6g}")) for h_alpha, h_beta in drawn]
    narrow = log_uniform(n, 1, settings.NARROW_HYPER_RATES, settings.NARROW_HYPER_RATES)
    nudged = [(alpha * (1 + 1e-6), beta) for alpha, beta in sgd]
    parts = "sinusoids" if figure == "starts_sinusoids" else ""
    lines = [
        Line("plain", sgd, [MAML] * n, parts=parts),
        Line("h = 0.001", sgd, [(1e-3, 1e-3)] * n, parts=parts),
        Line("h drawn", sgd, drawn, parts=parts),
        Line("null", nudged, [MAML] * n, parts=parts),
        Line("scale-free", sgd, [SCALE_FREE] * n, parts=parts, rule="scale-free"),
        Line("scale-free, drawn", sgd, constants, rule="scale-free"),
        Line("h drawn narrowly", sgd, narrow),
        Line("h = 0.01", sgd, [(1e-2, 1e-2)] * n),
        Line("h = 0.0001", sgd, [(1e-4, 1e-4)] * n),
        Line("h = 0.1", sgd, [(0.1, 0.1)] * n),
        Line("alpha alone", sgd, [(HYPER_RATE, 0.0)] * n),
        Line("beta alone", sgd, [(0.0, HYPER_RATE)] * n),
        Line("Adam", adam, [MAML] * n, "adam"),
        Line("Adam, adapted", adam, [settings.ADAM_HYPER_RATES] * n, "adam"),
        # With plain descent a scalar alpha that the meta-optimiser learns is this
        Line("learned alpha", sgd, [(beta, 0.0) for _, beta in sgd], method="learned alpha"),
        Line("frozen", sgd, [ALPHA_MAML] * n, parts="frozen"),
        Line("Meta-SGD", sgd, [MAML] * n, parts="Meta-SGD"),
        Line("LSLR", sgd, [MAML] * n, parts="LSLR"),
        Line("clipped", sgd, [ALPHA_MAML] * n, parts="clipped"),
        Line("hyper-clipped", sgd, [ALPHA_MAML] * n, parts="hyper-clipped"),
        Line("Adam, null", [(a * (1 + 1e-6), b) for a, b in adam], [MAML] * n, "adam"),
        Line("Adam, h drawn", adam, drawn_with_adam, "adam"),
    ]
    everywhere = [line for line in lines if line.variant in settings.ELSEWHERE]
    return lines if figure == "starts" and profile != "quick" else everywhere


def random_starts(figure: str, profile: str) -> list[PlannedRun]:
    """All methods from random starts (alpha_0, beta_0), paired by start, seed and tasks.

    In blocks, so that a part of them is an experiment: the first starts of every method, the next
    of all but the slow ones, then the rest of the main ones.
    """
    slow, first, last = settings.N_STARTS[figure][profile]
    lines = lines_of(figure, profile, last)
    fast_lines = [line for line in lines if line.variant not in settings.SLOW]
    main = [line for line in lines if line.variant in settings.MAIN]
    blocks = ((range(slow), lines), (range(slow, first), fast_lines), (range(first, last), main))
    fields, _ = fields_and_seeds(figure, profile)
    runs = []
    for numbers, of_lines in blocks:
        for line, i in product(of_lines, numbers):
            labels = {"variant": line.variant, "start": i}
            labels |= {"method": line.method} if line.method else {}
            seed = settings.FIRST_SEED.get(figure, 1000) + i
            own = fields | {"seed": seed, "meta_optimizer": line.optimizer, "rule": line.rule}
            start, rates = line.starts[i], line.hyper_rates[i]
            runs.append(planned(profile, start, rates, labels, line.parts, **own))
    return runs


FIGURES: dict[str, Callable[[str, str], list[PlannedRun]]] = {
    "figure_1": behaviour,
    "figure_1_scale_free": partial(behaviour, hyper_rates=(SCALE_FREE,)),
    "far_too_large": partial(behaviour, cases=settings.FAR_TOO_LARGE.items()),
    "figures_2_3": grid,
    "appendix_1": behaviour,  # 5-way 5-shot
    "appendix_2": behaviour,  # 20-way 1-shot
    "appendix_3": grid,  # 5-way 5-shot
    "appendix_4": sensitivity,
    "appendix_5": many_paths,
    "appendix_6": behaviour,  # five inner steps
    "appendix_7": partial(
        behaviour,
        cases=settings.ADAM_CASES.items(),
        hyper_rates=(MAML, settings.ADAM_HYPER_RATES),
    ),
    "accuracy": accuracy,
    "accuracy_settings": accuracy,
    **dict.fromkeys(settings.N_STARTS, random_starts),
}


def runs_of(figure: str, profile: str) -> list[PlannedRun]:
    """The runs of a figure; ValueError for an unknown figure or profile."""
    for name, given, known in (("figure", figure, FIGURES), ("profile", profile, PROFILES)):
        if given not in known:
            raise ValueError(f"{name}={given!r}: known are {', '.join(known)}")
    return FIGURES[figure](figure, profile)


def max_rows(figure: str) -> int:
    """How many rows of each run of a figure are published, at most."""
    if figure in settings.N_STARTS:
        return settings.MAX_ROWS_OF_A_START
    counts = settings.FIELDS.get(figure, {}).get("validation_every") == 5
    return settings.MAX_ROWS_IN_A_GRID if counts else settings.MAX_ROWS
