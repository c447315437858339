"""CLIP: an image and a text transformer that share one embedding space, its training loss and zero-shot use."""

from dalle2_jax.clip.encode import encode_captions
from dalle2_jax.clip.loss import contrastive_loss
from dalle2_jax.clip.model import CLIP
from dalle2_jax.clip.text import TextTransformer
from dalle2_jax.clip.vision import VisionTransformer
from dalle2_jax.clip.zero_shot import classify, zero_shot_weights

__all__ = [
    "CLIP",
    "TextTransformer",
    "VisionTransformer",
    "classify",
    "contrastive_loss",
    "encode_captions",
    "zero_shot_weights",
]
