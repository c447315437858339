"""The prior: from a caption and its CLIP embedding to CLIP image embeddings (Sec. 2.2)."""

from dalle2_jax.prior.diffusion_prior import DiffusionPrior
from dalle2_jax.prior.sample import caption_condition, sample_prior
from dalle2_jax.prior.selection import best_of

__all__ = ["DiffusionPrior", "best_of", "caption_condition", "sample_prior"]
