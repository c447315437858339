"""The Gaussian diffusion process: q(x_t | x_0), its posterior, and what a network's output says about x_0.

`Process` is a frozen dataclass of plain fields, so it is hashable (a static argument of `jax.jit`), comparable and goes
to JSON; its tables (`ScheduleTables`) are float64 numpy, computed on first use, and enter jax as float32. `i` is always
an index into the chain (`0 .. steps-1`, int32 `[batch]` or a scalar); `timestep_map[i]` is the timestep that a network
is shown.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.diffusion import schedule as schedules
from dalle2_jax.diffusion.tables import ScheduleTables
from dalle2_jax.errors import InputError

PREDICTIONS = ("epsilon", "x0", "v")
VARIANCES = ("fixed_small", "fixed_large", "learned_range", "analytic")


class Prediction(NamedTuple):
    """What a network's output says about a step, float32 of x_t's shape; mean and variance are p(x_{t-1} | x_t)'s."""

    x_0: jax.Array
    epsilon: jax.Array
    mean: jax.Array
    log_variance: jax.Array


def gather(table: np.ndarray, i: jax.Array | int, like: jax.Array) -> jax.Array:
    """Entries `i` (scalar or [batch]) of a float64 table, as float32 that broadcasts against `like` [batch, ...]."""
    values = jnp.asarray(table.astype(np.float32))[jnp.asarray(i)]
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim)) if values.ndim else values


