"""Networks by the files that others publish: Karlo's own, open_clip's and GLIDE's (references/*.npz, by make_*.py)."""

import json

import jax
import numpy as np
import pytest

from dalle2_jax.decoder import CaptionEncoder, Decoder, Upsampler
from dalle2_jax.layers.precision import with_dtype
from dalle2_jax.layers.unet import UNet
from dalle2_jax.prior import DiffusionPrior
from dalle2_jax.weights.sources import glide, karlo, karlo_original, open_clip
from tests.parity.closeness import close
from tests.parity.drawn_weights import draw, noise
from tests.parity.reference import reference_path
from tests.parity.tables import convert

KARLO_TIMESTEPS, GLIDE_TIMESTEPS = np.array([0, 37, 999]), np.array([0, 431, 999])


def read(name: str) -> dict[str, np.ndarray]:
    with np.load(reference_path(name)) as file:
        return dict(file)


def weights(reference: dict, part: str) -> dict[str, np.ndarray]:
    shapes = json.loads(str(reference["shapes"]))
    if part in shapes:
        shapes = {f"{part}/{name}": shape for name, shape in shapes[part].items()}
    shapes = {name: shape for name, shape in shapes.items() if name.startswith(f"{part}/")}
    return {f"weights/{name.removeprefix(f'{part}/')}": value for name, value in draw(shapes).items()}


BFLOAT16 = pytest.param("bfloat16", marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def karlo_files():
    return read("karlo_original")


def original(name: str, *shape: int) -> np.ndarray:
    return noise(f"original/{name}", shape)


def caption(reference: dict, kind: str) -> dict[str, np.ndarray]:
    mask = reference["mask"] | (kind == "unpadded")
    return {"text_embedding": original("text", 3, 16), "text": original("states", 3, 9, 16), "text_mask": mask}


def images(name: str) -> np.ndarray:
    return original(name, 3, 3, 16, 16).transpose(0, 2, 3, 1)


@pytest.mark.parametrize(("kind", "dtype"), [("padded", "float32"), ("padded", "bfloat16"), ("unpadded", "float32")])
def test_karlo_prior(karlo_files, kind, dtype):
    module = DiffusionPrior(
        embedding_size=16, width=24, depth=2, heads=2, context_length=9, embedding_scale=1.0, learned_null=False
    )
    module = with_dtype(module, dtype)
    inputs = (original("z", 3, 16), KARLO_TIMESTEPS)
    table = karlo_original.prior_table(module)
    params = convert(table, module, weights(karlo_files, "prior"), *inputs, **caption(karlo_files, kind))
    ours = jax.jit(module.apply)({"params": params}, *inputs, **caption(karlo_files, kind))
    close(ours, karlo_files[f"prior_{kind}"], dtype=dtype)


@pytest.mark.parametrize(("kind", "dtype"), [("padded", "float32"), ("padded", "bfloat16"), ("unpadded", "float32")])
def test_karlo_decoder(karlo_files, kind, dtype):
    unet = UNet(
        image_size=16, channels=32, channel_multipliers=(1, 2), depth=1, attention_resolutions=(8,), head_channels=8
    )
    module = with_dtype(karlo.decoder_module(unet, {"cross_attention_dim": 20}), dtype)
    inputs = (images("x"), KARLO_TIMESTEPS, original("z", 3, 16))
    table = karlo_original.decoder_table(module)
    params = convert(table, module, weights(karlo_files, "decoder"), *inputs, **caption(karlo_files, kind))
    ours = jax.jit(module.apply)({"params": params}, *inputs, **caption(karlo_files, kind))
    close(ours, karlo_files[f"decoder_{kind}"], dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", BFLOAT16])
def test_karlo_upsampler(karlo_files, dtype):
    unet = UNet(
        image_size=16,
        out_channels=3,
        channels=32,
        channel_multipliers=(1, 2),
        depth=1,
        attention_resolutions=(),
        middle_attention=False,
        scale_shift=False,
    )
    module = with_dtype(karlo.upsampler_module(unet, unet), dtype)
    inputs = (images("x"), KARLO_TIMESTEPS, images("low"))
    params = convert(karlo_original.upsampler_table(module), module, weights(karlo_files, "upsampler"), *inputs)
    for place, timestep in enumerate(KARLO_TIMESTEPS):
        ours = jax.jit(module.apply)({"params": params}, images("x"), np.full(3, timestep), images("low"))
        close(ours[place], karlo_files["last_step" if timestep == 0 else "first_steps"][place], dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_open_clip(dtype):
    reference = read("open_clip")
    module = with_dtype(open_clip.clip_module(json.loads(str(reference["config"])), "the reference"), dtype)
    drawn = {f"weights/{name}": value for name, value in draw(json.loads(str(reference["shapes"]))).items()}
    pixels = noise("open_clip/pixels", (3, 3, 16, 16)).transpose(0, 2, 3, 1)
    # Theirs is given normalised pixels.
    shown = 2 * (pixels * np.asarray(module.vision.std) + np.asarray(module.vision.mean)) - 1
    inputs = (shown.astype(np.float32), reference["tokens"], reference["mask"])
    params = {"params": convert(open_clip.clip_table(module), module, drawn, *inputs)}
    image, text, _ = jax.jit(module.apply)(params, *inputs)
    close(image, reference["image_embedding"], dtype=dtype)
    close(text, reference["text_embedding"], dtype=dtype)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float32") for name in ("base", "upsample", "base_inpaint", "upsample_inpaint")]
    + [pytest.param(name, "bfloat16", marks=pytest.mark.slow) for name in ("base", "upsample_inpaint")],
)
def test_glide(name, dtype):
    reference = read("glide")
    unet = UNet(
        image_size=16, channels=32, channel_multipliers=(1, 2), depth=1, attention_resolutions=(8,), head_channels=16
    )
    text = CaptionEncoder(vocabulary_size=40, context_length=8, width=48, depth=2, heads=3)
    painting = name.endswith("inpaint")
    drawn = {part: noise(f"glide/{part}", (3, 3, 16, 16)).transpose(0, 2, 3, 1) for part in ("x", "low", "seen")}
    inputs = {"x_t": drawn["x"], "timesteps": GLIDE_TIMESTEPS, "text": reference["tokens"]}
    inputs["text_mask"] = reference["mask"]
    if painting:
        known = (noise("glide/known", (3, 1, 16, 16)) > 0).transpose(0, 2, 3, 1).astype(np.float32)
        inputs["known"] = np.concatenate([drawn["seen"] * known, known], axis=-1)
    if name.startswith("base"):
        module = Decoder(unet, image_tokens=0, text=text, reads_image=False, inpainting=painting)
    else:
        module = Upsampler(unet, text=text, inpainting=painting)
        inputs["low_resolution"] = drawn["low"][:, ::4, ::4]
    module = with_dtype(module, dtype)
    params = convert(glide.glide_table(module), module, weights(reference, name), **inputs)
    close(jax.jit(module.apply)({"params": params}, **inputs), reference[name], dtype=dtype)
