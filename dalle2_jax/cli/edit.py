"""dalle2 edit RUN IMAGE ... --to TEXT: images turned towards what a caption says (text diffs, Sec. 3.3)."""

from __future__ import annotations

import argparse
from pathlib import Path

from dalle2_jax.cli.output import checked_out
from dalle2_jax.cli.series import add_series_arguments, labelled, latent_sampling, write_series
from dalle2_jax.errors import InputError

HELP = "images turned towards what a caption says"
USES_JAX = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("run", help="a run's folder, such as runs/demo")
    parser.add_argument("image", nargs="+", help="image files; what is beyond their central square is not seen")
    parser.add_argument("--to", required=True, metavar="TEXT", help="the caption of what they are to be")
    parser.add_argument(
        "--from", dest="origin", metavar="TEXT", help='of what they are now, or "a photo" (default: nothing)'
    )
    parser.add_argument("--theta", type=float, default=0.5, help="how far it goes, 0 to 1 (default 0.5)")
    parser.add_argument("--frames", type=int, default=5, help="images from 0 to theta (default 5; 1: theta alone)")
    add_series_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Samples the edited images."""
    import jax
    import numpy as np

    from dalle2_jax.cli.images import read_images
    from dalle2_jax.manipulate import edit, encode
    from dalle2_jax.unclip import DALLE2

    if options.frames < 1:
        raise InputError(f"--frames is {options.frames}; it must be 1 or more")
    if not 0 <= options.theta <= 1:
        raise InputError(f"--theta is {options.theta:g}; it must lie in 0 to 1")
    images = read_images(options.image)
    checked_out(options, len(images) * options.frames)
    steps, settings = latent_sampling(options)
    model = DALLE2.load(options.run, dtype=options.dtype)
    batch = {"batch_size": options.batch_size}
    latent = encode(model, images, steps=steps, refinements=options.refinements, **batch)
    thetas = np.linspace(0, options.theta, options.frames) if options.frames > 1 else [options.theta]
    key = jax.random.key(options.seed)
    series = edit(model, key, latent, options.to, options.origin, thetas, **settings, **batch)
    facts = {"sources": "\n".join(Path(name).name for name in options.image), "to": options.to, "steps": latent.steps}
    facts |= {} if options.origin is None else {"from": options.origin}
    return write_series(options, labelled(series, options.image), facts)
