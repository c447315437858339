"""The sample grid: a row for each caption, with the real picture and what the averaged and the raw parameters make."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

_GAP, _LINE, _BACKGROUND, _INK = 4, 14, (255, 255, 255), (30, 30, 30)
_SMALLEST = 64


def draw_grid(columns: dict[str, np.ndarray], captions: Sequence[str]) -> np.ndarray:
    """The grid as uint8 [height, width, 3].

    Args:
        columns: {title: uint8 [n, h, w, 3]}; sizes may differ, small pictures are enlarged without smoothing.
        captions: n strings.

    Raises:
        ValueError: if the columns and captions are not equally many pictures.
    """
    from PIL import Image, ImageDraw, ImageFont

    counts = {title: len(pictures) for title, pictures in columns.items()}
    if len({len(captions), *counts.values()}) != 1:
        raise ValueError(f"a grid needs a picture for each of its {len(captions)} captions, but has {counts}")
    cell = max(_SMALLEST, *(pictures.shape[2] for pictures in columns.values()))
    font = ImageFont.load_default(size=11)
    text_width = max([int(font.getlength(caption)) for caption in captions] + [0])
    width = _GAP + len(columns) * (cell + _GAP) + text_width + _GAP
    height = _LINE + len(captions) * (cell + _GAP) + _GAP
    canvas = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for index, (title, pictures) in enumerate(columns.items()):
        left = _GAP + index * (cell + _GAP)
        draw.text((left, 1), title, fill=_INK, font=font)
        for row, pixels in enumerate(np.asarray(pictures, np.uint8)):
            picture = Image.fromarray(pixels).resize((cell, cell), Image.Resampling.NEAREST)
            canvas.paste(picture, (left, _LINE + row * (cell + _GAP)))
    for row, caption in enumerate(captions):
        top = _LINE + row * (cell + _GAP) + cell // 2 - 7
        draw.text((_GAP + len(columns) * (cell + _GAP), top), caption, fill=_INK, font=font)
    return np.asarray(canvas)


def save_picture(path: Path, pixels: np.ndarray) -> None:
    """Writes uint8 [h, w, 3] as PNG, whole or not at all."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    Image.fromarray(pixels).save(temporary, "PNG")
    temporary.replace(path)
