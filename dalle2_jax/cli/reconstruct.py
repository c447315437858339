"""dalle2 reconstruct RUN IMAGE ...: images encoded and decoded again: as (z_i, x_T) by DALL-E 2 (Sec. 3), as a vector
by an autoencoder or a VAE, as codes by a dVAE."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dalle2_jax.cli.output import checked_out
from dalle2_jax.cli.sampling_options import read_sampling
from dalle2_jax.cli.series import add_series_arguments, latent_sampling, write_series
from dalle2_jax.errors import InputError

HELP = "images encoded into their latent and decoded again"
USES_JAX = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("run", help="a run's folder, such as runs/demo, or a stage of one, such as runs/lineage/vae")
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

    from dalle2_jax.cli.images import read_images
    from dalle2_jax.images.resize import squares
    from dalle2_jax.manipulate import Series, encode, reconstruct
    from dalle2_jax.systems import load
    from dalle2_jax.unclip import DALLE2

    images = read_images(options.image)
    checked_out(options, len(images))
    steps, settings = latent_sampling(options)
    model = load(options.run, dtype=options.dtype)
    if not isinstance(model, DALLE2):
        return _by_one_stage(options, model, images)
    batch = {"batch_size": options.batch_size}
    latent = encode(model, images, options.caption, steps=steps, refinements=options.refinements, **batch)
    series = reconstruct(model, jax.random.key(options.seed), latent, **settings, **batch)
    names = tuple(Path(name).stem for name in options.image)
    facts = {"sources": "\n".join(Path(name).name for name in options.image), "steps": latent.steps}
    given = squares(images, model.image_size)
    return write_series(options, Series(series.images, names, series.columns, given), facts)


def _by_one_stage(options: argparse.Namespace, model: Any, images: list[Any]) -> int:
    """The same by a system of one stage, which has no settings."""
    from dalle2_jax.images.resize import squares
    from dalle2_jax.manipulate import Series

    if not hasattr(model, "reconstruct"):
        raise InputError(f"{options.run} samples images and encodes none; name an autoencoder, a VAE or a dVAE")
    changed = [name for name, fields in read_sampling(options).items() if fields]
    if options.caption or options.refinements or options.tile or changed:
        raise InputError(f"{options.run} encodes an image in one step; leave captions and sampling options out")
    names = tuple(Path(name).stem for name in options.image)
    facts = {"sources": "\n".join(Path(name).name for name in options.image)}
    given = squares(images, model.image_size)
    return write_series(options, Series(model.reconstruct(images), names, 1, given), facts)
