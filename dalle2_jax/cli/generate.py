"""dalle2 generate RUN PROMPT ...: pictures of captions, one file each or as a sheet."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dalle2_jax._version import __version__
from dalle2_jax.cli.sampling import add_sampling_arguments, read_sampling

HELP = "pictures of captions"
DRAWS = True
INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("run", help="a run's folder, such as runs/demo")
    parser.add_argument("prompt", nargs="*", help="captions, each in quotes")
    parser.add_argument("--prompts", metavar="FILE", help="a text file with a caption a line (UTF-8); - is the input")
    parser.add_argument("--count", type=int, default=1, help="pictures a caption (default 1)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of a caption's first picture; each next one has the seed after it"
    )
    parser.add_argument("--out", default=None, help="a PNG (one picture, or a sheet) or a folder (default: samples/)")
    parser.add_argument("--grid", action="store_true", help="one sheet of all pictures with their captions")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures drawn at a time (default 16)")
    parser.add_argument("--tile", type=int, default=None, metavar="N", help="enlarge in tiles of N pixels: less memory")
    parser.add_argument("--strict", action="store_true", help="refuse a prompt that is too long, rather than cut it")
    parser.add_argument("--stages", action="store_true", help="write each stage's picture too")
    add_sampling_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Draws batch by batch; what is drawn is written at once, and stays when the rest is interrupted."""
    import jax

    from dalle2_jax.unclip import DALLE2

    prompts = [*options.prompt, *(read_prompts(options.prompts) if options.prompts else ())]
    if not prompts:
        raise ValueError("there is nothing to draw; give captions in quotes, or a file of them by --prompts")
    if options.seed + options.count > 2**32:
        raise ValueError(f"--seed {options.seed} with --count {options.count} goes beyond the last seed, {2**32 - 1}")
    captions = [prompt for prompt in prompts for _ in range(options.count)]
    seeds = [options.seed + number for _ in prompts for number in range(options.count)]
    out = _Output(options, captions, seeds)
    changes = read_sampling(options)
    model = DALLE2.load(options.run)
    model.tokenizer.encode(captions, strict=options.strict)
    progress, done = _Progress(len(captions), quiet=len(captions) <= options.batch_size), 0
    try:
        for start in range(0, len(captions), options.batch_size):
            part = slice(start, min(start + options.batch_size, len(captions)))
            # The last few are filled up to a whole batch, so that one compiled program serves all.
            rows = [start + number % (part.stop - start) for number in range(min(options.batch_size, len(captions)))]
            generated = model.generate(
                jax.numpy.stack([jax.random.key(seeds[row]) for row in rows]),
                [captions[row] for row in rows],
                **changes,
                tile=options.tile,
                batch_size=len(rows),
                strict=options.strict,
                warn=False,
                return_stages=True,
            )
            out.write(part, generated)
            done = part.stop
            progress.show(done)
    except KeyboardInterrupt:
        out.close(done)
        print(f"\ndalle2: stopped; {done} of {len(captions)} pictures are drawn", file=sys.stderr)
        return INTERRUPTED
    out.close(done)
    return 0


def read_prompts(name: str) -> list[str]:
    """The captions of a text file, one a line; empty lines and those that start with # are left out.

    Raises:
        ValueError: if there is no such file, it is not UTF-8, or no caption is in it.
    """
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        lines = data.decode("utf-8-sig").splitlines()
    except OSError as error:
        raise ValueError(f"--prompts {name} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"--prompts {name} is not UTF-8 in line {line}; save it as UTF-8") from error
    prompts = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not prompts:
        raise ValueError(f"--prompts {name} holds no caption; write one a line")
    return prompts


class _Output:
    """Where pictures go: files of a folder, one file, or a sheet that is written in the end."""

    def __init__(self, options: argparse.Namespace, captions: Sequence[str], seeds: Sequence[int]):
        self.captions, self.seeds, self.stages, self.grid = captions, seeds, options.stages, options.grid
        self.shown: list[Any] = []
        self.columns = options.count if options.count > 1 else 8
        out = Path(options.out or ("samples.png" if options.grid else "samples"))
        single = out.suffix.lower() == ".png"
        if options.grid and not single:
            raise ValueError(f"--grid draws one sheet, and --out {out} is no PNG; name one, such as sheet.png")
        if single and not options.grid and len(captions) > 1:
            raise ValueError(
                f"--out {out} is one file but {len(captions)} pictures are to be drawn; name a folder, or add --grid"
            )
        if out.exists() and (out.is_dir() if single else not out.is_dir()):
            raise ValueError(f"--out {out} is {'a folder' if single else 'a file'}; give another name")
        self.path = out
        self.paths = [out]
        if not single:
            numbers = [index // options.count for index in range(len(captions))]
            self.paths = [
                out / f"{number:03d}_{slug(caption)}_{seed}.png"
                for number, caption, seed in zip(numbers, captions, seeds, strict=True)
            ]

    def write(self, part: slice, generated: Any) -> None:
        from dalle2_jax.evaluation.grid import save_png

        if self.grid:
            self.shown.extend(generated.pictures[: part.stop - part.start])
            return
        for row, path in enumerate(self.paths[part]):
            facts = {"prompt": self.captions[part][row], "seed": str(self.seeds[part][row])}
            facts["software"] = f"dalle2_jax {__version__}"
            save_png(path, generated.pictures[row], facts)
            if self.stages and generated.upsampled:
                save_png(path.with_name(f"{path.stem}_decoder.png"), generated.decoded[row], facts)
                for number, pictures in enumerate(generated.upsampled[:-1]):
                    save_png(path.with_name(f"{path.stem}_upsampler{number}.png"), pictures[row], facts)
            print(path, flush=True)

    def close(self, done: int) -> None:
        from dalle2_jax.evaluation.grid import caption_grid, save_png

        if not self.grid or not done:
            return
        sheet = caption_grid([self.shown[:done]], list(self.captions[:done]), columns=min(self.columns, 12))
        facts = {"prompts": "\n".join(dict.fromkeys(self.captions[:done])), "seed": str(self.seeds[0])}
        save_png(self.path, sheet, {**facts, "software": f"dalle2_jax {__version__}"})
        print(self.path, flush=True)


class _Progress:
    """A line to the terminal after each batch: how many, how fast, how long."""

    def __init__(self, total: int, quiet: bool):
        self.total, self.quiet, self.start, self.first = total, quiet, time.monotonic(), 0

    def show(self, done: int) -> None:
        if self.quiet:
            return
        now = time.monotonic()
        if not self.first:  # its time was mostly compiling
            self.first, self.start = done, now
            print(f"{done}/{self.total} pictures", file=sys.stderr, flush=True)
            return
        rate = (done - self.first) / (now - self.start)
        left = (self.total - done) / rate
        line = f"{done}/{self.total} pictures | {rate:.2f} pictures/s | {int(left // 60)}:{int(left % 60):02d} left"
        print(line, file=sys.stderr, flush=True)


def slug(caption: str) -> str:
    """A caption as part of a file's name."""
    return "".join(c if c.isalnum() else "_" for c in caption)[:40].strip("_") or "picture"
