"""DALL-E 2 (unCLIP) in JAX and Flax.

The package is lazy: importing it loads no backend, no data library and no checkpoint library. `dalle2_jax.DALLE2` is
the assembled system; the parts are `dalle2_jax.clip`, `.prior`, `.decoder` and `.diffusion`.
"""

import importlib
from typing import TYPE_CHECKING

from dalle2_jax._version import __version__

if TYPE_CHECKING:
    from dalle2_jax.unclip import DALLE2

_LAZY = {"DALLE2": "dalle2_jax.unclip"}

__all__ = ["DALLE2", "__version__"]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'dalle2_jax' has no attribute {name!r}")
