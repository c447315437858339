"""Multi-head attention, and the one place where an attention kernel is chosen."""

import functools
import logging

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle2_jax.errors import InputError
from dalle2_jax.layers.cache import LayerCache
from dalle2_jax.layers.kernels.attention import late_normalised_attention
from dalle2_jax.layers.kernels.dense import product
from dalle2_jax.layers.kernels.target import traced_for_nvidia

logger = logging.getLogger(__name__)


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    key_lengths: jax.Array | None = None,
    is_causal: bool = False,
) -> jax.Array:
    """softmax(q k / sqrt(head_dim)) v, with the softmax in float32.

    Uses cuDNN's flash attention for bfloat16 and float16 on NVIDIA GPUs, XLA's products and softmax for them elsewhere,
    and `late_normalised_attention` for float32; each choice is logged once. `traced_for_nvidia` says which device it is
    for.

    Say with `key_lengths` what can be said so: a mask costs cuDNN an array of all queries by all keys.

    Args:
      query: `[b, queries, heads, head_dim]`.
      key: `[b, keys, heads, head_dim]`.
      value: `[b, keys, heads, head_dim]`.
      mask: bool, broadcastable to `[b, heads, queries, keys]`; True means that the query sees the key.
      key_lengths: int32 `[b]`; the keys from there on are not seen. `pack` makes them of a mask. At least 1.
      is_causal: whether query `i` sees only keys up to `i`, on top of the others.

    Returns:
      `[b, queries, heads, head_dim]` in the dtype of `value`.
    """
    shape = query.shape[1], key.shape[1], query.shape[-1]
    implementation = _implementation(str(query.dtype), *shape, mask is not None, traced_for_nvidia())
    if implementation == "cudnn":
        return flash_attention(query, key, value, mask, key_lengths, is_causal)
    if key_lengths is not None:
        seen = (jnp.arange(key.shape[1])[None] < key_lengths[:, None])[:, None, None]
        mask = seen if mask is None else mask & seen
    if implementation == "normalised last":
        return late_normalised_attention(query, key, value, mask, is_causal)
    return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=is_causal, implementation="xla").astype(
        value.dtype
    )


def attention_weights(
    query: jax.Array,
    key: jax.Array,
    *,
    mask: jax.Array | None = None,
    key_lengths: jax.Array | None = None,
    is_causal: bool = False,
) -> jax.Array:
    """The softmax of `dot_product_attention`, to be looked at: float32 `[b, heads, queries, keys]`, each row's sum 1.

    Arguments as there.
    """
    query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    seen = jnp.ones((1, 1, 1, 1), bool) if mask is None else mask
    if key_lengths is not None:
        seen = seen & (jnp.arange(key.shape[1])[None] < key_lengths[:, None])[:, None, None]
    if is_causal:
        seen = seen & jnp.tril(jnp.ones(logits.shape[-2:], bool))[None, None]
    return nn.softmax(jnp.where(seen, logits, jnp.finfo(jnp.float32).min / 2))


