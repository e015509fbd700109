"""The book's figure style, saving, and Figure 1 with the pictures of images and tasks.

MAML is orange and dashed, Alpha MAML blue and solid, everywhere: told apart by the colour-blind
and in grey print.
"""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from torch import Tensor

from amaml.paper.claims import LINE
from amaml.paper.records import PROJECT, RECORDS, read_records
from amaml.paper.settings import Pair
from amaml.shapes import Shaped
from amaml.tasks import Tasks

METHODS = ("MAML", "Alpha MAML")
COLOURS = {"MAML": "#D55E00", "Alpha MAML": "#0072B2"}  # of Okabe and Ito's palette
DASHES = {"MAML": (3, 1.5), "Alpha MAML": ""}
MARKS: dict[str, dict] = {  # MAML's open square is seen around Alpha MAML's dot
    "MAML": {"linestyle": "--", "marker": "s", "markersize": 6.5, "fillstyle": "none"},
    "Alpha MAML": {"linestyle": "-", "marker": "o", "markersize": 3.5},
}
LOOKS = {method: MARKS[method] | {"color": COLOURS[method]} for method in METHODS}
SCALE_FREE_COLOUR = "#117733"
PICTURES = PROJECT / "figures"
DATA_NAMES = {"omniglot": "Omniglot", "glyphs": "embedded glyphs"}
QUANTITIES = {  # the rows of Figure 1
    "alpha": r"$\alpha$ (inner rate)",
    "beta": r"$\beta$ (meta rate)",
    "training_loss": "training loss",
    "validation_loss": "validation loss",
}


def use_style() -> None:
    """Set the book's style; called by the figures here, and by chapters that draw their own."""
    sizes = ("font.size", "axes.titlesize", "axes.labelsize", "legend.fontsize")
    rc = dict.fromkeys(sizes, 9) | {
        "figure.dpi": 110,
        "savefig.dpi": 200,
        "figure.constrained_layout.use": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "lines.linewidth": 1.4,
    }
    sns.set_theme(context="paper", style="ticks", rc=rc)


def save(figure: Figure, name: str, profile: str, folder: str | Path = PICTURES) -> list[Path]:
    """Write `<folder>/<profile>/<name>.png` and `.pdf`; the same records give the same bytes."""
    paths = [Path(folder) / profile / f"{name}.{ending}" for ending in ("png", "pdf")]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    for path, changing in zip(paths, ("Software", "CreationDate"), strict=True):
        figure.savefig(path, metadata={changing: None})
    return paths


def legend_key(method: str, **changes) -> plt.Line2D:
    """A method's line and marker, as they stand in a legend."""
    return plt.Line2D([], [], label=method, **LOOKS[method] | changes)


def setting(table: pd.DataFrame) -> str:
    """What a figure's runs have in common, for the line below it."""
    run, seeds = table.iloc[0], ", ".join(map(str, sorted(table["seed"].unique())))
    tasks = f"{run['n_way']}-way {run['k_shot']}-shot, inner steps: {run['inner_steps']}"
    pairs = [pair for pair, _ in table.groupby(["hyper_alpha", "hyper_beta"]) if any(pair)]
    rates = f", {hyper_rates_label(pairs[0])}" if len(pairs) == 1 else ""
    batch = f"meta-batch: {run['meta_batch_size']}, seeds: {seeds}"
    return f"{DATA_NAMES[run['data']]}, {tasks}, {batch}{rates}"


def hyper_rates_label(hyper_rates: Pair) -> str:
    """The hyper rates of alpha and beta, as they stand in a picture."""
    alpha, beta = hyper_rates
    if alpha == beta:
        return rf"$h_\alpha = h_\beta$ = {alpha:g}"
    return rf"$h_\alpha$ = {alpha:g}, $h_\beta$ = {beta:g}"


def source(table: pd.DataFrame, figure: str, profile: str, folder: str | Path = RECORDS) -> str:
    """A sentence on who made a figure's runs, from its records."""
    made = []
    for batch in read_records(figure, profile, folder)[1]:
        seconds = [batch["runs"][run] for run in table["run"].unique() if run in batch["runs"]]
        commit = " and ".join(one[:10] for one in str(batch["commit"]).split())
        commit += "" if batch["clean"] else " and changes"
        made.append(f"{len(seconds)} runs at commit {commit}, {sum(seconds) / 3600:.1f} h")
    return f"Records: {figure}-{profile}.csv.gz ({'; '.join(made)})."


