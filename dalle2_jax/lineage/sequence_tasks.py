"""Toy translations for the Transformer: the target is the source, reversed, sorted or copied.

Every example is a pure function of a key. What is held out is decided by the sequence itself, so that no sequence of
the one kind is ever of the other, however many are made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dalle2_jax.diffusion.sampler import keys_for
from dalle2_jax.errors import InputError, nearest
from dalle2_jax.lineage.encoder_decoder import END, PAD, START

NAMES = ("reverse", "sort", "copy")
FIRST = END + 1  # the token of the smallest symbol


class Sequences(NamedTuple):
    """A batch of translations.

    source: int32 `[b, length + 1]`, its symbols, END and padding. target: int32 `[b, length + 2]`, START, its symbols,
    END and padding.
    """

    source: jax.Array
    target: jax.Array


@dataclass(frozen=True)
class SequenceTask:
    """What is translated, and how.

    name: of `NAMES`. symbols: how many there are; as tokens they follow on padding, start and end. length: most
    symbols of a sequence. shortest: fewest; None: all have `length`.

    Raises:
        InputError: for an unknown name, fewer than two symbols, or lengths out of order.
    """

    name: str = "reverse"
    symbols: int = 20
    length: int = 10
    shortest: int | None = None

    def __post_init__(self) -> None:
        _check_name(self.name)
        if self.symbols < 2:
            raise InputError(f"a sequence task has {self.symbols} symbols; it must be 2 or more")
        if self.length < 1:
            raise InputError(f"a sequence task's length is {self.length}; it must be 1 or more")
        if self.shortest is not None and not 1 <= self.shortest <= self.length:
            raise InputError(f"the shortest sequence has {self.shortest} symbols; it must be 1 to length={self.length}")

    @property
    def vocabulary_size(self) -> int:
        """How many tokens there are: the symbols, padding, start and end."""
        return FIRST + self.symbols


def make_sequences(key: jax.Array, task: SequenceTask, count: int, held_out: bool = False) -> Sequences:
    """`count` random sequences and their translations.

    The symbols 0 to s - 1 of a sequence that is held out add up to a multiple of s, those of no other one; so do its
    translation's. Of each kind and length all sequences are equally probable, and 1/s of all are held out.

    `key` is one key, or one a sequence `[count]`, with which a sequence is the same alone and in any batch.

    Raises:
        InputError: for another number of keys.
    """
    shortest = task.length if task.shortest is None else task.shortest

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        length_key, symbols_key, remainder_key = jax.random.split(key, 3)
        length = jax.random.randint(length_key, (), shortest, task.length + 1)
        symbols = jax.random.randint(symbols_key, (task.length,), 0, task.symbols)
        others = jnp.where(jnp.arange(task.length) < length, symbols, 0)[1:].sum()
        remainder = 0 if held_out else jax.random.randint(remainder_key, (), 1, task.symbols)
        return symbols.at[0].set((remainder - others) % task.symbols), length

    symbols, lengths = jax.vmap(one)(keys_for(key, count))
    target = _tokens(translate(task.name, symbols, lengths), lengths)
    start = jnp.full((count, 1), START, jnp.int32)
    return Sequences(_tokens(symbols, lengths), jnp.concatenate([start, target], axis=1))


def translate(name: str, symbols: jax.Array, lengths: jax.Array) -> jax.Array:
    """The translation of symbols int32 `[b, n]`, of which the first `lengths` int32 `[b]` of each row are real.

    name: of `NAMES`. What stands behind the real ones means nothing, in the result as well.

    Raises:
        InputError: for an unknown name.
    """
    _check_name(name)
    places = jnp.arange(symbols.shape[1])[None]
    real = places < lengths[:, None]
    if name == "sort":
        return jnp.sort(jnp.where(real, symbols, jnp.iinfo(jnp.int32).max), axis=1)
    if name == "reverse":
        return jnp.take_along_axis(symbols, jnp.where(real, lengths[:, None] - 1 - places, places), axis=1)
    return symbols


def is_held_out(task: SequenceTask, source: jax.Array) -> jax.Array:
    """Which sources `[b, n]` are held out, bool `[b]`; see `make_sequences`."""
    return jnp.where(source >= FIRST, source - FIRST, 0).sum(axis=1) % task.symbols == 0


def _check_name(name: str) -> None:
    if name not in NAMES:
        raise InputError(f"there is no sequence task {name!r}; the nearest is {nearest(name, NAMES)!r}")


def _tokens(symbols: jax.Array, lengths: jax.Array) -> jax.Array:
    """Symbols `[b, n]` as tokens int32 `[b, n + 1]`: END behind the last, then padding."""
    places, lengths = jnp.arange(symbols.shape[1] + 1)[None], lengths[:, None]
    tokens = jnp.pad(symbols + FIRST, ((0, 0), (0, 1)))
    return jnp.where(places < lengths, tokens, jnp.where(places == lengths, END, PAD)).astype(jnp.int32)
