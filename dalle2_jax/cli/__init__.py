"""The `dalle2` command over trained runs and folders of images. Bad input is one sentence and exit code 2."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from dalle2_jax._version import __version__
from dalle2_jax.arguments import Parser
from dalle2_jax.cli import (
    ablate,
    clip,
    compare,
    convert,
    curves,
    data,
    describe,
    edit,
    evaluate,
    generate,
    inpaint,
    interpolate,
    outpaint,
    probe,
    reconstruct,
    sweep,
    upsample,
    vary,
)
from dalle2_jax.errors import InputError, check_number, sentence_for_user

COMMANDS = {
    "generate": generate,
    "vary": vary,
    "reconstruct": reconstruct,
    "interpolate": interpolate,
    "edit": edit,
    "probe": probe,
    "inpaint": inpaint,
    "outpaint": outpaint,
    "upsample": upsample,
    "clip": clip,
    "evaluate": evaluate,
    "ablate": ablate,
    "compare": compare,
    "sweep": sweep,
    "describe": describe,
    "curves": curves,
    "convert": convert,
    "data": data,
}
LARGEST_SEED = 2**32 - 1
MOST_IMAGES = 10**6  # of one command, each of which has its key and its name in memory
LARGEST_SIDE = 2**16  # pixels


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    parser = Parser(prog="dalle2", description="Sample from, measure and describe trained runs.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=module.HELP))
    options = parser.parse_args(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"dalle2: warning: {message}", file=sys.stderr)
        try:
            _check_numbers(options)
            if COMMANDS[options.command].USES_JAX:
                _prepare_jax()
            return COMMANDS[options.command].run(options)
        except KeyboardInterrupt:
            print("dalle2: stopped", file=sys.stderr)
            return 130
        except Exception as error:
            sentence = sentence_for_user(error)
            if sentence is None:
                raise
            print(f"dalle2: {sentence}", file=sys.stderr)
            return 2


def _check_numbers(options: argparse.Namespace) -> None:
    for name, most in (("count", MOST_IMAGES), ("batch_size", MOST_IMAGES), ("tile", LARGEST_SIDE)):
        value = getattr(options, name, None)
        if value is not None:
            check_number(f"--{name.replace('_', '-')}", value, at_least=1, at_most=most, whole=True)
    seed = getattr(options, "seed", 0)
    if not 0 <= seed <= LARGEST_SEED:
        raise InputError(f"--seed is {seed}; it must lie in 0 to {LARGEST_SEED}")


def _prepare_jax() -> None:
    """CPU cores as devices, and compiled programs kept below ~/.cache, so that a second call starts in seconds."""
    import jax

    from dalle2_jax.sharding import use_cpu_cores

    use_cpu_cores()
    if not jax.config.jax_compilation_cache_dir:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dalle2_jax" / "jax"
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
