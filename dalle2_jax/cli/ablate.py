"""dalle2 ablate RUN ...: what each prior of a run, and none, makes of the same captions (Sec. 5.1)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dalle2_jax._version import __version__
from dalle2_jax.errors import InputError

HELP = "a run's priors against each other and against none, as a table"
USES_JAX = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("run", nargs="+", help="runs of one config with different seeds, over which the table goes")
    parser.add_argument("--count", type=int, default=240, help="captions of each split (default 240)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first run's images; each next run has the one after"
    )


def run(options: argparse.Namespace) -> int:
    """Measures each run, writes RUN/ablation.json, prints the table over all."""
    from dalle2_jax.checkpoint.run import Run, of_kind
    from dalle2_jax.evaluation.ablation import ablate_priors, format_ablation
    from dalle2_jax.files import write_atomically
    from dalle2_jax.unclip import DALLE2
    from dalle2_jax.unclip.placement import put_stage_on_devices

    reports, data = [], None
    for number, name in enumerate(options.run):
        folders = of_kind(Run(name), "prior")
        if not folders:
            raise InputError(f"{name} has no prior, of which an ablation could say anything; train one")
        model = DALLE2.load(name, prior=folders[0].name)
        model.require("clip", "decoder")
        others = {folder.name: put_stage_on_devices(folder.load()) for folder in folders[1:]}
        priors = {model.prior.name: model.prior, **others}
        own = model.recorded("data")
        if data is not None and (own.name, own.config, own.folder) != (data.name, data.config, data.folder):
            raise InputError(
                f"{name} was trained on {own.name} and {options.run[0]} on {data.name}; compare one data set"
            )
        data = own
        seed = options.seed + number
        report = ablate_priors(
            model, priors, data, count=options.count, seed=seed, log=lambda line: print(line, flush=True)
        )
        reports.append(report)
        path = Path(name) / "ablation.json"
        facts = {"count": options.count, "seed": seed, "version": __version__}
        write_atomically(path, json.dumps({**facts, "ways": report}, indent=2) + "\n")
        print(f"wrote {path}", flush=True)
    print(format_ablation(reports, data))
    return 0
