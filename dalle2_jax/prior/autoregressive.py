"""The autoregressive prior (Sec. 2.2): a causal transformer over the codes of a CLIP image embedding."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle2_jax.captions import EncodedCaptions
from dalle2_jax.errors import InputError
from dalle2_jax.layers.cache import Cache
from dalle2_jax.layers.caption_encoder import CaptionEncoder
from dalle2_jax.layers.mesh_axes import check_mesh_axes
from dalle2_jax.layers.transformer import LayerNorm, Transformer
from dalle2_jax.prior.autoregressive_sampling import AutoregressiveSampling, sample_codes
from dalle2_jax.prior.codec import Codec, check_codes
from dalle2_jax.prior.condition import check_caption
from dalle2_jax.prior.pca import PCA


class StoredCodec(nn.Module):
    """The codec's arrays as parameters that are not trained: they come from the data (`CodecFit`), before step 0."""

    embedding_size: int
    components: int
    buckets: int
    similarity_buckets: int

    @nn.compact
    def __call__(self) -> Codec:
        shapes = {
            "mean": (self.embedding_size,),
            "components": (self.components, self.embedding_size),
            "variances": (self.components,),
            "edges": (self.components, self.buckets + 1),
            "centroids": (self.components, self.buckets),
            "similarity_edges": (self.similarity_buckets - 1,),
        }
        zeros = nn.initializers.zeros
        values = {name: jax.lax.stop_gradient(self.param(name, zeros, shape)) for name, shape in shapes.items()}
        pca = PCA(values.pop("mean"), values.pop("components"), values.pop("variances"))
        return Codec(pca, **values)


class Progress(NamedTuple):
    """Where sampling is.

    cache: of the tokens so far. mask: bool `[b, places]`, which may be attended to. hints: `[b, components, width]`,
    what the text embedding adds to the codes' inputs, or None.
    """

    cache: Cache
    mask: jax.Array
    hints: jax.Array | None


def stored(codec: Codec) -> dict[str, jax.Array]:
    """A codec as the parameters of `StoredCodec`."""
    return {**vars(codec.pca), **{name: value for name, value in vars(codec).items() if name != "pca"}}


