"""Everything that one GPU is asked for, in one go and within a time limit, as a page with its figures and pictures.

    python -m benchmarks.gpu docs/results/gpu                                # within 25 minutes
    python -m benchmarks.gpu OUT --parts benchmark --minutes 9               # a part at a time
    python -m benchmarks.gpu OUT --parts emoji --minutes 120                 # the emoji in all their steps

benchmark   ours against diffusers, compiled and not, in bfloat16: the train steps of the paper's prior and of Karlo's
            decoder, and the whole path from caption to 256 px
parity      the networks against the peers' own outputs, on this GPU, in float32 and bfloat16
emoji       configs/emoji.py from nothing to its report: all stages, each with the same share of its steps, as many as
            the time allows

A part that its share of the time cuts off leaves what it has so far; what a part leaves over, later ones may use. The
page, OUT/gpu.md, says versions and commands. It needs torch and diffusers beside jax (or in another Python: --peers),
pytest, and for the emoji what that config asks for.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.compare import ROOT
from benchmarks.table import markdown

# Of the time, as parts; a later part has the leftovers of those before it as well.
SHARES = {"benchmark": 11, "parity": 3, "emoji": 11}
CASES, PEER_SIDES = "prior-1b,decoder-1b,generate-karlo", "ours,diffusers,diffusers-compiled"
# Steps by which a stage's speed is told; the first of their intervals compiles.
PROBE_STEPS, PROBE_INTERVAL = 60, 20
# Beside a stage's steps: to read the data, compile, validate and save, in seconds; and to evaluate the run.
STAGE_OVERHEAD, EVALUATION = 25.0, 60.0
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "torch", "diffusers", "transformers")


class Part:
    """Runs the commands of one part until its deadline, keeps what they print, and lists them for the page."""

    def __init__(self, out: Path, name: str, deadline: float) -> None:
        self.out, self.name, self.deadline = out, name, deadline
        self.commands: list[str] = []
        self.log = open(out / f"{name}.log", "w", encoding="utf-8")

    def left(self) -> float:
        """Seconds until the deadline."""
        return max(0.0, self.deadline - time.monotonic())

    def run(self, *words: str, env: Mapping[str, str] | None = None) -> int | None:
        """A command's exit status; None if the deadline came first: it is then told to stop, or killed."""
        before = " ".join(f"{name}={value}" for name, value in (env or {}).items())
        self.commands.append(f"{before} {' '.join(['python', *words])}".strip())
        self.log.write(f"$ {self.commands[-1]}\n")
        self.log.flush()
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(self.left())
        except subprocess.TimeoutExpired:
            for number, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, None)):
                os.killpg(process.pid, number)
                try:
                    process.wait(patience)
                    break
                except subprocess.TimeoutExpired:
                    continue
            return None


def said(status: int | None) -> str:
    """How a command ended, for the page; empty if well."""
    if status is None:
        return "**Cut off by the time limit.**"
    return f"**Failed with exit status {status}.**" if status else ""


def benchmark(part: Part, peers: str) -> list[str]:
    """The comparison's table, of as many sides and cases as there was time for."""
    found = part.out / "benchmark.json"
    found.unlink(missing_ok=True)
    status = part.run(
        *("-m", "benchmarks.compare", "--device", "cuda", "--cases", CASES, "--sides", PEER_SIDES),
        *("--measure", "train_step", "--rounds", "1", "--reps", "10", "--peers", peers, "--out", str(found)),
    )
    lines = [said(status)]
    if found.exists():
        told = json.loads(found.read_text())
        lines.append(markdown(told["settings"], told["results"]))
    return lines


def parity(part: Part) -> list[str]:
    """The differences that the parity tests print."""
    status = part.run(
        *("-m", "pytest", "tests/parity", "-m", "not slow and not live", "-q", "-s", "-p", "no:cacheprovider"),
        env={
            "JAX_PLATFORMS": "cuda,cpu",
            # Float32 is compared with float32: not with the TF32 that a GPU would take for it.
            "JAX_DEFAULT_MATMUL_PRECISION": "highest",
            # Else the tests turn the compiler's optimisation off.
            "XLA_FLAGS": "--xla_backend_optimization_level=3",
        },
    )
    printed = (part.out / f"{part.name}.log").read_text(encoding="utf-8").splitlines()
    lines = [line.lstrip(".") for line in printed if line.startswith(("FAILED", "ERROR")) or ": " in line]
    return [said(status), "```", *lines[-80:], *printed[-1:], "```"]