@dataclasses.dataclass(frozen=True)
class Process(ScheduleTables):
    """A discrete-time Gaussian diffusion process, and how the network that reverses it is read.

    Attributes:
      schedule: "cosine" (IDDPM), "linear" (DDPM), or betas of your own, an array of numbers between 0 and 1.
      timesteps: T, the length of the process as trained; with betas of your own their number, which need not be given.
      prediction: what the network predicts: "epsilon" (DDPM), "x0" (the prior of DALL-E 2) or
        "v" = sqrt(abar) epsilon - sqrt(1 - abar) x_0 (Salimans & Ho 2022).
      variance: of p(x_{t-1} | x_t): "fixed_small" (beta~), "fixed_large" (beta), "learned_range" (IDDPM Eq. 15), for
        which the network's output has twice the channels of x_t, the variance's second, or "analytic" (Analytic-DPM,
        Bao et al. 2022, which the paper's prior is sampled with), which needs `x0_error`.
      clip: predicted x_0 are clamped to [-clip, clip]; None: they are not.
      respacing: the part of the timesteps that is visited (`schedule.respace`); None: all.
      dynamic_percentile: the clamp is not at `clip` but at this percentile (0 to 1) of each example's own |x_0| where
        that is larger, and the result is scaled back to `clip` (dynamic thresholding, Imagen Sec. 2.3).
      zero_terminal_snr: the schedule is scaled so that nothing of x_0 is left at the last timestep (Lin et al. 2024);
        for networks that predict x0 or v, as epsilon says nothing there.
      x0_error: the mean squared error a dimension of the network's predicted x_0, at timesteps spread evenly from the
        first to the last (`loss.x0_error` measures it).
      clamped_epsilon: whether the epsilon of a clamped x_0 is the one that leads from x_t to it, which DDIM then
        follows; False: the network's.
    """

    schedule: str | tuple[float, ...] = "cosine"
    timesteps: int = 1000
    prediction: str = "epsilon"
    variance: str = "learned_range"
    clip: float | None = 1.0
    respacing: str | None = None
    dynamic_percentile: float | None = None
    zero_terminal_snr: bool = False
    x0_error: tuple[float, ...] | None = None
    clamped_epsilon: bool = True

    def __post_init__(self):
        choices = {"prediction": PREDICTIONS, "variance": VARIANCES}
        if isinstance(self.schedule, str):
            choices["schedule"] = tuple(schedules.SCHEDULES)
        else:
            self._take_betas(tuple(float(beta) for beta in self.schedule))
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"Process.{name} is {getattr(self, name)!r}; it must be one of {allowed}")
        if isinstance(self.timesteps, bool) or not isinstance(self.timesteps, int) or self.timesteps < 1:
            raise InputError(f"Process.timesteps is {self.timesteps!r}; it must be an integer of at least 1")
        is_number = isinstance(self.clip, int | float) and not isinstance(self.clip, bool)
        if self.clip is not None and not (is_number and self.clip > 0):
            raise InputError(f"Process.clip is {self.clip!r}; it must be a positive number, or None for no clamp")
        if self.dynamic_percentile is not None and not (0 < self.dynamic_percentile <= 1 and self.clip is not None):
            raise InputError(
                f"Process.dynamic_percentile is {self.dynamic_percentile!r} with clip {self.clip!r}; it must be a "
                "share of 1, such as 0.995, with a clip to scale back to"
            )
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise InputError(
                "zero_terminal_snr leaves nothing of x_0 at the last timestep, and epsilon says nothing of it there; "
                "set Process.prediction to v or x0"
            )
        if self.zero_terminal_snr and self.timesteps == 1:
            raise InputError("zero_terminal_snr with one timestep leaves no signal at all; set Process.timesteps to 2")
        if self.variance == "analytic" and self.x0_error is None:
            raise InputError(
                "the analytic variance needs the network's measured error (Process.x0_error); it is recorded when a "
                "stage's training ends"
            )
        if self.respacing is not None:
            kept = schedules.respace(self.respacing, self.timesteps, self._alphas_cumprod)
            if self.zero_terminal_snr and kept[-1] != self.timesteps - 1:
                raise InputError(
                    f"respacing {self.respacing!r} starts at timestep {kept[-1]} of {self.timesteps}, and with "
                    "zero_terminal_snr only the last one is pure noise; give a plain number of steps"
                )

    def _take_betas(self, betas: tuple[float, ...]) -> None:
        """Makes an array hashable, and the process as long as it is."""
        default = type(self).__dataclass_fields__["timesteps"].default
        if not betas or not all(0 < beta < 1 for beta in betas):
            raise InputError("Process.schedule as betas must be numbers between 0 and 1, at least one of them")
        if self.timesteps not in (default, len(betas)):
            raise InputError(
                f"Process.timesteps is {self.timesteps} but schedule has {len(betas)} betas; leave timesteps out"
            )
        object.__setattr__(self, "schedule", betas)
        object.__setattr__(self, "timesteps", len(betas))

    def respaced(self, spec: str | None) -> "Process":
        """The same process with only the timesteps that `spec` keeps (of the original T); None: all of them."""
        return dataclasses.replace(self, respacing=spec)

    def unclamped(self) -> "Process":
        """The same process without any clamp of predicted x_0."""
        return dataclasses.replace(self, clip=None, dynamic_percentile=None)

    # For x of any rank: images [batch, height, width, channels] or embeddings [batch, width].

    def original_timesteps(self, i: jax.Array) -> jax.Array:
        """The timesteps int32 that a network is shown at the steps `i` of the chain."""
        return jnp.asarray(self.timestep_map)[i]

    def q_sample(self, x_0: jax.Array, i: jax.Array, noise: jax.Array) -> jax.Array:
        """q(x_t | x_0) = N(sqrt(abar) x_0, (1 - abar) I), drawn with the standard normal `noise` (DDPM Eq. 4)."""
        x_0, noise = _float32(x_0, noise)
        signal, sigma = gather(self.sqrt_alphas_cumprod, i, x_0), gather(self.sqrt_one_minus_alphas_cumprod, i, x_0)
        return signal * x_0 + sigma * noise

    def q_posterior(self, x_0: jax.Array, x_t: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(mean, variance, log variance) of q(x_{t-1} | x_t, x_0) (DDPM Eq. 6-7), each of x_t's shape.

        At the first step the variance is 0 and its logarithm that of the second step.
        """
        x_0, x_t = _float32(x_0, x_t)
        from_x_0, from_x_t = self.posterior_mean_coefficients
        mean = gather(from_x_0, i, x_t) * x_0 + gather(from_x_t, i, x_t) * x_t
        variance = jnp.broadcast_to(gather(self.posterior_variance, i, x_t), x_t.shape)
        return mean, variance, jnp.broadcast_to(gather(self.posterior_log_variance, i, x_t), x_t.shape)

    def target(self, x_0: jax.Array, noise: jax.Array, i: jax.Array) -> jax.Array:
        """What the network should predict at the step `i`, given x_0 and the noise that `q_sample` added."""
        x_0, noise = _float32(x_0, noise)
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "x0":
            return x_0
        signal, sigma = gather(self.sqrt_alphas_cumprod, i, x_0), gather(self.sqrt_one_minus_alphas_cumprod, i, x_0)
        return signal * noise - sigma * x_0

    def split(self, output: jax.Array, x_t: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """A network's output as float32 (prediction, variance channels or None); InputError if the shape is wrong."""
        channels = x_t.shape[-1]
        expected = 2 * channels if self.variance == "learned_range" else channels
        if output.shape != (*x_t.shape[:-1], expected):
            raise InputError(
                f"the denoiser returned shape {output.shape} for x_t of shape {x_t.shape}; "
                f"variance={self.variance!r} needs {expected} channels"
            )
        output = output.astype(jnp.float32)
        if self.variance == "learned_range":
            return output[..., :channels], output[..., channels:]
        return output, None

    def predict(self, output: jax.Array, x_t: jax.Array, i: jax.Array) -> Prediction:
        """Read a network's `output` at x_t: the x_0 it implies (clamped), that x_0's epsilon, and p(x_{t-1} | x_t).

        The mean is q_posterior's at the predicted x_0; epsilon is the one that leads from x_t to the clamped x_0,
        unless `clamped_epsilon` is False.
        """
        (x_t,) = _float32(x_t)
        prediction, variance_channels = self.split(output, x_t)
        x_0, epsilon = self._x_0_and_epsilon(prediction, x_t, i)
        if self.clip is not None:
            x_0 = self._clamp(x_0)
            epsilon = self.epsilon_from_x_0(x_0, x_t, i) if self.clamped_epsilon else epsilon
        mean, _, _ = self.q_posterior(x_0, x_t, i)
        return Prediction(x_0, epsilon, mean, self._log_variance(variance_channels, x_t, i))

    def _clamp(self, x_0: jax.Array) -> jax.Array:
        if self.dynamic_percentile is None:
            return jnp.clip(x_0, -self.clip, self.clip)
        return dynamic_threshold(x_0, self.dynamic_percentile, self.clip)

    def epsilon_from_x_0(self, x_0: jax.Array, x_t: jax.Array, i: jax.Array) -> jax.Array:
        """The epsilon that makes x_t of x_0: (x_t - sqrt(abar) x_0) / sqrt(1 - abar)."""
        signal, sigma = gather(self.sqrt_alphas_cumprod, i, x_t), gather(self.sqrt_one_minus_alphas_cumprod, i, x_t)
        return (x_t - signal * x_0) / sigma

    def _x_0_and_epsilon(self, prediction: jax.Array, x_t: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        if self.prediction == "x0":
            return prediction, self.epsilon_from_x_0(prediction, x_t, i)
        if self.prediction == "epsilon":
            scale, noise_scale = self.sqrt_recip_alphas_cumprod, self.sqrt_recipm1_alphas_cumprod
            return gather(scale, i, x_t) * x_t - gather(noise_scale, i, x_t) * prediction, prediction
        signal, sigma = gather(self.sqrt_alphas_cumprod, i, x_t), gather(self.sqrt_one_minus_alphas_cumprod, i, x_t)
        return signal * x_t - sigma * prediction, sigma * x_t + signal * prediction

    def _log_variance(self, variance_channels: jax.Array | None, x_t: jax.Array, i: jax.Array) -> jax.Array:
        small = gather(self.posterior_log_variance, i, x_t)
        if self.variance == "learned_range":
            # IDDPM Eq. 15: interpolate between the bounds in the log domain; outputs in [-1, 1] span them.
            fraction = (variance_channels + 1) / 2
            return fraction * gather(self.log_betas, i, x_t) + (1 - fraction) * small
        if self.variance == "analytic":
            small = gather(self.analytic_log_variance, i, x_t)
        elif self.variance == "fixed_large":
            small = gather(self.fixed_large_log_variance, i, x_t)
        return jnp.broadcast_to(small, x_t.shape)


def dynamic_threshold(x_0: jax.Array, percentile: float, limit: float = 1.0) -> jax.Array:
    """Clamps each example to its own percentile of |x_0| and scales that to `limit` (Imagen Sec. 2.3).

    An example whose percentile lies within `limit` is only clamped there.
    """
    axes = tuple(range(1, x_0.ndim))
    bound = jnp.maximum(jnp.quantile(jnp.abs(x_0), percentile, axis=axes, keepdims=True), limit)
    return jnp.clip(x_0, -bound, bound) * (limit / bound)


def _float32(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(jnp.asarray(array).astype(jnp.float32) for array in arrays)
