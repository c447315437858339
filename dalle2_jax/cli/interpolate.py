"""dalle2 interpolate RUN A B [C D]: images between two others, or a grid among four (Sec. 3.2)."""

from __future__ import annotations

import argparse
from pathlib import Path

from dalle2_jax.cli.output import checked_out
from dalle2_jax.cli.series import add_series_arguments, latent_sampling, write_series
from dalle2_jax.errors import InputError

HELP = "images between two others, or a grid among four"
USES_JAX = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("run", help="a run's folder, such as runs/demo")
    parser.add_argument("image", nargs="+", help="two image files, or the four of a grid's corners")
    parser.add_argument("--frames", type=int, default=None, help="images along a side (default 7, in a grid 5)")
    parser.add_argument(
        "--noise", choices=("interpolated", "fixed"), default="interpolated", help="x_T from one to the other, or one"
    )
    add_series_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Samples the interpolation."""
    import jax

    from dalle2_jax.cli.images import read_images
    from dalle2_jax.manipulate import embed, encode, interpolate, interpolate_grid
    from dalle2_jax.unclip import DALLE2

    count = len(options.image)
    if count not in (2, 4):
        raise InputError(f"{count} images were given; name two to interpolate, or four for a grid")
    frames = (7 if count == 2 else 5) if options.frames is None else options.frames
    if frames < 2:
        raise InputError(f"--frames is {frames}; it must be 2 or more")
    images = read_images(options.image)
    checked_out(options, frames if count == 2 else frames**2)
    steps, settings = latent_sampling(options)
    model = DALLE2.load(options.run, dtype=options.dtype)
    batch = {"batch_size": options.batch_size}
    if options.noise == "fixed":
        latent = embed(model, images, steps=steps)
    else:
        latent = encode(model, images, steps=steps, refinements=options.refinements, **batch)
    key, settings = jax.random.key(options.seed), {**settings, **batch, "noise": options.noise}
    if count == 2:
        series = interpolate(model, key, latent, frames, **settings)
    else:
        series = interpolate_grid(model, key, latent, frames, frames, **settings)
    sources = "\n".join(Path(name).name for name in options.image)
    return write_series(options, series, {"sources": sources, "noise": options.noise, "steps": latent.steps})
