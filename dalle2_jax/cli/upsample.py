"""dalle2 upsample STAGE IMAGE: a trained upsampler by itself, on any image."""

from __future__ import annotations

import argparse
from pathlib import Path

from dalle2_jax._version import __version__
from dalle2_jax.cli.sampling_options import add_sampling_arguments, read_sampling
from dalle2_jax.errors import InputError

HELP = "a larger image of an image, by one trained upsampler"
USES_JAX = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("stage", help="a trained upsampler's folder, such as runs/demo/upsampler")
    parser.add_argument("image", help="any image; its central square is brought to the size the upsampler takes")
    parser.add_argument("--out", default=None, help="a PNG (default: IMAGE_large.png)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tile", type=int, default=None, metavar="N", help="in tiles of N pixels: less memory")
    add_sampling_arguments(parser, default="upsampler")


def run(options: argparse.Namespace) -> int:
    """Samples the image and writes it."""
    import jax
    import numpy as np

    from dalle2_jax.checkpoint import load_stage
    from dalle2_jax.checkpoint.run import of_kind
    from dalle2_jax.cli.images import read_whole_image
    from dalle2_jax.cli.output import write_image
    from dalle2_jax.diffusion.sampler import keys_for
    from dalle2_jax.images.resize import squares
    from dalle2_jax.layers.pixels import to_float, to_uint8
    from dalle2_jax.unclip.sample import upsample

    path = Path(options.image)
    out = Path(options.out) if options.out else path.with_name(f"{path.stem}_large.png")
    if out.suffix.lower() != ".png" or out.is_dir():
        raise InputError(f"--out {out} is no PNG; name one, such as large.png")
    changes = read_sampling(options, default="upsampler")
    if changes["prior"] or changes["decoder"]:
        raise InputError("only the upsampler is at work here; leave prior= and decoder= out")
    stage = load_stage(options.stage)
    if not of_kind([stage], "upsampler"):
        raise InputError(f"{options.stage} is a trained {stage.kind}; name an upsampler's folder")
    small = squares([read_whole_image(path)], stage.record.low_size)
    keys = keys_for(jax.random.key(options.seed), 1)
    large = upsample(stage, keys, to_float(small), tile=options.tile, **changes["upsampler"])()
    facts = {"source": path.name, "seed": str(options.seed), "software": f"dalle2_jax {__version__}"}
    print(write_image(out, np.asarray(to_uint8(large))[0], facts, options.out is not None))
    return 0
