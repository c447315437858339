"""dalle2 reconstruct RUN IMAGE ...: images encoded as (z_i, x_T) and decoded again (Sec. 3)."""

from __future__ import annotations

import argparse
from pathlib import Path

from dalle2_jax.cli.output import checked_out
from dalle2_jax.cli.series import add_series_arguments, latent_sampling, write_series

HELP = "images encoded into their latent and decoded again"
USES_JAX = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("run", help="a run's folder, such as runs/demo")
    parser.add_argument("image", nargs="+", help="image files; what is beyond their central square is not seen")
    parser.add_argument(
        "--caption",
        action="append",
        help="what the decoder reads, there and back; give it once an image (default: none)",
    )
    add_series_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Encodes, decodes and writes the images."""
    import jax

    from dalle2_jax.cli.images import read_images, squares_of
    from dalle2_jax.manipulate import Series, encode, reconstruct
    from dalle2_jax.unclip import DALLE2

    images = read_images(options.image)
    checked_out(options, len(images))
    steps, settings = latent_sampling(options)
    model = DALLE2.load(options.run, dtype=options.dtype)
    batch = {"batch_size": options.batch_size}
    latent = encode(model, images, options.caption, steps=steps, refinements=options.refinements, **batch)
    series = reconstruct(model, jax.random.key(options.seed), latent, **settings, **batch)
    names = tuple(Path(name).stem for name in options.image)
    facts = {"sources": "\n".join(Path(name).name for name in options.image), "steps": latent.steps}
    given = squares_of(images, model.image_size)
    return write_series(options, Series(series.images, names, series.columns, given), facts)