def pack(x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Moves the real tokens of each row to its front, in their order, so that a length says which they are.

    Args:
      x: `[b, n, d]`.
      mask: bool `[b, n]`, True for real tokens.

    Returns:
      `x` in the new order; int32 `[b]`, the number of real tokens; int32 `[b, n]`, where each token was.
    """
    order = jnp.argsort(~mask, axis=1, stable=True)
    return jnp.take_along_axis(x, order[:, :, None], axis=1), mask.sum(axis=1, dtype=jnp.int32), order


def flash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    key_lengths: jax.Array | None,
    is_causal: bool,
    implementation: str = "cudnn",
) -> jax.Array:
    """cuDNN's attention, for any number of queries and keys. Arguments as in `dot_product_attention`.

    jax refuses odd numbers of either in training, so that an odd one gets one more. A key more is not seen: it lies
    behind the lengths, the causal mask or the mask. What a query more gives is cut off. implementation: "xla" computes
    the same on any device.
    """
    batch, queries, keys = query.shape[0], query.shape[1], key.shape[1]
    if mask is not None:
        mask = jnp.broadcast_to(mask, (batch, mask.shape[1], queries, keys))
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, queries % 2), (0, keys % 2)))
    elif key_lengths is None and keys % 2 and not (is_causal and queries <= keys):
        key_lengths = jnp.full(batch, keys, jnp.int32)

    def even(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))

    y = jax.nn.dot_product_attention(
        even(query),
        even(key),
        even(value),
        mask=mask,
        is_causal=is_causal,
        key_value_seq_lengths=key_lengths,
        implementation=implementation,
    )
    return y[:, :queries].astype(value.dtype)


def last_of(x: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """The last real token of each row, `[b, 1, ...]` of `[b, n, ...]`; the last of all without `lengths` `[b]`."""
    if lengths is None:
        return x[:, -1:]
    return jnp.take_along_axis(x, jnp.expand_dims(lengths - 1, range(1, x.ndim)), axis=1)


# Before, jax asked cuDNN for the mask's gradient too, which cuDNN has at batch 1 alone (jax issue 30593).
MASKS_IN_CUDNN = jax.__version_info__ >= (0, 11)


@functools.cache
def _implementation(dtype: str, queries: int, keys: int, head_dim: int, masked: bool, nvidia: bool) -> str:
    half = dtype in ("bfloat16", "float16")
    # A single query is a product of a vector, for which there is nothing to be saved.
    allowed = half and head_dim % 8 == 0 and head_dim <= 128 and queries > 1 and (MASKS_IN_CUDNN or not masked)
    name = "cudnn" if allowed and nvidia else "xla" if half else "normalised last"
    logger.info("attention of %d queries over %d keys, head size %d, %s: %s", queries, keys, head_dim, dtype, name)
    return name


class MultiHeadAttention(nn.Module):
    """Self-attention with one fused projection for queries, keys and values.

    The kernel of `qkv` is `[width, heads, 3, head_dim]`, so that heads can be split among devices. Kernels start as in
    CLIP's code: normal, with a standard deviation of width^-1/2, times `out_scale` for the output projection. With
    `mutable=["intermediates"]` the weights are stored as "weights".

    Fields:
      heads: number of heads; must divide the width.
      is_causal: whether position `i` sees only positions up to `i`.
      last_only: whether only the last real position asks, which sees all of them.
      out_scale: factor on the initial output kernel (deep stacks shrink their residual branches).
      dtype: of the computation. param_dtype: of the parameters.
    """

    heads: int
    is_causal: bool = False
    last_only: bool = False
    out_scale: float = 1.0
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        lengths: jax.Array | None = None,
        cache: LayerCache | None = None,
        place: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, LayerCache]:
        """Attends within `x`, or with a cache within all tokens up to those of `x`.

        Args:
          x: `[batch, tokens, width]`.
          mask: bool, broadcastable to `[batch, heads, tokens, tokens]`, or with `last_only` to
            `[batch, heads, 1, tokens]`; True means that the query sees the key. With a cache of m places, to
            `[batch, heads, tokens, m]`, and it also has to say what is causal.
          lengths: int32 `[batch]`, how many tokens of each row are real; those behind them are not seen.
          cache: keys and values of earlier tokens. place: int32, where those of `x` go in it.

        Returns:
          `[batch, tokens, width]`, or `[batch, 1, width]` with `last_only`. With a cache, that and the cache with the
          keys and values of `x` in it.

        Raises:
          InputError: if the width does not divide by `heads`.
        """
        batch, _, width = x.shape
        if width % self.heads:
            raise InputError(f"width {width} does not divide into {self.heads} heads; choose heads that divide it")
        scale, dtypes = width**-0.5, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        qkv = nn.DenseGeneral(
            (self.heads, 3, width // self.heads),
            kernel_init=nn.initializers.normal(scale),
            dot_general=product,
            name="qkv",
            **dtypes,
        )(x)
        query, key, value = (part.squeeze(3) for part in jnp.split(qkv, 3, axis=3))
        if self.last_only:
            query = last_of(query, lengths)
        is_causal = self.is_causal and not self.last_only
        if cache is not None:
            key, value = cache = cache.write(key, value, place)
            is_causal = False
        if self.is_mutable_collection("intermediates"):
            weights = attention_weights(query, key, mask=mask, key_lengths=lengths, is_causal=is_causal)
            self.sow("intermediates", "weights", weights)
        y = dot_product_attention(query, key, value, mask=mask, key_lengths=lengths, is_causal=is_causal)
        y = y.reshape(batch, -1, width)
        init = nn.initializers.normal(scale * self.out_scale)
        y = nn.Dense(width, kernel_init=init, dot_general=product, name="out", **dtypes)(y)
        return y if cache is None else (y, cache)
