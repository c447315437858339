"""What every measured process does alike: read its orders, keep to its cores, time, report.

A process measures one case on one side and prints one line of JSON. Nothing but the standard library is imported here,
since the sides have different libraries.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.cases import CASES

MEASURES = ("forward", "train_step", "full_step")
# What a process prints when it waits for its turn to take a measured step.
TURN = "turn"
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


def timed(step: Callable[[], Any], orders: argparse.Namespace) -> dict[str, Any]:
    """Runs a step that ends when its result is there; returns its seconds and what the first call took beyond them.

    seconds: the median of `orders.reps` calls after the warm-up; steps: all of them; cpu_seconds: the median of what
    all of the process's threads worked in a call, which other programs on the machine hardly change.
    """

    def seconds() -> tuple[float, float]:
        began, worked = time.perf_counter(), time.process_time()
        step()
        return time.perf_counter() - began, time.process_time() - worked

    first, _ = seconds()
    for _ in range(WARM_UP):
        seconds()
    measured = []
    for _ in range(orders.reps):
        if orders.in_turn:
            await_turn()
        measured.append(seconds())
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


def report(side: str, orders: argparse.Namespace, **found: Any) -> None:
    """Prints what a process found as its last line."""
    line = {"side": side, "case": orders.case, "device": orders.device, "dtype": orders.dtype, **found}
    print(json.dumps(line | {"threads": orders.threads, "batch": ordered_case(orders)["batch"]}), flush=True)
