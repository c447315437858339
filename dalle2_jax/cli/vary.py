"""dalle2 vary RUN IMAGE ...: images that share with others what CLIP sees in them (Sec. 3.1)."""

from __future__ import annotations

import argparse
from pathlib import Path

from dalle2_jax.cli.output import add_output_arguments, plan, sample_to_files
from dalle2_jax.cli.sampling_options import read_sampling
from dalle2_jax.errors import InputError

HELP = "variations of images"
USES_JAX = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("run", help="a run's folder, such as runs/demo")
    parser.add_argument("image", nargs="+", help="image files; what is beyond their central square is not seen")
    add_output_arguments(parser, of="image")


def run(options: argparse.Namespace) -> int:
    """Samples the variations."""
    from dalle2_jax.cli.images import read_images
    from dalle2_jax.unclip import DALLE2

    images = read_images(options.image)
    places, seeds, out = plan(options, [Path(name).stem for name in options.image], "source")
    changes = read_sampling(options)
    if changes["prior"]:
        raise InputError("no prior is at work in variations; leave prior= out")
    model = DALLE2.load(options.run, dtype=options.dtype)

    def sample_batch(keys, rows):
        chosen = [images[places[row]] for row in rows]
        return model.vary(keys, chosen, **changes, tile=options.tile, batch_size=len(rows), return_stages=True)

    return sample_to_files(options, out, seeds, sample_batch)
