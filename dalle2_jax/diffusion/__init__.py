"""Diffusion as arithmetic over a function: schedules, the process, losses, samplers, guidance. It sees no network."""

from dalle2_jax.diffusion.guidance import classifier_free_guidance
from dalle2_jax.diffusion.inpainting import (
    REPAINT,
    REPAINT_SAMPLERS,
    REPLACEMENT,
    Resampling,
    repaint,
    sample_repaint,
    with_known_x_0,
)
from dalle2_jax.diffusion.inversion import ddim_inverse_step, ddim_invert
from dalle2_jax.diffusion.loss import check_loss, diffusion_loss, estimated_bound, variational_bound, x0_error
from dalle2_jax.diffusion.process import Prediction, Process, dynamic_threshold
from dalle2_jax.diffusion.sampler import SAMPLERS, ddim, ddim_step, ddpm, ddpm_step, dpmpp_2m, dpmpp_2m_step, normal
from dalle2_jax.diffusion.sampling import Sampling, sample
from dalle2_jax.diffusion.schedule import betas, cosine_betas, linear_betas, respace, zero_terminal_snr
from dalle2_jax.diffusion.tiling import tiled
from dalle2_jax.diffusion.timesteps import (
    LossHistory,
    loss_history,
    sample_timesteps,
    timestep_probabilities,
    update_history,
)

__all__ = [
    "REPAINT",
    "REPAINT_SAMPLERS",
    "REPLACEMENT",
    "SAMPLERS",
    "LossHistory",
    "Prediction",
    "Process",
    "Resampling",
    "Sampling",
    "betas",
    "check_loss",
    "classifier_free_guidance",
    "cosine_betas",
    "ddim",
    "ddim_inverse_step",
    "ddim_invert",
    "ddim_step",
    "ddpm",
    "ddpm_step",
    "diffusion_loss",
    "dpmpp_2m",
    "dpmpp_2m_step",
    "sample_timesteps",
    "dynamic_threshold",
    "estimated_bound",
    "linear_betas",
    "loss_history",
    "normal",
    "repaint",
    "respace",
    "sample",
    "sample_repaint",
    "tiled",
    "timestep_probabilities",
    "update_history",
    "variational_bound",
    "with_known_x_0",
    "x0_error",
    "zero_terminal_snr",
]
