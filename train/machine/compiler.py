"""Compiler options of a step and of the programs that make initial parameters."""

import functools
import importlib.util
import mmap
import os
from pathlib import Path
from typing import Any

import jax

# A library of kernels for products and sums of a CPU that jaxlib holds and does not use by itself.
KERNELS = "xla_cpu_experimental_ynn_fusion_type"
# From this many channels on it is the faster one, by a sixth at 128 of them; at 64 it takes half as long again.
CHANNELS = 128


def compiler_options(module: Any, platform: str) -> dict[str, str] | None:
    """Options for `jax.jit` of a network's train step on `platform`, as jax names it; None for XLA's own choices.

    On a CPU, U-Nets of `CHANNELS` channels or more take other kernels, where the installed jaxlib knows them and
    XLA_FLAGS does not speak of them.
    """
    unet = getattr(module, "unet", module)
    wide = getattr(unet, "channel_multipliers", None) is not None and unet.channels >= CHANNELS
    if platform != "cpu" or not wide or KERNELS in os.environ.get("XLA_FLAGS", ""):
        return None
    options = {KERNELS: "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE"}
    return options if _known(**options) else None


def initial_options(platform: str) -> dict[str, Any] | None:
    """Options for the programs that draw initial parameters on `platform`; None for XLA's own choices.

    On a CPU, random bits compile five times faster so, and run as fast.
    """
    if platform != "cpu":
        return None
    options = {"xla_backend_optimization_level": 1, "xla_cpu_use_fusion_emitters": False}
    return {name: value for name, value in options.items() if jaxlib_knows(name)}


@functools.cache
def jaxlib_knows(flag: str) -> bool:
    """Whether the name of an XLA flag stands in the installed jaxlib's libraries.

    XLA ends the process at a flag it does not know, so that trying is no way to find out.
    """
    package = importlib.util.find_spec("jaxlib")
    folder = Path(package.origin).parent if package and package.origin else Path()
    word = b"\0" + flag.encode() + b"\0"
    for library in sorted(folder.glob("*.so"), key=lambda path: -path.stat().st_size):
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(word) >= 0:
                return True
    return False


@functools.cache
def _known(**options: str) -> bool:
    """Whether this jaxlib takes them: experimental options come and go."""
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
