"""The same again: a config gives the same bits wherever it runs, a record the same pictures."""

import os
import subprocess
import sys
from dataclasses import asdict, fields, replace

import pytest
from helpers import ROOT, SMALL, bits, needs_omniglot

import amaml
from amaml.paper import records
from amaml.paper.thresholds import HYPER_RATES
from amaml.runs import provenance
from amaml.training import train_together

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = amaml.RunConfig(**SMALL, iterations=12)
CONFIGS = [
    CONFIG,
    replace(CONFIG, meta_optimizer="adam", seed=1),
    replace(CONFIG, inner_steps=2, k_query=2, seed=2),
    replace(CONFIG, inner_steps=2, first_order=True),
]


def fresh(program: str, *words, seeds: str = "7") -> None:
    """Run a program in fresh processes, all at once: one for each seed of Python's hashes."""
    command = [sys.executable, "-c", program, *map(str, words)]
    environments = (os.environ | {"PYTHONHASHSEED": seed} for seed in seeds)
    running = [subprocess.Popen(command, env=environment) for environment in environments]
    assert [process.wait() for process in running] == [0] * len(seeds)


FRESH = """
import sys, torch, amaml
torch.set_num_threads(1)
for fields in eval(sys.argv[2]):
    amaml.train(amaml.RunConfig(**fields), sys.argv[1], progress=False)
"""


def test_here_in_a_fresh_process_over_workers_and_together_a_run_has_the_same_bits(
    client, tmp_path
):
    """Together also beside a run that diverges."""
    fresh(FRESH, tmp_path / "fresh", [asdict(config) for config in CONFIGS])
    amaml.run_all(CONFIGS, tmp_path / "workers", client, progress=False)
    for config in CONFIGS:
        amaml.train(config, tmp_path, progress=False)
        for elsewhere in ("fresh", "workers"):
            assert bits(tmp_path / elsewhere / config.id) == bits(tmp_path / config.id)
        varied = ({}, {"hyper_alpha": 0.0, "hyper_beta": 0.0}, {"seed": 5}, {"beta": 1e38})
        configs = [replace(config, **fields) for fields in varied]
        together = train_together(configs, tmp_path / "together")
        assert [run.status for run in together] == ["done"] * 3 + ["diverged"]
        for run in together:
            amaml.train(run.config, tmp_path, progress=False)
            assert bits(tmp_path / "together" / run.id) == bits(tmp_path / run.id)


DRAWN = """
import os, sys
import matplotlib
matplotlib.use("agg")
from amaml.paper import figures, grid_figures, records

one, two = (records.read_records(name, "medium", sys.argv[1])[0] for name in sys.argv[3:])
one = one[(one["iteration"] <= 60) & (one["case"] != "good")]
two = two[(two["seed"] == 0) & (two["hyper_alpha"] <= 1e-3)]
paths = two[(two["hyper_alpha"] == 1e-3) & (two["alpha_0"] > 1e-2)]
drawn = {
    "figure_1": figures.figure_1(one),
    "heat_maps": grid_figures.heat_maps(two),
    "slices": grid_figures.slices(two),
    "paths": grid_figures.paths(paths),
}
matplotlib.rcParams["savefig.dpi"] = 60
for name, figure in drawn.items():
    figures.save(figure, name, os.environ["PYTHONHASHSEED"], sys.argv[2])
"""


def test_the_same_record_gives_the_same_picture_files_in_another_process(tmp_path):
    words = (ROOT / "figures" / "records", tmp_path, "figure_1", "figures_2_3")
    fresh(DRAWN, *words, seeds="12")
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / s).iterdir()} for s in "12")
    assert len(one) == 8 and one == two


@needs_omniglot
@pytest.mark.parametrize("hyper_rates", [(0.0, 0.0), (1e-3, 1e-3), (1e-2, 1e-4)])
def test_a_published_run_made_again_finds_its_numbers(tmp_path, hyper_rates):
    """Twenty iterations on a processor and torch like those of the record, elsewhere two.

    Where rounding differs (other processors, other orders of summing) its differences grow from
    1e-7 to some per cent within ten iterations.
    """
    table, made_by = records.read_records("appendix_4", "medium", ROOT / "figures" / "records")
    rows = table[(table[HYPER_RATES] == list(hyper_rates)).all(axis=1) & (table["seed"] == 0)]
    rows = rows[rows["iteration"] <= 20].set_index("iteration")
    row = rows.to_dict("records")[0]
    row |= {"alpha": row["alpha_0"], "beta": row["beta_0"]}
    names = [field.name for field in fields(amaml.RunConfig) if field.name in row]
    config = amaml.RunConfig(**{name: row[name] for name in names})
    assert rows["run"].unique().tolist() == [config.id]  # so these are the published run's fields

    (maker,) = [maker for maker in made_by if config.id in maker["runs"]]
    here = provenance.environment()
    alike = maker["versions"]["torch"] == here["versions"]["torch"] and all(
        maker["machine"].get(name) == here["machine"][name]
        for name in ("processor", "instructions")
    )
    run = amaml.train(replace(config, iterations=20), tmp_path, progress=False)
    again, until = run.metrics.set_index("iteration"), 20 if alike else 2
    assert 1 in rows.index and len(rows) >= 5
    for name in ("support_loss", "query_loss", "alpha", "beta", "gradient_norm", "validation_loss"):
        told = rows.loc[1:until, name].dropna()
        if name == "validation_loss":
            assert told.index.tolist() == ([5, 10, 15, 20] if alike else [])
        assert again.loc[told.index, name].tolist() == pytest.approx(told.tolist(), rel=1e-4), name
