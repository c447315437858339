"""The measured processes as `benchmarks.compare` sees them: started, called for steps in turn, stopped when too slow.

What a process says on its stdout is described in `benchmarks.worker`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.worker import COMPILED, COMPILING, STARTED, TURN

ROOT = Path(__file__).resolve().parents[1]

Result = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """How a side's process is started for a case."""

    command: list[str]
    environment: dict[str, str]


@dataclass(frozen=True)
class Limits:
    """After how many seconds a process is stopped.

    compile: until its first call is done, imports and weights included; of later measures, their first call.
    steps: for the measured steps of one measure after that; of processes that take turns, for each step.
    end: when all is over, as `time.monotonic()` tells it.
    """

    compile: float = 600.0
    steps: float = 600.0
    end: float = math.inf


class Worker:
    """A started process that steps on command. result: what it found, once it has ended.

    A process that fails or is stopped leaves `error` in the result, beside what it had reported until then;
    `cut_off` is there too where it was `limits.end` that stopped it.
    """

    def __init__(self, call: Call, limits: Limits) -> None:
        self.limits, self.result, self.found = limits, None, {}
        self.compiling = True
        self.words = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.words}
        environment = {**call.environment, STARTED: str(time.time())}
        self.process = subprocess.Popen(call.command, cwd=ROOT, env=environment, text=True, **pipes)
        # Read by a thread, since a process that this one started may hold its stdout open after it has been killed.
        self.lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        """Hands on the process's lines, and None after the last."""
        with self.process.stdout as lines:
            for line in lines:
                self.lines.put(line)
        self.lines.put(None)

    def advance(self) -> bool:
        """Waits until the process wants a turn; False once it has ended, and `result` is there."""
        deadline = self._deadline()
        try:
            while (line := self.lines.get(timeout=max(0.0, deadline - time.monotonic()))) is not None:
                word = line.split(maxsplit=1)[0] if line.strip() else ""
                if word == TURN:
                    return True
                if word in (COMPILING, COMPILED):
                    was, self.compiling = self.compiling, word == COMPILING
                    # The first measure's limit began with the process.
                    deadline = self._deadline() if was != self.compiling else deadline
                elif word.startswith("{"):
                    self.found = _report(line) or self.found
            code = self.process.wait(max(0.0, deadline - time.monotonic()))
        except (queue.Empty, subprocess.TimeoutExpired):
            self.process.kill()
            self.result = {**self.found, **self._late()}
            return False
        if code:
            self.words.seek(0)
            lines = self.words.read().strip().splitlines() or ["no word"]
            self.result = {**self.found, "error": f"exit {code}: {lines[-1]}"}
        else:
            self.result = self.found or {"error": "it ended without a report"}
        return False

    def _deadline(self) -> float:
        """When the process is stopped unless it says something new."""
        limit = self.limits.compile if self.compiling else self.limits.steps
        return min(time.monotonic() + limit, self.limits.end)

    def _late(self) -> Result:
        """Why it was stopped."""
        if time.monotonic() >= self.limits.end:
            return {"error": "cut off by the time limit", "cut_off": True}
        if self.compiling:
            return {"error": f"not compiled after {self.limits.compile:g} s"}
        return {"error": f"steps not done after {self.limits.steps:g} s"}

    def step(self) -> bool:
        """Lets it take a step, and waits as `advance` does."""
        with contextlib.suppress(BrokenPipeError):  # it has died: `advance` says of what
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        return self.advance()

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):  # a turn that it died before reading
            self.process.stdin.close()
        self.words.close()


def _report(line: str) -> Result | None:
    """A report, or None for a line of a library that merely looks like one."""
    with contextlib.suppress(json.JSONDecodeError):
        return json.loads(line)
    return None


def run_in_turn(calls: Iterable[Call], limits: Limits) -> list[Result]:
    """Starts the processes one after the other, and has each take a step in turn until all have ended.

    A process ends by itself where it measures without turns. One that fails gives its last line as `error`, one that
    outlasts `limits` is stopped; both keep what they have reported.
    """
    workers: list[Worker] = []
    try:
        pending = []
        for call in calls:
            workers.append(Worker(call, limits))
            if workers[-1].advance():
                pending.append(workers[-1])
        while pending:
            pending = [worker for worker in pending if worker.step()]
        return [worker.result for worker in workers]
    finally:
        for worker in workers:
            worker.close()


def environment_of(cache: Path, device: str, threads: int) -> dict[str, str]:
    """The environment of a measured process. cache: where compiled programs are kept."""
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "2", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    # Of a GPU's memory, which each process has to itself.
    more = {"OMP_NUM_THREADS": str(threads)} if device == "cpu" else {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
    return {**os.environ, **caches(cache), **quiet, **more}


def caches(folder: Path) -> dict[str, str]:
    """The environment variables that have jax and torch keep compiled programs in a folder."""
    return {"JAX_COMPILATION_CACHE_DIR": str(folder / "jax"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "torch")}
