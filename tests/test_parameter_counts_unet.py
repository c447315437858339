"""Parameter counts of the full-size U-Nets against the released ones and Table 3, by shapes alone."""

import math

import jax
import jax.numpy as jnp
import pytest

from dalle2_jax.decoder import CaptionEncoder, Decoder, Upsampler
from dalle2_jax.layers.unet import UNet


def _count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _decoder_shapes(decoder: Decoder, embedding_size: int, text: tuple | None = None) -> dict:
    size = decoder.unet.image_size
    if text is None:
        text = jax.ShapeDtypeStruct((1, decoder.text.context_length), jnp.int32)
    else:
        text = jax.ShapeDtypeStruct(text, jnp.float32)
    arguments = jnp.zeros((1, size, size, 3)), jnp.zeros(1, jnp.int32), jnp.zeros((1, embedding_size)), text
    return jax.eval_shape(decoder.init, jax.random.key(0), *arguments)["params"]


def _upsampler_count(unet: UNet) -> int:
    images, small = jnp.zeros((1, 64, 64, 3)), jnp.zeros((1, 16, 16, 3))
    return _count(jax.eval_shape(Upsampler(unet).init, jax.random.key(0), images, jnp.zeros(1, jnp.int32), small))


def test_glide_base():
    text = CaptionEncoder(vocabulary_size=50257, context_length=128, width=512, depth=16, heads=8)
    shapes = _decoder_shapes(Decoder(UNet(channels=192), image_tokens=0, text=text), embedding_size=4)
    ours = sum(_count(shapes[part]) for part in ("unet", "text", "text_time"))
    assert ours == pytest.approx(385_030_726, rel=1e-3)
    assert set(shapes) == {"unet", "text", "text_time", "image_time", "null_image"}


def test_karlo_decoder():
    shapes = _decoder_shapes(Decoder(UNet(channels=320), text_width=1536), embedding_size=768, text=(1, 77, 768))
    assert _count(shapes.pop("unet")) == pytest.approx(885_439_686, rel=1e-3)
    assert _count(shapes.pop("null_text")) == 768  # Karlo has none: its null caption is the empty prompt
    assert _count(shapes) == pytest.approx(7_878_400, rel=1e-3)


def test_table_3_decoder():
    shapes = _decoder_shapes(Decoder(UNet(), text=CaptionEncoder(vocabulary_size=50257)), embedding_size=1024)
    assert _count(shapes["unet"]) == pytest.approx(2.238e9, rel=0.01)
    assert _count(shapes["text"]) == pytest.approx(1.313e9, rel=0.01)
    assert _count(shapes) == pytest.approx(3.55e9, rel=0.01)


SR1 = {"image_size": 256, "channels": 320, "depth": 3, "channel_multipliers": (1, 2, 3, 4)}
SR2 = {"image_size": 1024, "channels": 192, "depth": 2, "channel_multipliers": (1, 1, 2, 2, 4, 4)}


@pytest.mark.parametrize(
    "sizes, scale_shift, expected, tolerance",
    [
        (SR1, False, 691_579_523, 1e-3),  # also Karlo's
        (SR1, True, 729.7e6, 0.01),
        (SR2, False, 267.1e6, 0.01),
        (SR2, True, 282.1e6, 0.01),
    ],
    ids=["sr1_plain", "sr1_scale_shift", "sr2_plain", "sr2_scale_shift"],
)
def test_table_3_upsamplers(sizes, scale_shift, expected, tolerance):
    unet = UNet(**sizes, out_channels=3, attention_resolutions=(), middle_attention=False, scale_shift=scale_shift)
    assert _upsampler_count(unet) == pytest.approx(expected, rel=tolerance)
