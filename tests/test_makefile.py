"""`make` says what it needs before it makes anything."""

import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).resolve().parents[1] / "Makefile"

OLD = """#!/bin/sh
case "$2" in
*version_info*) exit 1 ;;
*) echo 3.9.2 ;;
esac
"""
WITHOUT_VENV = """#!/bin/sh
case "$2" in
*ensurepip*) exit 1 ;;
esac
"""


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        (None, "there is no ./python; install Python 3.11 or newer"),
        (OLD, "./python is 3.9.2; Python 3.11 or newer is needed"),
        (WITHOUT_VENV, "./python has no venv module; install it"),
    ],
)
def test_what_is_missing_is_named(tmp_path, script, sentence):
    shutil.copy(MAKEFILE, tmp_path)
    (tmp_path / "pyproject.toml").touch()
    if script is not None:
        (tmp_path / "python").write_text(script)
        (tmp_path / "python").chmod(0o755)
    command = ["make", "--no-print-directory", "setup", "PYTHON=./python"]
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode == 2 and sentence in made.stderr
    assert not (tmp_path / ".venv").exists()
