"""Whether all processes of a run see its folder."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from time import monotonic, sleep

import jax

from dalle2_jax.errors import InputError
from dalle2_jax.sharding import processes
from train.machine.hosts import DISK

TOKEN = ".shared"


def check_shared(run_dir: Path) -> None:
    """Whether every process sees the run's folder, in which each writes its part of a checkpoint.

    Raises:
        InputError: in every process, naming a host that does not.
    """
    if jax.process_count() == 1:
        return
    token, first = run_dir / TOKEN, jax.process_index() == 0
    created = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()] if first else []
    text = processes.of_first(lambda: f"{socket.gethostname()} {os.getpid()} {monotonic()}")
    if first:
        run_dir.mkdir(parents=True, exist_ok=True)
        token.write_text(text)
    processes.wait_for_all()
    said = processes.gather([socket.gethostname(), _shows(token, text)])
    if first:
        token.unlink(missing_ok=True)
        for folder in created:
            with contextlib.suppress(OSError):
                folder.rmdir()
    blind = [host for host, sees in said if not sees]
    if blind:
        raise InputError(
            f"{blind[0]} does not see {run_dir.resolve()} of {said[0][0]}: every process writes its part of a "
            "checkpoint, so name by --runs-dir a folder on a disk that all hosts share"
        )


def _shows(path: Path, text: str) -> bool:
    """Whether a file reads so, at once or when the disk has caught up."""
    last = monotonic() + DISK
    while True:
        try:
            if path.read_text() == text:
                return True
        except OSError:
            pass
        if monotonic() > last:
            return False
        sleep(0.2)
