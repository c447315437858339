"""Captioned shapes for one accelerator: the cascade of shapes.py in wider networks, bfloat16, more and larger batches.

    python -m train configs/shapes_large.py all

Transformers are written out (`scan_layers=False`): a GPU would copy all layers' parameters and states from and to a
scan's stacks. The U-Nets work on the pixels themselves (`patch=1`).
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

VOCABULARY, CONTEXT, EMBEDDING = 512, 12, 24


def system() -> System:
    """The cascade, in steps and sizes for one accelerator."""
    layers = {"scan_layers": False, "dtype": "bfloat16"}
    clip = ClipRecipe(
        module=CLIP(
            vision=VisionTransformer(image_size=32, patch_size=4, width=256, depth=6, heads=8, **layers),
            text=TextTransformer(
                vocabulary_size=VOCABULARY, context_length=CONTEXT, width=128, depth=4, heads=4, **layers
            ),
            # Few dimensions and one layer of text leave no room for a code of its own for each pair of shape and
            # colour: what is learned of each has to serve for pairs that were never seen.
            embedding_size=EMBEDDING,
        ),
        steps=3000,
        batch_size=512,
        optimizer=Optimizer(learning_rate=1e-3, warmup_steps=100, schedule="cosine", weight_decay=0.05, ema_decay=0.99),
        shift=2,
        grayscale=0.4,
        checkpoint_every=300,
        preview_every=0,
    )
    prior = PriorRecipe(
        module=DiffusionPrior(
            embedding_size=EMBEDDING,
            width=256,
            depth=6,
            heads=8,
            context_length=CONTEXT,
            vocabulary_size=VOCABULARY,
            **layers,
        ),
        process=Process(schedule="cosine", prediction="x0", variance="fixed_small", clip=None),
        sampling=Sampling(sampler="ddim", steps="25", candidates=2),
        steps=5000,
        checkpoint_every=200,
        batch_size=512,
        optimizer=Optimizer(learning_rate=1e-3, warmup_steps=100, schedule="cosine", ema_decay=0.99),
        preview_every=0,
    )
    decoder = DecoderRecipe(
        module=Decoder(
            unet=UNet(
                image_size=16,
                out_channels=3,
                channels=96,
                channel_multipliers=(1, 2, 2),
                depth=2,
                attention_resolutions=(8, 4),
                head_channels=32,
                patch=1,
                groups=8,
                dtype="bfloat16",
            ),
            # CLIP has read captions already; a transformer of the decoder's own would have to learn to.
            text_width=128,
            dtype="bfloat16",
        ),
        process=Process(schedule="cosine", prediction="x0", variance="fixed_small", clip=1.0),
        sampling=Sampling(sampler="ddim", steps="20", guidance_scale=1.25),
        loss_kind="simple",
        weighting="min_snr_plus_one",
        weight_limit=10.0,
        image_drop=0.1,
        text_drop=0.3,
        steps=10_000,
        validate_every=2500,
        preview_every=2500,
        checkpoint_every=1250,
        batch_size=128,
        optimizer=Optimizer(learning_rate=2e-3, warmup_steps=100, schedule="cosine", ema_decay=0.995),
    )
    upsampler = UpsamplerRecipe(
        module=Upsampler(
            unet=UNet(
                image_size=64,
                out_channels=3,
                channels=64,
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
        low_size=16,
        crop_fraction=0.25,
        blur_probability=0.5,
        process=Process(schedule="cosine", prediction="x0", variance="fixed_small", clip=1.0),
        sampling=Sampling(sampler="ddim", steps="8"),
        steps=4000,
        checkpoint_every=150,
        validate_every=450,
        preview_every=450,
        batch_size=64,
        optimizer=Optimizer(learning_rate=1e-3, warmup_steps=50, schedule="cosine", ema_decay=0.99),
    )
    stages = {"clip": clip, "prior": prior, "decoder": decoder, "upsampler": upsampler}
    return System(
        name="shapes_large",
        data=Data(name="captioned_shapes", config="one_object"),
        vocabulary_size=VOCABULARY,
        context_length=CONTEXT,
        stages=stages,
    )
