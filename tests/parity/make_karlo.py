"""Writes references/karlo.npz: what diffusers' UnCLIP pipelines draw with small networks of Karlo's shape.

Runs in an environment of its own with torch, diffusers and transformers, never in the test suite:

    python -m tests.parity.make_karlo [FOLDER]

The weights follow from their names (drawn_weights.py) and the noise of every step from its place (`noise` there), so
that only configs and outputs are kept. With FOLDER the networks are saved there too, as `save_pretrained` does.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    PriorTransformer,
    UnCLIPImageVariationPipeline,
    UnCLIPPipeline,
    UnCLIPScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.pipelines.deprecated.unclip import pipeline_unclip, pipeline_unclip_image_variation
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from diffusers.schedulers import scheduling_unclip
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from tests.parity.drawn_weights import draw, noise
from tests.parity.make_schedulers import in_float64
from tests.parity.reference import to_write

WIDTH, CONTEXT, VOCABULARY, CONTEXT_WIDTH = 24, 9, 600, 20
TIMESTEPS = (0, 37, 999)
LENGTHS = (9, 5, 3)
STEPS = {"prior": 5, "decoder": 5, "super_res": 3}


def networks() -> dict[str, torch.nn.Module]:
    """Every network of both pipelines, by its folder's name."""
    common = {"hidden_size": WIDTH, "projection_dim": WIDTH, "intermediate_size": 40, "num_attention_heads": 3}
    text = CLIPTextConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        num_hidden_layers=2,
        bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
        hidden_act="quick_gelu",
        **common,
    )
    vision = CLIPVisionConfig(image_size=16, patch_size=8, num_hidden_layers=2, hidden_act="quick_gelu", **common)
    down, up = "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"
    enlarging = {
        "sample_size": 32,
        "in_channels": 6,
        "out_channels": 3,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "down_block_types": (down, down),
        "up_block_types": (up, up),
        "add_attention": False,
    }
    built = {
        "text_encoder": CLIPTextModelWithProjection(text),
        "image_encoder": CLIPVisionModelWithProjection(vision),
        "prior": PriorTransformer(
            num_attention_heads=2, attention_head_dim=12, embedding_dim=WIDTH, num_layers=2, num_embeddings=CONTEXT
        ),
        "text_proj": UnCLIPTextProjModel(
            clip_embeddings_dim=WIDTH, time_embed_dim=4 * 32, cross_attention_dim=CONTEXT_WIDTH
        ),
        "decoder": UNet2DConditionModel(
            sample_size=16,
            in_channels=3,
            out_channels=6,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=(down, "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", up),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            cross_attention_dim=CONTEXT_WIDTH,
            attention_head_dim=8,
            resnet_time_scale_shift="scale_shift",
            class_embed_type="identity",
        ),
        "super_res_first": UNet2DModel(**enlarging),
        "super_res_last": UNet2DModel(**enlarging),
    }
    for name, network in built.items():
        network.eval()
        tensors = draw({f"{name}/{key}": tuple(value.shape) for key, value in network.state_dict().items()})
        with torch.no_grad():
            for key, value in network.state_dict().items():
                if value.is_floating_point():
                    value.copy_(torch.from_numpy(tensors[f"{name}/{key}"]))
    return built


def schedulers() -> dict[str, UnCLIPScheduler]:
    """Those of kakaobrain/karlo-v1-alpha."""
    small = {"variance_type": "fixed_small_log"}
    return {
        "prior_scheduler": UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0, **small),
        "decoder_scheduler": UnCLIPScheduler(variance_type="learned_range", prediction_type="epsilon"),
        "super_res_scheduler": UnCLIPScheduler(prediction_type="epsilon", **small),
    }


def caption_ids(seed: int, length: int) -> np.ndarray:
    """Start, random tokens, end; filled up with token 0."""
    row = np.zeros(CONTEXT, np.int64)
    row[:length] = [
        VOCABULARY - 2,
        *np.random.RandomState(seed).randint(1, VOCABULARY - 2, length - 2),
        VOCABULARY - 1,
    ]
    return row


class FakeTokenizer:
    """In the tokenizer's place: the empty caption is its two ends, others by their length."""

    model_max_length = CONTEXT

    def __call__(self, texts, **_):
        texts = [texts] if isinstance(texts, str) else texts
        lengths = [min(len(text) + 2, CONTEXT) for text in texts]
        rows = np.stack([caption_ids(len(text), length) for text, length in zip(texts, lengths, strict=True)])
        mask = np.arange(CONTEXT)[None] < np.asarray(lengths)[:, None]

        class Batch:
            input_ids, attention_mask = torch.from_numpy(rows), torch.from_numpy(mask).long()

        return Batch()

    def batch_decode(self, _):
        return [""]


class Noise:
    """In `randn_tensor`'s place: each call's noise follows from the stage's name and the number of the call."""

    def __init__(self, names: list[str]):
        self.names, self.calls = names, 0

    def __call__(self, shape, **_):
        total = 0
        for name in self.names:
            steps = STEPS[name]
            if self.calls < total + steps:
                place = self.calls - total
                break
            total += steps
        self.calls += 1
        array = noise(f"{name}/{place}", tuple(shape))
        return torch.from_numpy(array)


