"""U-Net, Upsampler and Decoder against guided-diffusion's and GLIDE's (references/unet_*.npz, from make_unet.py)."""

import json
from pathlib import Path

import jax
import numpy as np

from dalle2_jax.decoder import CaptionEncoder, Decoder, Upsampler
from dalle2_jax.layers.unet import UNet
from tests.parity.drawn_weights import draw
from tests.parity.torch_weights import TorchWeights, assert_same_shapes, stack_layers


def _reference(name: str) -> tuple[TorchWeights, dict[str, np.ndarray], np.ndarray]:
    with np.load(Path(__file__).parent / "references" / f"unet_{name}.npz") as file:
        shapes = json.loads(str(file["shapes"]))
        inputs = {key.removeprefix("input/"): file[key] for key in file.files if key.startswith("input/")}
        return TorchWeights(draw(shapes)), inputs, file["output"]


def _heads_last(dense: dict[str, np.ndarray], parts: int, head_channels: int) -> dict[str, np.ndarray]:
    """Output features from theirs, [heads, parts, head_channels], to ours, [parts, heads, head_channels]."""

    def reorder(array: np.ndarray) -> np.ndarray:
        split = array.reshape(*array.shape[:-1], -1, parts, head_channels)
        return np.swapaxes(split, -3, -2).reshape(array.shape)

    return {name: reorder(array) for name, array in dense.items()}


class _Mapping:
    """Hands the tensors of a guided-diffusion or GLIDE U-Net to our names."""

    def __init__(self, weights: TorchWeights, unet: UNet, context: bool):
        self.weights, self.unet, self.context = weights, unet, context

    def conv(self, name: str) -> dict[str, np.ndarray]:
        kernel = self.weights.take(f"{name}.weight").transpose(2, 3, 1, 0)
        return {"kernel": kernel, "bias": self.weights.take(f"{name}.bias")}

    def pointwise(self, name: str) -> dict[str, np.ndarray]:
        kernel = self.weights.take(f"{name}.weight")[:, :, 0].T
        return {"kernel": kernel, "bias": self.weights.take(f"{name}.bias")}

    def res(self, name: str, skip: bool) -> dict:
        params = {
            "norm_1": self.weights.norm(f"{name}.in_layers.0"),
            "conv_1": self.conv(f"{name}.in_layers.2"),
            "time": self.weights.dense(f"{name}.emb_layers.1"),
            "norm_2": self.weights.norm(f"{name}.out_layers.0"),
            "conv_2": self.conv(f"{name}.out_layers.3"),
        }
        return params | {"skip": self.conv(f"{name}.skip_connection")} if skip else params

    def attention(self, name: str) -> dict:
        params = {
            "norm": self.weights.norm(f"{name}.norm"),
            "qkv": _heads_last(self.pointwise(f"{name}.qkv"), 3, self.unet.head_channels),
            "out": self.pointwise(f"{name}.proj_out"),
        }
        if self.context:
            kv = _heads_last(self.pointwise(f"{name}.encoder_kv"), 2, self.unet.head_channels)
            params["context_kv"] = kv
        return params

    def resample(self, name: str, direction: str) -> dict:
        if self.unet.resblock_resampling:
            return self.res(name, skip=False)
        return {"conv": self.conv(f"{name}.{'op' if direction == 'down' else 'conv'}")}

    def params(self) -> dict:
        """The block numbers run as in the modules' lists: one for every entry of the skip stack."""
        unet = self.unet
        params = {
            "time_1": self.weights.dense("time_embed.0"),
            "time_2": self.weights.dense("time_embed.2"),
            "conv_in": self.conv("input_blocks.0.0"),
            "norm_out": self.weights.norm("out.0"),
            "conv_out": self.conv("out.2"),
        }
        block, levels = 0, len(unet.channel_multipliers)
        skips, width = [unet.channel_multipliers[0]], unet.channel_multipliers[0]
        for level, multiplier in enumerate(unet.channel_multipliers):
            for i in range(unet.depth):
                block += 1
                params[f"down_{level}_res_{i}"] = self.res(f"input_blocks.{block}.0", width != multiplier)
                width = multiplier
                if unet.attends(level):
                    params[f"down_{level}_attention_{i}"] = self.attention(f"input_blocks.{block}.1")
                skips.append(width)
            if level < levels - 1:
                block += 1
                params[f"down_{level}_resample"] = self.resample(f"input_blocks.{block}.0", "down")
                skips.append(width)
        params["middle_res_0"] = self.res("middle_block.0", skip=False)
        if unet.middle_attention:
            params["middle_attention_0"] = self.attention("middle_block.1")
        params["middle_res_1"] = self.res("middle_block.2", skip=False)
        block = 0
        for level, multiplier in reversed(list(enumerate(unet.channel_multipliers))):
            for i in range(unet.depth + 1):
                skip = width + skips.pop() != multiplier
                params[f"up_{level}_res_{i}"] = self.res(f"output_blocks.{block}.0", skip)
                width = multiplier
                if unet.attends(level):
                    params[f"up_{level}_attention_{i}"] = self.attention(f"output_blocks.{block}.1")
                if level and i == unet.depth:
                    after = 2 if unet.attends(level) else 1
                    params[f"up_{level}_resample"] = self.resample(f"output_blocks.{block}.{after}", "up")
                block += 1
        return params


