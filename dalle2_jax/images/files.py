"""Image files that are whole or not there."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dalle2_jax.errors import InputError
from dalle2_jax.files import written_whole


def encode_png(pixels: Any, facts: Mapping[str, str] | None = None) -> bytes:
    """A PIL image or uint8 `[h, w, 3]` as PNG; `facts` become its text metadata."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    information = PngInfo()
    for name, value in (facts or {}).items():
        information.add_itxt(name, value)
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=information)
    return file.getvalue()


def save_png(path: Path, pixels: Any, facts: Mapping[str, str] | None = None) -> None:
    """Writes what `encode_png` makes, whole or not at all, in place of what is there."""
    with written_whole(path) as file:
        file.write(encode_png(pixels, facts))


def save_figure(path: str | Path, draw: Callable[[Any], None], size: tuple[float, float]) -> None:
    """Writes what `draw` draws into a figure of matplotlib, of that size in inches, as PNG, whole or not at all.

    Raises:
        InputError: where matplotlib is not installed, or the file is to be no PNG.
    """
    from PIL import Image

    path = Path(path)
    if path.suffix.lower() != ".png":
        raise InputError(f"{path} is no PNG; name one, such as curves.png")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise InputError("the plot needs matplotlib; pip install matplotlib, or 'dalle2-jax[plots]'") from error
    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    pixels = io.BytesIO()
    figure.savefig(pixels, dpi=100)
    save_png(path, Image.open(pixels))


def png(image: np.ndarray) -> io.BytesIO:
    """An image uint8 [h, w, 3] as a file: TFDS would need TensorFlow to encode an array."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=1)
    file.seek(0)
    return file
