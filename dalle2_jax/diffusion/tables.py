"""The tables of a diffusion process over its chain, from its schedule: float64 numpy, computed on first use."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from dalle2_jax.diffusion import schedule as schedules


class ScheduleTables:
    """What a `Process` knows of every step of its chain: float64 numpy [steps], except timestep_map (int32)."""

    schedule: str | tuple[float, ...]
    timesteps: int
    clip: float | None
    respacing: str | None
    zero_terminal_snr: bool
    x0_error: tuple[float, ...] | None

    @cached_property
    def timestep_map(self) -> np.ndarray:
        """The original timestep of each step of the chain, int32 [steps], ascending."""
        if self.respacing is None:
            return np.arange(self.timesteps, dtype=np.int32)
        return np.asarray(schedules.respace(self.respacing, self.timesteps, self._alphas_cumprod), np.int32)

    @property
    def steps(self) -> int:
        """The length of the chain."""
        return len(self.timestep_map)

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """abar_i: the share of the variance of x_i that is signal."""
        return self._alphas_cumprod[self.timestep_map]

    @cached_property
    def _alphas_cumprod(self) -> np.ndarray:
        """abar of every timestep, visited or not."""
        own = not isinstance(self.schedule, str)
        abar = np.cumprod(1 - (np.asarray(self.schedule) if own else schedules.betas(self.schedule, self.timesteps)))
        return schedules.zero_terminal_snr(abar) if self.zero_terminal_snr else abar

    @cached_property
    def alphas_cumprod_previous(self) -> np.ndarray:
        """abar of the step before, 1 at the first."""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @cached_property
    def alphas(self) -> np.ndarray:
        """alpha_i = abar_i / abar_{i-1}."""
        return self.alphas_cumprod / self.alphas_cumprod_previous

    @cached_property
    def betas(self) -> np.ndarray:
        """beta'_i = 1 - abar_i / abar_{i-1} (IDDPM Eq. 19): the schedule's own betas where nothing is skipped."""
        return 1 - self.alphas

    @cached_property
    def sqrt_alphas_cumprod(self) -> np.ndarray:
        return np.sqrt(self.alphas_cumprod)

    @cached_property
    def sqrt_one_minus_alphas_cumprod(self) -> np.ndarray:
        return np.sqrt(1 - self.alphas_cumprod)

    @cached_property
    def sqrt_recip_alphas_cumprod(self) -> np.ndarray:
        return np.sqrt(1 / self.alphas_cumprod)

    @cached_property
    def sqrt_recipm1_alphas_cumprod(self) -> np.ndarray:
        return np.sqrt(1 / self.alphas_cumprod - 1)

    @cached_property
    def posterior_mean_coefficients(self) -> tuple[np.ndarray, np.ndarray]:
        """The weights of x_0 and of x_t in the mean of q(x_{t-1} | x_t, x_0) (DDPM Eq. 7)."""
        abar, previous = self.alphas_cumprod, self.alphas_cumprod_previous
        return np.sqrt(previous) * self.betas / (1 - abar), np.sqrt(self.alphas) * (1 - previous) / (1 - abar)

    @cached_property
    def posterior_variance(self) -> np.ndarray:
        """beta~_i, the variance of q(x_{t-1} | x_t, x_0) (DDPM Eq. 7); 0 at the first step."""
        return self.betas * (1 - self.alphas_cumprod_previous) / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_log_variance(self) -> np.ndarray:
        """log beta~_i with beta~_0 := beta~_1, so that it is finite (a chain of one step has no beta~_1: beta_0)."""
        return np.log(self._with_first(self.posterior_variance))

    @cached_property
    def log_betas(self) -> np.ndarray:
        return np.log(self.betas)

    @cached_property
    def fixed_large_log_variance(self) -> np.ndarray:
        """log beta_i with beta~_1 in the first place, where beta_0 would be poor for the likelihood (DDPM's code)."""
        return np.log(self._with_first(self.betas))

    @cached_property
    def analytic_log_variance(self) -> np.ndarray:
        """log of beta~_i plus what the doubt about x_0 adds to it (Analytic-DPM, Theorem 1, by x_0's own error).

        The error is interpolated as a share of 1 - abar, of which it is a smooth function, and held below what it can
        be at most (Analytic-DPM, Theorem 2 and its Eq. 12): (1 - abar) / abar, and the clamp's square.
        """
        places = np.rint(np.linspace(0, self.timesteps - 1, len(self.x0_error))).astype(int)
        share = np.asarray(self.x0_error) / (1 - self._alphas_cumprod[places])
        error = np.interp(self.timestep_map, places, share) * (1 - self.alphas_cumprod)
        with np.errstate(divide="ignore"):
            error = np.minimum(error, (1 - self.alphas_cumprod) / self.alphas_cumprod)
        error = np.minimum(error, np.inf if self.clip is None else self.clip**2)
        variance = self.posterior_variance + self.posterior_mean_coefficients[0] ** 2 * error
        return np.log(np.maximum(variance, 1e-20))

    @cached_property
    def half_log_snr(self) -> np.ndarray:
        """lambda_i = log(sqrt(abar) / sqrt(1 - abar)), in which the DPM-Solvers count time."""
        with np.errstate(divide="ignore"):  # -inf where nothing of x_0 is left
            return 0.5 * (np.log(self.alphas_cumprod) - np.log1p(-self.alphas_cumprod))

    @cached_property
    def dpmpp_coefficients(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """DPM-Solver++(2M)'s weights of x_t, of the extrapolated x_0, and of the last two x_0's difference in that.

        The last is 0 at the chain's first and last visited step, which are of first order.
        """
        abar, previous = self.alphas_cumprod, self.alphas_cumprod_previous
        ratio = np.sqrt((1 - previous) / (1 - abar))
        extrapolation = np.zeros(self.steps)
        if self.steps > 2:
            lengths = self.half_log_snr[:-1] - self.half_log_snr[1:]  # of the steps 1, 2, ...
            extrapolation[1:-1] = lengths[:-1] / (2 * lengths[1:])
        return ratio, np.sqrt(previous) - ratio * np.sqrt(abar), extrapolation

    def _with_first(self, variances: np.ndarray) -> np.ndarray:
        first = self.posterior_variance[1] if self.steps > 1 else self.betas[0]
        return np.append(first, variances[1:])
