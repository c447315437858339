"""Emoji: 3,655 drawn images with Unicode's names, to 64 px on two CPU cores (for accelerators: emoji_large.py).

    apt install fonts-noto-color-emoji unicode-data libfribidi0          # the images and the names (Debian, Ubuntu)
    python -m train configs/emoji.py all
    dalle2 evaluate runs/emoji

It takes about an hour and a half. It sees all the emoji, reads captions in the decoder, and is guided. The prior is
trained for few steps on purpose: after some twenty times through the images it learns them by heart, and is worse on
others. Transformers are written out, as in shapes.py.
"""

from dalle2_jax.clip import CLIP, TextTransformer, VisionTransformer
from dalle2_jax.data.dataset import Data
from dalle2_jax.decoder import Decoder, Upsampler
from dalle2_jax.diffusion import Process, Sampling
from dalle2_jax.layers.transformer import Transformer
from dalle2_jax.layers.unet import UNet
from dalle2_jax.prior import AutoregressivePrior, AutoregressiveSampling, DiffusionPrior
from train.config.optimizer import Optimizer
from train.config.system import System
from train.recipes.autoregressive_prior import AutoregressivePriorRecipe
from train.recipes.clip import ClipRecipe
from train.recipes.decoder import DecoderRecipe
from train.recipes.prior import PriorRecipe
from train.recipes.upsampler import UpsamplerRecipe

VOCABULARY, CONTEXT, EMBEDDING = 1536, 24, 128


def system() -> System:
    """The cascade, in steps and sizes for two CPU cores."""
    clip = ClipRecipe(
        module=CLIP(
            vision=VisionTransformer(image_size=64, patch_size=16, width=192, depth=4, heads=4, scan_layers=False),
            text=TextTransformer(
                vocabulary_size=VOCABULARY, context_length=CONTEXT, width=128, depth=3, heads=4, scan_layers=False
            ),
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
            embedding_size=EMBEDDING,
            width=192,
            depth=4,
            heads=4,
            context_length=CONTEXT,
            vocabulary_size=VOCABULARY,
            scan_layers=False,
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
    # The paper's other prior, trained by its name alone: python -m train configs/emoji.py autoregressive_prior.
    autoregressive_prior = AutoregressivePriorRecipe(
        module=AutoregressivePrior(
            transformer=Transformer(width=192, depth=4, heads=4, is_causal=True, scan_layers=False),
            embedding_size=EMBEDDING,
            components=48,
            buckets=32,
            similarity_buckets=16,
            context_length=CONTEXT,
            vocabulary_size=VOCABULARY,
            text_components=True,
        ),
        sampling=AutoregressiveSampling(candidates=2),
        steps=600,
        batch_size=64,
        codec_examples=6400,
        optimizer=Optimizer(
            learning_rate=6e-4, warmup_steps=100, schedule="cosine", weight_decay=0.02, ema_decay=0.995
        ),
        validate_every=150,
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
    stages = {
        "clip": clip,
        "prior": prior,
        "decoder": decoder,
        "upsampler": upsampler,
        "autoregressive_prior": autoregressive_prior,
    }
    return System(
        name="emoji",
        data=Data(name="emoji", image_size=64),
        vocabulary_size=VOCABULARY,
        context_length=CONTEXT,
        stages=stages,
        optional=("autoregressive_prior",),
    )
