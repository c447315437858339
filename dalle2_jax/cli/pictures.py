"""Pictures named on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_pictures(names: Sequence[str]) -> list[Any]:
    """uint8 `[h, w, 3]` each.

    Raises:
        ValueError: naming the file that is no picture that can be read, and why.
    """
    return [read_picture_file(Path(name)) for name in names]


def read_picture_file(path: Path) -> Any:
    """uint8 `[h, w, 3]`; raises as `read_pictures`."""
    from dalle2_jax.data.picture import PictureError, read_picture

    try:
        return read_picture(path.read_bytes())
    except PictureError as error:
        raise ValueError(f"{path} is no picture that can be read: {error}") from error
