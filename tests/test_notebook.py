"""Notebooks and their plain Python twins are the same, run from top to bottom, and show what they say."""

import ast
import json
import re
import sys
from pathlib import Path

import matplotlib.pyplot
import pytest
from PIL import Image

from train.interactive import QUICK

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
# The story, in order, whose outputs are committed (`make notebooks`).
STORY = sorted(path.stem for path in NOTEBOOKS.glob("[0-9]*.py"))
NAMES = ("quickstart", *STORY)
LARGEST = 1_500_000  # bytes of a notebook with what it shows
OF_A_MACHINE = re.compile(r"/(home|root|tmp|work|usr|site-packages)/")


def cells_of_notebook(path: Path) -> list[tuple[str, str]]:
    """(kind, source) of every cell."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [(cell["cell_type"], "".join(cell["source"]).strip()) for cell in cells]


def cells_of_script(path: Path) -> list[tuple[str, str]]:
    """The same of a script in the percent format."""
    _, *blocks = path.read_text(encoding="utf-8").split("\n# %%")
    cells = []
    for block in blocks:
        head, _, body = block.partition("\n")
        if "[markdown]" in head:
            lines = [line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines()]
            cells.append(("markdown", "\n".join(lines).strip()))
        else:
            cells.append(("code", body.strip()))
    return cells


@pytest.mark.parametrize("name", NAMES)
def test_the_two_are_one(name):
    script = cells_of_script(NOTEBOOKS / f"{name}.py")
    assert len(script) > 10 and script == cells_of_notebook(NOTEBOOKS / f"{name}.ipynb")


def test_no_output_of_a_run_of_the_users_own_is_committed():
    for cell in json.loads((NOTEBOOKS / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None


@pytest.mark.parametrize("name", STORY)
def test_what_the_story_shows_is_committed(name):
    path = NOTEBOOKS / f"{name}.ipynb"
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert path.stat().st_size < LARGEST
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "in order, all of them"
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    said = json.dumps([{**output, "data": {**output.get("data", {}), "image/png": ""}} for output in outputs])
    assert not OF_A_MACHINE.search(said)


def run_notebook(name: str) -> list[object]:
    """Runs the cells from top to bottom; what Jupyter would show of them."""
    space: dict[str, object] = {}
    shown = []
    for kind, source in cells_of_script(NOTEBOOKS / f"{name}.py"):
        if kind != "code":
            continue
        tree = ast.parse(source)
        last = tree.body[-1]
        if isinstance(last, ast.Expr):
            tree.body.pop()
        exec(compile(tree, name, "exec"), space)
        if isinstance(last, ast.Expr):
            shown.append(eval(compile(ast.Expression(last.value), name, "eval"), space))
    return shown


def test_quickstart_runs(tiny, monkeypatch, capsys):
    monkeypatch.setenv("DALLE2_RUN", str(tiny.run_dir))
    assert sum(isinstance(value, Image.Image) for value in run_notebook("quickstart")) == 5
    assert f"{tiny.run_dir}: captioned_shapes, 16 px" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
@pytest.mark.parametrize("name", STORY)
def test_the_story_runs(tiny, monkeypatch, name, tmp_path_factory):
    """With a few steps each, on the tiny run where a run is looked at."""
    data = tmp_path_factory.getbasetemp() / "notebooks"
    settings = {QUICK: "1", "DALLE2_RUN": tiny.run_dir, "DALLE2_STEPS": "3", "DALLE2_DATA_DIR": data}
    for variable, value in settings.items():
        monkeypatch.setenv(variable, str(value))
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.chdir(NOTEBOOKS)
    matplotlib.use("Agg")
    run_notebook(name)
    matplotlib.pyplot.close("all")
