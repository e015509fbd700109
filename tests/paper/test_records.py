"""Published tables: exact, whole or refused by name, and complete however they were made."""

import gzip
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from helpers import OWN, SMALL, Cut, cut_short, started
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from scipy.stats import gmean

import amaml
from amaml.config import NUMERICS
from amaml.paper import __main__ as program
from amaml.paper import claims, experiments, figures, records, settings
from amaml.runs.parts import run_id
from amaml.runs.store import lock

NAME = "figure_9-small.csv.gz"
ORDER = [f"run{i}" for i in range(100)]
MAKER = dict.fromkeys(records.TOLD, "abc") | {
    "versions": {"torch": "2"}, "clean": True, "numerics": NUMERICS
}  # fmt: skip


def rows(run: str, value: float = 0.5) -> pd.DataFrame:
    return pd.DataFrame({"run": run, "iteration": [1, 2], "query_loss": [value, math.inf]})


def publish(folder: Path, run: str, value: float = 0.5, order=ORDER) -> pd.DataFrame:
    finished = SimpleNamespace(id=run, seconds=1.5, maker=MAKER | {"own": "not told"})
    return records.publish_runs("figure_9", "small", [finished], [rows(run, value)], order, folder)


def read(folder: Path) -> tuple[pd.DataFrame, list[dict]]:
    return records.read_records("figure_9", "small", folder)


numbers = st.floats(width=64) | st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 5e-324])
labels = st.sampled_from(["MAML", "Alpha MAML", "NA", "None", "nan", 'a "quoted", word', "é"])
ids = st.text("0123456789abcdef", min_size=16, max_size=16)
tables = st.lists(
    st.tuples(ids, labels, st.booleans(), st.integers(0, 2**62), numbers, numbers), min_size=1
)


@examples(max_examples=60)
@given(tables)
def test_any_table_comes_back_bit_for_bit(content):
    names = ["run", "method", "rotate", "iteration", "alpha", "query_loss"]
    table = pd.DataFrame(content, columns=names).astype({"alpha": float, "query_loss": float})
    with tempfile.TemporaryDirectory() as folder:
        records.write_records("figure_9", "small", table, [], folder)
        back, _ = read(folder)
    pd.testing.assert_frame_equal(back, table, check_exact=True)
    for name in ("alpha", "query_loss"):  # and zeros of either sign
        signs = [np.signbit(some[name][some[name] == 0]) for some in (back, table)]
        assert signs[0].equals(signs[1])


def test_records_are_a_table_that_anyone_reads_and_equal_ones_equal_bytes(tmp_path):
    empty, nobody = read(tmp_path)
    assert len(empty) == 0 and nobody == []
    table, path = publish(tmp_path, "run0"), tmp_path / NAME
    pd.testing.assert_frame_equal(pd.read_csv(path, comment="#"), table)
    back, made_by = read(tmp_path)
    pd.testing.assert_frame_equal(back, table, check_exact=True)
    assert made_by == [MAKER | {"runs": {"run0": 1.5}}]
    before = path.read_bytes()
    records.write_records("figure_9", "small", table, made_by, tmp_path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("figure", "content", "words"),
    [
        ("figure_8", None, r"figure_8-small.csv.gz is damaged \(it is of figure_9, small"),
        ("figure_9", "run,iteration\na,1\n", "no header: an older layout.*restore it"),
        ("figure_9", '# {"figure": "figure_9"}\nrun\na\n', "is damaged.*restore it"),
    ],
)
def test_records_of_others_and_of_an_older_layout_are_refused(tmp_path, figure, content, words):
    publish(tmp_path, "run0")
    written = (tmp_path / NAME).read_bytes()
    content = written if content is None else gzip.compress(content.encode())
    (tmp_path / f"{figure}-small.csv.gz").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        records.read_records(figure, "small", tmp_path)


