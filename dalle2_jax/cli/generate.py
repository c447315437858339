"""dalle2 generate RUN PROMPT ...: images of captions, one file each or as a sheet."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dalle2_jax.cli.output import add_output_arguments, plan, sample_to_files
from dalle2_jax.cli.sampling_options import read_sampling
from dalle2_jax.errors import InputError

HELP = "images of captions"
USES_JAX = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("run", help="a run's folder, such as runs/demo")
    parser.add_argument("prompt", nargs="*", help="captions, each in quotes")
    parser.add_argument("--prompts", metavar="FILE", help="a text file with a caption a line (UTF-8); - is the input")
    parser.add_argument("--strict", action="store_true", help="refuse a prompt that is too long, rather than cut it")
    add_output_arguments(parser, of="caption")


def run(options: argparse.Namespace) -> int:
    """Samples the captions."""
    from dalle2_jax.unclip import DALLE2

    prompts = [*options.prompt, *(read_prompts(options.prompts) if options.prompts else ())]
    if not prompts:
        raise InputError("there is nothing to sample; give captions in quotes, or a file of them by --prompts")
    places, seeds, out = plan(options, prompts, "prompt")
    changes = read_sampling(options)
    model = DALLE2.load(options.run, dtype=options.dtype)
    model.tokenizer.encode(prompts, strict=options.strict)

    def sample_batch(keys, rows):
        return model.generate(
            keys,
            [prompts[places[row]] for row in rows],
            **changes,
            tile=options.tile,
            batch_size=len(rows),
            strict=options.strict,
            warn=False,
            return_stages=True,
        )

    return sample_to_files(options, out, seeds, sample_batch)


def read_prompts(name: str, option: str = "--prompts", what: str = "caption") -> list[str]:
    """The captions of a text file, one a line; empty lines and those that start with # are left out.

    Raises:
        InputError: if there is no such file, it is not UTF-8, or no caption is in it.
    """
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        lines = data.decode("utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(f"{option} {name} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"{option} {name} is not UTF-8 in line {line}; save it as UTF-8") from error
    prompts = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not prompts:
        raise InputError(f"{option} {name} holds no {what}; write one a line")
    return prompts
