"""DALL-E 1's transformer: one causal stack over a caption's tokens and the dVAE's codes of its image.

Ramesh et al. 2021 (arXiv 2102.12092), Sec. 2.2 and App. B; the dVAE is `dalle2_jax.lineage.dvae`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from dalle2_jax.errors import InputError
from dalle2_jax.layers.cache import Cache
from dalle2_jax.layers.mesh_axes import check_mesh_axes
from dalle2_jax.layers.transformer import LayerMasks, LayerNorm, Transformer
from dalle2_jax.lineage.dalle1_masks import layer_masks
from dalle2_jax.lineage.dvae import check_codes

TEXT_WEIGHT = 1 / 8  # of the text's cross-entropy in the loss; the image's has the rest


class Logits(NamedTuple):
    """Of every token under those before it, float32.

    text: `[b, context_length, vocabulary_size]`. image: `[b, grid, grid, codebook_size]`.
    """

    text: jax.Array
    image: jax.Array


class Losses(NamedTuple):
    """Float32 scalars: text and image in nats a token, and loss, their weighted sum."""

    loss: jax.Array
    text: jax.Array
    image: jax.Array


class DALLE1(nn.Module):
    """Predicts a caption's tokens, and under it the codes of its image, row after row.

    The sequence is a start token, the caption at learned positions, filled up with a padding vector for every position
    (so that no token is hidden, and the empty caption is the padding alone), and the codes with learned embeddings of
    their row and column. The last text token predicts the first code. Masks by layer: `dalle1_masks.layer_masks`.
    Text positions have logits for the vocabulary and image positions for the codes, no others, from two layers over one
    norm. Embeddings and logits are float32, as in App. D, whatever the transformer computes in.

    The defaults are the paper's, of 12 billion parameters.

    Fields:
      transformer: causal; its last layer has the convolution's mask.
      vocabulary_size, context_length: of the captions.
      codebook_size, grid: of the dVAE: how many codes there are, and how many of them an image has a side.
      window: of the convolution, odd.
      epsilon: of the last norm. param_dtype: of the parameters outside the transformer.
    """

    transformer: Transformer = Transformer(width=3968, depth=64, heads=62, is_causal=True)
    vocabulary_size: int = 16_384
    context_length: int = 256
    codebook_size: int = 8192
    grid: int = 32
    window: int = 11
    epsilon: float = 1e-5
    param_dtype: str = "float32"

    @property
    def places(self) -> int:
        """How long the sequence is: a start token, the caption, and the codes but for the last, which is not read."""
        return self.context_length + self.grid**2

    def setup(self) -> None:
        if not self.transformer.is_causal or self.transformer.last_only:
            raise InputError("DALL-E 1's transformer has to be causal: set is_causal, not last_only")
        width, init = self.transformer.width, nn.initializers.normal
        dtypes = {"dtype": "float32", "param_dtype": self.param_dtype}
        embed = functools.partial(nn.Embed, features=width, embedding_init=init(0.02), **dtypes)
        self.token_embedding, self.code_embedding = embed(self.vocabulary_size), embed(self.codebook_size)
        self.start_of_text = self.param("start_of_text", init(0.02), (width,), self.param_dtype)
        self.positions = self.param("positions", init(0.01), (self.context_length, width), self.param_dtype)
        self.padding = self.param("padding", init(0.02), (self.context_length, width), self.param_dtype)
        self.rows = self.param("rows", init(0.01), (self.grid, width), self.param_dtype)
        self.columns = self.param("columns", init(0.01), (self.grid, width), self.param_dtype)
        self.final_norm = LayerNorm(self.epsilon, self.param_dtype)
        self.text_out, self.image_out = nn.Dense(self.vocabulary_size, **dtypes), nn.Dense(self.codebook_size, **dtypes)

    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array,
        codes: jax.Array,
        deterministic: bool = True,
    ) -> Logits:
        """The logits of every token.

        Args:
          tokens: int32 `[b, context_length]`. mask: bool of the same shape, True for real tokens; nowhere for the empty
            caption, which stands for a dropped one.
          codes: int32 `[b, grid, grid]`, of which the last is not read.
          deterministic: False turns dropout on.

        Raises:
          InputError: if a shape does not fit the fields, or a code is beyond the vocabulary.
        """
        self.check_grid(codes, self.grid)
        image = codes.reshape(-1, self.grid**2)
        x = jnp.concatenate([self._text(tokens, mask), self._image(image[:, :-1], 0)], axis=1)
        states = self.transformer(x, None, deterministic, layer_masks=self._masks())
        text, image = jnp.split(states, [self.context_length], axis=1)
        logits = self.image_out(self.final_norm(image))
        return Logits(self.text_out(self.final_norm(text)), logits.reshape(*codes.shape, self.codebook_size))

    def start(self, tokens: jax.Array, mask: jax.Array, given: jax.Array | None = None) -> tuple[jax.Array, Cache]:
        """Sampling's first step: the logits `[b, codebook_size]` of the first code, and what `advance` goes on from.

        given: int32 `[b, rows, grid]`, the first rows of the image; the logits are then of the code behind them.
        The others are as those of `__call__`.
        """
        x = self._text(tokens, mask)
        if given is not None:
            x = jnp.concatenate([x, self._image(given.reshape(len(given), -1), 0)], axis=1)
        cache = self.transformer.empty_cache(x.shape[0], self.places)
        return self._next(x, cache)

    def advance(self, codes: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """The logits `[b, codebook_size]` of the code behind `codes` int32 `[b]`, and the cache with these in it."""
        number = cache.length - (self.context_length + 1)
        return self._next(self._image(codes[:, None], number), cache)

    def _next(self, x: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        states, cache = self.transformer(x, None, True, cache, self._masks())
        return self.image_out(self.final_norm(states[:, -1])), cache

    def _text(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """The start token and the caption, float32 `[b, 1 + context_length, width]`."""
        check_mesh_axes(tokens)
        self._check_caption(tokens, mask)
        start, positions, padding = (
            value.astype(jnp.float32) for value in (self.start_of_text, self.positions, self.padding)
        )
        text = jnp.where(mask[:, :, None], self.token_embedding(tokens) + positions[None], padding[None])
        first = jnp.broadcast_to(start[None, None], (len(tokens), 1, start.shape[0]))
        return jnp.concatenate([first, text], axis=1)

    def _image(self, codes: jax.Array, first: jax.Array | int) -> jax.Array:
        """Codes `[b, n]`, of which the first has the number `first`, as inputs float32 `[b, n, width]`."""
        number = first + jnp.arange(codes.shape[1])
        rows, columns = self.rows.astype(jnp.float32), self.columns.astype(jnp.float32)
        place = jnp.take(rows, number // self.grid, axis=0) + jnp.take(columns, number % self.grid, axis=0)
        return self.code_embedding(codes) + place[None]

    def _masks(self) -> LayerMasks:
        """The masks for the sequence as it is read, without the last code."""
        masks, kinds = layer_masks(self.transformer.depth, self.context_length + 1, self.grid, self.window)
        return LayerMasks(masks[:, :-1, :-1], kinds)

    @nn.nowrap
    def check_grid(self, codes: jax.Array, rows: int) -> None:
        """Raises InputError unless codes are int `[b, rows, grid]` and, where their values are known, of the dVAE."""
        check_codes(codes, self.codebook_size)
        if codes.shape[1:] != (rows, self.grid):
            raise InputError(f"the codes are {list(codes.shape)}; they must be [b, {rows}, {self.grid}]")

    def _check_caption(self, tokens: jax.Array, mask: jax.Array) -> None:
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise InputError(f"captions must be tokens int32 [b, n], not {tokens.dtype} {list(tokens.shape)}")
        if tokens.shape[1] != self.context_length:
            raise InputError(
                f"the captions have {tokens.shape[1]} tokens and the transformer a context of {self.context_length}; "
                "encode them with a tokenizer of that context_length"
            )
        if mask.shape != tokens.shape:
            raise InputError(f"the captions' mask is {list(mask.shape)}; it must be {list(tokens.shape)}")


def dalle1_loss(
    logits: Logits,
    tokens: jax.Array,
    mask: jax.Array,
    codes: jax.Array,
    text_weight: float = TEXT_WEIGHT,
) -> Losses:
    """The mean cross-entropy of the captions' tokens and that of the codes, by 1/8 and 7/8 (Sec. 2.2).

    Each is over the count of its kind in the batch. Padding counts in neither; the paper does not say, and public code
    (DALLE-pytorch, ru-dalle) has it in the text's, where it is soon certain and lowers the mean.

    Args:
        tokens, mask, codes: those of `DALLE1.__call__`.
        text_weight: 1/8; the image's is the rest to 1.
    """
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    text = jnp.where(mask, cross_entropy(logits.text, tokens), 0.0).sum() / jnp.maximum(mask.sum(), 1)
    image = cross_entropy(logits.image, codes).mean()
    return Losses(text_weight * text + (1.0 - text_weight) * image, text, image)
