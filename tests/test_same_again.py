"""The same again: a config gives the same bits wherever it runs, a record the same pictures."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
from conftest import needs_omniglot
from test_training import SMALL

import amaml
from amaml.paper import grids, records
from amaml.runs import checkpoints, provenance
from amaml.training import train_together

CONFIGS = [
    amaml.RunConfig(**SMALL, iterations=12),
    amaml.RunConfig(**SMALL, iterations=12, meta_optimizer="adam", seed=1),
    amaml.RunConfig(**SMALL, iterations=12, inner_steps=2, k_query=2, seed=2),
]


def written(out: Path, config: amaml.RunConfig) -> tuple:
    """What a run wrote, to the last bit; its result names the machine and the time."""
    folder = out / config.id
    saved, iteration, _ = checkpoints.load_checkpoint(folder / "checkpoint.safetensors")
    tensors = {name: value.numpy().tobytes() for name, value in checkpoints.flatten(saved).items()}
    identity, metrics = (folder / "config.json").read_bytes(), (folder / "metrics.csv").read_bytes()
    return identity, metrics, iteration, tensors


FRESH = """
import sys, torch, amaml
torch.set_num_threads(1)
for fields in eval(sys.argv[2]):
    amaml.train(amaml.RunConfig(**fields), sys.argv[1], progress=False)
"""


def test_here_in_a_fresh_process_and_over_dask_a_run_has_the_same_bits(tmp_path, one_thread):
    for config in CONFIGS:
        amaml.train(config, tmp_path / "here", progress=False)
    words = [sys.executable, "-c", FRESH, tmp_path / "fresh", repr([asdict(c) for c in CONFIGS])]
    subprocess.run(words, check=True, env=os.environ | {"PYTHONHASHSEED": "7"})
    amaml.run_all(CONFIGS, tmp_path / "dask", progress=False)
    for config in CONFIGS:
        here = written(tmp_path / "here", config)
        assert here[2] == config.iterations
        assert written(tmp_path / "fresh", config) == here
        assert written(tmp_path / "dask", config) == here


def test_made_together_runs_have_the_bits_of_those_made_alone(tmp_path, one_thread):
    """Also beside a run that diverges."""
    for config in CONFIGS:
        varied = ({}, {"hyper_alpha": 0.0, "hyper_beta": 0.0}, {"seed": 5}, {"beta": 1e38})
        configs = [replace(config, **fields) for fields in varied]
        together = train_together(configs, tmp_path / "together")
        assert [run.status for run in together][:3] == ["done"] * 3
        for config, run in zip(configs, together, strict=True):
            alone = amaml.train(config, tmp_path / "alone", progress=False)
            assert run.status == alone.status and run.metrics.equals(alone.metrics)
            if run.status == "done":
                written_alone = written(tmp_path / "alone", config)
                assert written(tmp_path / "together", config) == written_alone


DRAWN = """
import sys
import matplotlib
matplotlib.use("agg")
import torch
import amaml
from amaml.paper import grids, figures, records

one, _ = records.read_records("figure_1", "medium")
two, _ = records.read_records("figures_2_3", "medium")
one, two = one[one["iteration"] <= 60], two[two["seed"] == 0]
paths = two[(two["hyper_alpha"] == 1e-3) & (two["alpha_0"] > 1e-2)]
glyphs = amaml.load_glyphs()
tasks = amaml.TaskSampler(glyphs, n_way=3).sample(2, torch.Generator().manual_seed(0))
figures = {
    "figure_1": figures.figure_1(one),
    "heat_maps": grids.heat_maps(two),
    "slices": grids.slices(two),
    "paths": grids.paths(paths),
    "curves": grids.curves(two, (0.01, 0.01), (0.001, 0.001)),
    "images": figures.image_grid(glyphs.images[:2, :5], ["a", "b"]),
    "tasks": figures.task_grid(tasks),
}
for name, figure in figures.items():
    figures.save(figure, name, "drawn", sys.argv[1])
"""


def test_the_same_record_gives_the_same_picture_files_in_another_process(tmp_path):
    drawn = []
    for seed in ("1", "2"):
        words = [sys.executable, "-c", DRAWN, tmp_path / seed]
        subprocess.run(words, check=True, env=os.environ | {"PYTHONHASHSEED": seed})
        folder = tmp_path / seed / "drawn"
        drawn.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert len(drawn[0]) == 14 and drawn[0] == drawn[1]


@needs_omniglot
@pytest.mark.parametrize("hyper_rates", [(0.0, 0.0), (1e-3, 1e-3), (1e-2, 1e-4)])
def test_a_published_run_made_again_finds_its_numbers(tmp_path, one_thread, hyper_rates):
    """Twenty iterations on a processor and torch like those of the record, elsewhere two.

    Where rounding differs (other processors, other orders of summing) its differences grow from
    1e-7 to some per cent within ten iterations.
    """
    table, made_by = records.read_records("appendix_4", "medium")
    rows = table[(table[grids.HYPER_RATES] == list(hyper_rates)).all(axis=1) & (table["seed"] == 0)]
    rows = rows[rows["iteration"] <= 20].set_index("iteration")
    row = rows.to_dict("records")[0]
    row |= {"alpha": row["alpha_0"], "beta": row["beta_0"]}
    names = [field.name for field in fields(amaml.RunConfig) if field.name in row]
    config = amaml.RunConfig(**{name: row[name] for name in names})
    assert rows["run"].unique().tolist() == [config.id]  # so these are the published run's fields

    (maker,) = [maker for maker in made_by if config.id in maker["runs"]]
    here = provenance.here()
    alike = all(
        maker[kind].get(name) == here[kind][name]
        for kind, name in (
            *(("machine", "processor"), ("machine", "instructions")),
            ("versions", "torch"),
        )
    )
    run = amaml.train(replace(config, iterations=20), tmp_path, progress=False)
    again, until = run.metrics.set_index("iteration"), 20 if alike else 2
    assert 1 in rows.index and len(rows) >= 5
    for name in ("support_loss", "query_loss", "alpha", "beta", "gradient_norm"):
        told = rows.loc[1:until, name]
        assert again.loc[told.index, name].tolist() == pytest.approx(told.tolist(), rel=1e-4), name
    validated = rows.loc[1:until, "validation_loss"].dropna()
    assert validated.index.tolist() == ([5, 10, 15, 20] if alike else [])
    assert again.loc[validated.index, "validation_loss"].tolist() == pytest.approx(
        validated.tolist(), rel=1e-4
    )
