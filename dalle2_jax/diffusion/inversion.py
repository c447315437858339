"""DDIM backwards: from an image to the noise from which it is sampled again."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dalle2_jax.diffusion.process import Process, gather
from dalle2_jax.diffusion.sampler import Denoiser


def ddim_inverse_step(output: jax.Array, x_t: jax.Array, i: jax.Array, process: Process) -> jax.Array:
    """The DDIM step backwards, from x at step i to x at step i + 1 of the chain (ADM App. F).

    `output` is the network's at x_t and step i; what it says of x_0 is taken as it is, without a clamp.
    """
    model = process.unclamped().predict(output, x_t, i)
    return _at_level(model.x_0, model.epsilon, i + 1, process)


def ddim_invert(denoiser: Denoiser, x_0: jax.Array, process: Process, refinements: int = 0) -> jax.Array:
    """The x_T from which `ddim` at eta 0 comes back to x_0 (DALL-E 2 Sec. 3; ADM App. F), by one `lax.scan`.

    x_0 counts as x at the chain's first step, so that one step less is taken than in sampling (249 of 250). Each step
    asks the network at the image it leaves; `refinements` then ask it again at the image where it arrived and go
    back to the start with that, which makes the inverse as exact as one likes for as many more evaluations.
    """
    timesteps = jnp.asarray(process.timestep_map)
    unclamped = process.unclamped()

    def evaluate(x, i):
        return denoiser(x, jnp.full(x_0.shape[:1], timesteps[i]))

    def body(x_t, i):
        x_next = ddim_inverse_step(evaluate(x_t, i), x_t, i, process)

        def refine(_, x_next):
            # DDIM leads from x_next to x_t along this epsilon: solve its step (Eq. 12) for x_next.
            epsilon = unclamped.predict(evaluate(x_next, i + 1), x_next, i + 1).epsilon
            clean = (x_t - gather(process.sqrt_one_minus_alphas_cumprod, i, x_t) * epsilon) / gather(
                process.sqrt_alphas_cumprod, i, x_t
            )
            return _at_level(clean, epsilon, i + 1, process)

        return jax.lax.fori_loop(0, refinements, refine, x_next), None

    x_T, _ = jax.lax.scan(body, x_0.astype(jnp.float32), jnp.arange(process.steps - 1, dtype=jnp.int32))
    return x_T


def _at_level(x_0: jax.Array, epsilon: jax.Array, i: jax.Array, process: Process) -> jax.Array:
    signal, sigma = process.sqrt_alphas_cumprod, process.sqrt_one_minus_alphas_cumprod
    return gather(signal, i, x_0) * x_0 + gather(sigma, i, x_0) * epsilon
