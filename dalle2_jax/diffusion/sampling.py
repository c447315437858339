"""How a stage is sampled, as data: which sampler, over which timesteps, at which guidance scale."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dalle2_jax.diffusion.guidance import is_guided
from dalle2_jax.diffusion.process import VARIANCES, Process
from dalle2_jax.diffusion.sampler import SAMPLERS, Denoiser
from dalle2_jax.errors import InputError, check_number

THRESHOLDS = ("none", "static", "dynamic")
# Fields that one sampler alone reads.
SAMPLER_OF = {"variance": "ddpm", "eta": "ddim", "clamped_epsilon": "ddim"}

MOST_CANDIDATES = 2**16  # for one caption
TRACED = ("guidance_scale", "guidance_interval", "eta")
SETTLED = ("sampler", "steps", "candidates", "variance", "threshold", "percentile", "clamped_epsilon")


@functools.partial(jax.tree_util.register_dataclass, data_fields=TRACED, meta_fields=SETTLED)
@dataclass(frozen=True, kw_only=True)
class Sampling:
    """A stage's sampling settings; a trained stage records them as its defaults.

    It is a pytree whose leaves are guidance_scale, guidance_interval and eta: as an argument of a jitted function it
    compiles once for all their values. `turned` prepares it for that.

    Fields:
      sampler: a name of `SAMPLERS`.
      steps: the respacing ("27", "10,10,3,2,2", "fast27", "logsnr12", ...); a plain number of them, also as an int, is
        spread evenly over the timesteps, but for dpmpp_2m, which counts time in log SNR, over that.
      guidance_scale: 1 or None leaves guidance off.
      guidance_interval: the part of the timesteps that is guided, as shares from 0 (the least noise) to 1.
      eta: DDIM's noise, 0 to 1.
      candidates: how many are sampled to keep the best of (the prior; Sec. 2.2).
      variance: another one than the process was trained with ("analytic", "fixed_small", ...).
      threshold: "none", "static" or "dynamic" clamping of predicted x_0, where it is not the process' own.
      percentile: of the dynamic one.
      clamped_epsilon: whether DDIM's direction follows the clamped x_0, as in guided-diffusion and Karlo; False: what
        the network predicts, as diffusers has it by default (`use_clipped_model_output=False`).
    """

    sampler: str = "ddim"
    steps: str = "50"
    guidance_scale: float | None = 1.0
    guidance_interval: tuple[float, ...] = (0.0, 1.0)
    eta: float = 0.0
    candidates: int = 1
    variance: str | None = None
    threshold: str | None = None
    percentile: float = 0.995
    clamped_epsilon: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.steps, int) and not isinstance(self.steps, bool):
            object.__setattr__(self, "steps", str(self.steps))
        if self.sampler not in SAMPLERS:
            raise InputError(f"there is no sampler {self.sampler!r}; the samplers are {', '.join(sorted(SAMPLERS))}")
        if not isinstance(self.steps, str):
            raise InputError(f"steps is {self.steps!r}; it is a number, or text such as '10,10,3,2,2'")
        if isinstance(self.eta, int | float) and not 0 <= self.eta <= 1:
            raise InputError(f"eta is {self.eta}; it must lie in 0 to 1")
        if isinstance(self.guidance_scale, int | float):
            check_number("guidance_scale", self.guidance_scale)
        check_number("candidates", self.candidates, at_least=1, at_most=MOST_CANDIDATES, whole=True)
        check_number("percentile", self.percentile, above=0, at_most=1)
        if self.variance not in (None, *VARIANCES):
            raise InputError(f"there is no variance {self.variance!r}; the variances are {', '.join(VARIANCES)}")
        if self.threshold not in (None, *THRESHOLDS):
            raise InputError(f"there is no threshold {self.threshold!r}; the thresholds are {', '.join(THRESHOLDS)}")
        interval = self.guidance_interval
        if _are_numbers(interval) and (len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1):
            raise InputError(f"guidance_interval is {interval}; it must be two shares from 0 to 1, the smaller first")

    @property
    def is_guided(self) -> bool:
        """Whether the network is asked for both predictions: not where the scale is known to be 1."""
        return is_guided(self.guidance_scale)

    def turned(self) -> Sampling:
        """The settings as an argument of a jitted function: a scale of 1 becomes None, a program of its own."""
        return self if self.is_guided else dataclasses.replace(self, guidance_scale=None)

    def without_effect(self) -> dict[str, str]:
        """Fields that have no effect beside the others, and why not."""
        unused = {
            name: f"the sampler {self.sampler}; take {sampler}"
            for name, sampler in SAMPLER_OF.items()
            if self.sampler != sampler
        }
        if self.threshold != "dynamic":
            unused["percentile"] = "this threshold; take threshold dynamic"
        return unused

    def interval(self, process: Process) -> tuple[jax.Array | float, jax.Array | float] | None:
        """The timesteps that are guided, as `classifier_free_guidance` wants them; None: all."""
        if _are_numbers(self.guidance_interval) and tuple(self.guidance_interval) == (0.0, 1.0):
            return None
        # The first whole timestep from there on, up to the rounding of a share of them in float32.
        low, high = (jnp.ceil(share * process.timesteps - 1e-3) for share in self.guidance_interval)
        return low, high

    def process(self, trained: Process) -> Process:
        """The chain that is sampled: the trained process with these settings' timesteps, variance and clamp.

        Raises:
          InputError: for timesteps the process does not have, or a variance or a threshold that it cannot have.
        """
        even = self.sampler == "dpmpp_2m" and self.steps.strip().isdigit()
        changes = {"respacing": f"logsnr{self.steps}" if even else self.steps}
        if self.variance is not None:
            if self.variance == "learned_range" != trained.variance:
                raise InputError("the network has learned no variance; choose fixed_small, fixed_large or analytic")
            changes["variance"] = self.variance
        if self.threshold == "none":
            changes |= {"clip": None, "dynamic_percentile": None}
        elif self.threshold is not None:
            if trained.clip is None:
                raise InputError(
                    f"the threshold {self.threshold!r} scales x_0 back to the process' clamp, and this one has none: "
                    "its x_0 is not bounded"
                )
            changes["dynamic_percentile"] = self.percentile if self.threshold == "dynamic" else None
        if not self.clamped_epsilon:
            changes["clamped_epsilon"] = False
        return dataclasses.replace(trained, **changes)


def _are_numbers(values: Sequence[Any]) -> bool:
    return isinstance(values, tuple | list) and all(isinstance(value, int | float) for value in values)


def sample(
    key: jax.Array,
    denoiser: Denoiser,
    x_T: jax.Array,
    process: Process,
    sampling: Sampling,
    return_path: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Runs `sampling.sampler` over the respaced `process` from `x_T`; `denoiser` is f(x_t, t) (already guided).

    return_path: also return x after each step, `[steps, batch, ...]`, of which the last is the sample.
    """
    chain = sampling.process(process)
    if process.variance == "learned_range" != chain.variance:
        with_variance, channels = denoiser, x_T.shape[-1]

        def denoiser(x_t, t):
            return with_variance(x_t, t)[..., :channels]

    options = {"eta": sampling.eta} if sampling.sampler == "ddim" else {}
    return SAMPLERS[sampling.sampler](key, denoiser, x_T, chain, **options, return_path=return_path)
