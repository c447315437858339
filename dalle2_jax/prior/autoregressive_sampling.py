"""Sampling the autoregressive prior: code after code from a key-value cache, by one `lax.scan` (Sec. 2.2)."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from dalle2_jax.captions import EncodedCaptions
from dalle2_jax.diffusion.guidance import is_guided
from dalle2_jax.diffusion.sampler import fold_in, split_each
from dalle2_jax.errors import InputError
from dalle2_jax.prior.condition import caption_condition

if TYPE_CHECKING:
    from dalle2_jax.prior.autoregressive import AutoregressivePrior

ALL = 2**31 - 1


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("temperature", "top_k", "top_p", "guidance_scale", "top_similarity"),
    meta_fields=("candidates",),
)
@dataclass(frozen=True, kw_only=True)
class AutoregressiveSampling:
    """An autoregressive prior's sampling settings; a trained stage records them as its defaults.

    It is a pytree whose leaves are the numbers that people turn, as those of `Sampling`; `turned` prepares it to be an
    argument of a jitted function, which compiles once for all their values.

    Fields:
      temperature: divides the logits; 0 takes the most probable code.
      top_k: only the so many most probable codes; None: all.
      top_p: only the most probable codes that together have this probability.
      guidance_scale: 1 or None leaves guidance off.
      top_similarity: the token of z_i . z_t is drawn from this share of its buckets, the upper ones (0.5 in the paper).
      candidates: how many are sampled to keep the best of.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    guidance_scale: float | None = 1.0
    top_similarity: float = 0.5
    candidates: int = 1

    def __post_init__(self) -> None:
        for name, low, high in (("temperature", 0, None), ("top_p", 0, 1), ("top_similarity", 0, 1)):
            value = getattr(self, name)
            if isinstance(value, int | float) and (value < low or (high is not None and not low < value <= high)):
                wanted = "0 or more" if high is None else "above 0 and at most 1"
                raise InputError(f"{name} is {value}; it must be {wanted}")
        if isinstance(self.top_k, int) and self.top_k < 1:
            raise InputError(f"top_k is {self.top_k}; it must be 1 or more, or None for all codes")
        if self.candidates < 1:
            raise InputError(f"candidates is {self.candidates}; at least one is needed")

    @property
    def is_guided(self) -> bool:
        """Whether the network is asked for both predictions: not where the scale is known to be 1."""
        return is_guided(self.guidance_scale)

    def turned(self) -> AutoregressiveSampling:
        """The settings as an argument of a jitted function: a scale of 1 becomes None, a program of its own."""
        scale = self.guidance_scale if self.is_guided else None
        return dataclasses.replace(self, guidance_scale=scale, top_k=ALL if self.top_k is None else self.top_k)

    def without_effect(self) -> dict[str, str]:
        """Fields that have no effect beside the others, and why not."""
        return {}


def restrict(logits: jax.Array, sampling: AutoregressiveSampling) -> jax.Array:
    """Log probabilities `[..., n]` after temperature, top-k and top-p; -inf for what is not to be sampled.

    Top-p keeps the smallest set of the most probable codes that has at least that probability (Holtzman et al. 2020);
    the most probable one always stays, and the others keep their proportions.
    """
    logits = logits.astype(jnp.float32)
    temperature = jnp.asarray(sampling.temperature, jnp.float32)
    logits = jax.nn.log_softmax(logits / jnp.maximum(temperature, 1e-6))
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranks = jnp.argsort(order, axis=-1)
    probabilities = jnp.exp(jnp.take_along_axis(logits, order, axis=-1))
    before = jnp.take_along_axis(jnp.cumsum(probabilities, axis=-1) - probabilities, ranks, axis=-1)
    top_k = ALL if sampling.top_k is None else sampling.top_k
    kept = (ranks == 0) | ((ranks < top_k) & (before < sampling.top_p) & (temperature > 0))
    return jnp.where(kept, logits, -jnp.inf)


def guided_log_probabilities(logits: jax.Array, guidance_scale: jax.Array | float | None) -> jax.Array:
    """Log probabilities `[b, n]`, up to a constant, of `logits` `[2 b, n]`, the null caption's in the second half.

    unconditional + scale (conditional - unconditional), of log probabilities (Ho & Salimans 2021, with tokens in place
    of scores). Without guidance the logits as they are.
    """
    if not is_guided(guidance_scale):
        return logits
    conditional, unconditional = jnp.split(jax.nn.log_softmax(logits.astype(jnp.float32)), 2)
    return unconditional + guidance_scale * (conditional - unconditional)


def draw_similarity(keys: jax.Array, buckets: int, share: jax.Array | float) -> jax.Array:
    """Buckets of z_i . z_t int32 `[b]`, drawn evenly from the upper `share` of them: all have as many examples."""
    drawn = 1.0 - share * jax.vmap(jax.random.uniform)(keys)
    return jnp.minimum((drawn * buckets).astype(jnp.int32), buckets - 1)


def sample_codes(
    prior: AutoregressivePrior,
    params: Any,
    keys: jax.Array,
    captions: EncodedCaptions,
    sampling: AutoregressiveSampling,
) -> jax.Array:
    """The codes int32 `[b, k]` of one image embedding a caption.

    Each key alone decides its sample. Guidance runs the null caption in a second half of the batch, with a cache of its
    own and the codes that were sampled.
    """
    batch, guided = len(captions), sampling.is_guided
    similarity_keys, code_keys = split_each(keys)
    similarity = draw_similarity(similarity_keys, prior.similarity_buckets, sampling.top_similarity)
    condition = {**caption_condition(prior, captions), "similarity": similarity, "keep_text": jnp.ones(batch, bool)}
    if guided:
        null = {**condition, "keep_text": jnp.zeros(batch, bool)}
        condition = jax.tree.map(lambda *halves: jnp.concatenate(halves), condition, null)

    def choose(logits: jax.Array, number: jax.Array) -> jax.Array:
        logits = restrict(guided_log_probabilities(logits, sampling.guidance_scale), sampling)
        return jax.vmap(jax.random.categorical)(fold_in(code_keys, number), logits).astype(jnp.int32)

    def step(carry, number):
        logits, progress = carry
        codes = choose(logits, number)
        both = jnp.concatenate([codes, codes]) if guided else codes
        return prior.apply({"params": params}, both, progress, method="advance"), codes

    first = prior.apply({"params": params}, **condition, method="start")
    numbers = jnp.arange(prior.components - 1, dtype=jnp.int32)
    (logits, _), codes = jax.lax.scan(step, first, numbers)
    last = choose(logits, jnp.int32(prior.components - 1))
    return jnp.concatenate([codes.T, last[:, None]], axis=1)
