"""The committed notebooks: each is its .md source, executed, tidy, and saved without a change."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
from jupyter_server.services.contents.largefilemanager import LargeFileManager
from jupytext.compare import compare_notebooks
from jupytext.sync_contentsmanager import build_sync_jupytext_contents_manager_class

from amaml.paper.characters import STAND_IN

BOOK = Path(__file__).resolve().parents[2] / "book"
NOTEBOOKS = sorted(BOOK.glob("*.ipynb"))


def test_there_are_notebooks_and_each_chapter_is_a_pair():
    assert NOTEBOOKS
    sources = {path.stem for path in BOOK.glob("[0-9]*.md")} | {"use_it"}
    assert sources == {path.stem for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_and_source_say_the_same(path):
    notebook, source = jupytext.read(path), jupytext.read(path.with_suffix(".md"))
    compare_notebooks(notebook, source, fmt="md:myst", raise_on_first_difference=False)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_saving_an_unchanged_chapter_in_jupyterlab_changes_nothing(path, tmp_path):
    """Where this fails: `jupytext --to md:myst` makes of an .md what JupyterLab would write."""
    pair = [path, path.with_suffix(".md")]
    for file in (*pair, BOOK / "jupytext.toml"):
        shutil.copy(file, tmp_path)
    manager = build_sync_jupytext_contents_manager_class(LargeFileManager)(root_dir=str(tmp_path))
    manager.save(manager.get(path.name), path.name)
    for file in pair:
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_executed_and_tidy(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    counts = [cell["execution_count"] for cell in code]
    assert counts == list(range(1, len(code) + 1)), "not executed once from top to bottom"
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert "widgets" not in notebook["metadata"]
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    text = json.dumps([output.get("text", "") for output in outputs])
    assert not re.search(r"(/(home|root|Users|tmp)/|[A-Z]:\\\\)", text), "a path of a machine"
    parameters = [cell for cell in code if "parameters" in cell["metadata"].get("tags", [])]
    assert len(parameters) == 1 and "profile = " in "".join(parameters[0]["source"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_code_fits_the_page(path):
    code = [
        cell.source.splitlines() for cell in jupytext.read(path).cells if cell.cell_type == "code"
    ]
    assert max(map(len, code)) <= 25, "lines of a cell"
    assert max(len(line) for lines in code for line in lines) <= 88, "characters of a line"


@pytest.mark.parametrize("path", NOTEBOOKS[:4], ids=lambda path: path.stem)
def test_the_teaching_chapters_show_omniglot(path):
    """Where this fails: execute the chapter with AMAML_DATA."""
    text = path.read_text(encoding="utf-8")
    assert 'profile = \\"medium\\"' in text and '"omniglot"' in text
    assert STAND_IN[:40] not in text


def compare_outputs(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    outer = {name: value for name, value in os.environ.items() if name != "AMAML_DATA"}
    options = ["-q", "--nbval", "--nbval-current-env", "-p", "no:cacheprovider"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--rootdir", ".", "."],
        cwd=folder,
        env=outer | {"XDG_CACHE_HOME": str(folder / "cache")} | environment,
        capture_output=True,
        text=True,
    )


def test_without_omniglot_only_what_shows_it_is_not_compared(tmp_path):
    """Of two cells with another output than the stored one, one is tagged `omniglot`."""
    cells = [
        nbformat.v4.new_code_cell(
            "print(1)",
            metadata={"tags": tags},
            outputs=[nbformat.v4.new_output("stream", text="2\n")],
            execution_count=1,
        )
        for tags in (["omniglot"], [])
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "chapter.ipynb")
    shutil.copy(BOOK / "conftest.py", tmp_path)
    without = compare_outputs(tmp_path)
    assert "1 failed, 1 passed" in without.stdout and "::Cell 1" in without.stdout
    assert "NOT COMPARED: the outputs of 1 cells" in without.stdout
    there = compare_outputs(tmp_path, AMAML_DATA=str(tmp_path))
    assert "2 failed" in there.stdout and "NOT COMPARED" not in there.stdout
