"""Writes references/full.npz: networks of the published sizes on drawn weights, and one image of the whole of Karlo.

Runs in an environment of its own with torch, diffusers and transformers, and a checkout of openai/glide-text2im, never
in the test suite; it takes some 20 minutes and 20 GiB on two cores:

    python -m tests.parity.make_full --glide PATH [--folder FOLDER]

Of large outputs every fourth pixel is kept, each of which depends on all of the input. With --folder Karlo is saved
there as `save_pretrained` does.
"""

import argparse
import gc
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from tests.parity import torchvision_shim  # noqa: F401
from tests.parity.drawn_weights import draw
from tests.parity.karlo_full import (
    CONTEXT,
    DECODER,
    EMBEDDING,
    LENGTHS,
    STRIDE,
    SUPER_RES,
    TEXT,
    TEXT_PROJECTION,
    TIMESTEPS,
    VISION,
    WEAK,
    WEAKENED,
    caption_ids,
    given,
)
from tests.parity.make_karlo import Noise, schedulers
from tests.parity.make_schedulers import in_float64
from tests.parity.reference import to_write


def text_encoder():
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(CLIPTextConfig(projection_dim=EMBEDDING, **TEXT))


def prior():
    from diffusers import PriorTransformer

    return PriorTransformer()


def text_proj():
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

    return UnCLIPTextProjModel(**TEXT_PROJECTION)


def decoder():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**DECODER)


def super_res():
    from diffusers import UNet2DModel

    return UNet2DModel(**SUPER_RES)


def clip():
    from transformers import CLIPConfig, CLIPModel

    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=EMBEDDING))


NETWORKS = {
    "text_encoder": text_encoder,
    "prior": prior,
    "text_proj": text_proj,
    "decoder": decoder,
    "super_res_first": super_res,
    "super_res_last": super_res,
}


def drawn(name: str, network: torch.nn.Module, shapes: dict) -> torch.nn.Module:
    """The network on its drawn weights; their names and shapes go to `shapes`."""
    network.eval().requires_grad_(False)
    for key, value in network.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.from_numpy(draw({f"{name}/{key}": tuple(value.shape)})[f"{name}/{key}"]))
            shapes.setdefault(name, {})[key] = list(value.shape)
    return network


class FakeTokenizer:
    """In the tokenizer's place: the empty caption is its two ends, another has nine tokens."""

    model_max_length = CONTEXT

    def __call__(self, texts, **_):
        texts = [texts] if isinstance(texts, str) else texts
        lengths = [9 if text else 2 for text in texts]
        rows = np.stack([caption_ids(length) for length in lengths])
        mask = np.arange(CONTEXT)[None] < np.asarray(lengths)[:, None]

        class Batch:
            input_ids, attention_mask = torch.from_numpy(rows), torch.from_numpy(mask).long()

        return Batch()

    def batch_decode(self, _):
        return [""]


def inputs(name: str, *shape: int) -> torch.Tensor:
    return torch.from_numpy(given(name, *shape))


def thin(images: torch.Tensor) -> np.ndarray:
    """[batch, channels, h, w] to every fourth pixel of [batch, h, w, channels]."""
    return images.permute(0, 2, 3, 1)[:, ::STRIDE, ::STRIDE].numpy()


START = time.monotonic()


def say(words: str) -> None:
    print(f"{time.monotonic() - START:6.0f} s  {words}", flush=True)


