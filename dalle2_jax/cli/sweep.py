"""dalle2 sweep RUN: quality against network evaluations, as a table, a JSON file and a plot."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dalle2_jax.cli.sampling_options import STAGES
from dalle2_jax.errors import InputError

HELP = "quality against network evaluations: samplers, steps and guidance scales of one stage"
USES_JAX = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("run")
    parser.add_argument("--stage", choices=STAGES, default="decoder", help="which stage (default: decoder)")
    parser.add_argument("--samplers", default="ddim,dpmpp_2m,ddpm", help="names with commas between them")
    parser.add_argument("--steps", default="5,10,20,50,100", help="numbers with commas between them")
    parser.add_argument("--guidance-scales", default="1,1.5,2.5", help="numbers with commas between them")
    parser.add_argument("--count", type=int, default=120, help="captions of the test split (default 120)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=None, help="the files' name without .json and .png (default: RUN/sweep_STAGE)")


def run(options: argparse.Namespace) -> int:
    """Samples all combinations; writes a JSON file and a plot."""
    from dalle2_jax.evaluation.sweep import format_row, header, plot, sweep
    from dalle2_jax.files import write_atomically
    from dalle2_jax.unclip import DALLE2

    try:
        scales = [float(text) for text in options.guidance_scales.split(",")]
    except ValueError:
        raise InputError(
            f"--guidance-scales takes numbers with commas between, not {options.guidance_scales}"
        ) from None
    model = DALLE2.load(options.run)
    model.require("clip", "prior", "decoder")
    base = Path(options.out) if options.out else Path(options.run) / f"sweep_{options.stage}"
    table = base.with_name(base.name + ".json")
    shown: list[dict] = []

    def log(row: dict) -> None:
        if not shown:
            print(header(row))
        shown.append(row)
        print(format_row(row), flush=True)
        report = {"run": options.run, "stage": options.stage, "seed": options.seed, "rows": shown}
        write_atomically(table, json.dumps(report, indent=2) + "\n")  # after each, so that a stop loses none

    rows = sweep(
        model,
        model.recorded("data"),
        stage=options.stage,
        samplers=options.samplers.split(","),
        steps=options.steps.split(","),
        guidance_scales=scales,
        count=options.count,
        seed=options.seed,
        log=log,
    )
    print(f"wrote {table}")
    plot(rows, "all" if "all" in rows[0] else "r5", f"{base}.png")
    print(f"wrote {base}.png")
    return 0
