"""Speed and memory of `amaml` beside other implementations and the machine's matrix products.

`make bench`, or `python -m benchmarks.bench` with the options of `--help`. A whole run writes
`figures/records/performance-<device>.csv.gz` with a header that says what made it; parts of it
(`--only`) are printed and not written.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import pandas as pd
import torch

from amaml.paper import records
from amaml.runs import provenance
from amaml.runs.process import keep_freed_memory
from benchmarks import costs, measures, peers, processes
from benchmarks.measures import AMAML, PRODUCT, Bench

MEASURES = {
    "iteration": measures.iteration,
    "twenty_way": measures.twenty_way,
    "alpha": costs.alpha,
    "parts": costs.parts,
    "meta_batch": measures.meta_batch,
    "inner_steps": measures.inner_steps,
    "ways": measures.ways,
    "batched_runs": costs.batched_runs,
    "memory": costs.memory,
    "start": processes.start,
    "run_all": processes.run_all,
}
REFERENCE = {"alpha": "MAML", "run_all": "one after another"}  # of a measure's ratios; else amaml
SIZES = ["n_way", "inner_steps", "meta_batch_size", "n_runs"]
UNITS = {"s": ("ms", 1e3), "bytes": ("MB", 1e-6)}  # shown, and the factor


def run(bench: Bench, names: list[str]) -> pd.DataFrame:
    """The rows of these measures; prints each measure's table as soon as it is there."""
    tables = []
    for name in names:
        rows = MEASURES[name](bench)
        table = pd.DataFrame([{"measure": name} | row for row in rows])
        print(f"\n{name}: {MEASURES[name].__doc__.partition(chr(10))[0]}")
        print(summarise(table).to_string(index=False, na_rep=""), flush=True)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """One row per contestant and size: median and quartiles over the rounds, the ratio to the
    measure's reference, and the share of the matrix-product rate.

    Ratios and shares are taken round by round, and are the medians over the rounds.
    """
    sizes = [name for name in SIZES if name in table]
    rows = []
    for keys, group in table.groupby(["measure", *sizes], sort=False, dropna=False):
        sizes_shown = dict(zip(sizes, keys[1:], strict=True))
        rounds = group.pivot(index="round", columns="contestant", values="value")
        reference = rounds.get(REFERENCE.get(keys[0], AMAML))
        for contestant in group["contestant"].unique():
            unit, scale = UNITS[group["unit"].iloc[0]]
            low, median, high = (scale * rounds[contestant]).quantile([0.25, 0.5, 0.75])
            row = {"measure": keys[0], "contestant": contestant, **sizes_shown, "unit": unit}
            row |= {"median": float(f"{median:.4g}"), "quartiles": f"{low:.4g} to {high:.4g}"}
            if reference is not None and contestant != PRODUCT and len(rounds.columns) > 1:
                low, median, high = (rounds[contestant] / reference).quantile([0.25, 0.5, 0.75])
                row |= {"ratio": median, "its quartiles": f"{low:.3f} to {high:.3f}"}
            if PRODUCT in rounds:
                gflop = group.groupby("contestant")["gflop"].first()
                rate = gflop / rounds
                row["GFLOP/s"] = rate[contestant].median()
                row["share"] = (rate[contestant] / rate[PRODUCT]).median()
            rows.append(row)
    shown = pd.DataFrame(rows).round({"ratio": 3, "GFLOP/s": 1, "share": 3})
    whole = {name: "Int64" for name in sizes}
    return shown.astype(whole).dropna(axis="columns", how="all")


def describe(bench: Bench) -> dict:
    """What makes the numbers: provenance as of all records, and what is particular to speed."""
    libraries = {name: library for name, (_, _, library) in peers.PEERS.items() if library}
    maker = provenance.environment(bench.device)
    maker["versions"] |= {
        library: provenance.package_version(library) or "source checkout"
        for name, library in libraries.items()
        if peers.installed(name)
    }
    maker["machine"]["load"] = round(os.getloadavg()[0], 2)  # of the last minute, before measuring
    left_out = [name for name in libraries if not peers.installed(name)]
    return maker | {"precision": bench.precision, "left_out": left_out}


def set_precision(precision: str) -> None:
    """Products and convolutions in the same precision: by default torch's convolutions alone
    would use TF32 on a GPU."""
    torch.backends.cuda.matmul.allow_tf32 = precision == "TF32"
    torch.backends.cudnn.allow_tf32 = precision == "TF32"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(MEASURES), help="these measures alone")
    parser.add_argument("--rounds", type=int, help="rounds of each measure (default: its own)")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count()), help="default: 2")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="float32", choices=["float32", "TF32"])
    parser.add_argument("--out", type=Path, help="folder of the record (default: figures/records)")
    given = parser.parse_args(arguments)
    for name in ("rounds", "threads"):
        value = getattr(given, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: at least 1 is needed")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU; leave the option out")
    if given.precision == "TF32" and given.device == "cpu":
        parser.error("--precision TF32: only a GPU has it; add --device cuda")

    torch.set_num_threads(given.threads)
    set_precision(given.precision)
    if given.device == "cpu":
        keep_freed_memory()
    begun = time.perf_counter()
    bench = Bench(given.device, given.threads, given.rounds, given.precision)
    maker = describe(bench)
    machine = maker["machine"]
    print(f"{machine['processor']} ({machine['cores']} cores, {machine['instructions']})", end="; ")
    print(f"device {machine['device']}, {given.precision}, {given.threads} threads, load", end=" ")
    print(f"{machine['load']}; torch {maker['versions']['torch']}")
    for name in maker["left_out"]:
        print(f"left out, not installed: {name}")
    names = given.only or [n for n in MEASURES if given.device == "cpu" or n != "run_all"]
    table = run(bench, names)
    for name, errors in bench.checked.items():
        verdict = "right" if measures.is_right(errors) else "WRONG, not timed"
        shown = ", ".join(f"{error:.0e} in {kind}" for kind, error in errors.items())
        print(f"meta-gradient of {name}: {verdict} (off by {shown})")
    maker |= {"checked": bench.checked, "seconds": round(time.perf_counter() - begun, 1)}
    print(f"\n{maker['seconds']:.0f} seconds")
    if given.only is None or given.out is not None:
        path = records.write_records(
            "performance", given.device, table, [maker], given.out or records.RECORDS
        )
        print(f"written: {path.relative_to(records.PROJECT) if given.out is None else path}")


if __name__ == "__main__":
    sys.exit(main())
