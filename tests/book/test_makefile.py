"""What `make` installs and passes on: exact versions, the data's folder, parameters that exist."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    outer = ("AMAML_DATA", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")  # of the make that runs the tests
    environment = {k: v for k, v in os.environ.items() if k not in outer} | environment
    command = ["make", "--eval=data: ; @printenv AMAML_DATA", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("/a/my thesis/data", "/a/my thesis/data"),
        ("/a/two  spaces/", "/a/two  spaces"),
        ("/it's/(here), or there", "/it's/(here), or there"),
        ("my data", f"{ROOT}/my data"),
        ("../data", f"{ROOT.parent}/data"),
        ("~", "/home/a b"),
        ("~/my thesis/data", "/home/a b/my thesis/data"),
    ],
)
def test_data_may_lie_in_any_folder(given, taken):
    assert make("data", f"DATA={given}", HOME="/home/a b").stdout == f"{taken}\n"


def test_without_data_the_environments_is_left_as_it_is():
    assert make("data", AMAML_DATA="~/my data").stdout == "~/my data\n"
    assert make("data").stdout == ""


@pytest.mark.parametrize("wrong", ["RETRIAN=1", "PROFILE=meduim", "Data=/data"])
def test_what_is_misspelt_is_refused(wrong):
    done = make("--dry-run", "figures", wrong)
    assert done.returncode != 0 and "is unknown: give" in done.stderr


@pytest.fixture
def clone(tmp_path) -> Path:
    """The Makefile, the book and a papermill that only says what it is told."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(ROOT / "book", tmp_path / "book")
    (tmp_path / "figures/medium").mkdir(parents=True)
    (tmp_path / "figures/medium/figure_1.png").touch()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/papermill").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "bin/papermill").chmod(0o755)
    return tmp_path


def make_figures(clone: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = ["make", "-o", "./installed", "VENV=.", "PROFILE=medium", *arguments, "figures"]
    return subprocess.run(command, cwd=clone, capture_output=True, text=True)


def test_figures_executes_the_chapters_with_their_parameters(clone):
    done = make_figures(clone, "RETRAIN=1")
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if "-p profile medium" in line]
    retrained = [line for line in told if "-p retrain True" in line]
    assert len(told) > len(retrained) >= 4 and "05_figure_1" in retrained[0]


def test_figures_shows_the_teaching_chapters_where_their_images_are(clone):
    for given, shown in (([], False), (["DATA=/data"], True), (["PROFILE=quick"], True)):
        (clone / "figures/quick").mkdir(exist_ok=True)
        (clone / "figures/quick/figure_1.png").touch()
        done = make_figures(clone, *given)
        assert done.returncode == 0, done.stderr
        assert ("-p profile" in done.stdout) and ("book/02_maml.ipynb" in done.stdout) == shown


def test_figures_stops_at_a_parameter_that_a_notebook_does_not_have(clone):
    notebook = clone / "book/06_figures_2_3.ipynb"
    notebook.write_text(notebook.read_text().replace("retrain", "again"))
    done = make_figures(clone)
    assert done.returncode != 0 and "06_figures_2_3 has no parameter retrain" in done.stderr
    assert "07_appendix_figures" not in done.stdout


def versions(name: str) -> dict[str, str]:
    text = (ROOT / name).read_text().lower().replace("_", "-")
    return dict(re.findall(r"^([\w.-]+)==([\w.]+)$", text, re.M))


def test_all_that_is_required_has_the_same_version_among_the_constraints():
    required, pinned = versions("requirements.txt"), versions("constraints.txt")
    assert required and required.items() <= pinned.items()
    assert len(pinned) > 2 * len(required)