def _assert_close(model, params: dict, inputs: tuple, output: np.ndarray) -> None:
    assert_same_shapes(params, jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"])
    ours = jax.jit(model.apply)({"params": params}, *inputs)
    np.testing.assert_allclose(ours, output, rtol=0, atol=1e-4 * np.abs(output).max())


def _check_unet(name: str, unet: UNet) -> None:
    weights, inputs, output = _reference(name)
    params = _Mapping(weights, unet, context=False).params()
    weights.assert_all_used()
    _assert_close(unet, params, (inputs["x_t"], inputs["timesteps"]), output)


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
    params = {"unet": _Mapping(weights, unet, context=False).params()}
    weights.assert_all_used()
    _assert_close(Upsampler(unet), params, tuple(inputs[k] for k in ("x_t", "timesteps", "low_resolution")), output)


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

    def layer(name: str) -> dict:
        return {
            "attention_norm": weights.norm(f"{name}.ln_1"),
            "attention": {
                "qkv": _heads_last(weights.dense(f"{name}.attn.c_qkv"), 3, text.width // text.heads),
                "out": weights.dense(f"{name}.attn.c_proj"),
            },
            "mlp_norm": weights.norm(f"{name}.ln_2"),
            "mlp_in": weights.dense(f"{name}.mlp.c_fc"),
            "mlp_out": weights.dense(f"{name}.mlp.c_proj"),
        }

    params = {
        "unet": _Mapping(weights, unet, context=True).params(),
        "text": {
            "token_embedding": {"embedding": weights.take("token_embedding.weight")},
            "positions": weights.take("positional_embedding"),
            "padding": weights.take("padding_embedding"),
            "transformer": {"blocks": stack_layers([layer(f"transformer.resblocks.{i}") for i in range(text.depth)])},
            "final_norm": weights.norm("final_ln"),
        },
        "text_time": weights.dense("transformer_proj"),
        # What GLIDE lacks: at zero, the image embedding says nothing.
        "image_time": {"kernel": np.zeros((4, 128), np.float32), "bias": np.zeros(128, np.float32)},
        "null_image": np.zeros(4, np.float32),
    }
    weights.assert_all_used()
    inputs = (inputs["x_t"], inputs["timesteps"], np.ones((3, 4), np.float32), inputs["tokens"], inputs["mask"])
    _assert_close(Decoder(unet, image_tokens=0, text=text), params, inputs, output)
