"""dalle2 describe RUN: what its stages are."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "what a run is"
USES_JAX = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("run")
    parser.add_argument(
        "--memory", action="store_true", help="compile each stage and say what sampling one image takes (minutes)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="with --memory (default: as the run says)")


def run(options: argparse.Namespace) -> int:
    """Prints a paragraph a stage."""
    from dalle2_jax.checkpoint import Run, describe_stage

    folder = Path(options.run)
    stages = Run(folder).stages
    print(f"{folder}: {len(stages)} stage{'s' if len(stages) > 1 else ''}")
    for stage in stages:
        print(describe_stage(stage.path))
    if options.memory:
        _print_memory(folder, options.dtype)
    return 0


def _print_memory(folder: Path, dtype: str | None) -> None:
    from dalle2_jax.unclip.memory import memory_of_sampling

    memories = memory_of_sampling(folder, dtype)
    print("GiB for one image     weights  beside them")
    for memory in memories:
        print(f"  {memory.stage:<20}{memory.weights / 2**30:9.2f}{memory.working / 2**30:13.2f}", flush=True)