def emoji(part: Part) -> list[str]:
    """Trains and evaluates the emoji, and puts their pictures beside the page."""
    from configs.emoji import system

    whole = {name: recipe.steps for name, recipe in system(accelerator=True).stages.items()}
    for name in ("gpu-probe", "gpu-emoji"):
        shutil.rmtree(ROOT / "runs" / name, ignore_errors=True)
    fields = {"steps": PROBE_STEPS, "log_every": PROBE_INTERVAL, "preview_every": 0}
    probe = [f"{stage}.{field}={value}" for stage in whole for field, value in fields.items()]
    status = part.run("-m", "train", "configs/emoji.py", "all", "--run", "gpu-probe", *probe)
    if status != 0:
        return [said(status)]
    speeds = {stage: _seconds_a_step(ROOT / "runs" / "gpu-probe" / stage / "speed.jsonl") for stage in whole}
    share = share_of_steps(whole, speeds, part.left() - EVALUATION)
    steps = [f"{stage}.steps={max(PROBE_STEPS, round(share * count))}" for stage, count in whole.items()]
    status = part.run("-m", "train", "configs/emoji.py", "all", "--run", "gpu-emoji", *(steps if share < 1 else ()))
    lines = [f"Each stage was given {share:.0%} of its steps.", said(status)]
    lines += ["", "| stage | ms a step |", "| --- | ---: |"]
    lines += [f"| {stage} | {1000 * seconds:.1f} |" for stage, seconds in speeds.items()]
    if status == 0:
        status = part.run("-m", "dalle2_jax.cli", "evaluate", "runs/gpu-emoji")
        lines += ["", said(status), "", "![drawn from captions that no stage has seen](emoji_samples.png)"]
    for name in ("samples.png", "report.json"):
        if (path := ROOT / "runs" / "gpu-emoji" / name).exists():
            shutil.copy(path, part.out / f"emoji_{name}")
    return lines


def run_part(part: Part, peers: str) -> list[str]:
    """A part's section of the page."""
    if part.name == "benchmark":
        return benchmark(part, peers)
    return parity(part) if part.name == "parity" else emoji(part)


def _seconds_a_step(path: Path) -> float:
    """Of a stage's last interval."""
    return json.loads(path.read_text().splitlines()[-1])["seconds_per_step"]


def share_of_steps(steps: Mapping[str, int], seconds_a_step: Mapping[str, float], seconds: float) -> float:
    """The share of all stages' steps, 0 to 1, that can be trained within `seconds`."""
    needed = sum(count * seconds_a_step[stage] for stage, count in steps.items())
    return max(0.0, min(1.0, (seconds - STAGE_OVERHEAD * len(steps)) / needed))


def versions() -> str:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def device() -> str | None:
    """The GPU's name, told by a process of its own, so that none of its memory is held here; None without one."""
    words = [sys.executable, "-c", "import jax; print(jax.devices('gpu')[0].device_kind)"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip().splitlines()[-1] if done.returncode == 0 else None


def page(kind: str, sections: Mapping[str, Sequence[str]], commands: Mapping[str, Sequence[str]]) -> str:
    """The page, in Markdown."""
    lines = [f"# On one {kind}", "", f"{datetime.date.today()}. {versions()}.", ""]
    lines += ["```", "python -m benchmarks.gpu OUT", "```"]
    for name, section in sections.items():
        lines += ["", f"## {name.capitalize()}", "", "```", *commands[name], "```", "", *section]
    return "\n".join(lines).rstrip() + "\n"


def main(words: Sequence[str] | None = None) -> int:
    """Runs the parts and writes the page after each; returns the exit code, 2 for what cannot start."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder of the page")
    parser.add_argument("--parts", default=",".join(SHARES), help=f"of {', '.join(SHARES)}")
    parser.add_argument("--minutes", type=float, default=25.0, help="for all of them")
    parser.add_argument("--peers", default=sys.executable, help="the Python that has torch and diffusers")
    asked = parser.parse_args(words)
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
    deadline, total = time.monotonic(), sum(SHARES[name] for name in parts)
    sections: dict[str, list[str]] = {}
    commands: dict[str, list[str]] = {}
    for name in parts:
        deadline += 60 * asked.minutes * SHARES[name] / total
        part = Part(out, name, deadline)
        print(f"{name}: {part.left() / 60:.1f} minutes", flush=True)
        with part.log:
            sections[name] = run_part(part, asked.peers)
        commands[name] = part.commands
        (out / "gpu.md").write_text(page(kind, sections, commands), encoding="utf-8")
    print((out / "gpu.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
