"""From an image embedding, and optionally its caption, to an image: the decoder and the upsamplers (Sec. 2.1)."""

from dalle2_jax.decoder.condition import Caption, caption_for
from dalle2_jax.decoder.decoder import Decoder
from dalle2_jax.decoder.known import Known
from dalle2_jax.decoder.low_resolution import gaussian_blur, random_crop
from dalle2_jax.decoder.sample import invert_decoder, sample_decoder, sample_upsampler
from dalle2_jax.decoder.upsampler import Upsampler
from dalle2_jax.layers.caption_encoder import CaptionEncoder

__all__ = [
    "Caption",
    "CaptionEncoder",
    "Decoder",
    "Known",
    "Upsampler",
    "caption_for",
    "gaussian_blur",
    "invert_decoder",
    "random_crop",
    "sample_decoder",
    "sample_upsampler",
]
