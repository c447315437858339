"""What every measured process does alike: read its orders, keep to its cores, time, report.

A process measures one case on one side. It says on stdout what it does, one line each:

    compiling MEASURE       the measure's first call begins; before the first of them the process was set up
    compiled SECONDS        that call is done
    turn                    with --in-turn: it waits for a line before it takes a measured step
    {...}                   a report: all that it has found so far, after every measured step; the last one counts

Nothing but the standard library is imported here, since the sides have different libraries.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.cases import CASES

MEASURES = ("forward", "train_step", "full_step")
COMPILING, COMPILED, TURN = "compiling", "compiled", "turn"
# The environment variable that says when the process was started, in seconds since the epoch.
STARTED = "BENCHMARK_STARTED"
IMPORTED = time.time()
# Beyond the first one, which compiles.
WARM_UP = 1


def start() -> argparse.Namespace:
    """The process's orders; from here on it stays on as many CPU cores as it has threads (before jax counts them)."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", required=True, choices=CASES)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--batch", type=int, help="another one than the case's")
    parser.add_argument("--measure", default="forward,train_step")
    parser.add_argument("--in-turn", action="store_true", help=f"before each step print {TURN!r} and await a line")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--one-device", action="store_true", help="one jax device for all cores")
    orders = parser.parse_args()
    orders.measure = orders.measure.split(",")
    if orders.device == "cpu":
        keep_to_cores(orders.threads)
    return orders


def ordered_case(orders: argparse.Namespace) -> dict[str, Any]:
    """The case that was asked for, with the batch that was."""
    case = CASES[orders.case]
    return case if orders.batch is None else {**case, "batch": orders.batch}


def keep_to_cores(count: int) -> None:
    """Takes the first `count` of the cores that the process may use, where the system lets it."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def peak_memory() -> int:
    """The most bytes of host memory that this process has held so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Report:
    """What a process finds; measures steps and prints a report after each of them.

    peak_bytes: gives the most bytes held so far. cache_hits: counts the compiled programs that were found in a cache
    on the disk so far.
    """

    def __init__(
        self,
        side: str,
        orders: argparse.Namespace,
        peak_bytes: Callable[[], int] = peak_memory,
        cache_hits: Callable[[], int] = lambda: 0,
        **found: Any,
    ) -> None:
        self.orders, self.peak_bytes, self.cache_hits = orders, peak_bytes, cache_hits
        self.found = {"side": side, "case": orders.case, "device": orders.device, "dtype": orders.dtype, **found}
        self.found |= {"threads": orders.threads, "batch": ordered_case(orders)["batch"]}

    def add(self, measure: str | None = None, **found: Any) -> None:
        """Adds to the report, or to what it says of a measure."""
        (self.found if measure is None else self.found[measure]).update(found)

    def measure(self, name: str, step: Callable[[], Any]) -> None:
        """Times a step that ends when its result is there: the first call, warm-ups, and `orders.reps` more.

        `setup_seconds`, once a process: from its start until its first measure, with imports and weights.
        """
        self.found.setdefault("setup_seconds", time.time() - float(os.environ.get(STARTED, IMPORTED)))
        print(f"{COMPILING} {name}", flush=True)
        hits = self.cache_hits()
        first, _ = seconds_of(step)
        hits = self.cache_hits() - hits
        print(f"{COMPILED} {first:.1f}", flush=True)
        for _ in range(WARM_UP):
            seconds_of(step)
        measured = []
        for _ in range(self.orders.reps):
            if self.orders.in_turn:
                await_turn()
            measured.append(seconds_of(step))
            self.found[name] = summary(first, measured) | {"peak_bytes": self.peak_bytes(), "cache_hits": hits}
            self.print()

    def print(self) -> None:
        """Prints the report as one line."""
        print(json.dumps(self.found), flush=True)


def seconds_of(step: Callable[[], Any]) -> tuple[float, float]:
    """The seconds of one call, and those that all of the process's threads worked in it."""
    began, worked = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - began, time.process_time() - worked


def summary(first: float, measured: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """What was measured, from the first call's seconds and from those of the calls after the warm-up.

    seconds: the median of the steps; steps: all of them; cpu_seconds: the median of what all of the process's threads
    worked in a step, which other programs on the machine hardly change; compile_seconds: what the first call took
    beyond a step.
    """
    steps, worked = zip(*measured, strict=True)
    median = statistics.median(steps)
    return {
        "seconds": median,
        "cpu_seconds": statistics.median(worked),
        "compile_seconds": max(0.0, first - median),
        "steps": steps,
    }


def await_turn() -> None:
    """Says that a step may come and waits until it is called for; ends the process if nobody is left to call."""
    print(TURN, flush=True)
    if not sys.stdin.readline():
        sys.exit("nobody calls for a step any more")
