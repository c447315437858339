"""Emoji for one accelerator: from 32 px to 128 px, in wider networks than emoji.py, bfloat16, `patch=1`.

    apt install fonts-noto-color-emoji unicode-data libfribidi0          # the images and the names (Debian, Ubuntu)
    python -m train configs/emoji_large.py all
    dalle2 evaluate runs/emoji_large

It is meant for about 20 minutes on one accelerator. Transformers are written out, as in shapes_large.py.
"""

from dalle2_jax.clip import CLIP, TextTransformer, VisionTransformer
from dalle2_jax.data.dataset import Data
from dalle2_jax.decoder import Decoder, Upsampler
from dalle2_jax.diffusion import Process, Sampling
from dalle2_jax.layers.unet import UNet
from dalle2_jax.prior import DiffusionPrior
from train.config.optimizer import Optimizer
from train.config.system import System
from train.recipes.clip import ClipRecipe
from train.recipes.decoder import DecoderRecipe
from train.recipes.prior import PriorRecipe
from train.recipes.upsampler import UpsamplerRecipe

VOCABULARY, CONTEXT, EMBEDDING = 1536, 24, 128


def system() -> System:
    """The cascade, in steps and sizes for one accelerator."""
    layers = {"scan_layers": False, "dtype": "bfloat16"}
    clip = ClipRecipe(
        module=CLIP(
            vision=VisionTransformer(image_size=64, patch_size=8, width=384, depth=8, heads=6, **layers),
            text=TextTransformer(
                vocabulary_size=VOCABULARY, context_length=CONTEXT, width=256, depth=4, heads=4, **layers
            ),
            embedding_size=EMBEDDING,
        ),
        steps=1000,
        batch_size=512,
        optimizer=Optimizer(
            learning_rate=1e-3, warmup_steps=200, schedule="cosine", beta2=0.98, weight_decay=0.2, ema_decay=0.995
        ),
        shift=6,
        validate_every=500,
        preview_every=0,
    )
    prior = PriorRecipe(
        module=DiffusionPrior(
            embedding_size=EMBEDDING,
            width=384,
            depth=8,
            heads=6,
            context_length=CONTEXT,
            vocabulary_size=VOCABULARY,
            **layers,
        ),
        process=Process(schedule="cosine", prediction="x0", variance="fixed_small", clip=None),
        sampling=Sampling(sampler="ddim", steps="25", guidance_scale=1.5, candidates=2),
        steps=1500,
        batch_size=128,
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
                channels=128,
                channel_multipliers=(1, 2, 3),
                depth=2,
                attention_resolutions=(16, 8),
                head_channels=64,
                patch=1,
                groups=8,
                dropout=0.1,
                dtype="bfloat16",
            ),
            text_width=256,
            dtype="bfloat16",
        ),
        process=Process(schedule="cosine", prediction="x0", variance="fixed_small", clip=1.0),
        sampling=Sampling(sampler="dpmpp_2m", steps="20", guidance_scale=2.0),
        loss_kind="simple",
        weighting="min_snr_plus_one",
        weight_limit=10.0,
        image_drop=0.1,
        text_drop=0.3,
        steps=20_000,
        batch_size=128,
        optimizer=Optimizer(learning_rate=2e-4, warmup_steps=200, schedule="cosine", ema_decay=0.9995),
        validate_every=2000,
    )
    upsampler = UpsamplerRecipe(
        module=Upsampler(
            unet=UNet(
                image_size=128,
                out_channels=3,
                channels=96,
                channel_multipliers=(1, 2, 3),
                depth=2,
                attention_resolutions=(),
                middle_attention=False,
                patch=1,
                groups=8,
                dtype="bfloat16",
            ),
            residual=True,
        ),
        low_size=32,
        crop_fraction=0.5,
        blur_probability=0.5,
        process=Process(schedule="cosine", prediction="x0", variance="fixed_small", clip=1.0),
        sampling=Sampling(sampler="ddim", steps="8"),
        steps=6000,
        batch_size=64,
        optimizer=Optimizer(learning_rate=3e-4, warmup_steps=100, schedule="cosine", ema_decay=0.995),
    )
    stages = {"clip": clip, "prior": prior, "decoder": decoder, "upsampler": upsampler}
    return System(
        name="emoji_large",
        data=Data(name="emoji", image_size=128),
        vocabulary_size=VOCABULARY,
        context_length=CONTEXT,
        stages=stages,
    )
