"""Installed as a package, and in a plain script: where it lies, what it says it is, what it writes.

Reports: an installed package tells another repository's commit as its own; wings that are left out
of the package; a command that writes into site-packages; a script without a main guard that fails
in hundreds of lines; a device without float64.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

WINGS = ["", ".fast", ".datasets", ".runs", ".paper"]


def run(*words, folder, **environment) -> subprocess.CompletedProcess:
    more = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    return subprocess.run(words, cwd=folder, env=more, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A repository of somebody else's, with the package installed in its .venv, not editably."""
    place = tmp_path_factory.mktemp("installed")
    source, project = place / "source", place / "project"
    for part in ("amaml", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(ROOT / part, source / part)
    project.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    done = run(*pip, "--target", str(project / ".venv/site"), str(source), folder=place)
    assert done.returncode == 0, done.stderr
    for words in ("init -q", "config user.name A", "config user.email a@b.c", "add -A"):
        run("git", *words.split(), folder=project)
    run("git", "commit", "-q", "-m", "their own", folder=project)
    return project


def python(installed, code: str, folder=None) -> str:
    path = str(installed / ".venv/site")
    done = run(sys.executable, "-c", code, folder=folder or installed, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_wing_comes_along(installed):
    code = f"""
import importlib, json, pkgutil
import amaml
names = [m.name for m in pkgutil.walk_packages(amaml.__path__, "amaml.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(json.dumps([amaml.__file__, names, [importlib.import_module("amaml" + w).__file__
                                          for w in {WINGS}]]))
"""
    where, names, wings = json.loads(python(installed, code))
    assert ".venv/site" in where and all(".venv/site" in wing for wing in wings)
    here = {p.stem for p in (ROOT / "amaml").rglob("*.py") if not p.stem.startswith("__")}
    assert here <= {name.rpartition(".")[2] for name in names}
    assert (installed / ".venv/site/amaml/py.typed").exists()


@pytest.mark.parametrize("ignored", [False, True])
def test_another_repositorys_commit_is_not_told_as_its_own(installed, ignored):
    if ignored:
        run("git", "rm", "-r", "-q", "--cached", ".venv", folder=installed)
        (installed / ".gitignore").write_text(".venv\n")
        run("git", "add", "-A", folder=installed)
        run("git", "commit", "-q", "-m", "ignored", folder=installed)
    code = "from amaml.runs.provenance import environment as e; import json; print(json.dumps(e()))"
    told = json.loads(python(installed, code))
    if ignored:
        assert told["commit"] is None and told["clean"] is None
    assert told["versions"]["torch"]


def test_records_and_runs_go_to_the_working_folder(installed, tmp_path):
    code = "from amaml.paper import records; print(records.PROJECT, records.RECORDS)"
    assert python(installed, code, tmp_path).split()[0] == str(tmp_path)


SCRIPT = """
import amaml
fields = dict(data="glyphs", n_way=2, filters=1, meta_batch_size=1, validation_tasks=1)
{guard}print(len(amaml.run_all([amaml.RunConfig(iterations=2, **fields)], progress=False)))
"""


def test_a_script_without_a_main_guard_is_told_in_one_sentence(tmp_path):
    """The README's call at the top of a plain script; with the guard it runs."""
    for guard in ("", 'if __name__ == "__main__": '):
        (tmp_path / "script.py").write_text(SCRIPT.format(guard=guard))
        done = run(sys.executable, "script.py", folder=tmp_path, PYTHONPATH=str(ROOT))
        if guard:
            assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
        else:
            last = done.stderr.strip().splitlines()[-1]
            assert 'under `if __name__ == "__main__":`' in last and "script.py" in last
            assert len(done.stderr.splitlines()) < 20


def test_the_former_command_says_what_it_is_now(tmp_path):
    words = [sys.executable, "-m", "amaml.sweep", "--figure", "figure_1", "--profile", "quick"]
    done = run(*words, folder=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 1
    assert "is now: python -m amaml.paper --figure F --profile P" in done.stderr
