"""Where a token stands in its sequence (Vaswani et al. 2017, Sec. 3.5): sinusoids, or a learned table."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.errors import InputError

KINDS = ("sinusoidal", "learned")


def sinusoidal_positions(length: int, width: int) -> jax.Array:
    """The positions 0 to `length` - 1 as float32 `[length, width]`, a sine and a cosine in turn.

    PE(p, 2i) = sin(p / 10000^(2i / width)) and PE(p, 2i + 1) = cos(p / 10000^(2i / width)). `timestep_embedding` has
    all cosines first.

    Raises:
      InputError: if `width` is odd.
    """
    if width % 2:
        raise InputError(f"sinusoidal positions need an even width, got {width}; set an even one, or positions=learned")
    frequencies = 10_000.0 ** (-np.arange(0, width, 2) / width)
    angles = np.arange(length)[:, None] * frequencies[None]
    return jnp.asarray(np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(length, width), jnp.float32)


class Positions(nn.Module):
    """Adds to each state what says where it stands.

    Fields:
      kind: "sinusoidal", without parameters, or "learned": a table `[max_length, width]`, initially normal with a
        standard deviation of width^-1/2.
      max_length: most tokens of a sequence.
      param_dtype: of the table.
    """

    kind: str = "sinusoidal"
    max_length: int = 512
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, first: jax.Array | int = 0) -> jax.Array:
        """States `[b, n, width]` at the positions from `first` on, int32, in their dtype.

        Raises:
          InputError: for another kind, more than `max_length` states, or sinusoids of an odd width.
        """
        if self.kind not in KINDS:
            raise InputError(f"the positions are {self.kind!r}; they must be {' or '.join(KINDS)}")
        if x.shape[1] > self.max_length:
            raise InputError(f"a sequence has {x.shape[1]} tokens; the most are max_length={self.max_length}")
        width = x.shape[-1]
        if self.kind == "learned":
            init = nn.initializers.normal(width**-0.5)
            table = self.param("table", init, (self.max_length, width), self.param_dtype)
        else:
            table = sinusoidal_positions(self.max_length, width)
        return x + jax.lax.dynamic_slice_in_dim(table, first, x.shape[1])[None].astype(x.dtype)