@pytest.mark.parametrize("after", range(3))
def test_a_publication_that_is_cut_short_leaves_the_old_or_the_new(tmp_path, monkeypatch, after):
    """At the sync of the file, at its rename, at the sync of the folder."""
    publish(tmp_path, "run0")
    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_short(patch, after, "os.fsync", "os.replace")
        publish(tmp_path, "run1", 0.7)
    table, made_by = read(tmp_path)
    published = ["run0"] if after < 2 else ["run0", "run1"]
    assert table["run"].unique().tolist() == list(made_by[0]["runs"]) == published
    publish(tmp_path, "run1", 0.7)
    both = pd.concat([rows("run0"), rows("run1", 0.7)], ignore_index=True)
    pd.testing.assert_frame_equal(read(tmp_path)[0], both)
    assert not list(tmp_path.glob("*.part"))


def publish_some(folder: Path, some: range) -> None:
    for i in some:
        publish(folder, f"run{i}", i)


def test_processes_that_publish_into_one_file_lose_nothing(tmp_path):
    waiting = f"waiting for another process that works in {tmp_path}\n"
    with lock(tmp_path):  # so that all of them begin at once
        running = [started(publish_some, tmp_path, range(start, 12, 3)) for start in range(3)]
        assert [said.readline() for _, said in running] == 3 * [waiting]
    for process, said in running:
        assert set(said) <= {waiting}
        process.join()
    table, made_by = read(tmp_path)
    expected = pd.concat([rows(f"run{i}", i) for i in range(12)], ignore_index=True)
    pd.testing.assert_frame_equal(table, expected)
    assert len(made_by) == 1 and made_by[0]["runs"] == {f"run{i}": 1.5 for i in range(12)}


def test_publishing_again_replaces_a_run_drops_strangers_and_keeps_the_order(tmp_path):
    for run in ("run2", "stranger", "run0"):
        publish(tmp_path, run, order=[*ORDER, "stranger"])
    table = publish(tmp_path, "run2", 0.9)
    expected = pd.concat([rows("run0"), rows("run2", 0.9)], ignore_index=True)
    pd.testing.assert_frame_equal(table, expected)
    table, made_by = read(tmp_path)
    pd.testing.assert_frame_equal(table, expected)
    assert [list(batch["runs"]) for batch in made_by] == [["run0", "run2"]]


def test_records_of_another_version_of_the_numerics_go_as_new_ones_come(tmp_path):
    old = [MAKER | {"numerics": NUMERICS - 1, "runs": {"run0": 1.5}}]
    records.write_records("figure_9", "small", rows("run0"), old, tmp_path)
    table = publish(tmp_path, "run1")
    assert table["run"].unique().tolist() == ["run1"]


MADE_BEFORE = {"far_too_large", "figures_2_3", *(f"appendix_{n}" for n in (1, 2, 3, 5, 6))}
COMMITTED = [
    path.name.removesuffix("-medium.csv.gz") for path in records.RECORDS.glob("*-medium.*")
]


@pytest.mark.parametrize("figure", sorted(COMMITTED))
def test_the_records_of_a_figure_are_of_one_version_from_a_clean_tree(figure):
    """But those begun before there were versions, which wait to be made again."""
    table, made_by = records.read_records(figure, "medium")
    assert {run for batch in made_by for run in batch["runs"]} == set(table["run"])
    of_one_version = {batch["numerics"] for batch in made_by} == {NUMERICS}
    assert of_one_version != (figure in MADE_BEFORE), "made again: take it out of the list"
    assert figure in MADE_BEFORE or all(batch["clean"] for batch in made_by)


