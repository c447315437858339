"""dalle2 convert SOURCE SRC RUN: public weights as a run."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "public weights as a run that generate, evaluate and training read"
DRAWS = False
SOURCES = ("karlo",)
LICENCES = {"karlo": "CreativeML Open RAIL-M (Karlo v1, Kakao Brain); CLIP: MIT (OpenAI)"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("source", choices=SOURCES)
    parser.add_argument("src", help="a local folder, or a repository of Hugging Face such as kakaobrain/karlo-v1-alpha")
    parser.add_argument("run", help="the run to make")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")


def run(options: argparse.Namespace) -> int:
    """Converts and writes the run."""
    from dalle2_jax.weights import karlo
    from dalle2_jax.weights.run import write_run

    folder = Path(options.src)
    conversions = {"karlo": karlo.conversions}[options.source](folder)
    source = {"name": options.source, "from": options.src, "licence": LICENCES[options.source]}
    write_run(options.run, conversions, source, dtype=options.dtype)
    return 0
