"""The Transformer (Vaswani et al. 2017): an encoder of the source, and a decoder that writes the target token by token.

CLIP's text encoder, both priors and DALL-E 1 are stacks of its decoder's layers without cross-attention and with the
norms moved (`layers.transformer`); this is the whole of it, as published.

Tokens 0, 1 and 2 are padding, start and end. A source is padded behind its end; a target is START, its tokens, END and
padding. The decoder reads `target[:, :-1]`, from which it predicts `target[:, 1:]`.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dalle2_jax.errors import InputError
from dalle2_jax.layers.attention import MultiHeadAttention
from dalle2_jax.layers.cache import Cache, LayerCache
from dalle2_jax.layers.cross_attention import CrossAttention
from dalle2_jax.layers.kernels.dense import product
from dalle2_jax.layers.mesh_axes import check_mesh_axes
from dalle2_jax.layers.positions import KINDS, Positions
from dalle2_jax.layers.transformer import HiddenLayer, LayerNorm

PAD, START, END = 0, 1, 2


class Progress(NamedTuple):
    """Where decoding is.

    cache: of the target so far. memory: keys and values of the source in all decoder layers, `[layers, b, m, ...]`.
    memory_mask: bool `[b, m]`, which of them may be attended to.
    """

    cache: Cache
    memory: LayerCache
    memory_mask: jax.Array


class Layer(nn.Module):
    """One layer of the encoder, or with `reads_memory` of the decoder: attention, in the decoder cross-attention, and
    the MLP, with a norm each. Fields are those of `EncoderDecoder`, which stacks it."""

    width: int
    heads: int
    hidden: int
    dropout: float
    norm_first: bool
    epsilon: float
    reads_memory: bool
    dtype: str
    param_dtype: str

    def setup(self) -> None:
        dtypes, init = {"dtype": self.dtype, "param_dtype": self.param_dtype}, nn.initializers.xavier_uniform()
        norm = functools.partial(LayerNorm, self.epsilon, self.param_dtype)
        self.attention = MultiHeadAttention(self.heads, is_causal=self.reads_memory, **dtypes)
        self.attention_norm = norm()
        if self.reads_memory:
            self.cross_attention = CrossAttention(self.width, self.heads, **dtypes)
            self.cross_attention_norm = norm()
        self.mlp_in = HiddenLayer(self.hidden, "relu", init, **dtypes)
        self.mlp_out = nn.Dense(self.width, kernel_init=init, dot_general=product, **dtypes)
        self.mlp_norm = norm()
        self.drop = nn.Dropout(self.dropout)

    def __call__(
        self,
        x: jax.Array,
        memory: LayerCache | None,
        cache: LayerCache | None,
        mask: jax.Array | None,
        memory_mask: jax.Array | None,
        place: jax.Array | None,
        deterministic: bool,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Maps `x` `[b, n, width]` to the same shape. memory: of `read`; the others are as the attentions have them."""
        drop = functools.partial(self.drop, deterministic=deterministic)
        y = self.attention(self._before(self.attention_norm, x), mask, None, cache, place)
        y, cache = (y, None) if cache is None else y
        x = self._after(self.attention_norm, x + drop(y))
        if self.reads_memory:
            y = self.cross_attention(self._before(self.cross_attention_norm, x), memory, memory_mask)
            x = self._after(self.cross_attention_norm, x + drop(y))
        y = self.mlp_out(self.mlp_in(self._before(self.mlp_norm, x)))
        return self._after(self.mlp_norm, x + drop(y)), cache

    def read(self, carry: None, memory: jax.Array) -> tuple[None, LayerCache]:
        """The keys and values of memory `[b, m, width]`."""
        return carry, self.cross_attention.read(memory)

    def _before(self, norm: LayerNorm, x: jax.Array) -> jax.Array:
        return norm(x).astype(self.dtype) if self.norm_first else x

    def _after(self, norm: LayerNorm, x: jax.Array) -> jax.Array:
        return x if self.norm_first else norm(x).astype(self.dtype)