def test_the_front_page_and_the_readme_tell_what_the_records_say():
    """Where this fails, newer records have come: write what `told` says into both pages."""
    readme, index = (
        " ".join((records.PROJECT / page).read_text().split())
        for page in ("README.md", "book/index.md")
    )
    table, _ = records.read_records("starts", "medium")
    run, losses = table.iloc[0], claims.final_losses(table, math.log(5))
    losses = losses[losses["h drawn"].notna()]  # those of the chapter's headline
    rates = table[table["meta_optimizer"] == "sgd"].groupby("start")[["alpha_0", "beta_0"]].first()
    narrow = losses[rates.loc[losses.index].min(axis=1) >= 0.01]
    worth, drawn, of_narrow, drawn_narrow = (
        claims.format_trials(some[line], some["plain"]).replace("\N{NBSP}", " ")
        for some in (losses, narrow)
        for line in ("h = 0.001", "h drawn")
    )
    for told in (
        "worth {} trials of MAML (95 % interval: {}".format(*worth.split(" (")),
        f"it is worth {drawn}. ",
    ):
        assert told in index and told in readme
    assert f"below 0.01 it is worth {of_narrow}, and {drawn_narrow} with drawn" in index

    waves, _ = records.read_records("starts_sinusoids", "medium")
    lost = waves[waves["status"] == "diverged"].groupby("variant")["run"].nunique()
    n = waves["start"].nunique()
    told = f"on sinusoids {lost['h = 0.001']} of {n} runs with the same hyper rates diverge"
    told += f", beside {lost['plain']} of MAML's"
    assert told in index and told in readme

    told = f"from {len(losses)} random starts (Omniglot, {run['n_way']}-way {run['k_shot']}-shot, "
    told += f"meta-batch of {run['meta_batch_size']} tasks, {run['iterations']} iterations)"
    assert told in index

    table, _ = records.read_records("accuracy", "medium")
    lines = claims.accuracies(table).reset_index()
    row = lines[(lines["method"] == "MAML") & (lines["case"] == "published")].iloc[0]
    told = f"{row['accuracy']:.1f} ± {row['ci95']:.1f} % here (held-out characters, "
    assert told + f"{row['seeds']} seed, {row['test_tasks']:,.0f} tasks, transductive)" in index
    ours = lines[(lines["method"] == "Alpha MAML") & (lines["meta_optimizer"] == "adam")]
    ours = ours[ours["case"] == "too small"].iloc[0]
    told = f"Alpha MAML with Adam comes to {ours['accuracy']:.1f} ± {ours['ci95']:.1f} % from rates"
    assert told in index and abs(ours["accuracy"] - row["accuracy"]) < ours["ci95"] + row["ci95"]
    assert ours["seeds"] == 1  # "one run as well"

    table, _ = records.read_records("figure_1", "medium")
    good = records.final_validation(table).query("case == 'good'")
    good = good.pivot(index="seed", columns="method", values="validation_loss")
    ratio = good["Alpha MAML"] / good["MAML"]
    told = f"at {gmean(ratio):.2f} times MAML's loss ({ratio.min():.2f} to {ratio.max():.2f} over "
    told += f"{len(ratio)} seeds)"
    assert told in index and told in readme
    run = table[table["method"] == "Alpha MAML"].iloc[0]
    told = f"meta-batch of {run['meta_batch_size']} tasks, {run['iterations']:,} iterations, "
    told += "one inner step, "
    seeds = f"over {table['seed'].nunique()} seeds"
    assert f"{told}h = {run['hyper_alpha']:g})" in index and f"ranges {seeds}" in index
    assert f"{told}h = {run['hyper_alpha']:g}, mean and range {seeds}" in readme
    assert f"{len(amaml.load_glyphs())} characters drawn from the fonts" in readme


def test_fewer_rows_keep_the_ends_the_spacing_and_the_validations():
    metrics = pd.DataFrame({"iteration": range(1, 1202)})
    metrics["validation_loss"] = (metrics["iteration"] % 10 == 0).replace(False, np.nan)
    fewer = records.subsample(metrics, 500)["iteration"]
    assert 400 < len(fewer) <= 500 and fewer.iloc[0] == 1 and fewer.iloc[-1] == 1201
    assert set(range(10, 1201, 10)) <= set(fewer) and set(range(3, 1201, 3)) <= set(fewer)
    assert len(records.subsample(metrics[:300], 500)) == 300


def test_final_validation_by_hand():
    table = pd.DataFrame({
        "run": ["a"] * 4 + ["b"] * 2,
        "status": ["done"] * 4 + ["diverged"] * 2,
        "iteration": [1, 100, 101, 200, 1, 2],
        "validation_loss": [9.0, 5.0, 1.0, 2.0, 0.5, np.nan],
        "validation_accuracy": [0.1, 0.2, 0.3, 0.5, 0.2, np.nan],
        "alpha": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        "beta": [0.1] * 6,
    })  # fmt: skip
    final = records.final_validation(table)
    names = ["validation_loss", "validation_accuracy", "alpha"]
    assert final.loc["a", names].tolist() == [1.5, 0.4, 4.0]
    assert final.loc["b", "validation_loss"] == math.inf


