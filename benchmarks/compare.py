"""Ours against diffusers and dalle2-pytorch: the same work, parameters, batch, dtype and threads, in turn in one run.

    make benchmark                                                # sets up .venv-benchmark with the peers, and runs it
    python -m benchmarks.compare --cases prior-2,prior-8 --reps 25
    python -m benchmarks.compare --device cuda --dtype bfloat16   # the same on one GPU, with the sizes for it

Each side measures a case in a process of its own. On a CPU all of a case's processes are there at once and take turns
step by step, so that what else the machine does strikes all of them alike; while one steps or compiles, the others
wait. On a GPU, whose memory holds one of them, a side is measured after the other. All of this may be repeated
(`--rounds`): a figure is the median over the rounds, each of which is the median of its steps. Prints a Markdown table;
`--out` writes all of it as JSON.

Use a quiet machine: with other programs on it all sides slow down, and the peers more, since torch's threads wait for
each other by spinning (a step of dalle2-pytorch's prior was seen to take 0.4 s and 26 s). The table says the load.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES, OF_DEVICE
from benchmarks.table import markdown
from benchmarks.worker import TURN
from dalle2_jax.checkpoint.files import write_atomically
from dalle2_jax.sharding import available_cores

ROOT = Path(__file__).resolve().parents[1]
PEERS = Path(".venv-benchmark") / "bin" / "python"
# A process that takes longer than this over all its work, or in turn over a step, has hung; in seconds.
LONGEST = 3600

Result = dict[str, Any]


@dataclass(frozen=True)
class Side:
    """One way of doing the work: the module that measures it and what else it is told. peer: in the peers' Python."""

    name: str
    module: str
    options: tuple[str, ...] = ()
    peer: bool = True


SIDES = (
    Side("ours", "benchmarks.ours", peer=False),
    Side("ours-one-device", "benchmarks.ours", ("--one-device",), peer=False),
    Side("diffusers", "benchmarks.diffusers_peer"),
    Side("diffusers-compiled", "benchmarks.diffusers_peer", ("--compile",)),
    Side("dalle2-pytorch", "benchmarks.dalle2_pytorch_peer"),
    Side("dalle2-pytorch-compiled", "benchmarks.dalle2_pytorch_peer", ("--compile",)),
)
# A GPU is one device anyway.
USUAL = {
    "cpu": [side.name for side in SIDES],
    "cuda": [side.name for side in SIDES if side.name != "ours-one-device"],
}


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line.

    Raises:
        ValueError: for a case or a side that there is not.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--threads", type=int, default=2, help="of each side, on a CPU")
    parser.add_argument("--cases", help=f"of {', '.join(CASES)}; by default those for the device")
    parser.add_argument("--sides", help=f"of {', '.join(side.name for side in SIDES)}")
    parser.add_argument("--batch", type=int, help="another batch than the cases'")
    parser.add_argument("--measure", default="forward,train_step", help="forward, train_step, full_step")
    parser.add_argument("--turns", choices=("step", "process"), help="step on a CPU, process on a GPU")
    parser.add_argument("--reps", type=int, help="steps, whose median is a round's figure; 15 in turn, else 5")
    parser.add_argument("--rounds", type=int, help="2 where steps take turns, else 3")
    parser.add_argument("--peers", type=Path, help=f"the Python that has the peers; by default {PEERS}")
    parser.add_argument("--out", type=Path, help="write all figures here, as JSON")
    asked = parser.parse_args(words)
    asked.dtype = asked.dtype or {"cpu": "float32", "cuda": "bfloat16"}[asked.device]
    asked.turns = asked.turns or {"cpu": "step", "cuda": "process"}[asked.device]
    reps, rounds = {"step": (15, 2), "process": (5, 3)}[asked.turns]
    asked.reps, asked.rounds = asked.reps or reps, asked.rounds or rounds
    asked.cases = chosen("case", asked.cases, OF_DEVICE[asked.device], CASES)
    asked.sides = chosen("side", asked.sides, USUAL[asked.device], [side.name for side in SIDES])
    return asked


def chosen(what: str, names: str | None, usual: Sequence[str], known: Sequence[str]) -> list[str]:
    """The names in a comma-separated list, or the usual ones; ValueError for one that is not known."""
    picked = list(usual) if names is None else names.split(",")
    for name in picked:
        if name not in known:
            raise ValueError(f"there is no {what} {name!r}; there are {', '.join(known)}")
    return picked


def find_peers(asked: Path | None, sides: Sequence[Side]) -> Path:
    """The Python that has the peers, which may be missing where no side needs it.

    Raises:
        ValueError: if it is needed and not there.
    """
    python = asked or ROOT / PEERS
    if any(side.peer for side in sides) and not python.exists():
        raise ValueError(
            f"there is no {asked or PEERS}, where the peers would run: make it with `make benchmark`, name another "
            "Python with --peers, or measure ours alone with --sides ours"
        )
    return python


@dataclass(frozen=True)
class Call:
    """How a side's process is started for a case."""

    command: list[str]
    environment: dict[str, str]