class AutoregressivePrior(nn.Module):
    """Predicts each code of a CLIP image embedding from the caption, z_i . z_t and the codes before it.

    The sequence is the caption, CLIP's text embedding, a token for the bucket of z_i . z_t, and the codes, at learned
    positions under a causal mask. The caption is one of three: `text` set: the states of an encoder of its own (the
    paper's); `vocabulary_size` set: tokens with an embedding table of its own; neither: the states of CLIP's text
    transformer, projected. Codes share one embedding table and one output layer, since a component's number is the
    position.

    The defaults are Table 3's, but for `text`, without which there are 0.8 billion parameters; with its 24 layers of
    width 2048 there are 2.0, not the 1 billion that the table says. The table's context of 384 has room for the 319
    codes, but not for the caption's 256 states beside them; here it follows from the fields.

    Fields:
      transformer: causal.
      embedding_size: of CLIP's image embedding.
      components: principal components that are kept, and codes of an embedding.
      buckets: of each component. similarity_buckets: of z_i . z_t.
      context_length: most caption tokens.
      vocabulary_size, text: see above.
      text_embedding_size: of CLIP's text embedding; None means `embedding_size`.
      text_components: whether the input from which a code is predicted also holds that component of CLIP's text
        embedding, times a learned vector. Images and captions share CLIP's space, so that new combinations of what is
        known are then mostly a matter of copying; for few images, and not in the paper.
      unit_norm: whether CLIP's embeddings have unit norm, so that what the codes say is scaled to it.
      epsilon: of the last norm. dtype: of the computation. param_dtype: of the parameters. Logits are float32.
    """

    transformer: Transformer = Transformer(width=1664, depth=24, heads=26, is_causal=True)
    embedding_size: int = 1024
    components: int = 319
    buckets: int = 1024
    similarity_buckets: int = 1024
    context_length: int = 256
    vocabulary_size: int | None = None
    text: CaptionEncoder | None = None
    text_embedding_size: int | None = None
    text_components: bool = False
    unit_norm: bool = True
    epsilon: float = 1e-5
    dtype: str = "float32"
    param_dtype: str = "float32"

    @property
    def reads_tokens(self) -> bool:
        """Whether the caption is given as tokens, rather than as CLIP's text states."""
        return self.text is not None or self.vocabulary_size is not None

    @property
    def needs_empty_caption(self) -> bool:
        """Whether the empty caption stands for a withheld one: not here, a null caption is learned."""
        return False

    def setup(self) -> None:
        self._check_fields()
        width, init = self.transformer.width, nn.initializers.normal
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.codec = StoredCodec(self.embedding_size, self.components, self.buckets, self.similarity_buckets)
        if self.text is None and self.vocabulary_size is not None:
            self.token_embedding = nn.Embed(self.vocabulary_size, width, embedding_init=init(0.02), **dtypes)
        else:
            self.text_projection = nn.Dense(width, **dtypes)
        self.text_embedding_projection = nn.Dense(width, **dtypes)
        self.null_text_token = self.param("null_text_token", init(0.01), (width,), self.param_dtype)
        self.null_text_embedding = self.param("null_text_embedding", init(0.01), (width,), self.param_dtype)
        self.similarity_embedding = nn.Embed(self.similarity_buckets, width, embedding_init=init(0.02), **dtypes)
        self.code_embedding = nn.Embed(self.buckets, width, embedding_init=init(0.02), **dtypes)
        if self.text_components:
            self.component_vectors = self.param(
                "component_vectors", init(0.02), (self.components, width), self.param_dtype
            )
        places = self.context_length + 1 + self.components
        self.positions = self.param("positions", init(0.01), (places, width), self.param_dtype)
        self.final_norm = LayerNorm(self.epsilon, self.param_dtype)
        self.out = nn.Dense(self.buckets, dtype="float32", param_dtype=self.param_dtype)

    def __call__(
        self,
        codes: jax.Array,
        similarity: jax.Array,
        text_embedding: jax.Array,
        text: jax.Array,
        text_mask: jax.Array,
        keep_text: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """The logits of every code under the codes before it.

        Args:
          codes: int32 `[b, components]`, of which the last is not read.
          similarity: int32 `[b]`, the bucket of z_i . z_t.
          text_embedding: `[b, text_embedding_size]`, as CLIP gives it.
          text: int32 tokens `[b, n]`, or CLIP's states `[b, n, d]`; n is up to `context_length`.
          text_mask: bool `[b, n]`, True for real tokens.
          keep_text: bool `[b]`; where False, caption and text embedding give way to learned nulls; None keeps all.
          deterministic: False turns dropout on.

        Returns:
          float32 `[b, components, buckets]`.

        Raises:
          InputError: if a shape does not fit the fields, a code is out of range, or `text` is tokens where states are
            due or the reverse.
        """
        check_codes(codes, self.components, self.buckets)
        x, mask, hints = self._prefix(similarity, text_embedding, text, text_mask, keep_text, deterministic)
        prefix = x.shape[1]
        x = jnp.concatenate([x, self._embed(codes[:, :-1], 1, hints)], axis=1)
        mask = jnp.pad(mask, ((0, 0), (0, self.components - 1)), constant_values=True)
        return self._logits(self.transformer(x, mask, deterministic)[:, prefix - 1 :])

    def encode(self, image_embedding: jax.Array, text_embedding: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The codes int32 `[b, components]` and the bucket of z_i . z_t int32 `[b]` of CLIP's embeddings `[b, z]`."""
        codec = self.codec()
        return codec.encode(image_embedding), codec.similarity_bucket(image_embedding, text_embedding)

    def decode(self, codes: jax.Array) -> jax.Array:
        """CLIP's image embeddings `[b, z]` of codes int32 `[b, components]`."""
        return self.codec().decode(codes, self.unit_norm)

    def beyond(self, image_embedding: jax.Array) -> jax.Array:
        """The share of the components of `[b, z]` beyond the outer edges of their buckets."""
        return self.codec().beyond(image_embedding)

    def start(
        self,
        similarity: jax.Array,
        text_embedding: jax.Array,
        text: jax.Array,
        text_mask: jax.Array,
        keep_text: jax.Array | None = None,
    ) -> tuple[jax.Array, Progress]:
        """Sampling's first step: the logits `[b, buckets]` of the first code, and what `advance` goes on from.

        Arguments as those of `__call__`.
        """
        x, mask, hints = self._prefix(similarity, text_embedding, text, text_mask, keep_text, True)
        mask = jnp.pad(mask, ((0, 0), (0, self.components - 1)), constant_values=True)
        states, cache = self.transformer(x, mask, cache=self.transformer.empty_cache(*mask.shape))
        return self._logits(states[:, -1:])[:, 0], Progress(cache, mask, hints)

    def advance(self, codes: jax.Array, progress: Progress) -> tuple[jax.Array, Progress]:
        """The logits `[b, buckets]` of the code behind `codes` int32 `[b]`, and the progress with these in it."""
        cache, mask, hints = progress
        number = cache.length - (mask.shape[1] - self.components)
        states, cache = self.transformer(self._embed(codes[:, None], number, hints), mask, cache=cache)
        return self._logits(states)[:, 0], Progress(cache, mask, hints)

    @nn.nowrap
    def sample_embeddings(
        self,
        params: Any,
        keys: jax.Array,
        captions: EncodedCaptions,
        sampling: AutoregressiveSampling,
        process: None = None,
        empty: EncodedCaptions | None = None,
    ) -> jax.Array:
        """One image embedding a caption, `[b, z]`; see `Prior`."""
        codes = sample_codes(self, params, keys, captions, sampling)
        return self.apply({"params": params}, codes, method="decode")

    def _prefix(self, similarity, text_embedding, text, text_mask, keep_text, deterministic):
        """What comes before the codes `[b, m, width]`, its mask `[b, m]`, and what the text embedding adds to the
        inputs of the codes `[b, components, width]`, or None."""
        self._check(text_embedding, text, text_mask)
        keep = jnp.ones(text.shape[:1], bool) if keep_text is None else keep_text
        if self.text is not None:
            # The encoder's padding is learned, so that all of its states are real, and no token is the null caption.
            tokens = self.text_projection(self.text(text, text_mask & keep[:, None], deterministic))
            text_mask = jnp.ones(tokens.shape[:2], bool)
        else:
            tokens = self.text_projection(text) if self.vocabulary_size is None else self.token_embedding(text)
            tokens = jnp.where(keep[:, None, None], tokens, self.null_text_token.astype(self.dtype)[None, None])
            # A dropped caption is a single null token, so that its length does not show through either.
            text_mask = jnp.where(keep[:, None], text_mask, (jnp.arange(text.shape[1]) == 0)[None])
        # For unit variance of embeddings of unit norm.
        scale = math.sqrt(text_embedding.shape[-1]) if self.unit_norm else 1.0
        caption = self.text_embedding_projection(text_embedding.astype(jnp.float32) * scale)
        caption = jnp.where(keep[:, None], caption, self.null_text_embedding.astype(self.dtype)[None])
        codec, hints, last = self.codec(), None, self.similarity_embedding(similarity)
        if self.text_components:
            coefficients = codec.pca.project(text_embedding) / jnp.sqrt(codec.pca.variances + 1e-12)[None]
            coefficients = jnp.where(keep[:, None], coefficients, 0.0).astype(self.dtype)
            hints = coefficients[:, :, None] * self.component_vectors.astype(self.dtype)[None]
            last = last + hints[:, 0]
        tail = jnp.stack([caption, last], axis=1)
        positions = self.positions.astype(self.dtype)
        behind = positions[self.context_length : self.context_length + 2]
        x = jnp.concatenate([tokens + positions[None, : tokens.shape[1]], tail + behind[None]], axis=1)
        return x, jnp.pad(text_mask, ((0, 0), (0, 2)), constant_values=True), hints

    def _embed(self, codes: jax.Array, number: jax.Array | int, hints: jax.Array | None) -> jax.Array:
        """Codes `[b, n]` as inputs `[b, n, width]`, from which the codes from `number` on are predicted."""
        first = self.context_length + 1 + number
        positions = jax.lax.dynamic_slice_in_dim(self.positions, first, codes.shape[1])
        x = self.code_embedding(codes) + positions.astype(self.dtype)[None]
        if hints is not None:
            x = x + jax.lax.dynamic_slice_in_dim(hints, number, codes.shape[1], axis=1)
        return x

    def _logits(self, states: jax.Array) -> jax.Array:
        return self.out(self.final_norm(states))

    def _check_fields(self) -> None:
        if not self.transformer.is_causal or self.transformer.last_only:
            raise InputError("the autoregressive prior's transformer has to be causal: set is_causal, not last_only")
        if self.text is not None and self.vocabulary_size is not None:
            raise InputError("the prior reads captions in one way: set text or vocabulary_size, not both")
        if not 1 <= self.components <= self.embedding_size:
            raise InputError(
                f"the prior keeps {self.components} principal components of embeddings of size {self.embedding_size}; "
                f"set components to that or less"
            )

        if self.text_components and self.text_embedding_size not in (None, self.embedding_size):
            raise InputError(
                "text_components wants images and captions in one space: embeddings of one size, not "
                f"{self.embedding_size} and {self.text_embedding_size}"
            )

    def _check(self, text_embedding: jax.Array, text: jax.Array, text_mask: jax.Array) -> None:
        check_mesh_axes(text)
        rank, kind, wanted = (2, jnp.integer, "int32 tokens [b, n]")
        if not self.reads_tokens:
            rank, kind, wanted = (3, jnp.floating, "CLIP's text states [b, n, d]")
        if text.ndim != rank or not jnp.issubdtype(text.dtype, kind):
            raise InputError(f"this prior reads {wanted}, not {text.dtype} {list(text.shape)}")
        check_caption(self, text_embedding, text, text_mask)
