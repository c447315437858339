"""Multi-head attention, and the one place where an attention kernel is chosen."""

import functools
import logging

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle2_jax.layers.product import product

logger = logging.getLogger(__name__)


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    is_causal: bool = False,
) -> jax.Array:
    """softmax(q k / sqrt(head_dim)) v, with the softmax in float32.

    Uses cuDNN's flash attention for bfloat16 and float16 on CUDA where the shapes allow it, XLA's products and softmax
    for them elsewhere, and `normalised_last` for float32; each choice is logged once.

    Args:
      query: `[batch, queries, heads, head_dim]`.
      key: `[batch, keys, heads, head_dim]`.
      value: `[batch, keys, heads, head_dim]`.
      mask: bool, broadcastable to `[batch, heads, queries, keys]`; True means that the query sees the key.
      is_causal: whether query `i` sees only keys up to `i`, on top of `mask`.

    Returns:
      `[batch, queries, heads, head_dim]` in the dtype of `value`.
    """
    masked = mask is not None
    implementation = _implementation(str(query.dtype), query.shape[1], key.shape[1], query.shape[-1], masked)
    if masked and implementation == "cudnn":
        mask = jnp.broadcast_to(mask, (query.shape[0], mask.shape[1], query.shape[1], key.shape[1]))
    if implementation == "normalised last":
        return normalised_last(query, key, value, mask, is_causal)
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask, is_causal=is_causal, implementation=implementation
    ).astype(value.dtype)


def normalised_last(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, is_causal: bool
) -> jax.Array:
    """Attention in float32 that divides by the softmax's sum after the product with the values, as flash attention.

    The division then runs over head_dim numbers a query and not over one for each key, and so does the sum that the
    softmax's derivative takes: on a CPU, where XLA adds up along the last axis slowly, a twentieth of a U-Net's step.
    Arguments as in `dot_product_attention`.
    """
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    if is_causal:
        seen = jnp.tril(jnp.ones(logits.shape[-2:], bool))[None, None]
        mask = seen if mask is None else mask & seen
    if mask is not None:
        # Finite, so that a query that sees no key has a finite result.
        logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min / 2)
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    sums = weights.sum(axis=-1, keepdims=True)
    return jnp.swapaxes(jnp.einsum("bhqk,bkhd->bhqd", weights, value) / sums, 1, 2)


@functools.cache
def _implementation(dtype: str, queries: int, keys: int, head_dim: int, masked: bool) -> str:
    allowed = (
        dtype in ("bfloat16", "float16")
        and head_dim % 8 == 0
        and head_dim <= 128
        # cuDNN takes a mask as a bias, whose backward pass asks for even lengths.
        and not (masked and (queries % 2 or keys % 2))
    )
    if dtype == "float32":
        name = "normalised last"
    else:
        name = "cudnn" if allowed and _on_cuda() else "xla"
    logger.info("attention of %d queries over %d keys, head size %d, %s: %s", queries, keys, head_dim, dtype, name)
    return name


def _on_cuda() -> bool:
    return jax.default_backend() == "gpu" and "cuda" in jax.devices()[0].client.platform_version.lower()


class MultiHeadAttention(nn.Module):
    """Self-attention with one fused projection for queries, keys and values.

    The kernel of `qkv` is `[width, heads, 3, head_dim]`, so that heads can be split among devices. Kernels start as in
    CLIP's code: normal, with a standard deviation of width^-1/2, times `out_scale` for the output projection.

    Fields:
      heads: number of heads; must divide the width.
      is_causal: whether position `i` sees only positions up to `i`.
      last_only: whether only the last position asks, which sees all of them.
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
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Attends within `x`.

        Args:
          x: `[batch, tokens, width]`.
          mask: bool, broadcastable to `[batch, heads, tokens, tokens]`, or with `last_only` to
            `[batch, heads, 1, tokens]`; True means that the query sees the key.

        Returns:
          `[batch, tokens, width]`, or `[batch, 1, width]` with `last_only`.

        Raises:
          ValueError: if the width does not divide by `heads`.
        """
        batch, _, width = x.shape
        if width % self.heads:
            raise ValueError(f"width {width} does not divide into {self.heads} heads; choose heads that divide it")
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
            query = query[:, -1:]
        y = dot_product_attention(query, key, value, mask=mask, is_causal=self.is_causal and not self.last_only)
        y = y.reshape(batch, -1, width)
        init = nn.initializers.normal(scale * self.out_scale)
        return nn.Dense(width, kernel_init=init, dot_general=product, name="out", **dtypes)(y)
