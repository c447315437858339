"""Ours against the peers: the same work, parameters, batch, dtype and threads, in turn in one run.

    make benchmark                                                # sets up .venv-benchmark with the peers, and runs it
    python -m benchmarks.compare --cases prior-2,prior-8 --reps 25
    python -m benchmarks.compare --device cuda --dtype bfloat16   # the same on one GPU, with the sizes for it

Each side measures a case in a process of its own. On a CPU all of a case's processes are there at once and take turns
step by step, so that what else the machine does strikes all of them alike; while one steps or compiles, the others
wait. On a GPU, whose memory holds one of them, a side is measured after the other. All of this may be repeated
(`--rounds`): a figure is the median over the rounds, each of which is the median of its steps. Prints a Markdown table;
`--out` writes all of it as JSON, after every result.

A side that fails, that has not compiled after `--compile-limit` or is not done with its steps after `--step-limit`
leaves what it has measured until then, and the others go on. What `--time-limit` cuts off or leaves undone is taken up
by the same command with `--resume`.

Use a quiet machine: with other programs on it all sides slow down, and the peers more, since torch's threads wait for
each other by spinning (a step of dalle2-pytorch's prior was seen to take 0.4 s and 26 s). The table says the load.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES, OF_DEVICE
from benchmarks.processes import ROOT, Call, Limits, Result, environment_of, run_in_turn
from benchmarks.table import markdown
from dalle2_jax.checkpoint.files import write_atomically
from dalle2_jax.sharding import available_cores

PEERS = Path(".venv-benchmark") / "bin" / "python"
# Seconds until a side's first call is done, imports and weights included; and for its measured steps.
LIMITS = {"cpu": Limits(compile=600, steps=600), "cuda": Limits(compile=240, steps=120)}
DIFFUSION = ("prior", "decoder", "upsampler", "generate")


@dataclass(frozen=True)
class Side:
    """One way of doing the work: the module that measures it and its arguments.

    peer: in the peers' Python. kinds: of the cases that it has networks for. sizes: the field of a case that says at
    which of its own sizes, without which it has none.
    """

    name: str
    module: str
    options: tuple[str, ...] = ()
    peer: bool = True
    kinds: tuple[str, ...] = DIFFUSION
    sizes: str | None = None

    def has(self, case: Mapping[str, Any]) -> bool:
        """Whether it has such networks."""
        parts = [case[name] for name in ("prior", "decoder", "upsampler")] if case["kind"] == "generate" else [case]
        return case["kind"] in self.kinds and all(self.sizes is None or part.get(self.sizes) for part in parts)


SIDES = (
    Side("ours", "benchmarks.ours", peer=False, kinds=("clip", *DIFFUSION)),
    Side("ours-one-device", "benchmarks.ours", ("--one-device",), peer=False, kinds=("clip", *DIFFUSION)),
    Side("diffusers", "benchmarks.peers.diffusers_peer"),
    Side("diffusers-compiled", "benchmarks.peers.diffusers_peer", ("--compile",)),
    Side("dalle2-pytorch", "benchmarks.peers.dalle2_pytorch_peer", sizes="dalle2_pytorch"),
    Side("dalle2-pytorch-compiled", "benchmarks.peers.dalle2_pytorch_peer", ("--compile",), sizes="dalle2_pytorch"),
    Side("transformers", "benchmarks.peers.transformers_peer", kinds=("clip",)),
    Side("transformers-compiled", "benchmarks.peers.transformers_peer", ("--compile",), kinds=("clip",)),
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
    parser.add_argument("--resume", action="store_true", help="keep what --out has, and measure what it lacks")
    parser.add_argument("--cache", type=Path, help="keep compiled programs here; else none outlasts the run")
    parser.add_argument(
        "--compile-limit", type=float, help="seconds until a side's first call is done; CPU 600, GPU 240"
    )
    parser.add_argument("--step-limit", type=float, help="seconds for a side's measured steps; CPU 600, GPU 120")
    parser.add_argument("--time-limit", type=float, help="seconds for all of it")
    asked = parser.parse_args(words)
    asked.dtype = asked.dtype or {"cpu": "float32", "cuda": "bfloat16"}[asked.device]
    asked.turns = asked.turns or {"cpu": "step", "cuda": "process"}[asked.device]
    reps, rounds = {"step": (15, 2), "process": (5, 3)}[asked.turns]
    asked.reps, asked.rounds = asked.reps or reps, asked.rounds or rounds
    asked.cases = chosen("case", asked.cases, OF_DEVICE[asked.device], CASES)
    asked.sides = chosen("side", asked.sides, USUAL[asked.device], [side.name for side in SIDES])
    usual = LIMITS[asked.device]
    asked.compile_limit = asked.compile_limit or usual.compile
    asked.step_limit = asked.step_limit or usual.steps
    if asked.resume and asked.out is None:
        raise ValueError("--resume goes on with the file that --out names: name one")
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


def call_of(side: Side, case: str, asked: argparse.Namespace, python: Path, cache: Path) -> Call:
    """The process that measures `case` on `side`. cache: where compiled programs are kept from round to round."""
    command = [
        *(str(python if side.peer else sys.executable), "-m", side.module, "--case", case),
        *("--device", asked.device, "--dtype", asked.dtype, "--threads", str(asked.threads)),
        *("--reps", str(asked.reps), "--measure", asked.measure, *side.options),
    ]
    if asked.batch is not None:
        command += ["--batch", str(asked.batch)]
    if asked.turns == "step":
        command.append("--in-turn")
    return Call(command, environment_of(cache, asked.device, asked.threads))


def missing(asked: argparse.Namespace, results: Sequence[Result]) -> Iterator[tuple[str, int, list[Side]]]:
    """(case, round, sides) of what is still to be measured, in its order; looks at `results` as it goes along.

    Every second round has the sides in the opposite order: of equal processes the first was seen to be slower by a
    twentieth. A side that failed once is not asked for that case again, one that was cut off is.
    """
    sides = [side for side in SIDES if side.name in asked.sides]
    for case in asked.cases:
        for number in range(asked.rounds):
            there = [result for result in results if result["case"] == case and "cut_off" not in result]
            done = {result["side"] for result in there if result["round"] == number or "error" in result}
            able = [side for side in sides[:: -1 if number % 2 else 1] if side.has(CASES[case])]
            left = [side for side in able if side.name not in done]
            # Where they take turns they run together, else one by one.
            for group in [left] if asked.turns == "step" else [[side] for side in left]:
                if group:
                    yield case, number, group


def compare(
    asked: argparse.Namespace,
    run: Callable[[list[Side], str], Iterable[Result]],
    log: Callable[[str], None],
    save: Callable[[list[Result]], None] = lambda results: None,
    earlier: Sequence[Result] = (),
    over: Callable[[], bool] = lambda: False,
) -> list[Result]:
    """Every case on every side, round after round.

    run: measures a case on sides; gives a result for each of them, as soon as it is there.
    save: is given what there is after every result, so that little is lost by who stops it.
    earlier: the results of a run that was stopped. over: whether no further process may be started.
    """
    results = [result for result in earlier if "cut_off" not in result]
    for case, number, group in missing(asked, results):
        if over():
            break
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        for side, found in zip(group, run(group, case), strict=True):
            results.append({"case": case, **found, "side": side.name, "round": number, "load": load})
            save(results)
            log(said(results[-1]))
    return results


def said(result: Result) -> str:
    """A line of progress."""
    name = f"{result['case']} | round {result['round'] + 1} | {result['side']}"
    measured = [f"{key} {value['seconds']:.4g} s" for key, value in result.items() if _is_measure(value)]
    if "error" in result:
        measured.append(f"{'stopped' if measured else 'not run'}: {result['error']}")
    return " | ".join([name, *measured])


def _is_measure(value: Any) -> bool:
    return isinstance(value, dict) and "seconds" in value


def machine(asked: argparse.Namespace) -> str:
    """What the figures were taken on, in words."""
    return f"{available_cores()} CPU cores, {asked.threads} threads a side" if asked.device == "cpu" else "one GPU"


def earlier_results(asked: argparse.Namespace) -> list[Result]:
    """What `--resume` goes on with.

    Raises:
        ValueError: if it was measured otherwise than is asked now.
    """
    if not asked.resume or not asked.out.exists():
        return []
    report = json.loads(asked.out.read_text(encoding="utf-8"))
    for name in ("device", "dtype", "threads", "batch", "measure", "turns", "reps"):
        then, now = report["settings"].get(name), getattr(asked, name)
        if then != now:
            raise ValueError(f"{asked.out} was measured with {name} {then}, not {now}: leave --resume out")
    return report["results"]


def main(words: Sequence[str] | None = None) -> int:
    """Runs the comparison; returns the exit code, 2 for a wrong command line."""
    try:
        asked = arguments(words)
        python = find_peers(asked.peers, [side for side in SIDES if side.name in asked.sides])
        earlier = earlier_results(asked)
    except ValueError as error:
        print(f"benchmarks.compare: {error}", file=sys.stderr)
        return 2
    settings = {name: value for name, value in vars(asked).items() if name not in ("out", "peers", "cache", "resume")}
    settings["machine"] = machine(asked)
    settings["lacking"] = {
        case: [side.name for side in SIDES if side.name in asked.sides and not side.has(CASES[case])]
        for case in asked.cases
    }
    end = math.inf if asked.time_limit is None else time.monotonic() + asked.time_limit
    limits = Limits(asked.compile_limit, asked.step_limit, end)

    def save(results: list[Result]) -> None:
        if asked.out is not None:
            report = {"settings": settings, "finished": not list(missing(asked, results)), "results": results}
            write_atomically(asked.out, json.dumps(report, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as scratch:

        def run(sides: list[Side], case: str) -> list[Result]:
            return run_in_turn(
                [call_of(side, case, asked, python, asked.cache or Path(scratch)) for side in sides], limits
            )

        def log(line: str) -> None:
            print(line, file=sys.stderr, flush=True)

        results = compare(asked, run, log, save, earlier, over=lambda: time.monotonic() >= end)
    save(results)
    print(markdown(settings, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
