"""dalle2 curves RUN [RUN ...]: the losses of every stage, of one run or of several side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "plot the losses of every stage, of one run or of several side by side"
USES_JAX = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--out", default=None, help="the image (default: curves.png in the first run)")


def run(options: argparse.Namespace) -> int:
    """Writes the plot."""
    from dalle2_jax.evaluation.curves import plot_curves, read_curves

    names = [Path(path).name for path in options.runs]
    labels = names if len(set(names)) == len(names) else options.runs
    out = Path(options.out) if options.out else Path(options.runs[0]) / "curves.png"
    plot_curves({label: read_curves(path) for label, path in zip(labels, options.runs, strict=True)}, out)
    print(f"wrote {out}")
    return 0
