"""What commands over latents share: images in, the options of DDIM, and a labelled series to files or a sheet."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dalle2_jax._version import __version__
from dalle2_jax.cli.output import checked_out, slug, write_image
from dalle2_jax.cli.sampling_options import add_sampling_arguments, read_sampling
from dalle2_jax.errors import InputError


def add_series_arguments(parser: argparse.ArgumentParser, *, encodes: bool = True) -> None:
    """The options; encodes: whether x_T is inverted, which can be refined."""
    parser.add_argument("--seed", type=int, default=0, help="of the noise, which all images share (default 0)")
    parser.add_argument("--out", default=None, help="a PNG (one image, or a sheet) or a folder (default: samples/)")
    parser.add_argument("--grid", action="store_true", help="one labelled sheet of all images")
    parser.add_argument("--batch-size", type=int, default=8, help="images at a time (default 8)")
    parser.add_argument("--tile", type=int, default=None, metavar="N", help="upsample in tiles of N pixels")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of weights and arithmetic (default: as the run says)"
    )
    if encodes:
        add_encoding_arguments(parser)
    add_sampling_arguments(parser)


def add_encoding_arguments(parser: argparse.ArgumentParser) -> None:
    """How images are inverted."""
    parser.add_argument(
        "--refinements", type=int, default=0, metavar="N", help="ask the decoder N times more a step of the inversion"
    )


def latent_sampling(
    options: argparse.Namespace, steps: str | None = None, allowed: Sequence[str] = ()
) -> tuple[str | None, dict[str, Any]]:
    """The steps of DDIM, and what else `manipulate` takes of how images are decoded.

    steps: unless the options say; None leaves them to `manipulate.default_steps`. allowed: fields of the decoder's
    Sampling that this command reads itself.

    Raises:
        InputError: for options of the prior, and of the decoder where DDIM has to be as it is.
    """
    changes = read_sampling(options)
    decoder = changes["decoder"]
    if changes["prior"]:
        raise InputError(f"no prior is at work here; leave prior={next(iter(changes['prior'].values()))} out")
    if decoder.get("sampler", "ddim") != "ddim":
        raise InputError(f"--sampler is {decoder['sampler']}; the decoder is sampled by ddim here, so leave it out")
    for name in ("eta", "variance"):
        if name in decoder and name not in allowed:
            raise InputError(f"--{name} has no effect here: the decoder is sampled by ddim at eta 0; leave it out")
    steps = decoder.pop("steps", steps)
    settings = {"decoder": decoder, "upsampler": changes["upsampler"], "tile": options.tile}
    return steps, settings


def labelled(series: Any, names: Sequence[str]) -> Any:
    """A Series of an image a row, whose labels start with the names of the images; one image needs none."""
    stems = [Path(name).stem for name in names]
    if len(stems) == 1:
        return series
    labels = (f"{stems[number // series.columns]}, {label}" for number, label in enumerate(series.labels))
    return dataclasses.replace(series, labels=tuple(labels))


def write_series(options: argparse.Namespace, series: Any, facts: dict[str, str]) -> int:
    """Writes a Series as `--out` and `--grid` say; facts are each PNG's text, beside its label and seed."""
    out = checked_out(options, len(series))
    facts = {**facts, "seed": str(options.seed), "software": f"dalle2_jax {__version__}"}
    if options.grid:
        print(write_image(out, series.sheet(), {**facts, "labels": "\n".join(series.labels)}, True), flush=True)
        return 0
    for number, (image, label) in enumerate(zip(series.images, series.labels, strict=True)):
        path = out if out.suffix.lower() == ".png" else out / f"{number:03d}_{slug(label)}_{options.seed}.png"
        print(write_image(path, image, {**facts, "label": label}, path == out), flush=True)
    return 0
