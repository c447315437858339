"""A sheet of images with captions under them, for people to look at."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from dalle2_jax.errors import InputError

_MARGIN, _LINE = 6, 12
_SMALLEST_CELL = 96
_SIZE = 10
_WIDER_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "arial.ttf")


def caption_grid(
    images: np.ndarray | Sequence[Sequence[np.ndarray]],
    captions: Sequence[str],
    *,
    columns: int = 8,
    cell: int | None = None,
    labels: Sequence[str] = (),
) -> Any:
    """Draws a sheet; returns a PIL image.

    images: uint8 `[n, h, w, 3]`, or several such arrays (of any sizes), whose images of one caption stand above
    each other in that order. captions: n of them. columns: captions side by side. cell: the side that every image is
    brought to without smoothing; None: the largest image's, and at least 96. labels: a name for each array, written
    at the left.

    Raises:
        InputError: if there is no caption, or not an image for each.
    """
    from PIL import Image, ImageDraw

    groups = [images] if isinstance(images, np.ndarray) else list(images)
    count = len(captions)
    if not count or any(len(group) != count for group in groups):
        raise InputError(f"a sheet needs one image a caption: {[len(group) for group in groups]} for {count} captions")
    if cell is None:
        cell = max(_SMALLEST_CELL, *(side for group in groups for image in group for side in image.shape[:2]))
    columns = min(columns, count)
    rows = -(-count // columns)
    fonts = _fonts()
    font, chosen = fonts[0], [min(fonts, key=lambda font: _missing(font, caption)) for caption in captions]
    lines = [_wrapped(caption, font, cell) for caption, font in zip(captions, chosen, strict=True)]
    text_height = _LINE * max(len(line) for line in lines) + 2
    left = _MARGIN + (max((int(font.getlength(label)) for label in labels), default=-_MARGIN) + _MARGIN)
    block = len(groups) * (cell + 2) + text_height + _MARGIN
    sheet = Image.new("RGB", (left + columns * (cell + _MARGIN), _MARGIN + rows * block), "white")
    draw = ImageDraw.Draw(sheet)
    for index in range(count):
        row, column = divmod(index, columns)
        x, y = left + column * (cell + _MARGIN), _MARGIN + row * block
        for number, group in enumerate(groups):
            top = y + number * (cell + 2)
            image = Image.fromarray(np.asarray(group[index])).resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(image, (x, top))
            draw.rectangle((x - 1, top - 1, x + cell, top + cell), outline="#bbb")
            if labels and column == 0:
                draw.text((_MARGIN, top + cell // 2 - 6), labels[number], fill="black", font=font)
        for number, line in enumerate(lines[index]):
            draw.text((x, y + len(groups) * (cell + 2) + number * _LINE), line, fill="black", font=chosen[index])
    return sheet


def _fonts() -> list[Any]:
    """Pillow's own font, which has Latin letters alone, and what this machine has of the fonts with more."""
    from PIL import ImageFont

    fonts = [ImageFont.load_default(_SIZE)]
    for name in _WIDER_FONTS:
        with contextlib.suppress(OSError):
            fonts.append(ImageFont.truetype(name, _SIZE))
    return fonts


def _missing(font: Any, text: str) -> int:
    """How many characters of a text the font has no glyph for: those drawn as it draws what is no character."""
    none = bytes(font.getmask(chr(0x10FFFF)))
    return sum(bytes(font.getmask(character)) == none for character in set(text) if not character.isspace())


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """Lines of at most `width` pixels, broken after spaces, hyphens and underscores, and within a longer word."""
    lines, line = [], ""
    for piece in re.findall(r"[^ _-]*[ _-]+|[^ _-]+", " ".join(text.split())):
        if line and font.getlength((line + piece).rstrip()) > width:
            lines.append(line.rstrip())
            line = ""
        line += piece
        while len(line) > 1 and font.getlength(line.rstrip()) > width:
            fitting = max(1, sum(font.getlength(line[: end + 1]) <= width for end in range(len(line))))
            lines.append(line[:fitting])
            line = line[fitting:]
    return [*lines, line.rstrip()] if line.strip() else lines