def call_of(side: Side, case: str, asked: argparse.Namespace, python: Path, scratch: Path) -> Call:
    """The process that measures `case` on `side`. scratch: where compiled programs are kept from round to round."""
    command = [
        *(str(python if side.peer else sys.executable), "-m", side.module, "--case", case),
        *("--device", asked.device, "--dtype", asked.dtype, "--threads", str(asked.threads)),
        *("--reps", str(asked.reps), "--measure", asked.measure, *side.options),
    ]
    if asked.batch is not None:
        command += ["--batch", str(asked.batch)]
    if asked.turns == "step":
        command.append("--in-turn")
    # What was compiled in the first round, which is where compiling is timed, is there in the later ones.
    caches = {"JAX_COMPILATION_CACHE_DIR": scratch / "jax", "TORCHINDUCTOR_CACHE_DIR": scratch / "torch"}
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "2", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    threads = {"OMP_NUM_THREADS": str(asked.threads)} if asked.device == "cpu" else {}
    if asked.device == "cuda":  # of the device's memory, which each process has to itself
        quiet["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.95"
    return Call(command, {**os.environ, **{name: str(path) for name, path in caches.items()}, **quiet, **threads})


class Worker:
    """A started process that steps when it is told to. result: what it found, or `error`, once it has ended."""

    def __init__(self, call: Call, longest: float = LONGEST) -> None:
        self.longest, self.result, self.last = longest, None, ""
        self.words = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.words}
        self.process = subprocess.Popen(call.command, cwd=ROOT, env=call.environment, text=True, **pipes)
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
        self.last, deadline = "", time.monotonic() + self.longest
        try:
            while (line := self.lines.get(timeout=max(0.0, deadline - time.monotonic()))) is not None:
                self.last = line.strip() or self.last
                if self.last == TURN:
                    return True
            code = self.process.wait(max(0.0, deadline - time.monotonic()))
        except (queue.Empty, subprocess.TimeoutExpired):
            self.process.kill()
            self.result = {"error": f"not done after {self.longest:g} s"}
            return False
        if code:
            self.words.seek(0)
            lines = self.words.read().strip().splitlines() or ["no word"]
            self.result = {"error": f"exit {code}: {lines[-1]}"}
        else:
            self.result = json.loads(self.last or '{"error": "it ended without a report"}')
        return False

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


def run_in_turn(calls: Iterable[Call], longest: float = LONGEST) -> list[Result]:
    """Starts the processes one after the other, and has each take a step in turn until all have ended.

    A process ends by itself where it measures without turns. One that fails gives its last line as `error`, one that is
    silent for `longest` seconds is stopped.
    """
    workers: list[Worker] = []
    try:
        waiting = []
        for call in calls:
            workers.append(Worker(call, longest))
            if workers[-1].advance():
                waiting.append(workers[-1])
        while waiting:
            waiting = [worker for worker in waiting if worker.step()]
        return [worker.result for worker in workers]
    finally:
        for worker in workers:
            worker.close()


def compare(
    asked: argparse.Namespace,
    run: Callable[[list[Side], str], Iterable[Result]],
    log: Callable[[str], None],
    save: Callable[[list[Result]], None] = lambda results: None,
) -> list[Result]:
    """Every case on every side, round after round; a side that failed once is not asked for that case again.

    Every second round starts the sides in the opposite order: of equal processes the first was seen to be slower by a
    twentieth.

    run: measures a case on sides; gives a result for each of them, as soon as it is there.
    save: is given what there is after every result, so that little is lost by who stops it.
    """
    sides = [side for side in SIDES if side.name in asked.sides]
    results: list[Result] = []
    failed: set[tuple[str, str]] = set()
    for case in asked.cases:
        for number in range(asked.rounds):
            able = [side for side in sides[:: -1 if number % 2 else 1] if (case, side.name) not in failed]
            load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
            for side, found in zip(able, run(able, case), strict=True):
                result = {"case": case, **found, "side": side.name, "round": number, "load": load}
                results.append(result)
                if "error" in result:
                    failed.add((case, side.name))
                save(results)
                log(said(result))
    return results


def said(result: Result) -> str:
    """A line of progress."""
    name = f"{result['case']} | round {result['round'] + 1} | {result['side']}"
    if "error" in result:
        return f"{name} | not run: {result['error']}"
    measured = (f"{key} {value['seconds']:.4g} s" for key, value in result.items() if _is_measure(value))
    return " | ".join([name, *measured])


def _is_measure(value: Any) -> bool:
    return isinstance(value, dict) and "seconds" in value


def machine(asked: argparse.Namespace) -> str:
    """What the figures were taken on, in words."""
    return f"{available_cores()} CPU cores, {asked.threads} threads a side" if asked.device == "cpu" else "one GPU"


def main(words: Sequence[str] | None = None) -> int:
    """Runs the comparison; returns the exit code, 2 for a wrong command line."""
    try:
        asked = arguments(words)
        python = find_peers(asked.peers, [side for side in SIDES if side.name in asked.sides])
    except ValueError as error:
        print(f"benchmarks.compare: {error}", file=sys.stderr)
        return 2
    settings = {name: value for name, value in vars(asked).items() if name not in ("out", "peers")}
    settings["machine"] = machine(asked)

    def save(results: list[Result]) -> None:
        if asked.out is not None:
            write_atomically(asked.out, json.dumps({"settings": settings, "results": results}, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as scratch:

        def run(sides: list[Side], case: str) -> Iterator[Result]:
            calls = [call_of(side, case, asked, python, Path(scratch)) for side in sides]
            together = [calls] if asked.turns == "step" else [[call] for call in calls]
            for group in together:
                yield from run_in_turn(group)

        results = compare(asked, run, lambda line: print(line, file=sys.stderr, flush=True), save)
    print(markdown(settings, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
