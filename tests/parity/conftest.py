"""The noise of the peers' chains in the place of ours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.diffusion import sampler
from tests.parity.drawn_weights import noise


@pytest.fixture
def given_noise(monkeypatch):
    """Puts the noise of make_karlo.py in the samplers' place; returns a function that says which stage is at work."""

    def start(stage: str, steps: int) -> None:
        def normal(key, shape):
            order = shape if len(shape) == 2 else (shape[0], shape[3], shape[1], shape[2])
            drawn = np.stack([noise(f"{stage}/{place}", order) for place in range(steps)])
            table = jnp.asarray(drawn if len(shape) == 2 else drawn.transpose(0, 1, 3, 4, 2))
            # Their calls count up from x_T; our steps count down.
            return table[0] if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else table[steps - key]

        monkeypatch.setattr(sampler, "normal", normal)
        monkeypatch.setattr(sampler, "fold_in", lambda key, i: i)
        for module in ("prior.diffusion_sampling", "decoder.sample"):
            monkeypatch.setattr(f"dalle2_jax.{module}.normal", normal)

    return start
