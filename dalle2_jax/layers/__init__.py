"""Building blocks of the networks: attention, transformers, the U-Net, convolutions and embeddings."""

from dalle2_jax.layers.attention import MultiHeadAttention, dot_product_attention
from dalle2_jax.layers.caption_encoder import CaptionEncoder
from dalle2_jax.layers.convolution import GroupNorm, Resample, ResBlock
from dalle2_jax.layers.cross_attention import CrossAttention
from dalle2_jax.layers.embedding import timestep_embedding
from dalle2_jax.layers.positions import Positions, sinusoidal_positions
from dalle2_jax.layers.transformer import LayerNorm, Transformer
from dalle2_jax.layers.unet import UNet

__all__ = [
    "CaptionEncoder",
    "CrossAttention",
    "GroupNorm",
    "LayerNorm",
    "MultiHeadAttention",
    "Positions",
    "ResBlock",
    "Resample",
    "Transformer",
    "UNet",
    "dot_product_attention",
    "sinusoidal_positions",
    "timestep_embedding",
]
