"""dalle2 data check FOLDER: what is in a folder of images, what is wrong with it, and how it looks."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

SHEET = 48


def run(options: argparse.Namespace) -> int:
    """Prints the report and writes the contact sheet; 0 also where there are problems, since training leaves them out.

    Raises:
        InputError: where nothing is left to train on.
    """
    from dalle2_jax.cli.output import write_image
    from dalle2_jax.data.sources.folder import FolderRecords, read_folder
    from dalle2_jax.images.read import read_image
    from dalle2_jax.images.resize import resize
    from dalle2_jax.images.sheet import caption_grid

    folder = read_folder(options.folder)
    print(report(folder))
    sheet = Path(options.out or f"{folder.root.resolve().name}_sheet.png")
    step = max(1, len(folder.images) // SHEET)
    chosen = folder.images[::step][:SHEET]
    records = FolderRecords(folder.root, chosen).__getitems__(range(len(chosen)))
    images = [resize(read_image(record["image"])[None], 96)[0] for record in records]
    write_image(sheet, caption_grid([images], [image.captions[0] for image in chosen]), {}, True)
    print(f"wrote {sheet}: {len(chosen)} of the images, as training sees them")
    return 0


def report(folder: Any) -> str:
    """Counts, sizes, modes, caption lengths and every problem by name, as lines to read."""
    from dalle2_jax.data.sources.folder import SPLITS

    images = folder.images
    splits = Counter(image.split for image in images)
    sides = sorted(min(image.width, image.height) for image in images)
    shapes = Counter(_shape(image.width / image.height) for image in images)
    modes = Counter(image.mode for image in images)
    captions = [caption for image in images for caption in image.captions]
    words = sorted(len(caption.split()) for caption in captions)
    repeated = len(captions) - len(set(captions))
    lines = [
        f"{folder.root}: {len(images)} captioned images, " + ", ".join(f"{splits[split]} {split}" for split in SPLITS),
        "; ".join(
            [
                f"  shorter side    {sides[0]} to {sides[-1]} pixels, half of them {sides[len(sides) // 2]} or less",
                *(f"{sum(side < size for side in sides)} below {size}" for size in (64, 128, 256) if sides[0] < size),
            ]
        ),
        f"  shapes          {', '.join(f'{count} {name}' for name, count in shapes.most_common())}",
        f"  modes           {', '.join(f'{count} {mode}' for mode, count in modes.most_common())}",
        f"  captions        {len(captions)}, of {words[0]} to {words[-1]} words, half of them {words[len(words) // 2]} "
        f"or less; the longest has {max(map(len, captions))} characters; {repeated} said more than once",
    ]
    kinds = folder.problems_by_kind()
    lines.append(f"{len(folder.problems)} problems" + (", all left out of training:" if kinds else ""))
    for kind, found in kinds.items():
        lines.append(f"  {len(found)} {kind}")
        lines.extend(f"    {problem}" for problem in found)
    return "\n".join(lines)


def _shape(ratio: float) -> str:
    if 0.99 < ratio < 1.01:
        return "square"
    return "wide" if ratio > 1 else "tall"
