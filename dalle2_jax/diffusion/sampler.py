"""Samplers: short functions of (key, denoiser, x_T, process), each one `lax.scan` over a single public step.

A denoiser is any f(x_t, t) -> prediction, where t is int32 [batch] in the original timesteps; it may return bfloat16,
and the chain is float32. `process.respaced("27")` is how a sampler is given fewer steps.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dalle2_jax.diffusion.process import Process, gather
from dalle2_jax.errors import InputError

Denoiser = Callable[[jax.Array, jax.Array], jax.Array]
Step = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def ddpm_step(output: jax.Array, x_t: jax.Array, i: jax.Array, process: Process, noise: jax.Array) -> jax.Array:
    """One ancestral step (DDPM Alg. 2): p(x_{t-1} | x_t), drawn with the standard normal `noise`; its mean at i = 0.

    `output` is the network's at x_t, i (scalar or [batch]) the step of the process' chain.
    """
    model = process.predict(output, x_t, i)
    return model.mean + _unless_last(i, jnp.exp(0.5 * model.log_variance) * noise)


def ddim_step(
    output: jax.Array, x_t: jax.Array, i: jax.Array, process: Process, noise: jax.Array, eta: jax.Array | float = 0.0
) -> jax.Array:
    """One DDIM step (Song et al. 2021, Eq. 12) with sigma = eta sqrt(beta~) (Eq. 16); the predicted x_0 at i = 0.

    The direction towards x_t follows the clamped x_0, as in guided-diffusion, or with `process.clamped_epsilon` False
    the network's epsilon, as in diffusers. Variance channels play no part.
    """
    model = process.predict(output, x_t, i)
    before = 1 - process.alphas_cumprod_previous
    # The square of the direction's length, before - eta^2 beta~, written without cancellation at eta 1.
    rest = gather(before - process.posterior_variance, i, x_t)
    direction = jnp.sqrt(jnp.maximum((1.0 - eta**2) * gather(before, i, x_t) + eta**2 * rest, 0.0))
    mean = gather(process.alphas_cumprod_previous**0.5, i, x_t) * model.x_0 + direction * model.epsilon
    return mean + _unless_last(i, eta * gather(process.posterior_variance**0.5, i, x_t) * noise)


def dpmpp_2m_step(x_0: jax.Array, previous_x_0: jax.Array, x_t: jax.Array, i: jax.Array, process: Process) -> jax.Array:
    """One step of DPM-Solver++(2M) (Lu et al. 2022, Alg. 2) from step i to i - 1, of second order.

    `x_0` is what the network predicts at x_t, `previous_x_0` what it predicted at the step i + 1. The first and the
    last step of the chain are of first order and look at `x_0` alone.
    """
    ratio, weight, extrapolation = process.dpmpp_coefficients
    extrapolated = x_0 + gather(extrapolation, i, x_t) * (x_0 - previous_x_0)
    return gather(ratio, i, x_t) * x_t + gather(weight, i, x_t) * extrapolated


def ddpm(
    key: jax.Array, denoiser: Denoiser, x_T: jax.Array, process: Process, return_path: bool = False
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Ancestral sampling (DDPM Alg. 2) with the process' variances, from noise x_T [batch, ...] to x_0, float32.

    `key` is one key, or a batch of keys [batch] with which an example's noise does not depend on its neighbours.
    return_path: also return x after each step, [steps, batch, ...], of which the last is x_0.
    """
    return _scan(key, denoiser, x_T, process, lambda *step: ddpm_step(*step[:3], process, step[3]), return_path)


