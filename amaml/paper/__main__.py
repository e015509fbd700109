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
    parser.add_argument("--data", help="folder of Omniglot (default: $AMAML_DATA)")
    parser.add_argument("--retrain", action="store_true", help="replace the published records")
    parser.add_argument("--records", default=records.RECORDS, help="folder to publish to")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: one GPU, no Dask")
    parser.add_argument("--minutes", type=float, help="stop after so long; no Dask")
    parser.add_argument("--tf32", action="store_true", help="faster, rougher products on a GPU")
    given = parser.parse_args(arguments)
    if given.tf32:
        torch.set_float32_matmul_precision("high")
    table = records.figure_records(
        given.figure,
        given.profile,
        retrain=given.retrain,
        out=given.out,
        folder=given.records,
        root=given.data,
        device=given.device,
        minutes=given.minutes,
    )
    n_runs = len(experiments.runs_of(given.figure, given.profile))
    n_published, n_all = (some["run"].nunique() for some in (records.finished(table), table))
    under_way = f", {n_all - n_published} under way" if n_all > n_published else ""
    print(f"{given.figure}, {given.profile}: {n_published} of {n_runs} runs published{under_way}")


if __name__ == "__main__":
    main()