@pytest.fixture
def figure_1(tmp_path, monkeypatch):
    """Figure 1 at a size that takes seconds, made in this process, its records in `tmp_path`."""
    small = {name: SMALL[name] for name in ("data", "filters", "meta_batch_size", "n_way")}
    small |= {"iterations": 12, "validation_every": 4, "validation_tasks": 3}
    for profile in ("quick", "paper"):
        monkeypatch.setitem(experiments.PROFILES, profile, small)
        monkeypatch.setitem(settings.FIGURE_1_SEEDS, profile, (0, 1))

    def make(profile: str = "quick", figure: str = "figure_1", **more) -> pd.DataFrame:
        places = {"out": tmp_path / "runs", "folder": tmp_path, "progress": False, "minutes": 60}
        return records.figure_records(figure, profile, **places | more)

    return make


def test_a_figure_trains_what_is_missing_and_is_drawn_from_its_records(
    figure_1, tmp_path, monkeypatch
):
    table = figure_1(minutes=None)
    planned = [run.config.id for run in experiments.runs_of("figure_1", "quick")]
    assert table["run"].unique().tolist() == planned and len(planned) == 12
    assert table.groupby("case")["method"].nunique().tolist() == [2, 2, 2]
    back, made_by = records.read_records("figure_1", "quick", tmp_path)
    pd.testing.assert_frame_equal(back, table)
    assert [set(batch["runs"]) for batch in made_by] == [set(planned)]
    assert all(seconds > 0 for seconds in made_by[0]["runs"].values())

    with monkeypatch.context() as patch:
        patch.setattr(records, "run_all", lambda *a, **k: pytest.fail("trained again"))
        pd.testing.assert_frame_equal(figure_1(), table)
    lost = table[table["run"] != planned[3]]
    records.write_records("figure_1", "quick", lost, made_by, tmp_path)
    pd.testing.assert_frame_equal(figure_1(), table)  # however the runs finished

    figure = figures.figure_1(table)
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert [title.split("\n")[0] for title in titles] == ["good", "too small", "too large"]
    line = figure.axes[0].lines[0]  # alpha, good case, MAML: constant
    assert line.get_ydata() == pytest.approx(0.4)


def test_runs_of_registered_parts_are_published_what_fails_is_told_and_all_can_be_made_again(
    figure_1, tmp_path, monkeypatch
):
    monkeypatch.setitem(experiments.PARTS, "lines", {k: OWN[k] for k in OWN if k != "name"})
    config, bad = (amaml.RunConfig(**SMALL | {"n_way": n}, iterations=4) for n in (3, 999))
    planned = [
        experiments.PlannedRun({"method": "own"}, config, "lines"),
        experiments.PlannedRun({"method": "usual"}, config),
        experiments.PlannedRun({"method": "usual"}, bad),
    ]
    monkeypatch.setitem(experiments.FIGURES, "figure_9", lambda figure, profile: planned)
    with pytest.raises(RuntimeError, match="1 of 2 runs failed"):
        figure_1(figure="figure_9")
    planned.pop()
    table = figure_1(figure="figure_9")
    ids = {"own": run_id(config, "lines"), "usual": config.id}
    assert table.groupby("method")["run"].unique().explode().to_dict() == ids
    again = figure_1(figure="figure_9", retrain=True, out=tmp_path / "other")
    assert {path.name for path in (tmp_path / "other").iterdir()} == set(ids.values())
    pd.testing.assert_frame_equal(again, table, rtol=1e-4)


def test_a_profile_for_a_gpu_is_not_begun_on_a_cpu_by_itself(figure_1):
    with pytest.raises(RuntimeError, match=r"12 of the 12 runs.*--device cuda"):
        figure_1("paper", minutes=None)


def test_a_figure_of_the_paper_profile_is_made_piece_by_piece(
    figure_1, tmp_path, monkeypatch, capsys
):
    undisturbed = figure_1("paper", out=tmp_path / "once", folder=tmp_path / "once")
    monkeypatch.setitem(settings.RUNS_PER_BATCH, "paper", 6)
    command = ["--figure", "figure_1", "--profile", "paper", "--minutes", "0"]
    command += ["--out", str(tmp_path / "runs"), "--records", str(tmp_path)]
    published = []
    for _ in range(8):
        program.main(command)
        table, _ = records.read_records("figure_1", "paper", tmp_path)
        published.append(table["run"].nunique())
        assert f"{published[-1]} of 12 runs published" in capsys.readouterr().out
    assert published == [0, 0, 0, 6, 6, 6, 6, 12]  # looked at after 4, 8, 10 and 12 iterations
    pd.testing.assert_frame_equal(table, undisturbed, rtol=1e-4)
    pd.testing.assert_frame_equal(figure_1("paper", minutes=None), table)  # none is missing


