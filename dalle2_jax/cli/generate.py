"""dalle2 generate RUN PROMPT ...: images of captions, one file each or as a sheet."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from dalle2_jax.cli.output import INTERRUPTED, Output, Progress, add_output_arguments, plan, sample_to_files
from dalle2_jax.cli.sampling_options import add_prior_argument, read_sampling
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
    add_prior_argument(parser)
    parser.add_argument(
        "--keep",
        type=int,
        metavar="K",
        help="with --candidates N: the K of N images that CLIP finds nearest (default 1)",
    )


def run(options: argparse.Namespace) -> int:
    """Samples the captions."""
    from dalle2_jax.unclip import DALLE2

    prompts = [*options.prompt, *(read_prompts(options.prompts) if options.prompts else ())]
    if not prompts:
        raise InputError("there is nothing to sample; give captions in quotes, or a file of them by --prompts")
    candidates = _candidates(options)
    if candidates is not None:
        options.count = options.keep
    places, seeds, out = plan(options, prompts, "prompt")
    changes = read_sampling(options)
    model = DALLE2.load(options.run, dtype=options.dtype, prior=options.prior)
    model.tokenizer.encode(prompts, strict=options.strict)

    def sample(keys, captions):
        return model.generate(
            keys,
            captions,
            **changes,
            tile=options.tile,
            batch_size=min(len(captions), options.batch_size),
            strict=options.strict,
            warn=False,
            return_stages=True,
        )

    if candidates is not None:
        model.require("clip")
        return best_to_files(options, out, prompts, candidates, model, sample)
    return sample_to_files(options, out, seeds, lambda keys, rows: sample(keys, [prompts[places[row]] for row in rows]))


def _candidates(options: argparse.Namespace) -> int | None:
    """How many images are sampled of a caption to keep the best of; None: --candidates says nothing of images.

    A number without a stage is of images here, `prior=N` of embeddings.
    """
    from dalle2_jax.unclip.rerank import check_candidates

    numbers = [text for text in options.candidates if "=" not in text]
    if not numbers:
        if options.keep is not None:
            raise InputError(f"--keep {options.keep} goes with --candidates N, of which so many are kept")
        return None
    if options.count != 1:
        raise InputError(f"--count {options.count} does not go with --candidates; say with --keep how many are kept")
    options.candidates = [text for text in options.candidates if "=" in text]
    options.keep = 1 if options.keep is None else options.keep
    try:
        candidates = int(numbers[-1])
    except ValueError:
        raise InputError(f"--candidates takes a number, not {numbers[-1]!r}") from None
    check_candidates(candidates, options.keep)
    if options.seed + candidates > 2**32:
        raise InputError(f"--seed {options.seed} with --candidates {candidates} goes beyond the last seed, {2**32 - 1}")
    return candidates


def best_to_files(
    options: argparse.Namespace, out: Output, prompts: list[str], candidates: int, model: Any, sample: Any
) -> int:
    """Samples the candidates of a prompt, seed after seed, and writes those that are kept, prompt after prompt.

    A kept image's seed samples it again without candidates.
    """
    import jax

    from dalle2_jax.unclip.rerank import nearest_images

    progress = Progress(len(prompts) * candidates, quiet=candidates * len(prompts) <= options.batch_size)
    seeds = range(options.seed, options.seed + candidates)
    keys = jax.numpy.stack([jax.random.key(seed) for seed in seeds])
    for number, prompt in enumerate(prompts):
        first = number * options.keep
        try:
            generated = sample(keys, [prompt] * candidates)
        except KeyboardInterrupt:
            out.close(first)
            print(f"\ndalle2: stopped; {number} of {len(prompts)} prompts are sampled", file=sys.stderr)
            return INTERRUPTED
        best, scores = nearest_images(model, generated.images, prompt, options.keep)
        part = slice(first, first + options.keep)
        out.seeds[part] = [seeds[row] for row in best]
        out.write(part, generated.rows(best))
        print(
            f"CLIP: {', '.join(f'{score:.3f}' for score in scores[best])}, of all {scores.mean():.3f}", file=sys.stderr
        )
        progress.show((number + 1) * candidates)
    out.close(len(prompts) * options.keep)
    return 0


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
