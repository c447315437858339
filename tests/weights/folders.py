"""Small folders and files as others publish them, filled from the tables themselves: what fits is known by design.

That the tables are right is for tests/parity to show; these folders are for what is around them.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from dalle2_jax.clip import CLIP
from dalle2_jax.decoder import CaptionEncoder
from dalle2_jax.layers.unet import UNet
from dalle2_jax.prior import DiffusionPrior
from dalle2_jax.tokenizer import ClipTokenizer, byte_letters
from dalle2_jax.weights.conversion import Conversion
from dalle2_jax.weights.sources import clip, glide, karlo, karlo_original, open_clip, pipeline
from dalle2_jax.weights.table import Table, _path
from dalle2_jax.weights.tensors import Tensors
from tests.parity.drawn_weights import draw
from tests.parity.karlo_folder import TEXT2IMG, VARIATION, read_reference, write_folder, write_vocabulary

VOCABULARY, WIDTH = 600, 24
NOTHING = Tensors("nothing", {}, {}, {}.get)
CLIP_CONFIG = {
    "model_type": "clip",
    "projection_dim": WIDTH,
    "text_config": {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 9,
        "hidden_size": WIDTH,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
    },
    "vision_config": {
        "image_size": 16,
        "patch_size": 8,
        "hidden_size": WIDTH,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
    },
}
OPEN_CLIP_CONFIG = {
    "embed_dim": WIDTH,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": WIDTH, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 9, "vocab_size": VOCABULARY, "width": WIDTH, "heads": 3, "layers": 1},
}
UNET = {"channels": 32, "channel_multipliers": (1, 2), "depth": 1, "head_channels": 8}
PLAIN = {"out_channels": 3, "attention_resolutions": (), "scale_shift": False, "middle_attention": False}


def wanted(table: Table, shapes: Any) -> dict[str, np.ndarray]:
    """Tensors of the names and shapes that a table asks for."""
    ours = {_path(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    found = {}
    for entry in table.entries:
        shape = ours[entry.target] if entry.layer is None else ours[entry.target][1:]
        found |= dict(zip(entry.sources, entry.shapes(shape), strict=True))
    return draw(found)


def tensors_of(conversion: Conversion) -> dict[str, np.ndarray]:
    """What a conversion asks for."""
    return wanted(conversion.table, conversion.shapes)


def clip_folder(folder: Path) -> Path:
    """In the layout of transformers."""
    write_vocabulary(folder, VOCABULARY)
    (folder / "config.json").write_text(json.dumps(CLIP_CONFIG))
    module = CLIP(
        vision=clip.vision_module(CLIP_CONFIG["vision_config"]),
        text=clip.text_module(CLIP_CONFIG["text_config"]),
        embedding_size=WIDTH,
    )
    save_file(tensors_of(clip.conversion(module, NOTHING, ClipTokenizer.read(folder, 9))), folder / "model.safetensors")
    return folder


def open_clip_folder(folder: Path) -> Path:
    """In the layout of open_clip."""
    write_vocabulary(folder, VOCABULARY)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP_CONFIG}))
    module = open_clip.clip_module(OPEN_CLIP_CONFIG, "the test")
    conversion = clip.stage(module, open_clip.clip_table(module), NOTHING, ClipTokenizer.read(folder, 9))
    save_file(tensors_of(conversion), folder / "open_clip_model.safetensors")
    return folder


def karlo_folder(folder: Path, pipeline: str = "UnCLIPPipeline") -> Path:
    """In the layout of diffusers."""
    parts = TEXT2IMG if pipeline == "UnCLIPPipeline" else VARIATION
    return write_folder(folder, read_reference(), parts, pipeline)


def kandinsky_folder(folder: Path) -> Path:
    """A prior's pipeline in the layout of diffusers."""
    parts = ("text_encoder", "image_encoder", "prior")
    write_folder(folder, read_reference(), parts, "KandinskyV22PriorPipeline")
    (folder / "prior_scheduler").rename(folder / "scheduler")
    return folder


