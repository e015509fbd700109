"""The one figure style of the book, the figures drawn from their records, and saving them.

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
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from torch import Tensor

from amaml.paper.records import PROJECT, RECORDS, read_records
from amaml.tasks import Tasks

METHODS = ("MAML", "Alpha MAML")
COLOURS = {"MAML": "#D55E00", "Alpha MAML": "#0072B2"}  # of Okabe and Ito's palette
DASHES = {"MAML": (3, 1.5), "Alpha MAML": ""}
DATA_NAMES = {"omniglot": "Omniglot", "glyphs": "embedded glyphs"}
FORMATS = ("png", "pdf")


def use_style() -> None:
    """Set the book's style; called by the figures here, and by notebooks that draw their own."""
    sns.set_theme(
        context="paper",
        style="ticks",
        rc={
            "figure.dpi": 110,
            "savefig.dpi": 200,
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "font.size": 9,
            "axes.titlesize": 9,
            "axes.labelsize": 9,
            "legend.fontsize": 9,
            "legend.frameon": False,
            "lines.linewidth": 1.4,
            "svg.hashsalt": "amaml",
        },
    )


def save(figure: Figure, name: str, profile: str, folder: str | Path | None = None) -> list[Path]:
    """Write `figures/<profile>/<name>.png` and `.pdf`; the same records give the same bytes."""
    place = (Path(folder) if folder else PROJECT / "figures") / profile
    place.mkdir(parents=True, exist_ok=True)
    paths = [place / f"{name}.{ending}" for ending in FORMATS]
    for path in paths:
        dates = {"CreationDate": None} if path.suffix == ".pdf" else {"Software": None}
        figure.savefig(path, metadata=dates)
    return paths


def source(table: pd.DataFrame, figure: str, profile: str, folder: str | Path = RECORDS) -> str:
    """Where a figure's numbers come from: data, seeds, and who made the runs, from its records."""
    data = " and ".join(DATA_NAMES[name] for name in table["data"].unique())
    seeds = ", ".join(map(str, sorted(table["seed"].unique())))
    lines = [f"{data}, profile {profile}, seeds {seeds}"]
    shown = set(table["run"])
    for batch in read_records(figure, profile, folder)[1]:
        seconds = [took for run, took in batch["runs"].items() if run in shown]
        commit = str(batch["commit"])[:10] + ("" if batch["clean"] else " and changes")
        lines.append(
            f"{len(seconds)} runs at commit {commit}: torch {batch['versions']['torch']}, "
            f"{batch['machine']['processor']}, {sum(seconds) / 3600:.1f} h"
        )
    return "\n".join(lines)


def image_grid(images: Tensor, labels: list[str] | None = None, inch: float = 0.42) -> Figure:
    """Images (rows, columns, height, width) side by side, dark ink on white; labels at the rows."""
    use_style()
    rows, columns = images.shape[:2]
    figure, axes = plt.subplots(
        rows, columns, figsize=(columns * inch + (1.6 if labels else 0), rows * inch), squeeze=False
    )
    for row, line in enumerate(axes):
        for axis, image in zip(line, images[row], strict=True):
            axis.imshow(image.cpu(), cmap="gray_r", vmin=0, vmax=images.max().item())
            axis.set(xticks=[], yticks=[])
            sns.despine(ax=axis, left=True, bottom=True)
        if labels:
            line[0].set_ylabel(labels[row], rotation=0, ha="right", va="center")
    return figure


def task_grid(tasks: Tasks) -> Figure:
    """Support and query sets of some tasks, a row a task and a column an image.

    The support set stands left, the query set right, each in the order of its labels.
    """
    use_style()
    sets = {"support set": tasks.support_x, "query set": tasks.query_x}
    labels = {"support set": tasks.support_y, "query set": tasks.query_y}
    widths = [x.shape[1] for x in sets.values()]
    figure, axes = plt.subplots(
        len(tasks), 2, figsize=(0.52 * sum(widths), 0.58 * len(tasks) + 0.3), squeeze=False,
        width_ratios=widths,
    )  # fmt: skip
    for column, (name, x) in enumerate(sets.items()):
        for row in range(len(tasks)):
            strip = torch.cat([torch.nn.functional.pad(i, (1, 1)) for i in x[row, :, 0]], dim=1)
            axis, side = axes[row, column], x.shape[-1] + 2
            axis.imshow(strip.cpu(), cmap="gray_r", vmin=0, vmax=1)
            axis.set(yticks=[], xticks=[side * (i + 0.5) for i in range(x.shape[1])])
            axis.set_xticklabels(labels[name][row].tolist() if row == len(tasks) - 1 else [])
            axis.tick_params(length=0)
            for i in range(1, x.shape[1]):
                axis.axvline(side * i - 0.5, color="0.85", linewidth=0.6)
            sns.despine(ax=axis, left=True, bottom=True)
            if column == 0:
                axis.set_ylabel(f"task {row}", rotation=0, ha="right", va="center")
        axes[0, column].set_title(name)
        axes[-1, column].set_xlabel("label")
    return figure


