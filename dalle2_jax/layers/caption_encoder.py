"""An encoder of captions by itself: GLIDE's text transformer (GLIDE Sec. 4; glide-text2im, text2im_model.py)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle2_jax.errors import InputError
from dalle2_jax.layers.remat import Remat
from dalle2_jax.layers.transformer import LayerNorm, Transformer


class CaptionEncoder(nn.Module):
    """Tokens to states, not causal, with a learned padding embedding for every position instead of an attention mask.

    An empty caption is therefore the padding embeddings alone, which is what guidance takes as the null caption.

    Fields:
        vocabulary_size, context_length, width, depth, heads: sizes; the paper's decoder has 256 positions and 24
            layers of width 2048 with 32 heads.
        final_norm: a LayerNorm over the states.
    """

    vocabulary_size: int
    context_length: int = 256
    width: int = 2048
    depth: int = 24
    heads: int = 32
    final_norm: bool = True
    activation: str = "gelu"
    epsilon: float = 1e-5
    dropout: float = 0.0
    scan_layers: bool = True
    remat: Remat = False
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None, deterministic: bool = True) -> jax.Array:
        """Encodes `tokens` int32 [batch, length] with `mask` bool [batch, length] (True = real; None: all are).

        Captions shorter than the context are filled up with padding, so the result does not depend on how far they came
        padded. Returns states [batch, context_length, width] in the compute dtype.

        Raises:
            InputError: if `tokens` are not integers of rank 2, or longer than `context_length`.
        """
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise InputError(
                f"the caption encoder wants tokens int32 [batch, length], not {tokens.dtype} {tokens.shape}."
            )
        length = tokens.shape[1]
        if length > self.context_length:
            raise InputError(
                f"the caption has {length} tokens, the caption encoder a context of {self.context_length}: "
                "shorten it, or train with a larger context_length."
            )
        if mask is None:
            mask = jnp.ones(tokens.shape, bool)
        missing = ((0, 0), (0, self.context_length - length))
        tokens, mask = jnp.pad(tokens, missing), jnp.pad(mask, missing)

        param_dtype = jnp.dtype(self.param_dtype)
        table = (self.context_length, self.width)
        positions = self.param("positions", nn.initializers.normal(0.01), table, param_dtype)
        padding = self.param("padding", nn.initializers.normal(0.02), table, param_dtype)
        embedding = nn.Embed(
            self.vocabulary_size,
            self.width,
            embedding_init=nn.initializers.normal(0.02),
            param_dtype=param_dtype,
            name="token_embedding",
        )
        states = jnp.where(mask[:, :, None], embedding(tokens) + positions[None], padding[None])
        states = Transformer(
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            activation=self.activation,
            epsilon=self.epsilon,
            dropout=self.dropout,
            scan_layers=self.scan_layers,
            remat=self.remat,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="transformer",
        )(states.astype(self.dtype), None, deterministic)
        if self.final_norm:
            states = LayerNorm(self.epsilon, self.param_dtype, name="final_norm")(states).astype(self.dtype)
        return states