def small_karlo(monkeypatch) -> None:
    """Karlo's own files are of one size; makes it a small one."""
    prior = DiffusionPrior(
        embedding_size=WIDTH, width=24, depth=1, heads=2, context_length=9, embedding_scale=1.0, learned_null=False
    )
    monkeypatch.setattr(karlo_original, "PRIOR_MODULE", prior)
    monkeypatch.setattr(karlo_original, "DECODER_UNET", UNet(image_size=16, attention_resolutions=(8,), **UNET))
    monkeypatch.setattr(karlo_original, "UPSAMPLER_UNET", UNet(image_size=32, **UNET, **PLAIN))
    monkeypatch.setattr(karlo_original, "TEXT_WIDTH", 20)


def original_folder(folder: Path, clip_run: Conversion) -> Path:
    """Karlo's own files; after `small_karlo`."""
    folder.mkdir()
    module = karlo_original.PRIOR_MODULE.clone(embedding_mean=(0.1,) * WIDTH, embedding_std=(0.9,) * WIDTH)
    tokenizer = ClipTokenizer.from_json(clip_run.record["tokenizer"])
    prior = pipeline.prior(module, karlo_original.prior_table(module), NOTHING, clip_run.module, tokenizer, 10.0)
    module = karlo.decoder_module(karlo_original.DECODER_UNET, {"cross_attention_dim": 20})
    decoder = karlo.decoder(module, karlo_original.decoder_table(module), NOTHING, clip_run.module, tokenizer)
    unet = karlo_original.UPSAMPLER_UNET
    module = karlo.upsampler_module(unet, unet)
    upsampler = karlo.upsampler(module, karlo_original.upsampler_table(module), NOTHING, 16)
    names = {"prior-ckpt-step=1": prior, "decoder-ckpt-step=1": decoder, "improved-sr-ckpt-step=1.2M": upsampler}
    for name, conversion in names.items():
        save_file(tensors_of(conversion), folder / f"{name}.safetensors")
    statistics = {"0": np.full(WIDTH, 0.1, np.float32), "1": np.full(WIDTH, 0.9, np.float32)}
    save_file(statistics, folder / "ViT-L-14_stats.safetensors")
    return folder


def small_glide(monkeypatch) -> None:
    """GLIDE's files are of one size; makes it a small one."""
    captions = CaptionEncoder(vocabulary_size=258, context_length=8, width=16, depth=1, heads=2)
    monkeypatch.setattr(glide, "CAPTIONS", captions)
    monkeypatch.setattr(glide, "BASE", UNet(image_size=8, attention_resolutions=(4,), **UNET))
    monkeypatch.setattr(glide, "UPSAMPLER", UNet(image_size=16, attention_resolutions=(8,), **UNET))


def glide_folder(folder: Path, inpainting: bool = False) -> Path:
    """GLIDE's files and a vocabulary of GPT-2's kind; after `small_glide`."""
    folder.mkdir()
    letters = list(byte_letters().values())
    tokens = [*letters, "ab", "<|endoftext|>"]
    (folder / "encoder.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "vocab.bpe").write_text("#version: 0.2\na b\n")
    ending = "_inpaint" if inpainting else ""
    painting = {"known": 4} if inpainting else {}
    for name, module in (("base", glide.decoder_module(inpainting)), ("upsample", glide.upsampler_module(inpainting))):
        size = module.unet.image_size
        inputs = {"x_t": np.zeros((1, size, size, 3), np.float32), "timesteps": np.zeros(1, np.int32)}
        inputs |= {"text": np.zeros((1, 8), np.int32), "text_mask": np.ones((1, 8), bool)}
        inputs |= {key: np.zeros((1, size, size, depth), np.float32) for key, depth in painting.items()}
        if name == "upsample":
            inputs["low_resolution"] = np.zeros((1, 8, 8, 3), np.float32)
        shapes = jax.eval_shape(lambda module=module, inputs=inputs: module.init(jax.random.key(0), **inputs))
        save_file(wanted(glide.glide_table(module), shapes["params"]), folder / f"{name}{ending}.safetensors")
    return folder
