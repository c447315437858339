"""dalle2 outpaint RUN IMAGE PROMPT: an image continued beyond its edges."""

from __future__ import annotations

import argparse
from pathlib import Path

from dalle2_jax.cli.inpaint import add_painting_arguments, paint_to_files
from dalle2_jax.errors import InputError

HELP = "continue an image beyond its edges"
USES_JAX = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("run", help="a run's folder, such as runs/demo")
    parser.add_argument("image", help="an image file, all of which is kept, on a larger square")
    add_painting_arguments(parser)
    parser.add_argument(
        "--factor", type=float, default=2.0, help="how many times wider than the image's longer side (default 2)"
    )
    parser.add_argument(
        "--place",
        default="0.5,0.5",
        metavar="LEFT,TOP",
        help="shares of the free space left of the image and above it (default 0.5,0.5: the middle)",
    )


def run(options: argparse.Namespace) -> int:
    """Samples the images."""
    from dalle2_jax.cli.images import read_whole_image

    try:
        left, top = map(float, options.place.split(","))
    except ValueError:
        raise InputError(f"--place takes LEFT,TOP, such as 0,0.5, not {options.place!r}") from None
    image = read_whole_image(Path(options.image))

    def paint(model, keys, captions, settings):
        from dalle2_jax.manipulate.inpaint import outpaint

        images = [image] * len(keys)
        return outpaint(model, keys, images, captions, factor=options.factor, place=(left, top), **settings)

    return paint_to_files(options, paint)
