"""The options that say how a stage is sampled: `--steps 12` is the decoder's, `--steps prior=25` the prior's."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from dalle2_jax.errors import InputError, nearest

STAGES = ("prior", "decoder", "upsampler")


def _interval(text: str) -> tuple[float, float]:
    low, _, high = text.partition(",")
    return float(low), float(high)


# option: (field of Sampling, how its text is read, what it takes, whose it is where no stage is named, help)
OPTIONS: dict[str, tuple[str, Callable[[str], Any], str, str, str]] = {
    "--sampler": ("sampler", str, "ddpm, ddim or dpmpp_2m", "decoder", "how it is sampled"),
    "--steps": ("steps", str, "a number, or 10,10,3,2,2", "decoder", "over which timesteps"),
    "--guidance-scale": ("guidance_scale", float, "a number", "decoder", "1 is none"),
    "--guidance-interval": ("guidance_interval", _interval, "LOW,HIGH", "decoder", "guided part of the time, 0 to 1"),
    "--eta": ("eta", float, "a number", "decoder", "ddim's noise, 0 to 1"),
    "--variance": ("variance", str, "a name", "decoder", "ddpm's: fixed_small, fixed_large, analytic, learned_range"),
    "--threshold": ("threshold", str, "a name", "decoder", "of predicted images: none, static, dynamic"),
    "--percentile": ("percentile", float, "a share of 1", "decoder", "of the dynamic threshold"),
    "--candidates": ("candidates", int, "a number", "prior", "embeddings of which the best is kept"),
    "--temperature": ("temperature", float, "a number", "prior", "an autoregressive prior's; 0: the likeliest codes"),
    "--top-k": ("top_k", int, "a number", "prior", "an autoregressive prior's: only so many of the likeliest codes"),
    "--top-p": ("top_p", float, "a share of 1", "prior", "an autoregressive prior's: only codes of that probability"),
    "--top-similarity": ("top_similarity", float, "a share of 1", "prior", "of z_i . z_t, from whose top it is drawn"),
}


def add_sampling_arguments(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """The options above, each of which may be given once a stage.

    default: whose they are where no stage is named; None: the decoder's, but for what only the prior has.
    """
    whose = default or "decoder"
    group = parser.add_argument_group("sampling", f"each VALUE is the {whose}'s, or STAGE=VALUE (--steps prior=25)")
    for option, (*_, text) in OPTIONS.items():
        group.add_argument(option, action="append", default=[], metavar="[STAGE=]VALUE", help=text)


def read_sampling(options: argparse.Namespace, default: str | None = None) -> dict[str, dict[str, Any]]:
    """{stage: {field of Sampling: value}} of all stages.

    Raises:
        InputError: for an unknown stage, or a value that cannot be read, naming it.
    """
    changes: dict[str, dict[str, Any]] = {stage: {} for stage in STAGES}
    for option, (field, read, takes, own, _) in OPTIONS.items():
        for text in getattr(options, option[2:].replace("-", "_")):
            stage, separator, value = text.rpartition("=")
            stage = stage if separator else default or own
            if stage not in changes:
                raise InputError(
                    f"{option} {text}: there is no stage {stage!r}; the nearest of {', '.join(STAGES)} is "
                    f"{nearest(stage, STAGES)}"
                )
            try:
                changes[stage][field] = read(value)
            except ValueError:
                raise InputError(f"{option} takes {takes}, not {value!r}") from None
    return changes


def add_prior_argument(parser: argparse.ArgumentParser) -> None:
    """Which prior, in a run that has several."""
    parser.add_argument("--prior", metavar="STAGE", help="which of the run's priors (default: the stage named prior)")
