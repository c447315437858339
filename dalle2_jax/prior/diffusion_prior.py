"""The diffusion prior (Sec. 2.2): a causal transformer that predicts the un-noised CLIP image embedding."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle2_jax.captions import EncodedCaptions
from dalle2_jax.diffusion.process import Process
from dalle2_jax.diffusion.sampling import Sampling
from dalle2_jax.errors import InputError
from dalle2_jax.layers.embedding import timestep_embedding, unit_norm
from dalle2_jax.layers.mesh_axes import check_mesh_axes
from dalle2_jax.layers.remat import Remat
from dalle2_jax.layers.transformer import LayerNorm, Transformer
from dalle2_jax.prior.condition import check_caption
from dalle2_jax.prior.diffusion_sampling import denoise_embeddings


class DiffusionPrior(nn.Module):
    """Predicts x_0, a scaled CLIP image embedding, from its noised form x_t, the timestep and the caption.

    The sequence is the caption's tokens, CLIP's text embedding, the timestep, the noised image embedding and a learned
    query, at learned positions under a causal mask; the query's final state is projected to the answer. With
    `embedding_scale=1`, width 2048, depth 20 and a context of 77 this is Karlo's prior.

    Fields:
      embedding_size: of CLIP's image embedding.
      width, depth, heads, activation, epsilon, dropout, scan_layers, remat, dtype, param_dtype: as in
        `Transformer`.
      context_length: most caption tokens.
      vocabulary_size: set, the caption is given as tokens and has its own embedding table; None, it is given as the
        states of CLIP's text transformer and is projected.
      text_embedding_size: of CLIP's text embedding; None means `embedding_size`.
      embedding_scale: factor on CLIP embeddings, text and image; None means sqrt(embedding_size), which gives unit-norm
        ones unit variance. The paper's is 17.2 at size 1024.
      embedding_mean, embedding_std: of CLIP's image embeddings as they leave its projection, one number a dimension.
        Set, images are brought to zero mean and unit variance by them instead, and the prior's answers are such
        embeddings, not of unit norm (Karlo, Kandinsky; with `embedding_scale=1` and a CLIP without `unit_norm`).
      learned_null: a dropped caption is a learned token and a learned embedding. False, and there are none: the null
        caption is the empty one, which whoever samples or trains has to give (Karlo, Kandinsky).
      final_norm: whether the states are normalised before the last projection.
    """

    embedding_size: int
    width: int = 2048
    depth: int = 24
    heads: int = 32
    context_length: int = 256
    vocabulary_size: int | None = None
    text_embedding_size: int | None = None
    embedding_scale: float | None = None
    embedding_mean: tuple[float, ...] = ()
    embedding_std: tuple[float, ...] = ()
    learned_null: bool = True
    final_norm: bool = True
    activation: str = "gelu"
    epsilon: float = 1e-5
    dropout: float = 0.0
    scan_layers: bool = True
    remat: Remat = False
    dtype: str = "float32"
    param_dtype: str = "float32"

    @property
    def reads_tokens(self) -> bool:
        """Whether the caption is given as tokens, rather than as CLIP's text states."""
        return self.vocabulary_size is not None

    @property
    def needs_empty_caption(self) -> bool:
        """Whether the empty caption stands for a withheld one, since no null caption was learned."""
        return not self.learned_null

    @nn.nowrap
    def sample_embeddings(
        self,
        params: Any,
        keys: jax.Array,
        captions: EncodedCaptions,
        sampling: Sampling,
        process: Process | None = None,
        empty: EncodedCaptions | None = None,
    ) -> jax.Array:
        """One image embedding a caption, `[b, z]`; see `Prior`."""
        return denoise_embeddings(self, params, keys, captions, sampling, process, empty)

    @property
    def scale(self) -> float:
        """The factor between unit-norm CLIP embeddings and the space in which the diffusion runs."""
        return math.sqrt(self.embedding_size) if self.embedding_scale is None else self.embedding_scale

    @nn.nowrap
    def scale_embedding(self, embedding: jax.Array) -> jax.Array:
        """CLIP's image embeddings into the diffusion's space, float32."""
        if self.embedding_mean:
            return (embedding.astype(jnp.float32) - self._statistic("mean")) / self._statistic("std")
        return embedding.astype(jnp.float32) * self.scale

    @nn.nowrap
    def unscale_embedding(self, embedding: jax.Array) -> jax.Array:
        """From the diffusion's space back to CLIP's, float32: to unit norm, unless there are statistics."""
        if self.embedding_mean:
            return embedding.astype(jnp.float32) * self._statistic("std") + self._statistic("mean")
        return unit_norm(embedding.astype(jnp.float32) / self.scale)

    @nn.nowrap
    def _statistic(self, name: str) -> jax.Array:
        values = jnp.asarray(getattr(self, f"embedding_{name}"), jnp.float32)
        if values.shape != (self.embedding_size,):
            raise InputError(
                f"the prior's embedding_{name} has {values.size} numbers for embeddings of size {self.embedding_size}"
            )
        return values[None]

    @nn.compact
    def __call__(
        self,
        noised_image_embedding: jax.Array,
        timesteps: jax.Array,
        text_embedding: jax.Array,
        text: jax.Array,
        text_mask: jax.Array,
        keep_text: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Predicts the un-noised image embedding.

        Args:
          noised_image_embedding: `[batch, embedding_size]`, in the scaled space.
          timesteps: `[batch]`, in the original chain's 0..T-1.
          text_embedding: `[batch, text_embedding_size]`, as CLIP gives it; scaled here.
          text: int32 tokens `[batch, length]` if `vocabulary_size` is set, else states `[batch, length, text width]`;
            `length` is up to `context_length`.
          text_mask: bool `[batch, length]`, True for real tokens.
          keep_text: bool `[batch]`; where False, tokens and text embedding give way to learned nulls, as in training
            for classifier-free guidance. The noised embedding and the timestep always stay. None keeps all, and is
            the only choice without `learned_null`.
          deterministic: False turns dropout on.

        Returns:
          float32 `[batch, embedding_size]`, in the scaled space.

        Raises:
          InputError: if a shape does not fit the fields, or `text` is tokens where states are due or the reverse.
        """
        self._check(noised_image_embedding, text_embedding, text, text_mask, keep_text)
        batch, length = text.shape[:2]
        init = nn.initializers.normal(0.01)

        def vector(name: str, shape: tuple[int, ...]) -> jax.Array:
            return self.param(name, init, shape, self.param_dtype).astype(self.dtype)

        def dense(name: str, x: jax.Array) -> jax.Array:
            return nn.Dense(self.width, dtype=self.dtype, param_dtype=self.param_dtype, name=name)(x)

        if self.vocabulary_size is None:
            tokens = dense("text_projection", text)
        else:
            tokens = nn.Embed(
                self.vocabulary_size,
                self.width,
                embedding_init=nn.initializers.normal(0.02),
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name="token_embedding",
            )(text)
        caption = dense("text_embedding_projection", text_embedding.astype(jnp.float32) * self.scale)
        if self.learned_null:
            null_token = vector("null_text_token", (self.width,))
            null_embedding = vector("null_text_embedding", (self.width,))
        if keep_text is not None:
            tokens = jnp.where(keep_text[:, None, None], tokens, null_token[None, None, :])
            caption = jnp.where(keep_text[:, None], caption, null_embedding[None, :])
            # A dropped caption is a single null token, so that its length does not show through either.
            text_mask = jnp.where(keep_text[:, None], text_mask, (jnp.arange(length) == 0)[None, :])

        time = dense("time_in", timestep_embedding(timesteps, self.width))
        time = dense("time_out", nn.silu(time))
        image = dense("image_embedding_projection", noised_image_embedding)
        query = jnp.broadcast_to(vector("query", (self.width,))[None, :], (batch, self.width))
        tail = jnp.stack([caption, time, image, query], axis=1)

        positions = vector("positions", (self.context_length + tail.shape[1], self.width))
        positions = jnp.concatenate([positions[:length], positions[self.context_length :]])
        x = jnp.concatenate([tokens, tail], axis=1) + positions[None]
        mask = jnp.concatenate([text_mask, jnp.ones((batch, tail.shape[1]), bool)], axis=1)
        x = Transformer(
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            is_causal=True,
            last_only=True,
            activation=self.activation,
            epsilon=self.epsilon,
            dropout=self.dropout,
            scan_layers=self.scan_layers,
            remat=self.remat,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="transformer",
        )(x, mask, deterministic)[:, 0]
        if self.final_norm:
            x = LayerNorm(epsilon=self.epsilon, param_dtype=self.param_dtype, name="final_norm")(x)
        return nn.Dense(self.embedding_size, dtype="float32", param_dtype=self.param_dtype, name="out")(x)

    def _check(self, noised_image_embedding, text_embedding, text, text_mask, keep_text):
        check_mesh_axes(text)
        image_size = self.embedding_size
        if noised_image_embedding.shape[-1] != image_size:
            raise InputError(
                f"the prior works on image embeddings of size {image_size}, got {noised_image_embedding.shape[-1]}"
            )
        if self.vocabulary_size is None and text.ndim != 3:
            raise InputError(
                f"a prior without vocabulary_size needs text states [batch, length, width], got {list(text.shape)}"
            )
        if self.vocabulary_size is not None and not (text.ndim == 2 and jnp.issubdtype(text.dtype, jnp.integer)):
            raise InputError(
                f"a prior with vocabulary_size needs int32 tokens [batch, length], got {text.dtype} {list(text.shape)}"
            )
        check_caption(self, text_embedding, text, text_mask)
        if keep_text is not None and not self.learned_null:
            raise InputError("this prior has learned no null caption: give it the empty caption's text instead")
