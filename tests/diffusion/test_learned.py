"""From loss to samples: a small network learns four points of the plane in every parametrisation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dalle2_jax.diffusion import Process, Sampling, diffusion_loss, sample

ANGLES = np.arange(4) * np.pi / 2
POINTS = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1).astype(np.float32) * 0.8
STEPS, DRAWN = 1000, 512


class Network(nn.Module):
    """[batch, 2] and timesteps to [batch, out]."""

    out: int

    @nn.compact
    def __call__(self, x_t: jax.Array, t: jax.Array) -> jax.Array:
        phases = t.astype(jnp.float32)[:, None] / 1000.0 * (jnp.pi / 2.0) * jnp.arange(1.0, 9.0)[None]
        h = jnp.concatenate([x_t, jnp.sin(phases), jnp.cos(phases)], axis=-1)
        for _ in range(3):
            h = nn.silu(nn.Dense(96)(h))
        return nn.Dense(self.out)(h)


def learned(process: Process, kind: str, weighting: str):
    """The denoiser after STEPS steps on batches of the four points."""
    network = Network(4 if process.variance == "learned_range" else 2)
    params = network.init(jax.random.key(0), jnp.zeros((1, 2)), jnp.zeros(1, jnp.int32))
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, STEPS))

    def loss(params, key):
        choose, noise = jax.random.split(key)
        x_0 = jnp.asarray(POINTS)[jax.random.randint(choose, (256,), 0, 4)]
        denoiser = lambda x_t, t: network.apply(params, x_t, t)  # noqa: E731
        return diffusion_loss(noise, denoiser, x_0, process, kind, weighting=weighting)[0].mean()

    def step(carry, key):
        params, state = carry
        gradients = jax.grad(loss)(params, key)
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies by integers
            updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    train = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys)[0][0])
    params = train((params, optimizer.init(params)), jax.random.split(jax.random.key(1), STEPS))
    return lambda x_t, t: network.apply(params, x_t, t)


@pytest.mark.parametrize(
    ("process", "kind", "weighting"),
    [
        (Process(schedule="cosine", prediction="epsilon", variance="fixed_small", clip=1.0), "simple", "uniform"),
        pytest.param(
            Process(schedule="cosine", prediction="x0", variance="fixed_small", clip=1.0),
            "simple",
            "min_snr_plus_one",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Process(schedule="cosine", prediction="v", variance="fixed_small", clip=1.0),
            "simple",
            "uniform",
            marks=pytest.mark.slow,
        ),
        (
            Process(schedule="linear", prediction="v", variance="learned_range", clip=1.0, zero_terminal_snr=True),
            "hybrid",
            "uniform",
        ),
    ],
    ids=["epsilon", "x0", "v", "v-zero_terminal-learned"],
)
def test_four_points_are_learned_and_drawn(process, kind, weighting):
    denoiser = learned(process, kind, weighting)
    x_T = jax.random.normal(jax.random.key(2), (DRAWN, 2))
    for sampling in (
        Sampling(sampler="ddpm", steps="100"),
        Sampling(sampler="ddim", steps="50"),
        Sampling(sampler="dpmpp_2m", steps="25"),
    ):
        drawn = jax.jit(lambda x_T, s=sampling: sample(jax.random.key(3), denoiser, x_T, process, s))(x_T)
        distance = np.linalg.norm(np.asarray(drawn)[:, None] - POINTS[None], axis=-1)
        # Neighbours are 1.13 apart.
        assert (distance.min(axis=1) < 0.3).mean() > 0.8
        share = np.bincount(distance.argmin(axis=1), minlength=4) / DRAWN
        assert share.min() > 0.15 and share.max() < 0.35