def image_grid(
    images: Shaped[Tensor, "rows columns height width"], labels: list[str], inch: float = 0.42
) -> Figure:
    """Images side by side, each `inch` wide, dark ink on white; labels at the rows."""
    use_style()
    size = (images.shape[1] * inch + 1.6, len(images) * inch)
    figure, axes = plt.subplots(*images.shape[:2], figsize=size, squeeze=False)
    for axis, image in zip(axes.flat, images.flatten(0, 1), strict=True):
        axis.imshow(image.cpu().numpy(), cmap="gray_r", vmin=0, vmax=images.max().item())
        axis.set(xticks=[], yticks=[])
        sns.despine(ax=axis, left=True, bottom=True)
    for axis, label in zip(axes[:, 0], labels, strict=True):
        axis.set_ylabel(label, rotation=0, ha="right", va="center")
    return figure


def task_grid(tasks: Tasks) -> Figure:
    """Tasks below each other: the support set left, the query set right, in the order of labels."""
    use_style()
    sets = [(tasks.support_x, tasks.support_y), (tasks.query_x, tasks.query_y)]
    widths = [x.shape[1] for x, _ in sets]
    size = (0.52 * sum(widths), 0.58 * len(tasks) + 0.3)
    figure, axes = plt.subplots(len(tasks), 2, figsize=size, squeeze=False, width_ratios=widths)
    for column, (x, y), name in zip(axes.T, sets, ("support set", "query set"), strict=True):
        side = x.shape[-1] + 2
        for axis, images in zip(column, x[:, :, 0], strict=True):
            strip = torch.cat([torch.nn.functional.pad(image, (1, 1)) for image in images], dim=1)
            axis.imshow(strip.cpu().numpy(), cmap="gray_r", vmin=0, vmax=1)
            axis.set(yticks=[], xticks=[side * (i + 0.5) for i in range(len(images))])
            axis.set_xticklabels([])
            axis.tick_params(length=0)
            for i in range(1, len(images)):
                axis.axvline(side * i - 0.5, color="0.85", linewidth=0.6)
            sns.despine(ax=axis, left=True, bottom=True)
        column[0].set_title(name)
        column[-1].set_xticklabels(y[-1].tolist())
        column[-1].set_xlabel("label")
    for row, axis in enumerate(axes[:, 0]):
        axis.set_ylabel(f"task {row}", rotation=0, ha="right", va="center")
    return figure


def figure_1(table: pd.DataFrame) -> Figure:
    """Figure 1: alpha, beta, training and validation loss against the iteration.

    `table` has the records of Figure 1 or of one like it. A column of panels per case, a line per
    method (the mean over the seeds), a band from the lowest to the highest seed. Runs that diverged
    are not in the means: they are thin lines up to a cross.
    """
    use_style()
    cases = table["case"].unique()
    table = table.assign(training_loss=training_loss(table))
    size, shape = (2.3 * len(cases) + 0.5, 6.6), (len(QUANTITIES), len(cases))
    figure, axes = plt.subplots(*shape, figsize=size, sharex=True, squeeze=False)
    for column, case in zip(axes.T, cases, strict=True):
        for axis, quantity in zip(column, QUANTITIES, strict=True):
            behaviour_panel(axis, table, case, quantity)
        alpha, beta = table.loc[table["case"] == case, ["alpha_0", "beta_0"]].iloc[0]
        column[0].set_title(f"{case}\n" + rf"$\alpha_0$ = {alpha:g}, $\beta_0$ = {beta:g}")
    for axis, label in zip(axes[:, 0], QUANTITIES.values(), strict=True):
        axis.set_ylabel(label)
    for axis in axes[-1]:
        axis.set_xlabel("iteration t")
        plain_log_ticks(axis.xaxis, subs=(1,))
    handles = [legend_key(method, marker="") for method in METHODS]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(METHODS))
    figure.supxlabel(setting(table), fontsize=8, color="0.3")
    return figure


def behaviour_panel(axis: Axes, table: pd.DataFrame, case: str, quantity: str) -> None:
    """One panel of Figure 1; its axis of losses is that of all cases."""
    diverged = table["status"] == "diverged"
    shown, lost = (table[(table["case"] == case) & which] for which in (~diverged, diverged))
    values = shown[np.isfinite(shown[quantity])]
    if len(values):
        sns.lineplot(
            values, x="iteration", y=quantity, hue="method", style="method",
            hue_order=METHODS, style_order=METHODS, palette=COLOURS, dashes=DASHES,
            errorbar=("pi", 100), err_kws={"linewidth": 0, "alpha": 0.2}, ax=axis, legend=False,
        )  # fmt: skip
    axis.set(xlabel="", ylabel="", xscale="log")
    if quantity in ("training_loss", "validation_loss"):
        losses = table[quantity] if diverged.all() else table[quantity][~diverged]
        loss_axis(axis, losses, math.log(table["n_way"].max()))
    elif len(values):
        low, high = 1.1 * values[quantity].min(), 1.1 * values[quantity].max()
        axis.set_ylim(min(0, low), max(0, high))
    mark_divergence(axis, lost, quantity)


