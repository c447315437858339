"""Captioned shapes: the whole cascade, small enough for two CPU cores (`make demo`).

    python -m train configs/shapes.py all --run demo
"""

from dalle2_jax.clip import CLIP, TextTransformer, VisionTransformer
from dalle2_jax.data.pipeline import Data
from dalle2_jax.decoder import CaptionEncoder, Decoder, Upsampler
from dalle2_jax.diffusion import Process, Sampling
from dalle2_jax.layers.unet import UNet
from dalle2_jax.prior import DiffusionPrior
from train.clip import ClipRecipe
from train.decoder import DecoderRecipe
from train.prior import PriorRecipe
from train.system import Optimizer, System
from train.upsampler import UpsamplerRecipe

VOCABULARY, CONTEXT = 512, 12


def system(accelerator: bool) -> System:
    """The cascade; an accelerator gets more steps and larger networks."""
    clip = ClipRecipe(
        module=CLIP(
            vision=VisionTransformer(image_size=32, patch_size=8, width=128, depth=4, heads=4),
            text=TextTransformer(
                vocabulary_size=VOCABULARY, context_length=CONTEXT, width=128, depth=2, heads=4
            ),
            embedding_size=64,
        ),
        steps=1500,
        batch_size=128,
        optimizer=Optimizer(learning_rate=1e-3, warmup_steps=100, schedule="cosine", weight_decay=0.05, ema_decay=0.99),
        shift=2,
    )
    prior = PriorRecipe(
        module=DiffusionPrior(
            embedding_size=64, width=128, depth=4, heads=4, context_length=CONTEXT, vocabulary_size=VOCABULARY
        ),
        process=Process(schedule="cosine", prediction="x0", variance="fixed_small", clip=None),
        sampling=Sampling(sampler="ddim", steps="25", candidates=2),
        steps=1500,
        batch_size=128,
        optimizer=Optimizer(learning_rate=1e-3, warmup_steps=100, schedule="cosine", ema_decay=0.99),
    )
    decoder = DecoderRecipe(
        module=Decoder(
            unet=UNet(
                image_size=16,
                out_channels=3,
                channels=32,
                channel_multipliers=(1, 2, 2),
                depth=1,
                attention_resolutions=(8, 4),
                head_channels=32,
                groups=8,
            ),
            text=CaptionEncoder(
                vocabulary_size=VOCABULARY, context_length=CONTEXT, width=64, depth=2, heads=2
            ),
        ),
        process=Process(schedule="cosine", prediction="v", variance="fixed_small", clip=1.0),
        sampling=Sampling(sampler="ddim", steps="20", guidance_scale=2.0),
        loss_kind="simple",
        steps=3500,
        batch_size=32,
        optimizer=Optimizer(learning_rate=1e-3, warmup_steps=100, schedule="cosine", ema_decay=0.999),
    )
    upsampler = UpsamplerRecipe(
        module=Upsampler(
            unet=UNet(
                image_size=64,
                out_channels=3,
                channels=16,
                channel_multipliers=(1, 2, 2),
                depth=1,
                attention_resolutions=(),
                middle_attention=False,
                groups=8,
            )
        ),
        low_size=16,
        crop_fraction=0.5,
        blur_probability=0.5,
        process=Process(schedule="cosine", prediction="v", variance="fixed_small", clip=1.0),
        sampling=Sampling(sampler="ddim", steps="8"),
        steps=600,
        batch_size=32,
        optimizer=Optimizer(learning_rate=1e-3, warmup_steps=50, schedule="cosine", ema_decay=0.99),
    )
    return System(
        name="shapes",
        data=Data(name="captioned_shapes", config="one_object"),
        vocabulary_size=VOCABULARY,
        context_length=CONTEXT,
        stages={"clip": clip, "prior": prior, "decoder": decoder, "upsampler": upsampler},
    )
