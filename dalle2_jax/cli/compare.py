"""dalle2 compare RUN RUN ...: systems of any kind side by side, as one table and one sheet.

With --join: one table of several comparisons, such as those of three seeds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dalle2_jax._version import __version__
from dalle2_jax.errors import InputError
from dalle2_jax.files import read_bytes

HELP = "systems of any kind side by side: what they sample, what they cost, how long they trained"
USES_JAX = True
SHOWN = 8  # images of each system on the sheet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "run", nargs="*", help="runs, or stages of one, and what the table calls them: runs/demo VAE=runs/lineage/vae"
    )
    parser.add_argument("--count", type=int, default=240, help="images of each (default 240)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--judge", metavar="RUN", help="whose CLIP's features tell images apart (default: the first run that has one)"
    )
    parser.add_argument("--out", default="comparison", help="NAME.json, NAME.md and NAME.png (default: comparison)")
    parser.add_argument(
        "--join", nargs="+", metavar="FILE", help="instead, the means and half ranges over such .json files"
    )


def run(options: argparse.Namespace) -> int:
    """Samples, measures, writes the three files, prints the table."""
    from dalle2_jax.evaluation.compare import REAL, compare, data_of, format_comparison
    from dalle2_jax.files import write_atomically
    from dalle2_jax.images.files import save_png
    from dalle2_jax.images.resize import resize
    from dalle2_jax.images.sheet import caption_grid
    from dalle2_jax.systems import SequenceModel, load
    from dalle2_jax.unclip import DALLE2

    if options.join:
        if options.run:
            raise InputError(
                f"--join takes comparisons that are made, and {options.run[0]} is to be sampled; leave one out"
            )
        print(format_comparison(_systems_of(options.join)))
        return 0
    if not options.run:
        raise InputError("there is nothing to compare; name two runs or more, such as runs/demo runs/lineage/vae")
    runs = dict(_named(text) for text in options.run)
    names = list(runs)
    out = Path(options.out)
    if out.is_dir():
        raise InputError(f"--out {out} is a folder; give the beginning of the files' names, such as {out}/comparison")
    models = {name: load(path) for name, path in runs.items()}
    for name, model in models.items():
        if isinstance(model, SequenceModel):
            raise InputError(f"{name} translates sequences and samples no images; leave it out")
    data = data_of(models[names[0]])
    for name, model in models.items():
        own = data_of(model)
        if (own.name, own.config, own.folder) != (data.name, data.config, data.folder):
            raise InputError(f"{name} was trained on {own.name} and {names[0]} on {data.name}; compare one data set")
    judged_by = _run_of(options.judge) if options.judge else _first_clip(list(runs.values()))
    judge = None if judged_by is None else DALLE2.load(judged_by)
    if judge is not None:
        judge.require("clip")
    settings = {"count": options.count, "seed": options.seed, "judge": judge}
    found, images = compare(models, data, **settings, log=lambda line: print(line, flush=True))
    facts = {"runs": runs, "count": options.count, "seed": options.seed, "judge": judged_by, "version": __version__}
    write_atomically(out.with_name(f"{out.name}.json"), json.dumps({**facts, "systems": found}, indent=2) + "\n")
    table = format_comparison([found])
    write_atomically(out.with_name(f"{out.name}.md"), table + "\n")
    size = max(shown.shape[1] for shown in images.values())
    rows = [resize(images[name][:SHOWN], size) for name in (*names, REAL)]
    sheet = caption_grid(rows, [""] * len(rows[0]), labels=(*names, REAL))
    save_png(out.with_name(f"{out.name}.png"), sheet, {"systems": ", ".join(names), "seed": str(options.seed)})
    print(table)
    return 0


def _named(text: str) -> tuple[str, str]:
    """What the table calls a run, and its folder, of NAME=RUN or RUN."""
    name, given, path = text.rpartition("=")
    return (name, path) if given else (path, path)


def _systems_of(files: list[str]) -> list[dict[str, dict[str, float]]]:
    """The figures in files that this command wrote; InputError where one is none."""
    from dalle2_jax.checkpoint.files import LARGEST_JSON

    reports = []
    for name in files:
        try:
            reports.append(json.loads(read_bytes(name, LARGEST_JSON))["systems"])
        except OSError as error:
            raise InputError(f"--join {name} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"--join {name} is no comparison; name a .json that dalle2 compare wrote") from error
    return reports


def _run_of(name: str) -> str:
    """The folder of a run that is named by itself or by one of its stages."""
    from dalle2_jax.checkpoint.record import has_record

    path = Path(name)
    return str(path.parent if has_record(path) else path)


def _first_clip(names: list[str]) -> str | None:
    """The folder of the first run that has a CLIP."""
    from dalle2_jax.checkpoint.run import Run, of_kind

    return next((folder for folder in map(_run_of, names) if of_kind(Run(folder), "clip")), None)
