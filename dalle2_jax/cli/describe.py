"""dalle2 describe RUN: what its stages are."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "what a run is"
DRAWS = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("run")


def run(options: argparse.Namespace) -> int:
    """Prints a paragraph a stage."""
    from dalle2_jax.checkpoint import CheckpointError, describe_stage

    folder = Path(options.run)
    paths = sorted(folder.glob("*/stage.json")) if folder.is_dir() else []
    if not paths:
        raise CheckpointError(
            f"there is no trained stage in {folder}; train one with `python -m train configs/shapes.py all`"
        )
    print(f"{folder}: {len(paths)} stage{'s' if len(paths) > 1 else ''}")
    for path in paths:
        print(describe_stage(path.parent))
    return 0
