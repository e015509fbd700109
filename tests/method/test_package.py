"""What the package promises as a whole."""

import ast
import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path

import amaml
from amaml import alpha_maml

ROOT = Path(__file__).resolve().parents[2]


def test_every_public_name_is_there_and_documented():
    assert amaml.__version__ == importlib.metadata.version("amaml")
    for name in amaml.__all__:
        assert getattr(amaml, name).__doc__
    assert (Path(amaml.__file__).parent / "py.typed").exists()


def test_pins_are_exact_and_are_what_is_installed():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert len(pins) > 10
    for name, version in pins:
        assert importlib.metadata.version(name).partition("+")[0] == version


def test_the_readme_runs():
    readme = (ROOT / "README.md").read_text()
    code = readme.partition("```python\n")[2].partition("```")[0].replace("range(100)", "range(3)")
    assert "meta_step" in code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "query_accuracy" in done.stdout


FLOORS = (
    "data tasks checks inner_loop fast maml alpha_maml runs training sweep paper".split()
)  # imports go down


def test_imports_go_one_way_and_the_method_stands_at_the_top():
    """From the study to the data; `config`, `model` and `shapes` stand by themselves."""
    package = ROOT / "amaml"
    assert len(list(package.glob("*.py"))) <= 12
    for path in package.rglob("*.py"):
        place = path.relative_to(package).with_suffix("").parts[0]
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {
            f"{node.module}.{name.name}".split(".")[1]
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("amaml")
            for name in node.names
        } - {"shapes", "config", place}
        if place in ("config", "shapes", "model", "datasets"):
            assert not imported, (path.name, imported)
        elif place != "__init__":
            below = {*FLOORS[: FLOORS.index(place)], "model", "datasets"}
            assert imported <= below, (path.name, imported - below)
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 300, path.name


def test_a_meta_step_is_read_on_one_screen():
    tree = ast.parse(inspect.getsource(alpha_maml.meta_step)).body[0]
    docstring = tree.body[0]
    length = tree.end_lineno - (docstring.end_lineno - docstring.lineno + 1)
    assert length <= 40
