"""A sheet of pictures with captions under them, for people to look at."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np

_MARGIN, _LINE = 6, 12


def caption_grid(
    pictures: np.ndarray | Sequence[Sequence[np.ndarray]],
    captions: Sequence[str],
    *,
    columns: int = 8,
    cell: int = 96,
    labels: Sequence[str] = (),
):
    """Draws a sheet; returns a PIL image.

    pictures: uint8 `[n, h, w, 3]`, or several such arrays (of any sizes), whose pictures of one caption stand above each
    other in that order. captions: n of them. labels: a name for each array, written at the left.
    """
    from PIL import Image, ImageDraw, ImageFont

    groups = [pictures] if isinstance(pictures, np.ndarray) else list(pictures)
    count = len(captions)
    if any(len(group) != count for group in groups):
        raise ValueError(
            f"a sheet needs one picture a caption: {[len(group) for group in groups]} for {count} captions"
        )
    columns = min(columns, count)
    rows = -(-count // columns)
    font = ImageFont.load_default(10)
    lines = [textwrap.wrap(caption, max(8, cell // 5)) for caption in captions]
    text_height = _LINE * max(len(line) for line in lines) + 2
    left = _MARGIN + (max((int(font.getlength(label)) for label in labels), default=-_MARGIN) + _MARGIN)
    block = len(groups) * (cell + 2) + text_height + _MARGIN
    sheet = Image.new("RGB", (left + columns * (cell + _MARGIN), _MARGIN + rows * block), "white")
    draw = ImageDraw.Draw(sheet)
    for index in range(count):
        row, column = divmod(index, columns)
        x, y = left + column * (cell + _MARGIN), _MARGIN + row * block
        for number, group in enumerate(groups):
            picture = Image.fromarray(np.asarray(group[index])).resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(picture, (x, y + number * (cell + 2)))
            draw.rectangle(
                (x - 1, y + number * (cell + 2) - 1, x + cell, y + number * (cell + 2) + cell), outline="#bbb"
            )
            if labels and column == 0:
                draw.text((_MARGIN, y + number * (cell + 2) + cell // 2 - 6), labels[number], fill="black", font=font)
        for number, line in enumerate(lines[index]):
            draw.text((x, y + len(groups) * (cell + 2) + number * _LINE), line, fill="black", font=font)
    return sheet
