"""Captioned shapes: the whole cascade, small enough for two CPU cores (`make demo`; for accelerators: shapes_large.py).

python -m train configs/shapes.py all --run demo

Transformers are written out (`scan_layers=False`): a CPU would copy all layers' parameters and states from and to a
scan's stacks.
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

VOCABULARY, CONTEXT, EMBEDDING = 512, 12, 24


def system() -> System:
    """The cascade, in steps and sizes for two CPU cores."""
    clip = ClipRecipe(
        module=CLIP(
            vision=VisionTransformer(image_size=32, patch_size=16, width=128, depth=2, heads=4, scan_layers=False),
            text=TextTransformer(
                vocabulary_size=VOCABULARY, context_length=CONTEXT, width=64, depth=1, heads=2, scan_layers=False
            ),
            # Few dimensions and one layer of text leave no room for a code of its own for each pair of shape and
            # colour: what is learned of each has to serve for pairs that were never seen.
            embedding_size=EMBEDDING,
        ),
        steps=900,
        batch_size=128,
        optimizer=Optimizer(learning_rate=1e-3, warmup_steps=100, schedule="cosine", weight_decay=0.05, ema_decay=0.99),
        shift=2,
        grayscale=0.4,
        checkpoint_every=300,
        preview_every=0,
    )
    prior = PriorRecipe(
        module=DiffusionPrior(
            embedding_size=EMBEDDING,
            width=128,
            depth=2,
            heads=4,
            context_length=CONTEXT,
            vocabulary_size=VOCABULARY,
            scan_layers=False,
        ),
        process=Process(schedule="cosine", prediction="x0", variance="fixed_small", clip=None),
        sampling=Sampling(sampler="ddim", steps="25", candidates=2),
        steps=600,
        checkpoint_every=200,
        batch_size=64,
        optimizer=Optimizer(learning_rate=1e-3, warmup_steps=100, schedule="cosine", ema_decay=0.99),
        preview_every=0,
    )
    # The paper's other prior, trained by its name alone: python -m train configs/shapes.py autoregressive_prior. Fewer
    # buckets than the paper's 1,024, of which 13,000 images would leave a dozen each.
    autoregressive_prior = AutoregressivePriorRecipe(
        module=AutoregressivePrior(
            transformer=Transformer(width=128, depth=2, heads=4, is_causal=True, scan_layers=False),
            embedding_size=EMBEDDING,
            components=20,
            buckets=64,
            similarity_buckets=16,
            context_length=CONTEXT,
            vocabulary_size=VOCABULARY,
            text_components=True,
        ),
        sampling=AutoregressiveSampling(candidates=2),
        steps=600,
        checkpoint_every=200,
        batch_size=64,
        codec_examples=12_800,
        optimizer=Optimizer(learning_rate=1e-3, warmup_steps=100, schedule="cosine", ema_decay=0.99),
        validate_every=300,
        preview_every=0,
    )
    decoder = DecoderRecipe(
        module=Decoder(
            unet=UNet(
                image_size=16,
                out_channels=3,
                channels=64,
                channel_multipliers=(1, 1),
                depth=1,
                attention_resolutions=(),
                head_channels=64,
                patch=2,
                groups=8,
            ),
            # CLIP has read captions already; a transformer of the decoder's own would have to learn to.
            text_width=64,
        ),
        process=Process(schedule="cosine", prediction="x0", variance="fixed_small", clip=1.0),
        sampling=Sampling(sampler="ddim", steps="20", guidance_scale=1.25),
        loss_kind="simple",
        weighting="min_snr_plus_one",
        weight_limit=10.0,
        image_drop=0.1,
        text_drop=0.3,
        steps=5000,
        validate_every=2500,
        preview_every=2500,
        checkpoint_every=1250,
        batch_size=24,
        optimizer=Optimizer(learning_rate=2e-3, warmup_steps=100, schedule="cosine", ema_decay=0.995),
    )
    upsampler = UpsamplerRecipe(
        module=Upsampler(
            unet=UNet(
                image_size=64,
                out_channels=3,
                channels=48,
                channel_multipliers=(1, 1),
                depth=1,
                attention_resolutions=(),
                middle_attention=False,
                patch=4,
                groups=8,
            ),
            residual=True,
        ),
        low_size=16,
        crop_fraction=0.5,
        blur_probability=0.5,
        process=Process(schedule="cosine", prediction="x0", variance="fixed_small", clip=1.0),
        sampling=Sampling(sampler="ddim", steps="8"),
        steps=450,
        checkpoint_every=150,
        validate_every=450,
        preview_every=450,
        batch_size=32,
        optimizer=Optimizer(learning_rate=1e-3, warmup_steps=50, schedule="cosine", ema_decay=0.99),
    )
    stages = {
        "clip": clip,
        "prior": prior,
        "decoder": decoder,
        "upsampler": upsampler,
        "autoregressive_prior": autoregressive_prior,
    }
    return System(
        name="shapes",
        data=Data(name="captioned_shapes", config="one_object"),
        vocabulary_size=VOCABULARY,
        context_length=CONTEXT,
        stages=stages,
        optional=("autoregressive_prior",),
    )