def forwards(shapes: dict, folder: Path | None) -> dict[str, np.ndarray]:
    """Every network of Karlo alone, one after the other."""
    mask = torch.arange(CONTEXT)[None] < torch.tensor(LENGTHS)[:, None]
    ids = torch.from_numpy(np.stack([caption_ids(length) for length in LENGTHS]))
    timesteps, found = torch.tensor(TIMESTEPS), {}
    z, x, y = inputs("z", 2, EMBEDDING), inputs("x", 2, 3, 64, 64), inputs("y", 2, 6, 256, 256)
    text = context = None
    for name, make in NETWORKS.items():
        network = drawn(name, make(), shapes)
        if folder is not None:
            network.save_pretrained(folder / name)
        if name == "text_encoder":
            text = network(ids)
            found |= {"text_embedding": text.text_embeds.numpy(), "text_states": text.last_hidden_state.numpy()}
        for kind, one in (("padded", mask), ("unpadded", torch.ones_like(mask))):
            if name == "prior":
                found[f"prior_{kind}"] = network(
                    z,
                    timestep=timesteps,
                    proj_embedding=text.text_embeds,
                    encoder_hidden_states=text.last_hidden_state,
                    attention_mask=one,
                ).predicted_image_embedding.numpy()
            if name == "decoder":
                seen = torch.nn.functional.pad(one, (4, 0), value=True)
                found[f"decoder_{kind}"] = thin(
                    network(
                        x, timesteps, encoder_hidden_states=context[0], class_labels=context[1], attention_mask=seen
                    ).sample
                )
        if name == "text_proj":
            context = network(
                image_embeddings=z,
                prompt_embeds=text.text_embeds,
                text_encoder_hidden_states=text.last_hidden_state,
                do_classifier_free_guidance=False,
            )
        if name.startswith("super_res"):
            found[name] = thin(network(y, timesteps).sample)
        del network
        gc.collect()
        say(name)
    return found


def whole_clip(shapes: dict) -> dict[str, np.ndarray]:
    """CLIP L/14, both halves."""
    network = drawn("clip", clip(), shapes)
    ids = torch.from_numpy(np.stack([caption_ids(length) for length in LENGTHS]))
    out = network(input_ids=ids, pixel_values=inputs("pixels", 2, 3, 224, 224))
    say("clip")
    return {"clip_image": out.image_embeds.numpy(), "clip_text": out.text_embeds.numpy()}


def glide(shapes: dict) -> dict[str, np.ndarray]:
    """GLIDE's base network, as its own code makes it."""
    from glide_text2im.model_creation import create_model_and_diffusion, model_and_diffusion_defaults

    network, _ = create_model_and_diffusion(**{**model_and_diffusion_defaults(), "use_fp16": False})
    drawn("glide", network, shapes)
    tokens = torch.from_numpy(np.random.RandomState(0).randint(0, 50_257, (2, 128)))
    mask = torch.arange(128)[None] < torch.tensor([[128], [9]])
    out = network(inputs("x", 2, 3, 64, 64), torch.tensor(TIMESTEPS), tokens=tokens, mask=mask)
    say("glide")
    return {"glide": thin(out)}


def weakened(network: torch.nn.Module) -> torch.nn.Module:
    """The network with a weak last layer, where it has one of that name."""
    for name, value in network.state_dict().items():
        if name in WEAK:
            value.mul_(WEAKENED)
    return network


def image() -> np.ndarray:
    """One image of diffusers' UnCLIPPipeline, with the noise of every step given: every second pixel."""
    from diffusers import UnCLIPPipeline
    from diffusers.pipelines.deprecated.unclip import pipeline_unclip
    from diffusers.schedulers import scheduling_unclip

    built = {name: weakened(drawn(name, make(), {})) for name, make in NETWORKS.items()}
    plans = {name: in_float64(scheduler) for name, scheduler in schedulers().items()}
    given = Noise(["prior", "decoder", "super_res"])
    for module in (pipeline_unclip, scheduling_unclip):
        module.randn_tensor = given
    pipeline = UnCLIPPipeline(tokenizer=FakeTokenizer(), **built, **plans)
    images = pipeline(
        ["a caption"],
        prior_num_inference_steps=5,
        decoder_num_inference_steps=5,
        super_res_num_inference_steps=3,
        output_type="np",
    ).images
    say("pipeline")
    return images[:, ::2, ::2].astype(np.float32)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--glide", help="a checkout of openai/glide-text2im")
    parser.add_argument("--folder", type=Path, help="save Karlo there")
    parser.add_argument("--image", action="store_true", help="make the image alone anew")
    options = parser.parse_args()
    if options.image:
        with np.load(to_write("full")) as file:
            arrays = dict(file)
    else:
        sys.path.insert(0, options.glide)
        shapes: dict = {}
        arrays = {**whole_clip(shapes), **glide(shapes), **forwards(shapes, options.folder)}
        arrays["shapes"] = np.array(json.dumps(shapes))
        if options.folder is not None:
            for name, scheduler in schedulers().items():
                scheduler.save_pretrained(options.folder / name)
    arrays["picture"] = image()
    path = to_write("full")
    np.savez_compressed(path, **arrays)
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
