"""dalle2 evaluate RUN: the oracle on captioned shapes, retrieval elsewhere; report.json and samples.png.

With --latent: reconstructions, variations, text diffs and probes of images (captioned shapes alone); latent.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dalle2_jax._version import __version__
from dalle2_jax.cli.sampling_options import add_prior_argument
from dalle2_jax.errors import InputError

HELP = "how good a run's images are, measured on held-out captions"
USES_JAX = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("run")
    parser.add_argument(
        "--count", type=int, default=None, help="captions of the split (default 240; with --latent images, 64)"
    )
    parser.add_argument(
        "--split", help="in place of the test split, such as train or validation+test (not with shapes)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--latent", action="store_true", help="instead, what the latent of images keeps and changes (shapes alone)"
    )
    add_prior_argument(parser)
    parser.add_argument("--judge", metavar="RUN", help="another run, whose CLIP judges the images (not with shapes)")


def run(options: argparse.Namespace) -> int:
    """Measures, writes both files, prints the report."""
    from dalle2_jax.evaluation.captioned import evaluate_images
    from dalle2_jax.evaluation.report import format_images_report, format_report
    from dalle2_jax.evaluation.shapes import evaluate
    from dalle2_jax.files import write_atomically
    from dalle2_jax.unclip import DALLE2

    folder = Path(options.run)
    model = DALLE2.load(folder, prior=options.prior)
    if options.latent:
        return _measure_latent(model, options)
    model.require("clip", "prior", "decoder")
    data = model.recorded("data")
    settings: dict[str, Any] = {"count": options.count or 240, "seed": options.seed}
    settings["log"] = lambda line: print(line, flush=True)
    if data.name == "captioned_shapes":
        if data.config not in (None, "one_object"):
            raise InputError(f"{folder} was trained on captioned_shapes/{data.config}; only one_object is evaluated")
        for name in ("judge", "split"):
            if getattr(options, name):
                raise InputError(
                    f"{folder} was trained on captioned_shapes, whose test split the oracle judges; leave --{name} out"
                )
        report, shown = evaluate(model, data, **settings)
        text = format_report(report)
    else:
        judge = DALLE2.load(options.judge) if options.judge else None
        report, shown = evaluate_images(model, data, split=options.split, judge=judge, **settings)
        report["judge"] = options.judge or options.run
        text = format_images_report(report)
    report["seconds"] = {stage.name: round(stage.record.seconds or 0.0, 1) for stage in model.stages}
    report["version"] = __version__
    report["prior_stage"] = model.prior.name
    suffix = f"_{options.prior}" if options.prior else ""
    written, samples = folder / f"report{suffix}.json", folder / f"samples{suffix}.png"
    write_atomically(written, json.dumps(report, indent=2) + "\n")
    _save_samples(samples, shown)
    print(text)
    print(f"wrote {written} and {samples}")
    return 0


def _measure_latent(model: Any, options: argparse.Namespace) -> int:
    from dalle2_jax.evaluation.manipulations import format_latent, measure_latent
    from dalle2_jax.files import write_atomically

    for name in ("judge", "split"):
        if getattr(options, name):
            raise InputError(f"--{name} has no effect with --latent; leave it out")
    report = measure_latent(
        model,
        model.recorded("data"),
        count=options.count or 64,
        seed=options.seed,
        log=lambda line: print(line, flush=True),
    )
    report["version"] = __version__
    path = Path(options.run) / "latent.json"
    write_atomically(path, json.dumps(report, indent=2) + "\n")
    print(format_latent(report))
    print(f"wrote {path}")
    return 0


def _save_samples(path: Path, shown: dict[str, Any]) -> None:
    """A sheet of test captions, and of unseen ones where there are any: real, the decoder's, and the final image."""
    from dalle2_jax.images.files import save_png
    from dalle2_jax.images.sheet import caption_grid

    parts = [("test", "generated", 16 if "unseen" in shown else 24, "")]
    if "unseen" in shown:
        parts.append(("unseen", "unseen_generated", 8, " (unseen pair)"))
    rows: list[list[Any]] = [[], [], []]
    captions: list[str] = []
    for examples, drawn, most, note in parts:
        found, generated = shown[examples], shown[drawn]
        count = min(most, len(found.captions))
        chosen = [place * len(found.captions) // count for place in range(count)]  # all over a split that is sorted
        for row, images in zip(rows, (found.images, generated.decoded, generated.images), strict=True):
            row.extend(images[place] for place in chosen)
        captions.extend(found.captions[place] + note for place in chosen)
    save_png(path, caption_grid(rows, captions, labels=("real", "decoder", "final")))
