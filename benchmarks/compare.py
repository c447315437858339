"""Ours against diffusers and dalle2-pytorch: the same work, parameters, batch, dtype and threads, in turn in one run.

    make benchmark                                                # sets up .venv-benchmark with the peers, and runs it
    python -m benchmarks.compare --cases prior-2,prior-8 --rounds 5
    python -m benchmarks.compare --device cuda --dtype bfloat16   # the same on one GPU, with the sizes for it

Each side measures a case in a process of its own, one side after the other and that several times over (rounds), so
that what else the machine does strikes all of them. A figure is the median over the rounds, each of which is the median
of some repetitions; beside it stands the rounds' spread. Prints a Markdown table; `--out` writes all of it as JSON.

Use a quiet machine: with other programs on it both sides slow down, and the peers more, since torch's threads wait for
each other by spinning (a step of dalle2-pytorch's prior was seen to take 0.4 s and 26 s). The table says the load.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES, OF_DEVICE
from benchmarks.table import markdown
from dalle2_jax.checkpoint.files import write_atomically
from dalle2_jax.sharding import available_cores

ROOT = Path(__file__).resolve().parents[1]
PEERS = Path(".venv-benchmark") / "bin" / "python"
# A process that takes longer than this has hung.
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
    parser.add_argument("--reps", type=int, default=5, help="repetitions, whose median is a round's figure")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", type=Path, help=f"the Python that has the peers; by default {PEERS}")
    parser.add_argument("--out", type=Path, help="write all figures here, as JSON")
    asked = parser.parse_args(words)
    asked.dtype = asked.dtype or {"cpu": "float32", "cuda": "bfloat16"}[asked.device]
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


def run_side(side: Side, case: str, asked: argparse.Namespace, python: Path, scratch: Path) -> Result:
    """Measures one case on one side in a process of its own; a process that fails gives its last line as `error`."""
    command = [
        *(str(python if side.peer else sys.executable), "-m", side.module, "--case", case),
        *("--device", asked.device, "--dtype", asked.dtype, "--threads", str(asked.threads)),
        *("--reps", str(asked.reps), "--measure", asked.measure, *side.options),
    ]
    if asked.batch is not None:
        command += ["--batch", str(asked.batch)]
    # What was compiled in the first round, which is where compiling is timed, is there in the later ones.
    caches = {"JAX_COMPILATION_CACHE_DIR": scratch / "jax", "TORCHINDUCTOR_CACHE_DIR": scratch / "torch"}
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "2", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    threads = {"OMP_NUM_THREADS": str(asked.threads)} if asked.device == "cpu" else {}
    if asked.device == "cuda":  # of the device's memory, which each process has to itself
        quiet["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.95"
    environment = {**os.environ, **{name: str(path) for name, path in caches.items()}, **quiet, **threads}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LONGEST)
    except subprocess.TimeoutExpired:
        return {"case": case, "error": f"not done after {LONGEST} s"}
    if done.returncode:
        words = (done.stderr.strip().splitlines() or ["no word"])[-1]
        return {"case": case, "error": f"exit {done.returncode}: {words}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(
    asked: argparse.Namespace,
    run: Callable[[Side, str], Result],
    log: Callable[[str], None],
    save: Callable[[list[Result]], None] = lambda results: None,
) -> list[Result]:
    """Every case on every side, round after round; a side that failed once is not asked for that case again.

    save: is given what there is after every process, so that little is lost by who stops it.
    """
    sides = [side for side in SIDES if side.name in asked.sides]
    results: list[Result] = []
    failed: set[tuple[str, str]] = set()
    for case in asked.cases:
        for number in range(asked.rounds):
            for side in sides:
                if (case, side.name) in failed:
                    continue
                load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
                result = {**run(side, case), "side": side.name, "round": number, "load": load}
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
        results = compare(
            asked,
            lambda side, case: run_side(side, case, asked, python, Path(scratch)),
            lambda line: print(line, file=sys.stderr, flush=True),
            save,
        )
    print(markdown(settings, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
