"""Karlo's networks in their published sizes, as diffusers' configs say it, and the inputs of their comparison."""

import numpy as np

from tests.parity.drawn_weights import noise

CONTEXT, EMBEDDING = 77, 768
TIMESTEPS = (37, 999)
LENGTHS = (77, 9)
STRIDE = 4  # of the pixels of large outputs that are kept
DOWN, UP = "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"
TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "bos_token_id": 49_406,
    "eos_token_id": 49_407,
}
VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,
}
TEXT_PROJECTION = {"time_embed_dim": 4 * 320, "cross_attention_dim": 1536}
DECODER = {
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 6,
    "layers_per_block": 3,
    "cross_attention_dim": 1536,
    "block_out_channels": (320, 640, 960, 1280),
    "down_block_types": (DOWN, *("SimpleCrossAttnDownBlock2D",) * 3),
    "up_block_types": (*("SimpleCrossAttnUpBlock2D",) * 3, UP),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "class_embed_type": "identity",
    "attention_head_dim": 64,
    "resnet_time_scale_shift": "scale_shift",
}
SUPER_RES = {
    "sample_size": 256,
    "in_channels": 6,
    "out_channels": 3,
    "layers_per_block": 3,
    "block_out_channels": (320, 640, 960, 1280),
    "down_block_types": (DOWN,) * 4,
    "up_block_types": (UP,) * 4,
    "add_attention": False,
}


# The image's U-Nets have a weak last layer, as they are made before training. One as strong as the others' would turn
# rounding into other pixels: at timestep 999 the chain multiplies what it finds by 20,000 and cuts it at one.
WEAK = ("conv_out.weight", "conv_out.bias")
WEAKENED = 0.1


def caption_ids(length: int) -> np.ndarray:
    """Start, random tokens, end; filled up with token 0."""
    row = np.zeros(CONTEXT, np.int64)
    words = np.random.RandomState(length).randint(1, 49_406, length - 2)
    row[:length] = [49_406, *words, 49_407]
    return row


def given(name: str, *shape: int) -> np.ndarray:
    """An input, float32; images as [batch, channels, height, width]."""
    return noise(f"full/{name}", shape)
