"""dalle2 probe RUN IMAGE ...: images decoded from the first principal components of their embeddings (Fig. 7)."""

from __future__ import annotations

import argparse
from pathlib import Path

from dalle2_jax.cli.output import checked_out
from dalle2_jax.cli.series import add_series_arguments, labelled, latent_sampling, write_series
from dalle2_jax.errors import InputError

HELP = "images decoded from few principal components of their embeddings"
USES_JAX = True
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("run", help="a run's folder, such as runs/demo")
    parser.add_argument("image", nargs="+", help="image files; what is beyond their central square is not seen")
    parser.add_argument(
        "--dimensions",
        metavar="N,N",
        help="how many components each image keeps (default: 20,30,40,80,120,160,200,320, or as large a share)",
    )
    parser.add_argument(
        "--fit", metavar="FOLDER", help="images of which the components are (default: the run's training data)"
    )
    parser.add_argument("--fit-count", type=int, default=2000, metavar="N", help="how many of them (default 2000)")
    add_series_arguments(parser, encodes=False)


def run(options: argparse.Namespace) -> int:
    """Fits the components and samples the images."""
    import jax

    from dalle2_jax.cli.images import read_images
    from dalle2_jax.manipulate import pca_of_run, probe
    from dalle2_jax.manipulate.probe import default_dimensions
    from dalle2_jax.unclip import DALLE2

    dimensions = read_dimensions(options.dimensions)
    images = read_images(options.image)
    checked_out(options, len(images) * (len(dimensions) if dimensions else 2))
    steps, settings = latent_sampling(options, steps="50")
    fitted_on = None if options.fit is None else read_images(image_files(options.fit)[: options.fit_count])
    model = DALLE2.load(options.run, dtype=options.dtype)
    pca = pca_of_run(model, options.fit_count, images=fitted_on)
    dimensions = dimensions or default_dimensions(len(pca))
    settings = {**settings, "steps": steps, "batch_size": options.batch_size}
    series = probe(model, jax.random.key(options.seed), images, pca, dimensions, **settings)
    facts = {"sources": "\n".join(Path(name).name for name in options.image), "steps": steps}
    return write_series(options, labelled(series, options.image), facts)


def read_dimensions(text: str | None) -> tuple[int, ...]:
    """ "20,30" as numbers; none for None. Raises InputError."""
    try:
        return tuple(int(part) for part in text.split(",")) if text is not None else ()
    except ValueError:
        raise InputError(f"--dimensions takes numbers with commas between, not {text!r}") from None


def image_files(folder: str) -> list[str]:
    """The image files of a folder, by name; InputError where there are none."""
    path = Path(folder)
    files = sorted(str(file) for file in path.iterdir() if file.suffix.lower() in SUFFIXES) if path.is_dir() else []
    if not files:
        raise InputError(f"there is no image in {folder}; name a folder of images")
    return files