def figure_1(table: pd.DataFrame) -> Figure:
    """Figure 1: alpha, beta, training and validation loss against the iteration.

    `table` is that of `sweep.figure_records("figure_1", profile)`: a column of panels a case, a
    line a method (the mean over the seeds), a band from the lowest to the highest seed. Training
    losses of single meta-batches are averaged over 20 iterations. The dotted line is the loss of
    guessing. Runs that diverged are no part of the means: they are thin lines up to a cross.
    """
    use_style()
    cases = list(dict.fromkeys(table["case"]))
    table = table.assign(training_loss=training_loss(table))
    rows = {
        "alpha": r"$\alpha$ (inner rate)",
        "beta": r"$\beta$ (meta rate)",
        "training_loss": "training loss",
        "validation_loss": "validation loss",
    }
    figure, axes = plt.subplots(
        len(rows), len(cases), figsize=(2.3 * len(cases) + 0.5, 6.6), sharex=True, squeeze=False
    )
    diverged = table["status"] == "diverged"
    for column, case in enumerate(cases):
        shown, lost = (table[(table["case"] == case) & which] for which in (~diverged, diverged))
        for axis, quantity in zip(axes[:, column], rows, strict=True):
            values = shown[np.isfinite(shown[quantity])]
            if len(values):
                sns.lineplot(
                    values, x="iteration", y=quantity, hue="method", style="method",
                    hue_order=METHODS, style_order=METHODS, palette=COLOURS, dashes=DASHES,
                    errorbar=("pi", 100), err_kws={"linewidth": 0, "alpha": 0.2},
                    ax=axis, legend=False,
                )  # fmt: skip
            axis.set(xlabel="iteration t", ylabel=rows[quantity] if column == 0 else "")
            if quantity in ("training_loss", "validation_loss"):
                losses = table[quantity] if diverged.all() else table[quantity][~diverged]
                loss_axis(axis, losses, table["n_way"].max())
            elif len(values):
                low, high = 1.1 * values[quantity].min(), 1.1 * values[quantity].max()
                axis.set_ylim(min(0, low), max(0, high))
            mark_divergence(axis, lost, quantity)
        axes[0, column].set_title(title(case, table[table["case"] == case]))
    handles = [
        plt.Line2D([], [], color=COLOURS[m], linestyle="--" if DASHES[m] else "-", label=m)
        for m in METHODS
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(METHODS))
    return figure


def training_loss(table: pd.DataFrame, window: int = 20) -> pd.Series:
    """Query loss on the training tasks after adaptation, trailing mean over `window` iterations."""
    smooth = []
    for _, run in table.groupby("run"):
        stride = run["iteration"].diff().median() if len(run) > 1 else 1
        rows = max(1, round(window / stride))
        smooth.append(run["query_loss"].rolling(rows, min_periods=1).mean())
    return pd.concat(smooth).reindex(table.index)


def loss_axis(axis, losses: pd.Series, n_way: int) -> None:
    """A logarithmic axis that holds all losses up to 20 times guessing, which is a dotted line."""
    guessing = math.log(n_way)
    losses = losses[np.isfinite(losses)].clip(upper=20 * guessing)
    low, high = (losses.min(), losses.max()) if len(losses) else (guessing, guessing)
    axis.set(yscale="log", ylim=(0.9 * low, 1.1 * high))
    axis.axhline(guessing, color="0.6", linestyle=":", linewidth=0.8)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_locator(NullLocator())


def title(case: str, shown: pd.DataFrame) -> str:
    """A case with its starting rates."""
    first = shown.iloc[0]
    rates = rf"$\alpha_0$ = {first['alpha_0']:g}, $\beta_0$ = {first['beta_0']:g}"
    return f"{case}\n{rates}"


def mark_divergence(axis, lost: pd.DataFrame, quantity: str) -> None:
    """Each run that diverged as a thin line, and a cross where it ended or left the axis."""
    low, high = axis.get_ylim()
    for _, run in lost.groupby("run"):
        finite = run[np.isfinite(run[quantity])]
        if finite.empty:
            continue
        inside = finite[quantity].between(low, high)
        iteration, value = finite["iteration"], finite[quantity].clip(low, high)
        until = len(finite) if inside.all() else int((~inside).to_numpy().argmax()) + 1
        colour = COLOURS[run["method"].iloc[0]]
        axis.plot(iteration[:until], value[:until], color=colour, linewidth=0.8)
        end = slice(until - 1, until)
        axis.plot(iteration[end], value[end], "x", color=colour, clip_on=False)
    axis.set_ylim(low, high)
