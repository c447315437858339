"""dalle2 convert SOURCE SRC RUN: public weights as a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dalle2_jax.errors import InputError
from dalle2_jax.files import check_new_folder

HELP = "public weights as a run that generate, vary and training read"
USES_JAX = False
# {source: (what is converted, its licence)}
SOURCES = {
    "karlo": (
        "Karlo v1: diffusers' folder of either pipeline, or Kakao Brain's own files (with --clip)",
        "CreativeML Open RAIL-M (Karlo, Kakao Brain); CLIP: MIT (OpenAI)",
    ),
    "clip": ("CLIP in the layout of transformers", "MIT (OpenAI's CLIP; see the model's card for others)"),
    "open_clip": ("CLIP in the layout of open_clip", "MIT (LAION's CLIPs; see the model's card for others)"),
    "kandinsky": ("the prior of Kandinsky 2.1 or 2.2, with its CLIP", "Apache-2.0 (Kandinsky); CLIP: MIT"),
    "glide": ("GLIDE's released base and upsampler, or their inpainting twins", "MIT (OpenAI)"),
    "openai_dvae": ("the discrete VAE of DALL-E: a folder with encoder.pkl and decoder.pkl", "Modified MIT (OpenAI)"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    sources = "; ".join(f"{name}: {what}" for name, (what, _) in SOURCES.items())
    parser.add_argument("source", choices=SOURCES, help=sources)
    parser.add_argument("src", help="a folder, or a repository of Hugging Face such as kakaobrain/karlo-v1-alpha")
    parser.add_argument("run", help="the run to make")
    parser.add_argument(
        "--clip",
        metavar="SRC",
        help="karlo: a whole CLIP in the layout of transformers (openai/clip-vit-large-patch14) in place of the half "
        "that the folder has; with it a run samples from captions, varies images and can be trained further",
    )
    parser.add_argument(
        "--vocabulary",
        metavar="PATH",
        help="open_clip, glide: where the vocabulary is, if not in SRC; a folder, or bpe_simple_vocab_16e6.txt.gz",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (default float32)"
    )


def run(options: argparse.Namespace) -> int:
    """Converts and writes the run."""
    from dalle2_jax.weights.conversion import settings_of
    from dalle2_jax.weights.run import write_run

    check_new_folder(Path(options.run))
    for option, takers in (("clip", ("karlo",)), ("vocabulary", ("open_clip", "glide"))):
        if getattr(options, option) is not None and options.source not in takers:
            raise InputError(f"--{option} goes with {' and '.join(takers)}, not with {options.source}")
    source = {"name": options.source, "from": options.src, "licence": SOURCES[options.source][1]}
    with settings_of(options.src):
        conversions = _conversions(options)
    write_run(options.run, conversions, source, dtype=options.dtype)
    return 0


def _conversions(options: argparse.Namespace) -> list[Any]:
    from dalle2_jax.weights.hub import local_folder
    from dalle2_jax.weights.sources import clip, glide, kandinsky, karlo, karlo_original, open_clip, openai_dvae
    from dalle2_jax.weights.tensors import WeightsError

    folder = local_folder(options.src)
    vocabulary = None if options.vocabulary is None else Path(options.vocabulary)
    if options.source == "clip":
        return clip.conversions(folder)
    if options.source == "open_clip":
        return open_clip.conversions(folder, vocabulary)
    if options.source == "kandinsky":
        return kandinsky.conversions(folder)
    if options.source == "glide":
        return glide.conversions(folder, vocabulary)
    if options.source == "openai_dvae":
        return openai_dvae.conversions(folder)
    whole = None
    if options.clip is not None:
        (whole,) = clip.conversions(local_folder(options.clip), unit_norm=False)
    if (folder / "model_index.json").is_file():
        return karlo.conversions(folder, whole)
    if karlo_original.is_there(folder):
        if whole is None:
            raise WeightsError(
                f"{folder} holds Karlo's original files, which come without CLIP; add --clip "
                "openai/clip-vit-large-patch14, or a folder of it"
            )
        return karlo_original.conversions(folder, whole)
    raise WeightsError(f"{folder} holds neither diffusers' model_index.json nor Karlo's original files")
