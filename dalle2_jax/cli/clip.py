"""dalle2 clip score|classify RUN IMAGE ...: how well captions fit images, by a run's CLIP."""

from __future__ import annotations

import argparse
from pathlib import Path

from dalle2_jax.errors import InputError

HELP = "what CLIP says of images: their likeness to captions, or which class they are of"
USES_JAX = True
SHOWN = 5
TEMPLATE = "a photo of a {}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    actions = parser.add_subparsers(dest="action", required=True)
    score = actions.add_parser("score", help="the cosine of each image and each caption")
    classify = actions.add_parser("classify", help="which of some classes each image is of, with no training for it")
    for one in (score, classify):
        one.add_argument("run", help="a run with a CLIP that reads images, trained or converted")
        one.add_argument("image", nargs="+", help="image files; what is beyond their central square is not seen")
        one.add_argument("--dtype", choices=("float32", "bfloat16"), help="(default: as the run says)")
    score.add_argument("--caption", action="append", required=True, help="may be given several times")
    classify.add_argument("--class", dest="classes", action="append", default=[], help="may be given several times")
    classify.add_argument("--classes", dest="file", metavar="FILE", help="a text file with a class a line (UTF-8)")
    classify.add_argument(
        "--template",
        action="append",
        help=f"how a class is said, with {{}} in its place; several are averaged (default: {TEMPLATE!r})",
    )


def run(options: argparse.Namespace) -> int:
    """Prints a line an image and caption, or an image and its likeliest classes."""
    import numpy as np

    from dalle2_jax.cli.generate import read_prompts
    from dalle2_jax.cli.images import read_images
    from dalle2_jax.unclip import DALLE2

    images = read_images(options.image)
    if options.action == "classify":
        classes = [*options.classes, *(read_prompts(options.file, "--classes", "class") if options.file else ())]
        if len(classes) < 2:
            raise InputError("classify chooses among classes: give two or more by --class NAME, or --classes FILE")
        templates = options.template or [TEMPLATE]
        for template in templates:
            if "{}" not in template:
                raise InputError(f"--template {template!r} has no {{}}, where the class goes")
    model = DALLE2.load(options.run, dtype=options.dtype)
    if options.action == "score":
        scores = np.asarray(model.scores(images, options.caption))
        for name, row in zip(options.image, scores, strict=True):
            for caption, value in zip(options.caption, row, strict=True):
                print(f"{Path(name).name}  {value:+.4f}  {caption}")
        return 0
    chances = np.asarray(model.classify(images, classes, templates))
    for name, row in zip(options.image, chances, strict=True):
        best = np.argsort(-row)[:SHOWN]
        print(f"{Path(name).name}  " + "  ".join(f"{classes[place]} {row[place]:.3f}" for place in best))
    return 0
