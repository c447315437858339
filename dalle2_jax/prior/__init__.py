"""The priors: from a caption and its CLIP embedding to CLIP image embeddings (Sec. 2.2).

diffusion_prior      the diffusion prior; sampled in diffusion_sampling
autoregressive       the autoregressive prior; sampled in autoregressive_sampling
codec, pca           CLIP embeddings as codes, for the latter
condition            what any prior is, and what ours read of captions
sample, selection    sampling any prior, and the best of several candidates
"""

from dalle2_jax.prior.autoregressive import AutoregressivePrior
from dalle2_jax.prior.autoregressive_sampling import AutoregressiveSampling
from dalle2_jax.prior.codec import Codec, CodecFit
from dalle2_jax.prior.condition import Prior, caption_condition
from dalle2_jax.prior.diffusion_prior import DiffusionPrior
from dalle2_jax.prior.pca import PCA, fit_pca
from dalle2_jax.prior.sample import sample_prior
from dalle2_jax.prior.selection import best_of

__all__ = [
    "PCA",
    "AutoregressivePrior",
    "AutoregressiveSampling",
    "Codec",
    "CodecFit",
    "DiffusionPrior",
    "Prior",
    "best_of",
    "caption_condition",
    "fit_pca",
    "sample_prior",
]
