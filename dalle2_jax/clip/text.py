"""CLIP's caption encoder: a causal transformer that is read at the caption's last token."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle2_jax.errors import InputError
from dalle2_jax.layers.mesh_axes import check_mesh_axes
from dalle2_jax.layers.remat import Remat
from dalle2_jax.layers.transformer import LayerNorm, Transformer


class TextTransformer(nn.Module):
    """The text transformer of CLIP (its paper's section 2.4; OpenAI's clip/model.py).

    Captions start at position 0 and padding follows them. The causal mask alone keeps padding out of every state of a
    real token, so the padding mask serves only to find the last one.

    Fields:
      vocabulary_size, context_length: number of tokens, and of positions.
      width, depth, heads, mlp_ratio, activation, epsilon, scan_layers, remat, dtype, param_dtype: as in
        `Transformer`.
    """

    vocabulary_size: int
    context_length: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    epsilon: float = 1e-5
    scan_layers: bool = True
    remat: Remat = False
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Encodes captions.

        Args:
          tokens: int32 `[batch, length]`, with `length` up to `context_length`.
          mask: bool `[batch, length]`, True for real tokens.

        Returns:
          The state at each caption's last real token, `[batch, width]`, and all states, `[batch, length, width]`; both
          after the final norm. States at padding mean nothing.

        Raises:
          InputError: if `length` is over `context_length`, or `mask` has another shape.
        """
        batch, length = tokens.shape
        check_mesh_axes(tokens)
        if length > self.context_length:
            raise InputError(f"captions of {length} tokens are longer than the context of {self.context_length}")
        if mask.shape != tokens.shape:
            raise InputError(f"the mask {list(mask.shape)} must have the shape of the tokens {list(tokens.shape)}")
        init = nn.initializers.normal
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = nn.Embed(self.vocabulary_size, self.width, embedding_init=init(0.02), name="token_embedding", **dtypes)(
            tokens
        )
        positions = self.param("positions", init(0.01), (self.context_length, self.width), self.param_dtype)
        x = x + positions[None, :length].astype(x.dtype)
        x = Transformer(
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            is_causal=True,
            mlp_ratio=self.mlp_ratio,
            activation=self.activation,
            epsilon=self.epsilon,
            scan_layers=self.scan_layers,
            remat=self.remat,
            name="transformer",
            **dtypes,
        )(x)
        states = LayerNorm(epsilon=self.epsilon, param_dtype=self.param_dtype, name="final_norm")(x)
        last = length - 1 - jnp.argmax(mask[:, ::-1], axis=1)
        pooled = jnp.take_along_axis(states, last[:, None, None], axis=1)[:, 0]
        return pooled, states
