"""Importance sampling of training timesteps by the losses that were seen there (IDDPM Sec. 3.3).

history = loss_history(process.steps)
i, weights = sample_timesteps(key, history, batch_size)
...                                             # train on (weights * loss).mean()
history = update_history(history, i, losses)    # the unweighted ones
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# How often a timestep is sampled whatever its losses, so that none is forgotten.
UNIFORM_SHARE = 0.001


class LossHistory(NamedTuple):
    """The last losses seen at each timestep, float32 [steps, length], and how many there are, int32 [steps]."""

    losses: jax.Array
    counts: jax.Array


def loss_history(steps: int, length: int = 10) -> LossHistory:
    """An empty history that keeps the last `length` losses of each of `steps` timesteps."""
    return LossHistory(jnp.zeros((steps, length), jnp.float32), jnp.zeros(steps, jnp.int32))


def timestep_probabilities(history: LossHistory) -> jax.Array:
    """How likely each timestep is, float32 [steps]: as sqrt(E[L^2]) (IDDPM Eq. 18), uniform until all are known."""
    steps, length = history.losses.shape
    size = jnp.sqrt(jnp.mean(jnp.square(history.losses), axis=1))
    share = size / jnp.maximum(size.sum(), 1e-20)
    known = (1.0 - UNIFORM_SHARE) * share + UNIFORM_SHARE / steps
    return jnp.where((history.counts >= length).all(), known, 1.0 / steps)


def sample_timesteps(key: jax.Array, history: LossHistory, batch: int) -> tuple[jax.Array, jax.Array]:
    """Timesteps int32 [batch] and the weights float32 [batch] that leave the loss's expectation as it was."""
    probabilities = timestep_probabilities(history)
    i = jax.random.choice(key, probabilities.shape[0], (batch,), p=probabilities).astype(jnp.int32)
    return i, 1.0 / (probabilities.shape[0] * probabilities[i])


def update_history(history: LossHistory, i: jax.Array, losses: jax.Array) -> LossHistory:
    """The history after the `losses` float32 [batch] of the timesteps `i` int32 [batch], taken in their order."""
    length = history.losses.shape[1]

    def add(number: jax.Array, history: LossHistory) -> LossHistory:
        place, loss = i[number], losses[number].astype(jnp.float32)
        row, count = history.losses[place], history.counts[place]
        pushed = jnp.append(row[1:], loss)
        row = jnp.where(count == length, pushed, row.at[jnp.minimum(count, length - 1)].set(loss))
        counts = history.counts.at[place].set(jnp.minimum(count + 1, length))
        return LossHistory(history.losses.at[place].set(row), counts)

    return jax.lax.fori_loop(0, i.shape[0], add, history)