def test_a_long_run_is_published_under_way_and_goes_on(figure_1, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(settings.SIZES["accuracy"], "paper", (2, 12, 2, (0,)))
    monkeypatch.setitem(settings.TEST_TASKS, "paper", 8)
    monkeypatch.setitem(settings.RUNS_PER_BATCH, "paper", 1)
    command = ["--figure", "accuracy", "--profile", "paper", "--minutes", "0"]
    command += ["--out", str(tmp_path / "runs"), "--records", str(tmp_path)]
    program.main(command)  # looked at after 10 iterations
    assert "0 of 7 runs published, 1 under way" in capsys.readouterr().out
    table, _ = records.read_records("accuracy", "paper", tmp_path)
    assert table["status"].unique() == ["running"] and table["iteration"].max() == 10
    assert claims.accuracies(table).empty
    program.main(command)
    assert "1 of 7 runs published\n" in capsys.readouterr().out
    table, _ = records.read_records("accuracy", "paper", tmp_path)
    assert table["status"].unique() == ["done"] and table["iteration"].tolist() == [*range(1, 13)]
    assert claims.accuracies(table)["accuracy"].notna().all()


def test_numbers_are_shortened_to_what_tells_float32_apart():
    values = np.random.default_rng(0).lognormal(sigma=20, size=1000).astype(np.float32)
    values[:3] = math.nan, math.inf, -math.inf
    table = pd.DataFrame({"run": "a", "iteration": range(1000), "query_loss": values.astype(float)})
    short = records.shorten(table)
    assert np.array_equal(short["query_loss"].astype(np.float32), values, equal_nan=True)
    assert len(short.to_csv()) < 0.85 * len(table.to_csv())
    pd.testing.assert_frame_equal(short, table)


def test_pieces_need_neither_dask_nor_what_draws(tmp_path):
    words = f"""
import sys
for name in ("dask", "distributed", "matplotlib", "seaborn", "torchvision", "PIL", "papermill"):
    sys.modules[name] = None  # importing it is an error
from amaml.paper import __main__, experiments
experiments.PROFILES["paper"] = experiments.PROFILES["quick"] | dict(filters=2, iterations=2)
options = ["--figure", "figure_1", "--profile", "paper", "--minutes", "5"]
__main__.main([*options, "--out", {str(tmp_path / "runs")!r}, "--records", {str(tmp_path)!r}])
"""
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True)
    assert "30 of 30 runs published" in done.stdout, done.stderr


def test_an_unknown_profile_is_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        program.main(["--figure", "figure_1", "--profile", "huge"])
    assert "invalid choice: 'huge'" in capsys.readouterr().err


def test_the_accuracy_after_a_whole_training_is_measured_and_told(figure_1, monkeypatch):
    monkeypatch.setitem(settings.SIZES["accuracy"], "paper", (2, 3, 2, (0, 1)))
    monkeypatch.setitem(settings.TEST_TASKS, "paper", 8)
    table = figure_1("paper", "accuracy")
    told = claims.accuracies(table).reset_index()
    assert len(told) == 7 and (told["seeds"] == 2).all() and (told["test_tasks"] == 8).all()
    row = told.set_index(["method", "meta_optimizer", "case"]).loc[("MAML", "adam", "published")]
    ends = table.dropna(subset="test_accuracy").set_index(["method", "meta_optimizer", "case"])
    of_row = 100 * ends.loc[row.name, ["test_accuracy", "test_accuracy_ci95"]]
    low, high = sorted(of_row["test_accuracy"])
    assert (row["lowest"], row["highest"]) == (low, high)
    assert row["accuracy"] == pytest.approx((low + high) / 2)
    assert row["ci95"] == pytest.approx(math.hypot(*of_row["test_accuracy_ci95"]) / 2)
