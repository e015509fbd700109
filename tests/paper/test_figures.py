"""Figure 1 of a table by hand, pictures of images and tasks, and where a figure is from."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

import amaml
from amaml.paper import figures, records
from amaml.runs import provenance


@pytest.fixture
def table() -> pd.DataFrame:
    """MAML and Alpha MAML, two seeds each; the second of Alpha MAML diverges."""
    runs = []
    for method, slopes in (("MAML", (0.0, 0.0)), ("Alpha MAML", (0.01, 0.03))):
        for seed, slope in enumerate(slopes):
            lost = slope == 0.03
            iteration = np.arange(1, 31 if lost else 41)
            loss = 1.0 + iteration * (1.0 if lost else 0.1)
            runs.append(pd.DataFrame({
                "run": f"{method} {seed}", "case": "good", "method": method, "data": "omniglot",
                "n_way": 5, "k_shot": 1, "inner_steps": 1, "meta_batch_size": 8, "alpha_0": 0.4,
                "hyper_alpha": 0.01 * bool(any(slopes)), "hyper_beta": 0.02 * bool(any(slopes)),
                "beta_0": 0.3, "seed": seed, "iteration": iteration,
                "status": "diverged" if lost else "done", "alpha": 0.4 + slope * iteration,
                "beta": 0.3, "query_loss": loss, "validation_loss": loss,
            }))  # fmt: skip
    return pd.concat(runs, ignore_index=True)


def test_figure_1_shows_means_without_what_diverged_which_is_a_thin_line_to_a_cross(table):
    figure = figures.figure_1(table)
    alpha = figure.axes[0]
    assert alpha.get_title() == "good\n" + r"$\alpha_0$ = 0.4, $\beta_0$ = 0.3"
    maml, ours, thin, cross = alpha.lines
    assert maml.get_ydata() == pytest.approx(0.4)
    assert ours.get_ydata() == pytest.approx(0.4 + 0.01 * np.arange(1, 41))
    assert thin.get_linewidth() < ours.get_linewidth()
    top = alpha.get_ylim()[1]  # the line that diverged leaves the axis, and ends there
    assert cross.get_marker() == "x" and cross.get_ydata()[0] == top == thin.get_ydata()[-1]
    assert thin.get_ydata()[-2] < top
    plt.close(figure)


def test_training_losses_are_means_over_a_window_that_grows_with_time(table):
    lost = table["run"] == "Alpha MAML 1"
    table.loc[lost & (table["iteration"] == 30), "query_loss"] = np.inf
    smooth = figures.training_loss(table)
    one = table[table["run"] == "MAML 0"].set_index("iteration")["query_loss"]
    ours = smooth[table["run"] == "MAML 0"].to_numpy()
    assert ours[:9] == pytest.approx(one.loc[:9])  # alone
    assert ours[19] == pytest.approx(one.loc[19:22].mean())  # from 20 / 1.1 to 20 * 1.1
    assert smooth[lost].isna().tolist() == 29 * [False] + [True]


def test_a_figure_says_what_its_runs_have_in_common(table):
    said = "Omniglot, 5-way 1-shot, inner steps: 1, meta-batch: 8, seeds: 0, 1, "
    assert figures.setting(table) == said + r"$h_\alpha$ = 0.01, $h_\beta$ = 0.02"
    assert figures.figure_1(table).get_supxlabel() == figures.setting(table)
    plt.close("all")


def test_a_task_is_shown_with_its_labels_and_images_with_theirs(glyphs):
    tasks = amaml.TaskSampler(glyphs, 3).sample(2, torch.Generator().manual_seed(0))
    figure = figures.task_grid(tasks)
    lowest = figure.axes[2]  # of the support set
    labels = [tick.get_text() for tick in lowest.get_xticklabels()]
    assert labels == [str(label) for label in tasks.support_y[1].tolist()]
    assert [axis.get_ylabel() for axis in figure.axes[::2]] == ["task 0", "task 1"]
    plt.close(figure)
    figure = figures.image_grid(glyphs.images[:2, :3], ["first", "second"])
    assert [axis.get_ylabel() for axis in figure.axes] == ["first", "", "", "second", "", ""]
    plt.close(figure)


def test_the_source_of_a_figure_names_runs_and_commit(table, tmp_path):
    maker = provenance.environment() | {
        "commit": "0123456789abcdef",
        "clean": False,
        "runs": {table["run"].iloc[0]: 7200, "of another figure": 3600},
    }
    records.write_records("figure_1", "medium", table, [maker], tmp_path)
    text = figures.source(table, "figure_1", "medium", tmp_path)
    made = "1 runs at commit 0123456789 and changes, 2.0 h"
    assert text == f"Records: figure_1-medium.csv.gz ({made})."
