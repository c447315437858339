"""dalle2 data export NAME SPLIT FOLDER: images and captions of a data set as a folder, to look at and to change."""

from __future__ import annotations

import argparse
from pathlib import Path

from dalle2_jax.files import check_new_folder, folder_written_whole

CHUNK = 256


def run(options: argparse.Namespace) -> int:
    """Writes `NAME.png` and `NAME.txt` of every chosen example; the folder appears when it is whole.

    Raises:
        InputError: for a data set or split that does not exist, or a folder that does.
    """
    import numpy as np

    from dalle2_jax.cli.output import slug
    from dalle2_jax.data.dataset import Data, open_source
    from dalle2_jax.images.files import save_png

    folder = Path(options.folder)
    name, _, config = options.name.partition("/")
    check_new_folder(folder)
    source = open_source(Data(name=name, config=config or None, cache=False), options.split)
    count = min(options.count or len(source), len(source))
    chosen = np.linspace(0, len(source), count, endpoint=False).astype(int)
    with folder_written_whole(folder) as whole:
        for start in range(0, count, CHUNK):
            images, captions = source.examples(chosen[start : start + CHUNK])
            for number, (image, said) in enumerate(zip(images, captions, strict=True), start):
                base = f"{number:0{len(str(count - 1))}d}_{slug(said[0])}"
                save_png(whole / f"{base}.png", image)
                (whole / f"{base}.txt").write_text("\n".join(said) + "\n", encoding="utf-8")
    print(f"wrote {count} images with captions to {folder}")
    return 0