def ddim(
    key: jax.Array,
    denoiser: Denoiser,
    x_T: jax.Array,
    process: Process,
    eta: jax.Array | float = 0.0,
    return_path: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """DDIM sampling (Song et al. 2021) from noise x_T [batch, ...] to x_0, float32; eta 0 is deterministic in x_T.

    `key` is one key or a batch of keys [batch], as in `ddpm`; at eta 0 it has no effect. return_path: as in `ddpm`.
    """
    return _scan(key, denoiser, x_T, process, lambda *step: ddim_step(*step[:3], process, step[3], eta), return_path)


def dpmpp_2m(
    key: jax.Array, denoiser: Denoiser, x_T: jax.Array, process: Process, return_path: bool = False
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """DPM-Solver++(2M) (Lu et al. 2022) from noise x_T [batch, ...] to x_0, float32; deterministic in x_T.

    return_path: as in `ddpm`.
    """
    del key
    timesteps = jnp.asarray(process.timestep_map)

    def body(carry, i):
        x_t, previous_x_0 = carry
        x_0 = process.predict(denoiser(x_t, jnp.full(x_T.shape[:1], timesteps[i])), x_t, i).x_0
        x_next = dpmpp_2m_step(x_0, previous_x_0, x_t, i, process)
        return (x_next, x_0), (x_next if return_path else None)

    x_T = x_T.astype(jnp.float32)
    (x_0, _), path = jax.lax.scan(body, (x_T, x_T), jnp.arange(process.steps, dtype=jnp.int32), reverse=True)
    return (x_0, path[::-1]) if return_path else x_0


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpmpp_2m": dpmpp_2m}


def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal float32 noise [batch, ...] from one key, or from a batch of keys [batch], a key an example."""
    key = _typed(key)
    if key.ndim == 0:
        return jax.random.normal(key, shape, jnp.float32)
    if key.shape != shape[:1]:
        raise InputError(f"{key.shape} keys for a batch of {shape[0]}; give one key, or one for each example")
    return jax.vmap(lambda one: jax.random.normal(one, shape[1:], jnp.float32))(key)


def fold_in(key: jax.Array, data: jax.Array | int) -> jax.Array:
    """`jax.random.fold_in` for one key or for each of a batch of keys."""
    key = _typed(key)
    return jax.random.fold_in(key, data) if key.ndim == 0 else jax.vmap(lambda one: jax.random.fold_in(one, data))(key)


def _scan(
    key: jax.Array, denoiser: Denoiser, x_T: jax.Array, process: Process, step: Step, return_path: bool
) -> jax.Array | tuple[jax.Array, jax.Array]:
    timesteps = jnp.asarray(process.timestep_map)

    def body(x_t, i):
        output = denoiser(x_t, jnp.full(x_T.shape[:1], timesteps[i]))
        x_next = step(output, x_t, i, normal(fold_in(key, i), x_T.shape))
        return x_next, (x_next if return_path else None)

    indices = jnp.arange(process.steps, dtype=jnp.int32)
    x_0, path = jax.lax.scan(body, x_T.astype(jnp.float32), indices, reverse=True)
    return (x_0, path[::-1]) if return_path else x_0  # a reversed scan's first entry is its last step


def _unless_last(i: jax.Array, noise: jax.Array) -> jax.Array:
    """`noise`, or 0 where i = 0: the last step only takes the mean."""
    is_last = jnp.asarray(i) == 0
    return jnp.where(is_last.reshape(is_last.shape + (1,) * (noise.ndim - is_last.ndim)), 0.0, noise)


def keys_for(key: jax.Array, count: int) -> jax.Array:
    """One key an example `[count]`, from one for all of them or from one each.

    Raises:
      InputError: for another number of keys.
    """
    key = _typed(key)
    keys = jax.random.split(key, count) if key.ndim == 0 else key
    if keys.shape != (count,):
        raise InputError(f"{keys.size} keys were given for {count} examples; give one key, or one for each")
    return keys


def split_each(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two batches of keys `[b]` of one, each from its own."""
    pairs = jax.vmap(jax.random.split)(keys)
    return pairs[:, 0], pairs[:, 1]


def _typed(key: jax.Array) -> jax.Array:
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)