@torch.no_grad()
def forwards(built: dict) -> dict[str, np.ndarray]:
    """Inputs and outputs of every network alone, with padded and unpadded captions at three timesteps."""
    ids = torch.from_numpy(np.stack([caption_ids(100 + n, n) for n in LENGTHS]))
    mask = torch.arange(CONTEXT)[None] < torch.tensor(LENGTHS)[:, None]
    timesteps = torch.tensor(TIMESTEPS)

    def drawn(name: str, *shape: int) -> torch.Tensor:
        return torch.from_numpy(noise(f"input/{name}", shape))

    text = built["text_encoder"](ids)
    z, x, y = drawn("z", 3, WIDTH), drawn("x", 3, 3, 16, 16), drawn("y", 3, 6, 32, 32)
    found = {
        "ids": ids,
        "mask": mask,
        "text_embedding": text.text_embeds,
        "text_states": text.last_hidden_state,
        "image_embedding": built["image_encoder"](drawn("pixels", 3, 3, 16, 16)).image_embeds,
        "super_res_first": built["super_res_first"](y, timesteps).sample,
        "super_res_last": built["super_res_last"](y, timesteps).sample,
    }
    for name, one in (("padded", mask), ("unpadded", torch.ones_like(mask))):
        found[f"prior_{name}"] = built["prior"](
            z,
            timestep=timesteps,
            proj_embedding=text.text_embeds,
            encoder_hidden_states=text.last_hidden_state,
            attention_mask=one,
        ).predicted_image_embedding
        context, time = built["text_proj"](
            image_embeddings=z,
            prompt_embeds=text.text_embeds,
            text_encoder_hidden_states=text.last_hidden_state,
            do_classifier_free_guidance=False,
        )
        seen = torch.nn.functional.pad(one, (4, 0), value=True)
        found[f"decoder_{name}"] = built["decoder"](
            x, timesteps, encoder_hidden_states=context, class_labels=time, attention_mask=seen
        ).sample
    return {f"network/{name}": value.numpy() for name, value in found.items()}


def pipelines(built: dict) -> dict[str, np.ndarray]:
    """What both pipelines draw, with the noise of every step given and the schedulers' tables in float64.

    With tables as published a few pixels, of networks as untrained as these, come out at the other end of the range:
    at the first step of epsilon's chain the sign of a difference decides between -1 and 1.
    """
    parts = {name: built[name] for name in ("text_encoder", "text_proj", "decoder")}
    parts |= {name: built[name] for name in ("super_res_first", "super_res_last")}
    plans = {name: in_float64(scheduler) for name, scheduler in schedulers().items()}
    steps = {"decoder_num_inference_steps": STEPS["decoder"], "super_res_num_inference_steps": STEPS["super_res"]}
    found = {}

    def patched(*names: str) -> None:
        given = Noise(list(names))
        for module in (pipeline_unclip, pipeline_unclip_image_variation, scheduling_unclip):
            module.randn_tensor = given

    patched("prior", "decoder", "super_res")
    text2img = UnCLIPPipeline(tokenizer=FakeTokenizer(), prior=built["prior"], **parts, **plans)
    text2img.set_progress_bar_config(disable=True)

    # What goes from stage to stage, to tell where a difference would begin.
    def seen_embedding(module, given, named) -> None:
        found.setdefault("embedding", named["image_embeddings"].numpy().copy())

    def seen_enlarged(module, given, named) -> None:
        found.setdefault("enlarged", named["sample"][:, 3:].numpy().copy())

    built["text_proj"].register_forward_pre_hook(seen_embedding, with_kwargs=True)
    built["super_res_first"].register_forward_pre_hook(seen_enlarged, with_kwargs=True)
    prompts = ["abc", "abcdef"]
    images = text2img(prompts, prior_num_inference_steps=STEPS["prior"], output_type="np", **steps).images
    found["text2img"] = images.astype(np.float32)

    patched("decoder", "super_res")
    del plans["prior_scheduler"]
    variation = UnCLIPImageVariationPipeline(
        tokenizer=FakeTokenizer(),
        image_encoder=built["image_encoder"],
        feature_extractor=CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        **parts,
        **plans,
    )
    variation.set_progress_bar_config(disable=True)
    from PIL import Image

    source = np.random.RandomState(0).randint(0, 255, (21, 30, 3), np.uint8)
    images = variation(Image.fromarray(source), output_type="np", **steps).images
    found |= {"variation": images.astype(np.float32), "source": source}
    return {f"pipeline/{name}": value for name, value in found.items()}


def main() -> None:
    torch.set_num_threads(1)
    built = networks()
    configs = {}
    for name, network in {**built, **schedulers()}.items():
        config = network.config.to_dict() if hasattr(network.config, "to_dict") else dict(network.config)
        configs[name] = json.loads(json.dumps(config, default=str))
    shapes = {
        name: {key: list(value.shape) for key, value in network.state_dict().items()} for name, network in built.items()
    }
    arrays = {"configs": np.array(json.dumps(configs)), "shapes": np.array(json.dumps(shapes))}
    arrays |= forwards(built)
    arrays |= pipelines(built)
    path = to_write("karlo")
    np.savez_compressed(path, **arrays)
    print(f"{path.name}: {path.stat().st_size} bytes")
    if len(sys.argv) > 1:
        for name, part in {**built, **schedulers()}.items():
            part.save_pretrained(Path(sys.argv[1]) / name)


if __name__ == "__main__":
    main()
