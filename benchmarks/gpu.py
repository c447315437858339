"""Everything that one GPU is asked for, in one go and within a time limit, as a page with its figures and images.

    python -m benchmarks.gpu docs/results/gpu                    # within 25 minutes
    python -m benchmarks.gpu OUT --minutes 9                     # again and again, until all of it is done
    python -m benchmarks.gpu OUT --parts emoji --minutes 120     # the emoji in all their steps
    python -m benchmarks.gpu OUT --parts parity --fresh          # a part anew

train-steps ours against the peers, compiled and not, in bfloat16: the train steps of CLIP, of the paper's prior and of
            Karlo's decoder
generation  the whole path from caption to 256 px at Karlo's sizes, against diffusers
parity      the networks against the peers' own outputs, on this GPU, in bfloat16 and float32
demo        what `make demo` trains and evaluates, at the sizes for an accelerator
emoji       configs/emoji.py from nothing to its report: all stages, each with the same share of its steps, as many as
            the time allows

The page, OUT/gpu.md, says versions and commands. Each part's section is kept in OUT/PART.json: a call skips what is
done there and takes up what was cut off or failed, sides of a comparison and stages of a training that are done not
again. What a part leaves over of its time, later ones may use; with less time than the parts are meant for, the last
ones wait for another call. Compiled programs are kept too (`benchmarks.gpu_cache`).

It needs torch, diffusers and transformers beside jax (or in another Python: --peers), pytest, and for the emoji what
that config asks for.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpu_cache
from benchmarks.gpu_parts import SECTIONS, SHARES, Part, read_record
from benchmarks.processes import ROOT

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "torch", "diffusers", "transformers")
RUNS = {"demo": ("gpu-demo",), "emoji": ("gpu-probe", "gpu-emoji")}
# With fewer seconds than this, no part is begun.
LEAST = 45.0


def versions() -> str:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def device() -> str | None:
    """The GPU's name, read by a process of its own, so that none of its memory is held here; None without one."""
    words = [sys.executable, "-c", "import jax; print(jax.devices('gpu')[0].device_kind)"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip().splitlines()[-1] if done.returncode == 0 else None


def page(records: Mapping[str, Mapping[str, Any]], cache: str = "") -> str:
    """The page, in Markdown, from the parts' records."""
    kinds = list(dict.fromkeys(record["device"] for record in records.values()))
    dates = sorted({record["date"] for record in records.values()})
    lines = [f"# On one {', and one '.join(kinds)}", "", " to ".join(dict.fromkeys((dates[0], dates[-1]))) + "."]
    for versions in dict.fromkeys(record["versions"] for record in records.values()):
        lines.append(f"{versions}.")
    lines += ["", "```", "python -m benchmarks.gpu OUT", "```"]
    if cache:
        lines += ["", cache]
    for name, record in records.items():
        state = f"{record['date']}, {record['state']}, {record['seconds'] / 60:.1f} minutes."
        title = name.replace("-", " ").capitalize()
        lines += ["", f"## {title}", "", state, "", "```", *record["commands"], "```", "", *record["section"]]
    return "\n".join(lines).rstrip() + "\n"


def forget(out: Path, parts: Sequence[str]) -> None:
    """Removes what OUT and runs/ have of these parts; compiled programs stay."""
    for name in parts:
        for path in out.glob(f"{name}[._-]*"):
            path.unlink()
        for run in RUNS.get(name, ()):
            shutil.rmtree(ROOT / "runs" / run, ignore_errors=True)


def deadlines(parts: Sequence[str], now: float, minutes: float) -> dict[str, float]:
    """When each of these parts must end. With more time than they are meant for, all have more.

    With less, each has what those before it left, so that nothing is cut off that another call would have to do again.
    """
    whole = sum(SHARES[name] for name in parts)
    ends, end = {}, now
    for name in parts:
        end += 60 * minutes * SHARES[name] / whole
        ends[name] = end if minutes >= whole else now + 60 * minutes
    return ends


def main(words: Sequence[str] | None = None) -> int:
    """Runs the parts and writes the page after each; returns the exit code, 2 for what cannot start."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder of the page")
    parser.add_argument("--parts", default=",".join(SHARES), help=f"of {', '.join(SHARES)}")
    parser.add_argument("--minutes", type=float, default=25.0, help="for all of them")
    parser.add_argument("--peers", default=sys.executable, help="the Python that has torch, diffusers, transformers")
    parser.add_argument("--fresh", action="store_true", help="forget what OUT and runs/ have of the parts")
    parser.add_argument(
        "--cache-mib", type=float, default=14.0, help="the most that cache.tar.gz holds; 0: no such file"
    )
    asked = parser.parse_args(words)
    started = time.monotonic()
    parts = asked.parts.split(",")
    if unknown := [name for name in parts if name not in SHARES]:
        print(f"benchmarks.gpu: there is no part {unknown[0]!r}; there are {', '.join(SHARES)}", file=sys.stderr)
        return 2
    kind = device()
    if kind is None:
        print("benchmarks.gpu: jax finds no GPU here; see benchmarks.compare for a CPU", file=sys.stderr)
        return 2
    asked.out.mkdir(parents=True, exist_ok=True)
    out = asked.out.resolve()
    if asked.fresh:
        forget(out, parts)
    gpu_cache.unpack(out)
    left = [name for name in SHARES if name in parts and read_record(out, name).get("state") != "done"]
    ends = deadlines(left, started, asked.minutes)
    about = {"date": str(datetime.date.today()), "versions": versions(), "device": kind}
    for name in left:
        if ends[name] - time.monotonic() < LEAST:
            continue
        minutes = max(SHARES[name], asked.minutes * SHARES[name] / sum(SHARES[name] for name in left))
        part = Part(out, name, ends[name], about, minutes)
        print(f"{name}: {part.left() / 60:.1f} minutes", flush=True)
        with part.log:
            part.save(section_of(part, asked.peers), part.state)
        print(f"{name}: {part.state}", flush=True)
        gpu_cache.pack(out, int(asked.cache_mib * 2**20))
        write_page(out)
    if any(read_record(out, name) for name in SHARES):
        print(write_page(out))
    if undone := [name for name in parts if read_record(out, name).get("state") != "done"]:
        print(f"for another call: {', '.join(undone)}")
    return 0


def section_of(part: Part, peers: str) -> list[str]:
    """A part's section of the page; one that raises has failed, and the others go on."""
    part.save()
    try:
        return SECTIONS[part.name](part, peers)
    except Exception as error:
        part.state = "failed"
        part.log.write(traceback.format_exc())
        return [f"**Failed:** {type(error).__name__}: {error}"]


def write_page(out: Path) -> str:
    """Writes OUT/gpu.md from the records that are there, and returns it."""
    records = {name: record for name in SHARES if (record := read_record(out, name))}
    text = page(records, gpu_cache.sizes(out))
    (out / "gpu.md").write_text(text, encoding="utf-8")
    return text


if __name__ == "__main__":
    # So that the commands under way are stopped too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
