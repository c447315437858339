"""Images named on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dalle2_jax.errors import InputError
from dalle2_jax.files import read_bytes


def read_images(names: Sequence[str]) -> list[Any]:
    """Whole images, uint8 `[h, w, 3]` each; what is transparent turns white.

    Raises:
        InputError: naming the file that is no image that can be read, and why.
    """
    return [read_whole_image(Path(name)) for name in names]


def read_whole_image(path: Path) -> Any:
    """uint8 `[h, w, 3]`; raises as `read_images`."""
    import numpy as np

    from dalle2_jax.images.read import MOST_BYTES, ImageError, open_image
    from dalle2_jax.images.resize import to_rgb

    try:
        return to_rgb(np.asarray(open_image(read_bytes(path, MOST_BYTES))[0]))
    except ImageError as error:
        raise InputError(f"{path} is no image that can be read: {error}") from error
