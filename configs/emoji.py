"""Emoji: 3,655 drawn pictures with Unicode's names, from 32 px to 128 px on an accelerator, to 64 px on a CPU.

    apt install fonts-noto-color-emoji unicode-data libfribidi0          # the pictures and the names (Debian, Ubuntu)
    python -m train configs/emoji.py all
    dalle2 evaluate runs/emoji

On one accelerator this is meant for about 20 minutes; on two CPU cores the smaller stages that are chosen there take
about an hour and a half. Both see all the emoji, read captions in the decoder, and are guided. The prior is trained
for few steps on purpose: after some twenty times through the pictures it learns them by heart, and is worse on others.
"""

from dataclasses import replace

from dalle2_jax.clip import CLIP, TextTransformer, VisionTransformer
from dalle2_jax.data.pipeline import Data
from dalle2_jax.decoder import Decoder, Upsampler
from dalle2_jax.diffusion import Process, Sampling
from dalle2_jax.layers.unet import UNet
from dalle2_jax.prior import DiffusionPrior
from train.clip import ClipRecipe
from train.decoder import DecoderRecipe
from train.optimizer import Optimizer
from train.prior import PriorRecipe
from train.system import Recipe, System
from train.upsampler import UpsamplerRecipe

VOCABULARY, CONTEXT, EMBEDDING = 1536, 24, 128


def system(accelerator: bool) -> System:
    """The cascade, in steps and sizes for two CPU cores or (`larger`) for one accelerator."""
    clip = ClipRecipe(
        module=CLIP(
            vision=VisionTransformer(image_size=64, patch_size=16, width=192, depth=4, heads=4),
            text=TextTransformer(vocabulary_size=VOCABULARY, context_length=CONTEXT, width=128, depth=3, heads=4),
            embedding_size=EMBEDDING,
        ),
        steps=1600,
        batch_size=128,
        optimizer=Optimizer(
            learning_rate=1e-3, warmup_steps=200, schedule="cosine", beta2=0.98, weight_decay=0.2, ema_decay=0.995
        ),
        shift=6,
        validate_every=500,
        preview_every=0,
    )
    prior = PriorRecipe(
        module=DiffusionPrior(
            embedding_size=EMBEDDING, width=192, depth=4, heads=4, context_length=CONTEXT, vocabulary_size=VOCABULARY
        ),
        process=Process(schedule="cosine", prediction="x0", variance="fixed_small", clip=None),
        sampling=Sampling(sampler="ddim", steps="25", guidance_scale=1.5, candidates=2),
        steps=1000,
        batch_size=64,
        optimizer=Optimizer(
            learning_rate=6e-4, warmup_steps=200, schedule="cosine", weight_decay=0.02, ema_decay=0.995
        ),
        validate_every=250,
        preview_every=0,
    )
    decoder = DecoderRecipe(
        module=Decoder(
            unet=UNet(
                image_size=32,
                out_channels=3,
                channels=64,
                channel_multipliers=(1, 2),
                depth=1,
                attention_resolutions=(8,),
                head_channels=32,
                patch=2,
                groups=8,
            ),
            text_width=128,
        ),
        process=Process(schedule="cosine", prediction="x0", variance="fixed_small", clip=1.0),
        sampling=Sampling(sampler="dpmpp_2m", steps="20", guidance_scale=2.0),
        loss_kind="simple",
        weighting="min_snr_plus_one",
        weight_limit=10.0,
        image_drop=0.1,
        text_drop=0.3,
        steps=6000,
        batch_size=24,
        optimizer=Optimizer(learning_rate=1e-3, warmup_steps=200, schedule="cosine", ema_decay=0.999),
        validate_every=2000,
    )
    upsampler = UpsamplerRecipe(
        module=Upsampler(
            unet=UNet(
                image_size=64,
                out_channels=3,
                channels=64,
                channel_multipliers=(1, 2),
                depth=1,
                attention_resolutions=(),
                middle_attention=False,
                patch=2,
                groups=8,
            ),
            residual=True,
        ),
        low_size=32,
        crop_fraction=0.5,
        blur_probability=0.5,
        process=Process(schedule="cosine", prediction="x0", variance="fixed_small", clip=1.0),
        sampling=Sampling(sampler="ddim", steps="8"),
        steps=1000,
        batch_size=32,
        optimizer=Optimizer(learning_rate=1e-3, warmup_steps=100, schedule="cosine", ema_decay=0.995),
    )
    stages = {"clip": clip, "prior": prior, "decoder": decoder, "upsampler": upsampler}
    return System(
        name="emoji",
        data=Data(name="emoji", image_size=128 if accelerator else 64),
        vocabulary_size=VOCABULARY,
        context_length=CONTEXT,
        stages=larger(stages) if accelerator else stages,
    )


def larger(stages: dict[str, Recipe]) -> dict[str, Recipe]:
    """The same stages for one accelerator, to 128 px: wider networks in bfloat16, no folded pixels, more steps."""
    clip, prior, decoder, upsampler = (stages[name] for name in ("clip", "prior", "decoder", "upsampler"))
    half = {"dtype": "bfloat16"}
    # Written out: a GPU would copy all layers' parameters and states from and to a scan's stacks.
    layers = {"scan_layers": False, **half}
    vision = clip.module.vision.clone(patch_size=8, width=384, depth=8, heads=6, **layers)
    text = clip.module.text.clone(width=256, depth=4, heads=4, **layers)
    unet = decoder.module.unet.clone(
        channels=128,
        channel_multipliers=(1, 2, 3),
        depth=2,
        attention_resolutions=(16, 8),
        head_channels=64,
        patch=1,
        dropout=0.1,
        **half,
    )
    enlarging = upsampler.module.unet.clone(
        image_size=128, channels=96, channel_multipliers=(1, 2, 3), depth=2, patch=1, **half
    )
    slower = replace(decoder.optimizer, learning_rate=2e-4, ema_decay=0.9995)
    return {
        "clip": replace(clip, module=clip.module.clone(vision=vision, text=text), steps=1000, batch_size=512),
        "prior": replace(
            prior, module=prior.module.clone(width=384, depth=8, heads=6, **layers), steps=1500, batch_size=128
        ),
        "decoder": replace(
            decoder,
            module=decoder.module.clone(unet=unet, text_width=256, **half),
            optimizer=slower,
            steps=20_000,
            batch_size=128,
        ),
        "upsampler": replace(
            upsampler,
            module=upsampler.module.clone(unet=enlarging),
            optimizer=replace(upsampler.optimizer, learning_rate=3e-4),
            steps=6000,
            batch_size=64,
        ),
    }
