"""torchvision's operators are declared only where its own library does not load, since the process would end else."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from benchmarks.peers.torchvision_operators import declare

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def declared(tmp_path, monkeypatch):
    """(load, declare): sets what loading torchvision's library does; the operators that are then declared."""
    (tmp_path / "_C.so").touch()
    found = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    seen = []

    class Library:
        def __init__(self, namespace, kind):
            assert (namespace, kind) == ("torchvision", "DEF")

        def define(self, operator):
            seen.append(operator)

    def start(load, installed=True):
        torch = ModuleType("torch")
        torch.ops = SimpleNamespace(load_library=load)
        torch.library = SimpleNamespace(Library=Library)
        monkeypatch.setitem(sys.modules, "torch", torch)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: found if installed else None)
        declare.cache_clear()
        return declare(), declare(), seen

    yield start
    declare.cache_clear()


def refuse(path):
    raise OSError(f"{path}: undefined symbol")


def test_a_library_that_loads_has_declared_them_itself(declared, tmp_path):
    loaded = []
    assert declared(loaded.append) == (None, None, [])
    assert loaded == [tmp_path / "_C.so"], "once a process"


def test_a_library_that_does_not_load_is_stood_in_for(declared):
    first, second, seen = declared(refuse)
    assert first is second is not None, "torch forgets the operators with the last reference"
    assert [operator.partition("(")[0] for operator in seen] == ["nms", "qnms"]


def test_without_torchvision_there_is_nothing_to_do(declared):
    assert declared(refuse, installed=False) == (None, None, [])


def test_the_shim_runs_a_module(tmp_path):
    (tmp_path / "a_module.py").write_text("import sys; print(__name__, sys.argv[1:])")
    words = [sys.executable, "-m", "tests.parity.torchvision_shim", "a_module", "word"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == "__main__ ['word']\n", done.stderr
