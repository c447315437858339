"""The notebook and its plain Python twin are the same, and run from top to bottom on a tiny run."""

import ast
import json
from pathlib import Path

import pytest
from PIL import Image

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
NAMES = ("quickstart", "latent")


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


@pytest.mark.parametrize("name", NAMES)
def test_no_output_is_committed(name):
    for cell in json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None


def run_notebook(name: str) -> list[object]:
    """Runs the cells from top to bottom; what Jupyter would show of them."""
    space: dict[str, object] = {}
    shown = []
    for kind, source in cells_of_notebook(NOTEBOOKS / f"{name}.ipynb"):
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


@pytest.mark.slow
def test_latent_runs(tiny, monkeypatch):
    """Slow: what its cells call is tested with the functions themselves."""
    monkeypatch.setenv("DALLE2_RUN", str(tiny.run_dir))
    monkeypatch.setenv("DALLE2_STEPS", "3")
    assert sum(isinstance(value, Image.Image) for value in run_notebook("latent")) == 11
