"""dalle2 generate RUN [PROMPT ...]: images, of captions where the run reads them, one file each or as a sheet."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dalle2_jax.cli.output import INTERRUPTED, Output, Progress, add_output_arguments, plan, sample_to_files
from dalle2_jax.cli.sampling_options import add_prior_argument, read_sampling
from dalle2_jax.errors import InputError
from dalle2_jax.files import read_bytes

HELP = "images, of captions where the run reads them"
USES_JAX = True
MOST_PROMPTS = 2**26  # bytes of a file of captions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("run", help="a run's folder, such as runs/demo, or a stage of one, such as runs/lineage/vae")
    parser.add_argument("prompt", nargs="*", help="captions, each in quotes; none where the run reads none")
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
    """Samples the captions, or without any as many images as `--count` says."""
    from dalle2_jax.systems import SequenceModel, load
    from dalle2_jax.unclip import DALLE2

    prompts = [*options.prompt, *(read_prompts(options.prompts) if options.prompts else ())]
    candidates = _candidates(options)
    if candidates is not None:
        options.count = options.keep
    changes = read_sampling(options)
    places, seeds, out = plan(options, prompts or [""], "prompt")
    model = load(options.run, dtype=options.dtype, prior=options.prior)
    if isinstance(model, SequenceModel):
        for prompt, written in zip(prompts, model.generate(None, prompts or None), strict=True):
            print(f"{prompt} -> {written}")
        return 0
    is_cascade = isinstance(model, DALLE2)
    if prompts and not model.reads_captions:
        raise InputError(f"{options.run} reads no captions; leave them out, and say by --count how many images")
    if not prompts and model.reads_captions:
        raise InputError("there is nothing to sample; give captions in quotes, or a file of them by --prompts")
    if prompts:  # one warning for all of them
        (model.tokenizer.encode if is_cascade else model.encode)(prompts, strict=options.strict)
    if is_cascade:
        settings = {**changes, "tile": options.tile, "strict": options.strict}
    else:
        settings = stage_settings(options, model)

    def sample(keys, captions):
        batch = {"batch_size": min(len(keys), options.batch_size)}
        if is_cascade:
            return model.generate(keys, captions, **settings, **batch, warn=False, return_stages=True)
        return Images(model.generate(keys, captions, None if captions else len(keys), **settings, **batch, warn=False))

    if candidates is not None:
        if not prompts:
            raise InputError("--candidates keeps the images that CLIP finds nearest to a caption, and there is none")
        model.require("clip")
        return best_to_files(options, out, prompts, candidates, model, sample)

    def sample_rows(keys, rows):
        return sample(keys, [prompts[places[row]] for row in rows] if prompts else None)

    return sample_to_files(options, out, seeds, sample_rows)


@dataclass(frozen=True)
class Images:
    """Images of a system of one stage, uint8 `[b, h, w, 3]`, as files are written of a cascade's."""

    images: Any
    upsampled: tuple[Any, ...] = ()

    def rows(self, rows: Sequence[int]) -> Images:
        """Some of the images, in that order."""
        return Images(self.images[list(rows)])


def stage_settings(options: argparse.Namespace, model: Any) -> dict[str, Any]:
    """What the `generate` of a system of one stage takes of the options: its sampling settings.

    Raises:
        InputError: for options that only a cascade has.
    """
    for option, value in (("--tile", options.tile), ("--stages", options.stages), ("--prior", options.prior)):
        if value:
            raise InputError(f"{option} is of DALL-E 2's stages, and {options.run} has one stage; leave it out")
    changes = read_sampling(options, default="decoder")
    own = changes.pop("decoder")
    for stage, fields in changes.items():
        if fields:
            raise InputError(f"{options.run} has no {stage} whose {', '.join(fields)} could be changed")
    model.check_sampling(**own)
    return {**own, "strict": options.strict}


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
        data = sys.stdin.buffer.read(MOST_PROMPTS + 1) if name == "-" else read_bytes(name, MOST_PROMPTS)
        lines = data.decode("utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(f"{option} {name} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"{option} {name} is not UTF-8 in line {line}; save it as UTF-8") from error
    if len(data) > MOST_PROMPTS:
        raise InputError(f"{option} {name} has more than {MOST_PROMPTS >> 20} MiB; give it in parts")
    prompts = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not prompts:
        raise InputError(f"{option} {name} holds no {what}; write one a line")
    return prompts
