"""U-Net, Upsampler and Decoder against guided-diffusion's and GLIDE's (references/unet_*.npz, from make_unet.py)."""

import json

import jax
import numpy as np

from dalle2_jax.decoder import CaptionEncoder, Decoder, Upsampler
from dalle2_jax.layers.unet import UNet
from dalle2_jax.weights.sources.glide import glide_table
from dalle2_jax.weights.sources.unet import GuidedDiffusion, unet_entries
from dalle2_jax.weights.table import Table
from tests.parity.drawn_weights import draw
from tests.parity.reference import reference_path
from tests.parity.tables import convert


def _reference(name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]:
    with np.load(reference_path(f"unet_{name}")) as file:
        shapes = json.loads(str(file["shapes"]))
        inputs = {key.removeprefix("input/"): file[key] for key in file.files if key.startswith("input/")}
        return {f"weights/{key}": value for key, value in draw(shapes).items()}, inputs, file["output"]


def _assert_close(model, table: Table, weights: dict, inputs: dict, output: np.ndarray) -> None:
    params = convert(table, model, weights, **inputs)
    ours = jax.jit(lambda params: model.apply({"params": params}, **inputs))(params)
    np.testing.assert_allclose(ours, output, rtol=0, atol=1e-4 * np.abs(output).max())


def _check_unet(name: str, unet: UNet) -> None:
    weights, inputs, output = _reference(name)
    table = Table()
    unet_entries(table, GuidedDiffusion(unet), "")
    _assert_close(unet, table, weights, {"x": inputs["x_t"], "timesteps": inputs["timesteps"]}, output)


def test_adm():
    unet = UNet(
        image_size=16,
        channels=32,
        channel_multipliers=(1, 2),
        depth=2,
        attention_resolutions=(8,),
        head_channels=16,
    )
    _check_unet("adm", unet)


def test_plain_resampling_without_scale_shift():
    unet = UNet(
        image_size=16,
        channels=32,
        channel_multipliers=(1, 1, 2),
        depth=1,
        attention_resolutions=(16, 4),
        head_channels=16,
        scale_shift=False,
        resblock_resampling=False,
    )
    _check_unet("plain", unet)


def test_upsampler():
    weights, inputs, output = _reference("upsampler")
    unet = UNet(
        image_size=16,
        out_channels=3,
        channels=32,
        channel_multipliers=(1, 1, 2),
        depth=1,
        attention_resolutions=(),
        middle_attention=False,
        scale_shift=False,
    )
    table = Table()
    unet_entries(table, GuidedDiffusion(unet), "unet/")
    # There the middle attention is an identity in its place; Karlo's upsamplers have none.
    weights = {name.replace("middle_block.2.", "middle_block.1."): value for name, value in weights.items()}
    named = {key: inputs[key] for key in ("x_t", "timesteps", "low_resolution")}
    _assert_close(Upsampler(unet), table, weights, named, output)


def test_decoder_without_image_embedding_is_glide():
    weights, inputs, output = _reference("glide")
    unet = UNet(
        image_size=16,
        channels=32,
        channel_multipliers=(1, 2, 2),
        depth=1,
        attention_resolutions=(8, 4),
        head_channels=16,
    )
    text = CaptionEncoder(vocabulary_size=40, context_length=8, width=48, depth=2, heads=3)

    model = Decoder(unet, image_tokens=0, text=text, reads_image=False)
    inputs = {
        "x_t": inputs["x_t"],
        "timesteps": inputs["timesteps"],
        "text": inputs["tokens"],
        "text_mask": inputs["mask"],
    }
    _assert_close(model, glide_table(model), weights, inputs, output)
