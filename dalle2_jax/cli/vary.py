"""dalle2 vary RUN IMAGE ...: images that share with others what CLIP sees in them, or their content (Sec. 3.1)."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dalle2_jax.cli.output import Output, add_output_arguments, plan, sample_to_files
from dalle2_jax.cli.sampling_options import read_sampling
from dalle2_jax.cli.series import add_encoding_arguments, latent_sampling
from dalle2_jax.errors import InputError

HELP = "variations of images"
USES_JAX = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("run", help="a run's folder, such as runs/demo")
    parser.add_argument("image", nargs="+", help="image files; what is beyond their central square is not seen")
    parser.add_argument(
        "--share",
        choices=("content", "semantics"),
        help="vary the latent by DDIM: from the image's own x_T, with noise on the way (--eta, default 0.5), or from "
        "another x_T (default: the embedding alone, by the decoder's own sampler)",
    )
    add_encoding_arguments(parser)
    add_output_arguments(parser, of="image")


def run(options: argparse.Namespace) -> int:
    """Samples the variations."""
    from dalle2_jax.cli.images import read_images
    from dalle2_jax.images.resize import squares
    from dalle2_jax.unclip import DALLE2

    images = read_images(options.image)
    places, seeds, out = plan(options, [Path(name).stem for name in options.image], "source")
    if options.share is not None:
        return sample_to_files(options, out, seeds, _of_latents(options, images, places, out))
    changes = read_sampling(options)
    if changes["prior"]:
        raise InputError("no prior is at work in variations; leave prior= out")
    if options.refinements:
        raise InputError("--refinements is of latents; add --share content, or leave it out")
    model = DALLE2.load(options.run, dtype=options.dtype)
    out.given = squares(images, model.image_size)

    def sample_batch(keys, rows):
        chosen = [images[places[row]] for row in rows]
        return model.vary(keys, chosen, **changes, tile=options.tile, batch_size=len(rows), return_stages=True)

    return sample_to_files(options, out, seeds, sample_batch)


def _of_latents(
    options: argparse.Namespace, images: list[Any], places: list[int], out: Output
) -> Callable[[Any, list[int]], Any]:
    """What `sample_to_files` calls: variations of the images' latents."""
    from dalle2_jax.images.resize import squares
    from dalle2_jax.manipulate import embed, encode, vary
    from dalle2_jax.unclip import DALLE2

    if options.stages:
        raise InputError("--stages and --share do not go together; leave one of them out")
    steps, settings = latent_sampling(options, allowed=("eta",))
    eta = settings["decoder"].pop("eta", None)
    model = DALLE2.load(options.run, dtype=options.dtype)
    out.given = squares(images, model.image_size)
    if options.share == "semantics":
        latent = embed(model, images, steps=steps)
    else:
        batch = min(8, options.batch_size)
        latent = encode(model, images, steps=steps, refinements=options.refinements, batch_size=batch)

    def sample_batch(keys, rows):
        chosen = latent[[places[row] for row in rows]]
        return vary(model, keys, chosen, 1, share=options.share, eta=eta, batch_size=len(rows), **settings)

    return sample_batch
