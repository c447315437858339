"""The comparison as Markdown, a table a case."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.cases import CASES
from train.step.peaks import PEAKS

Result = Mapping[str, Any]
MEASURES = {"forward": "forward", "train_step": "train step", "full_step": "full step", "generate": "whole path"}
NOTE = (
    "Seconds are the median over the rounds, without the first call; in brackets the rounds' least and most, of a "
    "single round the middle half of its steps. A train step is loss, gradients and AdamW, on embeddings that are "
    "given; a full step also clips the gradient and keeps a moving average. Against ours: how many times as long as "
    "the best of ours; above 1, ours is faster. Memory is the process's peak, on a GPU the device's. Compile is what "
    "the first call took beyond a later one, in the first round; cached: with programs that an earlier run had kept."
)


def markdown(settings: Mapping[str, Any], results: Sequence[Result]) -> str:
    """All cases; `settings` says on what (`machine`), in which dtype, and how often."""
    head = f"{settings['machine']}, {settings['dtype']}, rounds: {settings['rounds']}, repetitions: {settings['reps']}"
    if settings.get("turns") == "step":
        head += ", the sides in turn step by step"
    loads = [result["load"] for result in results if result.get("load") is not None]
    if loads:
        head += f"; load before a round {min(loads):.1f} to {max(loads):.1f}"
    parts = [head + _versions(results)]
    lacking = settings.get("lacking", {})
    for case in dict.fromkeys([*(result["case"] for result in results), *(case for case in lacking if lacking[case])]):
        parts.append(case_table(case, [result for result in results if result["case"] == case], lacking.get(case, ())))
    return "\n\n".join([*parts, NOTE])


def _versions(results: Sequence[Result]) -> str:
    versions: dict[str, str] = {}
    for result in results:
        versions |= result.get("versions", {})
    return "".join(f", {name} {version}" for name, version in versions.items())


def case_table(case: str, results: Sequence[Result], lacking: Sequence[str] = ()) -> str:
    """One case: a row a side, in the order in which they ran.

    A side that failed has a row of what it had measured until then. lacking: the sides without such a network.
    """
    measures = [name for name in MEASURES if any(name in result for result in results)]
    sides = list(dict.fromkeys(result["side"] for result in results))
    rounds = {side: [r for r in results if r["side"] == side and any(name in r for name in measures)] for side in sides}
    errors = {result["side"]: result["error"] for result in results if "error" in result}
    flops = any("flops" in result.get(name, {}) for result in results for name in measures)
    header = ["side", "parameters"]
    for name in measures:
        header += [f"{MEASURES[name]}, s", "against ours"]
    header += ["peak memory", "compile, s"]
    if flops:
        header.append("FLOP/s of the last")
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    for side in sides:
        if not rounds[side]:
            continue
        row = [side, f"{rounds[side][0]['parameters'] / 1e6:.2f}M"]
        for name in measures:
            row += _time(name, rounds, side)
        row += [_memory(rounds[side], measures), _compile(rounds[side], measures)]
        if flops:
            row.append(_speed(rounds[side], measures))
        rows.append(row)
    lines = ["| " + " | ".join(row) + " |" for row in rows] if len(rows) > 2 else []
    batch = next((result["batch"] for result in results if "batch" in result), CASES[case]["batch"])
    title = f"### {case}: {CASES[case]['title']}, batch {batch}"
    left_out = [f"{side} was {'stopped' if rounds[side] else 'not run'}: {error}" for side, error in errors.items()]
    if lacking:
        left_out.append(f"No such network: {', '.join(lacking)}")
    return "\n".join([title, "", *lines, *[""] * bool(lines and left_out), "\n\n".join(left_out)]).rstrip()


def seconds_of(results: Sequence[Result], name: str) -> list[float]:
    return [result[name]["seconds"] for result in results if name in result]


def _time(name: str, rounds: Mapping[str, Sequence[Result]], side: str) -> list[str]:
    """A side's seconds, and its share of the best of ours."""
    seconds = seconds_of(rounds[side], name)
    if not seconds:
        return ["", ""]
    median = statistics.median(seconds)
    steps = next(found[name]["steps"] for found in rounds[side] if name in found)
    ends = (min(seconds), max(seconds)) if len(seconds) > 1 else _middle_half(steps)
    spread = f" ({ends[0]:.3g} to {ends[1]:.3g})" if ends else ""
    ours = [seconds_of(found, name) for other, found in rounds.items() if other.startswith("ours")]
    best = min((statistics.median(found) for found in ours if found), default=None)
    return [f"{median:.3g}{spread}", "" if best is None else f"{median / best:.2f}"]


def _middle_half(steps: Sequence[float]) -> tuple[float, float] | None:
    """The quartiles of a round's steps; None of too few."""
    if len(steps) < 4:
        return None
    first, _, third = statistics.quantiles(steps, n=4)
    return first, third


def _memory(results: Sequence[Result], measures: Sequence[str]) -> str:
    peaks = [result[name]["peak_bytes"] for result in results for name in measures if name in result]
    return f"{max(peaks) / 2**30:.2f} GiB" if peaks else ""


def _compile(results: Sequence[Result], measures: Sequence[str]) -> str:
    """Of the first round, since later ones find what was compiled."""
    first = [results[0][name] for name in measures if name in results[0]]
    cached = any(measure.get("cache_hits") for measure in first)
    return " + ".join(f"{measure['compile_seconds']:.1f}" for measure in first) + " (cached)" * cached


def _speed(results: Sequence[Result], measures: Sequence[str]) -> str:
    """Operations a second of the last measure that counts them, and their share of the device's peak in bfloat16."""
    counted = [name for name in measures if "flops" in results[0].get(name, {})]
    if not counted:
        return ""
    speed = results[0][counted[-1]]["flops"] / statistics.median(seconds_of(results, counted[-1]))
    peak = PEAKS.get(results[0].get("device_kind", "")) if results[0].get("dtype") == "bfloat16" else None
    return f"{speed / 1e9:,.0f}G" + (f" ({speed / peak:.0%} of the peak)" if peak else "")
