"""Train what is missing of a figure and publish it."""

from __future__ import annotations

import argparse

import torch

from amaml.paper import experiments, records, settings


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m amaml.paper", description=__doc__)
    parser.add_argument("--figure", required=True, choices=list(experiments.FIGURES))
    parser.add_argument("--profile", required=True, choices=list(settings.PROFILES))
    out = records.PROJECT / "runs"
    parser.add_argument("--out", default=out, help="folder of the runs (default: runs)")
    parser.add_argument("--data", dest="root", help="folder of Omniglot (default: $AMAML_DATA)")
    parser.add_argument("--retrain", action="store_true", help="replace the published records")
    parser.add_argument("--records", dest="folder", default=records.RECORDS, help="published here")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: one GPU, no Dask")
    parser.add_argument("--minutes", type=float, help="stop after so long; no Dask")
    parser.add_argument("--tf32", action="store_true", help="faster, rougher products on a GPU")
    options = vars(parser.parse_args(arguments))
    if options.pop("tf32"):
        torch.set_float32_matmul_precision("high")
    table = records.figure_records(**options)
    figure, profile = options["figure"], options["profile"]
    n_runs = len(experiments.runs_of(figure, profile))
    n_published, n_all = (some["run"].nunique() for some in (records.finished(table), table))
    under_way = f", {n_all - n_published} under way" if n_all > n_published else ""
    print(f"{figure}, {profile}: {n_published} of {n_runs} runs published{under_way}")


if __name__ == "__main__":
    main()
