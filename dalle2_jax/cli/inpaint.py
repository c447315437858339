"""dalle2 inpaint RUN IMAGE MASK PROMPT: a part of an image painted anew."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dalle2_jax.cli.output import add_output_arguments, plan, sample_to_files
from dalle2_jax.cli.sampling_options import read_sampling
from dalle2_jax.errors import InputError
from dalle2_jax.files import read_bytes

HELP = "paint a part of an image anew"
USES_JAX = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("run", help="a run's folder, such as runs/demo")
    parser.add_argument("image", help="an image file; what is beyond its central square is not seen")
    parser.add_argument("mask", help="an image file of the same size: white where to paint; transparent stays")
    add_painting_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Samples the images."""
    from dalle2_jax.cli.images import read_whole_image

    image, mask = read_whole_image(Path(options.image)), read_mask(Path(options.mask))

    def paint(model, keys, captions, settings):
        from dalle2_jax.manipulate.inpaint import inpaint

        return inpaint(model, keys, [image] * len(keys), [mask] * len(keys), captions, **settings)

    return paint_to_files(options, paint)


def add_painting_arguments(parser: argparse.ArgumentParser) -> None:
    """The prompt, RePaint's numbers and the options of all that sample images."""
    parser.add_argument("prompt", nargs="?", help="what the whole image is to show (default: what it shows now)")
    parser.add_argument(
        "--jump-length", type=int, default=None, metavar="N", help="steps that RePaint goes back at a time (default 10)"
    )
    parser.add_argument(
        "--jump-samples", type=int, default=None, metavar="N", help="how often it samples a stretch (default 10)"
    )
    add_output_arguments(parser, of="image")


def paint_to_files(options: argparse.Namespace, paint: Callable[[Any, Any, list[str] | None, dict], Any]) -> int:
    """Samples `--count` images; paint: from the run, keys `[b]`, captions and settings to an `Inpainted`."""
    from dalle2_jax.unclip import DALLE2, Generated

    thing, fact = options.prompt, "prompt"
    if thing is None:
        thing, fact = Path(options.image).stem, "source"
    _, seeds, out = plan(options, [thing], fact)
    settings = {**read_sampling(options), "tile": options.tile}
    for name in ("jump_length", "jump_samples"):
        if getattr(options, name) is not None:
            settings[name] = getattr(options, name)
    model = DALLE2.load(options.run, dtype=options.dtype)

    def sample_batch(keys, rows):
        captions = None if options.prompt is None else [options.prompt] * len(rows)
        painted = paint(model, keys, captions, {**settings, "batch_size": len(rows)})
        out.given = painted.marked[:1]
        return Generated((), None, None, painted.stages[0], painted.stages[1:])

    return sample_to_files(options, out, seeds, sample_batch)


def read_mask(path: Path) -> Any:
    """Where to paint, bool `[h, w]`: where a mask's file is nearer to white than to black, and not transparent.

    Raises:
        InputError: naming the file that is no image that can be read, and why.
    """
    import numpy as np

    from dalle2_jax.images.read import MOST_BYTES, ImageError, open_image

    try:
        image = open_image(read_bytes(path, MOST_BYTES))[0].convert("LA")
    except ImageError as error:
        raise InputError(f"{path} is no image that can be read: {error}") from error
    level, alpha = np.moveaxis(np.asarray(image).astype(int), -1, 0)
    return level * alpha >= 128 * 255