def training_loss(table: pd.DataFrame) -> pd.Series:
    """Query loss on the training tasks after adaptation, smoothed run by run."""
    smooth = table["query_loss"].where(np.isfinite(table["query_loss"]))
    for _, loss in smooth.dropna().groupby(table["run"]):
        smooth[loss.index] = smoothed(loss, table.loc[loss.index, "iteration"])
    return smooth


def smoothed(values: pd.Series, time: pd.Series | pd.Index, width: float = 1.1) -> list[float]:
    """The mean of the values from time / width to time * width, at each time.

    The window grows with t, so that on a logarithmic axis of time all points are smoothed alike.
    """
    times = time.to_numpy()
    first, last = times.searchsorted(times / width), times.searchsorted(times * width, "right")
    return [values.iloc[start:end].mean() for start, end in zip(first, last, strict=True)]


def accuracy_curves(table: pd.DataFrame, published: Pair) -> Figure:
    """The validation error of runs of full length against the iteration, both logarithmic.

    A line per method, rule, meta-optimiser and start: the smoothed mean over the seeds, thick from
    a bad start. `published`, a grey band: an accuracy and half its interval, in percent.
    """
    use_style()
    figure, axis = plt.subplots(figsize=(7, 3.4))
    seen = table[table["validation_accuracy"].notna()]
    for (method, rule, optimizer, case), runs in seen.groupby(LINE, sort=False):
        accuracy = runs.groupby("iteration")["validation_accuracy"].mean()
        error = 100 * (1 - np.array(smoothed(accuracy, accuracy.index)))
        free = rule == "scale-free"
        name = "Scale-free rule" if free else method
        with_what = "Adam" if optimizer == "adam" else "plain descent"
        axis.plot(
            accuracy.index, error, label=f"{name}, {with_what}, {case} start",
            color=SCALE_FREE_COLOUR if free else COLOURS[method],
            linestyle="--" if method == "MAML" else ":" if optimizer == "adam" else "-",
            linewidth=1.8 if case == "too small" else 1,
        )  # fmt: skip
    best, half = published
    axis.axhspan(100 - best - half, 100 - best + half, color="0.85", linewidth=0, zorder=0)
    axis.set(xscale="log", yscale="log", xlabel="iteration t", ylabel="validation error (%)")
    plain_log_ticks(axis.xaxis)
    plain_log_ticks(axis.yaxis)
    figure.legend(loc="outside upper center", ncols=2)
    figure.supxlabel(setting(table), fontsize=8, color="0.3")
    return figure


def loss_axis(axis: Axes, losses: pd.Series, guessing: float) -> None:
    """A logarithmic axis that holds all losses up to 20 times guessing, which is a dotted line."""
    losses = losses[np.isfinite(losses)].clip(upper=20 * guessing)
    low, high = (losses.min(), losses.max()) if len(losses) else (guessing, guessing)
    axis.set(yscale="log", ylim=(0.9 * low, 1.1 * high))
    axis.axhline(guessing, color="0.6", linestyle=":", linewidth=0.8)
    plain_log_ticks(axis.yaxis)


def plain_log_ticks(axis: Axis, subs: tuple[int, ...] = (1, 2, 5)) -> None:
    """Ticks at these multiples of the powers of ten, written as plain numbers."""
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


def mark_divergence(axis: Axes, lost: pd.DataFrame, quantity: str) -> None:
    """Each run that diverged as a thin line, and a cross where it ended or left the axis."""
    low, high = axis.get_ylim()
    for _, run in lost[np.isfinite(lost[quantity])].groupby("run"):
        inside = run[quantity].between(low, high)
        iteration, value = run["iteration"], run[quantity].clip(low, high)
        end = len(run) - 1 if inside.all() else int((~inside).to_numpy().argmax())
        colour = COLOURS[run["method"].iloc[0]]
        axis.plot(iteration[: end + 1], value[: end + 1], color=colour, linewidth=0.8)
        axis.plot(iteration.iloc[end], value.iloc[end], "x", color=colour, clip_on=False)
    axis.set_ylim(low, high)
