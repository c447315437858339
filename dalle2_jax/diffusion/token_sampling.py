"""Sampling tokens from a network's logits: temperature, top-k, top-p, guidance, and one `lax.scan` over a sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import jax
import jax.numpy as jnp

from dalle2_jax.diffusion.guidance import is_guided
from dalle2_jax.diffusion.sampler import fold_in
from dalle2_jax.errors import InputError, check_number

if TYPE_CHECKING:
    from typing import Self

ALL = 2**31 - 1
State = TypeVar("State")


@dataclass(frozen=True, kw_only=True)
class TokenSampling:
    """How tokens are sampled; a network's own settings are a subclass, registered as a pytree of these numbers.

    Fields:
      temperature: divides the logits; 0 takes the most probable token.
      top_k: only the so many most probable tokens; None: all.
      top_p: only the most probable tokens that together have this probability.
      guidance_scale: 1 or None leaves guidance off.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    guidance_scale: float | None = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.temperature, int | float):
            check_number("temperature", self.temperature, at_least=0)
        if isinstance(self.guidance_scale, int | float):
            check_number("guidance_scale", self.guidance_scale)
        check_fraction("top_p", self.top_p)
        if isinstance(self.top_k, int) and self.top_k < 1:
            raise InputError(f"top_k is {self.top_k}; it must be 1 or more, or None for all codes")

    @property
    def is_guided(self) -> bool:
        """Whether the network is asked for both predictions: not where the scale is known to be 1."""
        return is_guided(self.guidance_scale)

    def turned(self) -> Self:
        """The settings as an argument of a jitted function: a scale of 1 becomes None, a program of its own."""
        scale = self.guidance_scale if self.is_guided else None
        return dataclasses.replace(self, guidance_scale=scale, top_k=ALL if self.top_k is None else self.top_k)

    def without_effect(self) -> dict[str, str]:
        """Fields that have no effect beside the others, and why not."""
        return {}


def check_fraction(name: str, value: jax.Array | float) -> None:
    """Raises InputError for a number, where it is known, that is not above 0 and at most 1."""
    if isinstance(value, int | float):
        check_number(name, value, above=0, at_most=1)


def restrict(logits: jax.Array, sampling: TokenSampling) -> jax.Array:
    """Log probabilities `[..., n]` after temperature, top-k and top-p; -inf for what is not to be sampled.

    Top-p keeps the smallest set of the most probable tokens that has at least that probability (Holtzman et al. 2020);
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


def sample_sequence(
    keys: jax.Array,
    start: tuple[jax.Array, State],
    advance: Callable[[jax.Array, State], tuple[jax.Array, State]],
    sampling: TokenSampling,
    count: int,
    first: int = 0,
) -> jax.Array:
    """`count` tokens a row, each under those before it: int32 `[b, count]`, by one `lax.scan`.

    Args:
      keys: `[b]`, of which each alone decides its row.
      start: the logits `[b, n]` of the first token, and the state from which `advance` goes on. With guidance both have
        2 b rows, the null caption's in the second half, and the sampled tokens are given to both halves.
      advance: tokens int32 `[b]` (or `[2 b]`) and the state to the logits of the next token and the state after it.
      first: the number of the first token; token i is sampled with `fold_in(key, i)`.
    """

    def choose(logits: jax.Array, number: jax.Array) -> jax.Array:
        logits = restrict(guided_log_probabilities(logits, sampling.guidance_scale), sampling)
        return jax.vmap(jax.random.categorical)(fold_in(keys, number), logits).astype(jnp.int32)

    def step(carry: tuple[jax.Array, State], number: jax.Array) -> tuple[tuple[jax.Array, State], jax.Array]:
        logits, state = carry
        tokens = choose(logits, number)
        both = jnp.concatenate([tokens, tokens]) if sampling.is_guided else tokens
        return advance(both, state), tokens

    numbers = first + jnp.arange(count - 1, dtype=jnp.int32)
    (logits, _), tokens = jax.lax.scan(step, start, numbers)
    last = choose(logits, jnp.int32(first + count - 1))
    return jnp.concatenate([tokens.T, last[:, None]], axis=1)
