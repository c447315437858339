"""Diffusion as arithmetic over a function: schedules, the process, losses, samplers, guidance. It sees no network."""

from dalle2_jax.diffusion.guidance import classifier_free_guidance
from dalle2_jax.diffusion.loss import check_loss, diffusion_loss, variational_bound
from dalle2_jax.diffusion.process import Prediction, Process
from dalle2_jax.diffusion.sampler import SAMPLERS, ddim, ddim_step, ddpm, ddpm_step, normal
from dalle2_jax.diffusion.sampling import Sampling, sample
from dalle2_jax.diffusion.schedule import betas, cosine_betas, linear_betas, respace

__all__ = [
    "SAMPLERS",
    "Prediction",
    "Process",
    "Sampling",
    "betas",
    "classifier_free_guidance",
    "cosine_betas",
    "ddim",
    "ddim_step",
    "ddpm",
    "ddpm_step",
    "check_loss",
    "diffusion_loss",
    "linear_betas",
    "normal",
    "respace",
    "sample",
    "variational_bound",
]
