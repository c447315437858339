"""How a target is written: the Transformer's decoder, one token after the other, from its cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dalle2_jax.diffusion.sampler import fold_in, keys_for
from dalle2_jax.errors import InputError
from dalle2_jax.lineage.encoder_decoder import END, PAD, START, EncoderDecoder


def greedy_decode(module: EncoderDecoder, params: Any, source: jax.Array, length: int) -> jax.Array:
    """The most probable token after the other, int32 `[b, length]`: up to END, and padding behind it.

    One `lax.scan`, in which each layer's keys and values of earlier tokens are kept. PAD and START are never written.

    Args:
      source: int32 `[b, m]`, padded with PAD. length: most tokens, END among them.

    Raises:
      InputError: as `EncoderDecoder.start`.
    """
    return _decode(module, params, source, length, lambda logits, _: jnp.argmax(logits, axis=-1))


def sample_decode(
    key: jax.Array,
    module: EncoderDecoder,
    params: Any,
    source: jax.Array,
    length: int,
    temperature: float | jax.Array = 1.0,
) -> jax.Array:
    """As `greedy_decode`, each token sampled from the softmax of logits / temperature.

    `key` is one key, or one a source `[b]`, with which a sample is the same alone and in any batch. temperature: above
    0; the lower, the nearer to the most probable.

    Raises:
      InputError: for a temperature of 0 or less, another number of keys, and as `EncoderDecoder.start`.
    """
    if not isinstance(temperature, jax.core.Tracer) and not temperature > 0:
        raise InputError(f"the temperature is {temperature}; it must be above 0 (greedy_decode is the limit)")
    keys = keys_for(key, source.shape[0])

    def choose(logits: jax.Array, number: jax.Array) -> jax.Array:
        return jax.vmap(jax.random.categorical)(fold_in(keys, number), logits / temperature)

    return _decode(module, params, source, length, choose)


def _decode(
    module: EncoderDecoder,
    params: Any,
    source: jax.Array,
    length: int,
    choose: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """choose: of logits `[b, v]` and the token's number, tokens `[b]`."""
    apply = functools.partial(module.apply, {"params": params})
    written = jnp.isin(jnp.arange(module.vocabulary_size), jnp.array([PAD, START]), invert=True)[None]

    def step(carry, number):
        tokens, ended, progress = carry
        logits, progress = apply(tokens, progress, method="advance")
        tokens = choose(jnp.where(written, logits, -jnp.inf), number).astype(jnp.int32)
        tokens = jnp.where(ended, PAD, tokens)
        return (tokens, ended | (tokens == END), progress), tokens

    batch = source.shape[0]
    carry = jnp.full(batch, START, jnp.int32), jnp.zeros(batch, bool), apply(source, length, method="start")
    _, tokens = jax.lax.scan(step, carry, jnp.arange(length, dtype=jnp.int32))
    return tokens.T