class EncoderDecoder(nn.Module):
    """Source tokens to the logits of target tokens. The defaults are the paper's base model: 63 million parameters.

    Source, target and the layer before the softmax share one embedding table, which is scaled by sqrt(width) where
    tokens are read. Each stack's parameters lie stacked under `encoder_blocks` and `decoder_blocks`, and one layer is
    compiled for all.

    Fields:
      vocabulary_size: of source and target, with the three tokens above.
      width, depth, heads: of the states, layers of each stack, heads a layer. hidden: units of the MLP.
      dropout: rate on the output of every attention and MLP, and on the sum of embeddings and positions (Sec. 5.4).
      max_length: most tokens of a source, and of a target without its last.
      positions: "sinusoidal", "learned" (a table each for source and target), or None: without, and a source is a set.
      norm_first: False, a norm comes after each sum, as published; True, before each attention and MLP, as in the
        transformers of CLIP and DALL-E, whose training hangs less on the warm-up (Xiong et al. 2020).
      final_norm: whether each stack ends in another norm, which one with `norm_first` wants.
      epsilon: of the norms.
      dtype: of the computation. param_dtype: of the parameters. Norms, softmax and logits are float32.

    Raises:
      InputError: for fields that do not fit each other.
    """

    vocabulary_size: int = 37_000
    width: int = 512
    depth: int = 6
    heads: int = 8
    hidden: int = 2048
    dropout: float = 0.1
    max_length: int = 512
    positions: str | None = "sinusoidal"
    norm_first: bool = False
    final_norm: bool = False
    epsilon: float = 1e-5
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "hidden", "max_length"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.vocabulary_size <= END + 1:
            raise InputError(f"vocabulary_size is {self.vocabulary_size}; padding, start and end alone take {END + 1}")
        if self.width % self.heads:
            raise InputError(f"width {self.width} does not divide into {self.heads} heads; choose heads that divide it")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout}; it must be 0 or more and below 1")
        if self.positions is not None and self.positions not in KINDS:
            raise InputError(f"positions is {self.positions!r}; it must be {', '.join(KINDS)} or None")
        if self.positions == "sinusoidal" and self.width % 2:
            raise InputError(
                f"width is {self.width}, and sinusoidal positions need an even one; set one, or positions=learned"
            )
        super().__post_init__()

    def setup(self) -> None:
        init, dtypes = nn.initializers.normal(self.width**-0.5), {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.token_embedding = nn.Embed(self.vocabulary_size, self.width, embedding_init=init, **dtypes)
        if self.positions is not None:
            self.source_positions, self.target_positions = (
                Positions(self.positions, self.max_length, self.param_dtype) for _ in range(2)
            )
        self.encoder_blocks, self.decoder_blocks = self._blocks(False), self._blocks(True)
        if self.final_norm:
            self.encoder_norm, self.decoder_norm = (LayerNorm(self.epsilon, self.param_dtype) for _ in range(2))
        self.drop = nn.Dropout(self.dropout)

    def encode(self, source: jax.Array, mask: jax.Array | None = None, deterministic: bool = True) -> jax.Array:
        """The encoder's states `[b, m, width]`, in `dtype`, of source tokens.

        Args:
          source: int32 `[b, m]`.
          mask: bool `[b, m]`, True for the tokens that may be attended to; None: all but padding.
          deterministic: False turns dropout on; it then needs the `dropout` key.

        Raises:
          InputError: for more than `max_length` tokens, and where their values are known, for one that is not in the
            vocabulary.
        """
        x = self._embed(source, "source", 0, deterministic)
        mask = source != PAD if mask is None else mask
        x, _ = self.encoder_blocks(x, None, None, mask[:, None, None], None, None, deterministic)
        return self.encoder_norm(x).astype(self.dtype) if self.final_norm else x

    def decode(
        self,
        target: jax.Array,
        memory: jax.Array,
        memory_mask: jax.Array | None = None,
        target_mask: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """The logits, float32 `[b, n, vocabulary_size]`, of the token behind each target token.

        Args:
          target: int32 `[b, n]`, from START on.
          memory: `[b, m, width]`, the encoder's states. memory_mask: bool `[b, m]`, that of the source; None: all of
            it may be attended to.
          target_mask: bool `[b, n]`, True for the tokens that may be attended to by later ones; None: all but padding.
          deterministic: see `encode`.

        Raises:
          InputError: as `encode`.
        """
        x = self._embed(target, "target", 0, deterministic)
        mask = target != PAD if target_mask is None else target_mask
        _, read = self.decoder_blocks.read(None, memory)
        x, _ = self.decoder_blocks(x, read, None, mask[:, None, None], memory_mask, None, deterministic)
        return self._logits(x)

    def __call__(
        self,
        source: jax.Array,
        target: jax.Array,
        source_mask: jax.Array | None = None,
        target_mask: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """The logits, float32 `[b, n, vocabulary_size]`, of the token behind each token of `target` `[b, n]`, under
        `source` `[b, m]`. Arguments as those of `encode` and `decode`."""
        source_mask = source != PAD if source_mask is None else source_mask
        memory = self.encode(source, source_mask, deterministic)
        return self.decode(target, memory, source_mask, target_mask, deterministic)

    def start(self, source: jax.Array, length: int, mask: jax.Array | None = None) -> Progress:
        """What `advance` needs to decode up to `length` tokens. Source and mask as those of `encode`.

        Raises:
          InputError: for a length below 1 or above `max_length`.
        """
        if not 1 <= length <= self.max_length:
            raise InputError(f"{length} tokens are to be decoded; it must be 1 to max_length={self.max_length}")
        mask = source != PAD if mask is None else mask
        _, read = self.decoder_blocks.read(None, self.encode(source, mask))
        shape = (self.depth, source.shape[0], length, self.heads, self.width // self.heads)
        layers = LayerCache(*(jnp.zeros(shape, self.dtype) for _ in range(2)))
        return Progress(Cache(layers, jnp.zeros((), jnp.int32)), read, mask)

    def advance(self, tokens: jax.Array, progress: Progress) -> tuple[jax.Array, Progress]:
        """The logits, float32 `[b, vocabulary_size]`, of the tokens behind `tokens` int32 `[b]`, of which the first is
        START; and the progress with these in it."""
        cache, memory, memory_mask = progress
        x = self._embed(tokens[:, None], "target", cache.length, True)
        x, layers = self.decoder_blocks(x, memory, cache.layers, cache.seen(1), memory_mask, cache.length, True)
        return self._logits(x)[:, 0], Progress(Cache(layers, cache.length + 1), memory, memory_mask)

    def _blocks(self, reads_memory: bool) -> nn.Module:
        """All layers of a stack as one, over their stacked parameters."""
        every, rngs = nn.broadcast, {"params": True, "dropout": True}
        call = {
            "variable_axes": {"params": 0, "intermediates": 0},
            "split_rngs": rngs,
            "in_axes": (0, 0, every, every, every, every),
            "length": self.depth,
        }
        read = {"variable_axes": {"params": 0}, "split_rngs": rngs, "in_axes": (every,), "length": self.depth}
        names = ("width", "heads", "hidden", "dropout", "norm_first", "epsilon", "dtype", "param_dtype")
        fields = {name: getattr(self, name) for name in names}
        return nn.scan(Layer, methods={"__call__": call, "read": read})(reads_memory=reads_memory, **fields)

    def _embed(self, tokens: jax.Array, name: str, first: jax.Array | int, deterministic: bool) -> jax.Array:
        check_mesh_axes(tokens)
        check_tokens(tokens, name, self.vocabulary_size, self.max_length)
        x = self.token_embedding(tokens) * math.sqrt(self.width)
        if self.positions is not None:
            x = getattr(self, f"{name}_positions")(x, first)
        return self.drop(x, deterministic=deterministic)

    def _logits(self, x: jax.Array) -> jax.Array:
        x = self.decoder_norm(x) if self.final_norm else x.astype(jnp.float32)
        return x @ self.token_embedding.embedding.astype(jnp.float32).T


def check_tokens(tokens: jax.Array, name: str, vocabulary_size: int, max_length: int) -> None:
    """Raises InputError unless tokens are int `[b, n]`, at most `max_length` a row, and where their values are known,
    in 0..vocabulary_size - 1."""
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise InputError(f"the {name} must be integers [b, n], not {tokens.dtype} {list(tokens.shape)}")
    if tokens.shape[1] > max_length:
        raise InputError(f"the {name} has {tokens.shape[1]} tokens; the most are max_length={max_length}")
    if isinstance(tokens, jax.core.Tracer) or not tokens.size:
        return
    values = np.asarray(tokens)
    if values.min() < 0 or values.max() >= vocabulary_size:
        raise InputError(
            f"the {name}'s tokens go from {values.min()} to {values.max()}; they must lie in 0 to {vocabulary_size - 1}"
        )


def sequence_loss(logits: jax.Array, labels: jax.Array, smoothing: float | jax.Array = 0.0) -> jax.Array:
    """The cross-entropy in nats a token, a float32 scalar: the mean over all labels of the batch but padding.

    With label smoothing (Szegedy et al. 2016; 0.1 in the paper) the label has the probability 1 - smoothing, and all
    of the vocabulary together, itself among it, the rest in equal parts. The least loss is then that distribution's
    entropy, and not 0.

    Args:
      logits: `[b, n, v]`. labels: int32 `[b, n]`. smoothing: 0 to below 1.

    Raises:
      InputError: for a smoothing beyond that.
    """
    if not isinstance(smoothing, jax.Array) and not 0 <= smoothing < 1:
        raise InputError(f"the label smoothing is {smoothing}; it must be 0 or more and below 1")
    logits = logits.astype(jnp.float32)
    wrong = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    uniform = nn.logsumexp(logits, axis=-1) - logits.mean(axis=-1)
    return _mean_over_tokens((1.0 - smoothing) * wrong + smoothing * uniform, labels)


def token_accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """How many of the labels int32 `[b, n]`, but padding, have the largest logit of `[b, n, v]`: 0 to 1."""
    return _mean_over_tokens((jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32), labels)


def _mean_over_tokens(values: jax.Array, labels: jax.Array) -> jax.Array:
    real = (labels != PAD).astype(jnp.float32)
    return (values * real).sum() / jnp.maximum(real.sum(), 1.0)


def attention_maps(module: EncoderDecoder, params: Any, source: jax.Array, target: jax.Array) -> dict[str, jax.Array]:
    """What attends to what, float32 `[layers, b, heads, queries, keys]` whose last axis sums to 1.

    "encoder": source tokens to each other; "decoder": target tokens to themselves and those before; "cross": target
    tokens to source tokens. Arguments as those of `EncoderDecoder`.
    """
    _, state = module.apply({"params": params}, source, target, mutable=["intermediates"])
    encoder, decoder = (state["intermediates"][name] for name in ("encoder_blocks", "decoder_blocks"))
    found = {"encoder": encoder["attention"], "decoder": decoder["attention"], "cross": decoder["cross_attention"]}
    return {name: weights["weights"][0] for name, weights in found.items()}
