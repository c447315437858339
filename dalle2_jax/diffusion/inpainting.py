"""Sampling what is missing of images whose other pixels are known.

`repaint` works with any denoiser (RePaint, Lugmayr et al. 2022; andreas128/RePaint, guided_diffusion/scheduler.py and
gaussian_diffusion.py). A network that sees what is known needs `with_known_x_0` alone (GLIDE, notebooks/inpaint.ipynb).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.diffusion.process import Process
from dalle2_jax.diffusion.sampler import Denoiser, ddim_step, ddpm_step, fold_in, normal
from dalle2_jax.diffusion.sampling import Sampling
from dalle2_jax.errors import InputError

Step = Callable[[jax.Array, jax.Array, jax.Array, Process, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Resampling:
    """How often a stretch of the chain is sampled again, so that what is painted fits what is known (RePaint Alg. 1).

    jump_length: steps of the chain that a jump goes back. jump_samples: how often each stretch is sampled in all; 1
    only replaces what is known at every step. The defaults are RePaint's, with which a chain of T steps asks the
    network about 10 T times.
    """

    jump_length: int = 10
    jump_samples: int = 10

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{field.name} is {value!r}; it must be a whole number of 1 or more")

    def levels(self, steps: int) -> list[int]:
        """The noise levels that are visited, from steps - 1 down to -1, the clean image; jumps rise one at a time.

        RePaint's `get_schedule_jump`. A chain that is not longer than a jump has none.
        """
        levels = []
        for level in range(steps - 1, -1, -1):
            levels.append(level)
            if level % self.jump_length == 0 and level < steps - self.jump_length:
                top = level + self.jump_length
                levels += [*range(level + 1, top + 1), *range(top - 1, level - 1, -1)] * (self.jump_samples - 1)
        return [*levels, -1]

    def moves(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """The same as two int32 arrays, an entry an evaluation: the level x comes from, and the one it is denoised at.

        Several steps up are one, as the sum of normal noise is normal.
        """
        levels = self.levels(steps)
        reached, moves = levels[0], []
        for level, after in zip(levels, levels[1:], strict=False):
            if after < level:
                moves.append((reached, level))
                reached = after
        starts, evaluated = np.asarray(moves, np.int32).T
        return starts, evaluated


REPAINT = Resampling()
REPLACEMENT = Resampling(jump_samples=1)
REPAINT_SAMPLERS = ("ddpm", "ddim")  # those of which a step does not look back to earlier ones


def repaint(
    key: jax.Array,
    denoiser: Denoiser,
    x_T: jax.Array,
    process: Process,
    known: jax.Array,
    mask: jax.Array,
    step: Step = ddpm_step,
    resampling: Resampling = REPAINT,
) -> jax.Array:
    """x_0 `[b, h, w, c]`, float32, sampled where `mask` is False and `known` elsewhere, by one `lax.scan`.

    Before the network is asked at a noise level, what is known is noised to that level and put in place. That is all
    with `jump_samples` 1; what is painted then knows of it only through the network. Jumps add noise to all of the
    image and sample the stretch again.

    key: one key, or one an example `[b]`. denoiser: f(x_t, t), guided or not. x_T: noise `[b, h, w, c]`. known:
    `[b, h, w, c]`, of any values where mask, bool `[b, h, w, 1]`, is False. step: `ddpm_step`, or `ddim_step` with an
    eta.
    """
    timesteps = jnp.asarray(process.timestep_map)
    starts, evaluated = resampling.moves(process.steps)
    # A jump's share of the signal; 1 where there is none, also at a last level without any signal.
    ratio = np.ones(len(starts))
    jumps = starts != evaluated
    ratio[jumps] = process.alphas_cumprod[evaluated[jumps]] / process.alphas_cumprod[starts[jumps]]
    known = known.astype(jnp.float32)

    def body(x, move):
        number, i, signal, sigma = move
        up, kept, down = (normal(fold_in(key, 3 * number + place), x_T.shape) for place in range(3))
        x = jnp.where(mask, process.q_sample(known, i, kept), signal * x + sigma * up)
        output = denoiser(x, jnp.full(x_T.shape[:1], timesteps[i]))
        return step(output, x, i, process, down), None

    numbers = np.arange(len(starts), dtype=np.int32)
    scales = (np.float32(ratio**0.5), np.float32((1 - ratio) ** 0.5))
    x_0, _ = jax.lax.scan(body, x_T.astype(jnp.float32), (numbers, evaluated, *scales))
    return jnp.where(mask, known, x_0)


def sample_repaint(
    key: jax.Array,
    denoiser: Denoiser,
    x_T: jax.Array,
    process: Process,
    sampling: Sampling,
    known: jax.Array,
    mask: jax.Array,
    resampling: Resampling = REPAINT,
) -> jax.Array:
    """`repaint` with a stage's sampling settings over the respaced `process`, as `sample` does it without an image.

    Raises:
        InputError: for a sampler that looks back to earlier steps.
    """
    steps = {"ddpm": ddpm_step, "ddim": functools.partial(ddim_step, eta=sampling.eta)}
    if sampling.sampler not in REPAINT_SAMPLERS:
        raise InputError(
            f"the sampler {sampling.sampler} cannot go back in its chain, which painting with a network does that was "
            "not trained for it; take ddim or ddpm"
        )
    chain = sampling.process(process)
    if process.variance == "learned_range" != chain.variance:
        denoiser = functools.partial(_without_variance, denoiser)
    return repaint(key, denoiser, x_T, chain, known, mask, steps[sampling.sampler], resampling)


def with_known_x_0(denoiser: Denoiser, known: jax.Array, mask: jax.Array, process: Process) -> Denoiser:
    """A denoiser whose prediction implies the x_0 `known` where `mask` is True (GLIDE's `denoised_fn`).

    known, mask: as in `repaint`. process: the one the network was trained with. Whatever it predicts is changed, so
    that every sampler works with it; variance channels stay.
    """
    whole = process.respaced(None)

    def changed(x_t: jax.Array, t: jax.Array) -> jax.Array:
        output = denoiser(x_t, t).astype(jnp.float32)
        target = whole.target(known, whole.epsilon_from_x_0(known, x_t, t), t)
        prediction = jnp.where(mask, target, output[..., : x_t.shape[-1]])
        return jnp.concatenate([prediction, output[..., x_t.shape[-1] :]], axis=-1)

    return changed


def _without_variance(denoiser: Denoiser, x_t: jax.Array, t: jax.Array) -> jax.Array:
    return denoiser(x_t, t)[..., : x_t.shape[-1]]
