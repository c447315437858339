"""How a stage is sampled, as data: which sampler, over which timesteps, at which guidance scale."""

from dataclasses import dataclass

import jax

from dalle2_jax.diffusion.process import Process
from dalle2_jax.diffusion.sampler import SAMPLERS


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """A stage's sampling settings; a trained stage records them as its defaults.

    sampler: a name of `SAMPLERS`. steps: the respacing ("27", "10,10,3,2,2", "fast27", ...). eta: DDIM's noise, 0 to 1.
    guidance_scale: 1 leaves guidance off. candidates: how many are drawn to keep the best of (the prior; Sec. 2.2).
    """

    sampler: str = "ddim"
    steps: str = "50"
    guidance_scale: float = 1.0
    eta: float = 0.0
    candidates: int = 1

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"there is no sampler {self.sampler!r}; the samplers are {', '.join(sorted(SAMPLERS))}")
        if self.candidates < 1:
            raise ValueError(f"candidates is {self.candidates}; at least one sample must be drawn")


def sample(key: jax.Array, denoiser, x_T: jax.Array, process: Process, sampling: Sampling) -> jax.Array:
    """Runs `sampling.sampler` over the respaced `process` from `x_T`; `denoiser` is f(x_t, t) (already guided)."""
    respaced = process.respaced(sampling.steps)
    options = {"eta": sampling.eta} if sampling.sampler == "ddim" else {}
    return SAMPLERS[sampling.sampler](key, denoiser, x_T, respaced, **options)
