"""DALL-E 2 (unCLIP) in JAX and Flax.

The package is lazy: importing it loads no backend, no data library and no checkpoint library. `dalle2_jax.load`
reads a trained run, whichever system it is of; `dalle2_jax.DALLE2` is the assembled cascade; the parts are
`dalle2_jax.clip`, `.prior`, `.decoder`, `.diffusion` and `.lineage`.
"""

import importlib
from typing import TYPE_CHECKING

from dalle2_jax._version import __version__

if TYPE_CHECKING:
    from dalle2_jax.systems import load
    from dalle2_jax.unclip import DALLE2

_LAZY = {"DALLE2": "dalle2_jax.unclip", "load": "dalle2_jax.systems"}

__all__ = ["DALLE2", "__version__", "load"]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'dalle2_jax' has no attribute {name!r}")
