"""dalle2 vary RUN PICTURE ...: pictures that share with others what CLIP sees in them (Sec. 3.1)."""

from __future__ import annotations

import argparse
from pathlib import Path

from dalle2_jax.cli.output import add_drawing_arguments, draw, plan
from dalle2_jax.cli.sampling_options import read_sampling
from dalle2_jax.errors import InputError

HELP = "variations of pictures"
DRAWS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("run", help="a run's folder, such as runs/demo")
    parser.add_argument("picture", nargs="+", help="picture files; what is beyond their central square is not seen")
    add_drawing_arguments(parser, of="picture")


def run(options: argparse.Namespace) -> int:
    """Draws the variations."""
    from dalle2_jax.cli.images import read_pictures
    from dalle2_jax.unclip import DALLE2

    pictures = read_pictures(options.picture)
    places, seeds, out = plan(options, [Path(name).stem for name in options.picture], "source")
    changes = read_sampling(options)
    if changes["prior"]:
        raise InputError("no prior is at work in variations; leave prior= out")
    model = DALLE2.load(options.run, dtype=options.dtype)

    def draw_batch(keys, rows):
        chosen = [pictures[places[row]] for row in rows]
        return model.vary(keys, chosen, **changes, tile=options.tile, batch_size=len(rows), return_stages=True)

    return draw(options, out, seeds, draw_batch)
