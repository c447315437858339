"""unCLIP assembled: a run's CLIP, prior, decoder and upsamplers at work, from captions to images.

system      DALLE2: load a run, generate, vary
load        the stages of a run, checked against each other
embed       CLIP's embeddings of captions and images
sample      each stage's sampling, from `(stage, captions, keys, settings)`
generate    the stages one after the other, in batches
rerank      the best of several images of a caption, by CLIP
settings    what a stage is sampled by
placement   parameters and batches on devices
memory      what one image takes of memory
"""

from dalle2_jax.unclip.generate import Generated
from dalle2_jax.unclip.rerank import generate_best
from dalle2_jax.unclip.system import DALLE2

__all__ = ["DALLE2", "Generated", "generate_best"]
