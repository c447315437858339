"""What sampling commands share: batch by batch to files or a sheet, with progress; what is done stays."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dalle2_jax._version import __version__
from dalle2_jax.cli.sampling_options import add_sampling_arguments
from dalle2_jax.errors import InputError
from dalle2_jax.files import numbered, written_whole

INTERRUPTED = 130


def add_output_arguments(parser: argparse.ArgumentParser, of: str) -> None:
    """The options; of: what an image is made of."""
    parser.add_argument("--count", type=int, default=1, help=f"images a {of} (default 1)")
    parser.add_argument(
        "--seed", type=int, default=0, help=f"of a {of}'s first image; each next one has the seed after it"
    )
    parser.add_argument("--out", default=None, help="a PNG (one image, or a sheet) or a folder (default: samples/)")
    parser.add_argument("--grid", action="store_true", help=f"one sheet of all images, each with its {of}")
    parser.add_argument("--batch-size", type=int, default=16, help="images sampled at a time (default 16)")
    parser.add_argument("--tile", type=int, default=None, metavar="N", help="upsample in tiles of N pixels")
    parser.add_argument("--stages", action="store_true", help="write each stage's image too")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of weights and arithmetic (default: as the run says)"
    )
    add_sampling_arguments(parser)


def plan(options: argparse.Namespace, things: Sequence[str], fact: str) -> tuple[list[int], list[int], Output]:
    """For `--count` images of each thing: which thing and which seed each has, and where they go.

    Raises:
        InputError: for seeds beyond the last one, or an `--out` that does not fit.
    """
    if options.seed + options.count > 2**32:
        raise InputError(f"--seed {options.seed} with --count {options.count} goes beyond the last seed, {2**32 - 1}")
    places = [place for place in range(len(things)) for _ in range(options.count)]
    seeds = [options.seed + number for _ in things for number in range(options.count)]
    return places, seeds, Output(options, [things[place] for place in places], seeds, fact)


def sample_to_files(
    options: argparse.Namespace, out: Output, seeds: Sequence[int], sample_batch: Callable[[Any, list[int]], Any]
) -> int:
    """Samples batch by batch; what is sampled is written at once, and stays when the rest is interrupted.

    sample_batch: from keys `[b]` and the images' numbers to what `DALLE2.generate` returns with its stages. Returns the
    exit code.
    """
    import jax

    total = len(seeds)
    progress, done = Progress(total, quiet=total <= options.batch_size), 0
    try:
        for start in range(0, total, options.batch_size):
            part = slice(start, min(start + options.batch_size, total))
            # The last few are filled up to a whole batch, so that one compiled program serves all.
            rows = [start + number % (part.stop - start) for number in range(min(options.batch_size, total))]
            keys = jax.numpy.stack([jax.random.key(seeds[row]) for row in rows])
            out.write(part, sample_batch(keys, rows))
            done = part.stop
            progress.show(done)
    except KeyboardInterrupt:
        out.close(done)
        print(f"\ndalle2: stopped; {done} of {total} images are sampled", file=sys.stderr)
        return INTERRUPTED
    out.close(done)
    return 0


class Output:
    """Where images go: files of a folder, one file, or a sheet that is written in the end."""

    def __init__(self, options: argparse.Namespace, captions: Sequence[str], seeds: Sequence[int], fact: str):
        """captions: what each image is of, in sheets and files' names. fact: how a PNG's text calls that.

        `given`, once set, has an image for each thing of which there are `--count`: a sheet shows it before them.
        """
        self.captions, self.seeds, self.stages, self.grid = captions, list(seeds), options.stages, options.grid
        self.fact = fact
        self.shown: list[Any] = []
        self.given: Sequence[Any] = ()
        self.path = checked_out(options, len(captions))
        self.count = options.count

    def path_of(self, index: int) -> Path:
        """The file of one image."""
        if self.path.suffix.lower() == ".png":
            return self.path
        return self.path / f"{index // self.count:03d}_{slug(self.captions[index])}_{self.seeds[index]}.png"

    def write(self, part: slice, generated: Any) -> None:
        if self.grid:
            self.shown.extend(generated.images[: part.stop - part.start])
            return
        for row, path in enumerate(map(self.path_of, range(part.start, part.stop))):
            facts = {self.fact: self.captions[part][row], "seed": str(self.seeds[part][row])}
            facts["software"] = f"dalle2_jax {__version__}"
            path = write_image(path, generated.images[row], facts, path == self.path)
            if self.stages and generated.upsampled:
                parts = {"decoder": generated.decoded}
                parts |= {f"upsampler{number}": images for number, images in enumerate(generated.upsampled[:-1])}
                for name, images in parts.items():
                    write_image(path.with_name(f"{path.stem}_{name}.png"), images[row], facts)
            print(path, flush=True)

    def close(self, done: int) -> None:
        from dalle2_jax.images.sheet import caption_grid

        if not self.grid or not done:
            return
        images, captions = [], []
        for start in range(0, done, self.count):
            part = slice(start, min(start + self.count, done))
            given = self.given[start // self.count : start // self.count + 1]
            images += [*given, *self.shown[part]]
            captions += [*("given" for _ in given), *self.captions[part]]
        columns = self.count + bool(len(self.given)) if self.count > 1 else 8
        sheet = caption_grid([images], captions, columns=min(columns, 12))
        facts = {f"{self.fact}s": "\n".join(dict.fromkeys(self.captions[:done])), "seed": str(self.seeds[0])}
        print(write_image(self.path, sheet, {**facts, "software": f"dalle2_jax {__version__}"}, True), flush=True)


def checked_out(options: argparse.Namespace, count: int) -> Path:
    """Where `count` images go by `--out` and `--grid`: a PNG or a folder; InputError for what does not fit."""
    out = Path(options.out or ("samples.png" if options.grid else "samples"))
    single = out.suffix.lower() == ".png"
    if options.grid and not single:
        raise InputError(f"--grid makes one sheet, and --out {out} is no PNG; name one, such as sheet.png")
    if single and not options.grid and count > 1:
        raise InputError(f"--out {out} is one file but {count} images are to be sampled; name a folder, or add --grid")
    if out.exists() and (out.is_dir() if single else not out.is_dir()):
        raise InputError(f"--out {out} is {'a folder' if single else 'a file'}; give another name")
    return out


def write_image(path: Path, pixels: Any, facts: dict[str, str], is_named: bool = False) -> Path:
    """Writes a PNG, and returns where.

    Another image that is there already is replaced where the user has named the file, and this is said; else it stays,
    and the name gets a number: the same prompt and seed under other settings give another image.
    """
    from dalle2_jax.images.files import encode_png

    content = encode_png(pixels, facts)

    def holds_it(place: Path) -> bool:
        return place.is_file() and place.stat().st_size == len(content) and place.read_bytes() == content

    if not is_named:
        path = next(place for place in numbered(path) if not os.path.lexists(place) or holds_it(place))
    if holds_it(path):
        return path
    if os.path.lexists(path):
        print(f"dalle2: {path} was there, and is replaced", file=sys.stderr, flush=True)
    with written_whole(path) as file:
        file.write(content)
    return path


class Progress:
    """A line to the terminal after each batch: how many, how fast, how long."""

    def __init__(self, total: int, quiet: bool):
        self.total, self.quiet, self.start, self.first = total, quiet, time.monotonic(), 0

    def show(self, done: int) -> None:
        if self.quiet:
            return
        now = time.monotonic()
        if not self.first:  # its time was mostly compiling
            self.first, self.start = done, now
            print(f"{done}/{self.total} images", file=sys.stderr, flush=True)
            return
        rate = (done - self.first) / (now - self.start)
        left = (self.total - done) / rate
        line = f"{done}/{self.total} images | {rate:.2f} images/s | {int(left // 60)}:{int(left % 60):02d} left"
        print(line, file=sys.stderr, flush=True)


def slug(caption: str) -> str:
    """A caption as part of a file's name."""
    return "".join(c if c.isalnum() else "_" for c in caption)[:40].strip("_") or "image"
