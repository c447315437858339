"""The cascade of the paper, in full size: Table 3 and App. C of arXiv 2204.06125 ("unCLIP").

    python -m train describe configs/paper.py                           # what it is and what it would take
    python -m train describe configs/paper.py --topology v5e:16x16      # the same, compiled for 256 TPU chips
    python -m train configs/paper.py clip data.name=mine data.image_size=256

Nobody trains this on one machine: the five networks of a cascade have 6.7 billion parameters, 135 GB in float32 with
gradients, Adam's moments and the moving average, a training of all of them is some 6e22 operations, and the decoder
alone sees 1.6 billion images. It stands here so that the paper's numbers are in one place and every one of them is
built, counted and lowered by the tests.

From the paper: all sizes, noise schedules, dropout, weight decay, batch sizes, iterations, learning rates, Adam's
betas and epsilons, averaging, sampling steps and variances (analytic for the prior), crops, blur, BSR degradation and
what is dropped of the conditioning (10% and 50%).

Where the paper says nothing, this file chooses:

- CLIP (App. C gives widths and depths, and otherwise "as in CLIP"): 16 heads in either half, as open_clip's ViT-H;
  batch, weight decay, warm-up, Adam and the 32 epochs are those of CLIP's ViT, over the 650 million images that
  App. C names; 256 positions, so that one tokenizer serves all stages; CLIP's vocabulary of 49,408. SAM (rho 0.1) is
  not built: AdamW.
- The prior reads the states of CLIP's text transformer. Its guidance scale is not given; 1 (Sec. 5.5: guiding the prior
  hurt).
- The autoregressive prior, which `all` leaves out: the table says 1 billion parameters, and its two transformers have
  2.0 (1.2 in the caption's, 0.8 in that of the codes). Its context of 384 has no room for the caption's 256 states and
  the 319 codes; here the codes' transformer sees both. Buckets are uniform from the 0.1th to the 99.9th percentile, as
  many (1,024) for z_i . z_t; temperature 1, no guidance.
- The decoder's guidance scale is 1.25, that of Table 2.
- The upsamplers add the time embedding instead of scaling and shifting by it: with Karlo's choice the first counts
  692 million, nearest to the table's 700; DDIM's 27 steps are GLIDE's `fast27`.
- Warm-up is 1,000 steps to a constant rate (CLIP: 2,000 and a cosine), gradients are clipped at norm 1, and networks
  compute in bfloat16 with float32 parameters.

`data` is a placeholder, COCO's captions by its name in TFDS, since the paper's images are not public; name your own
on the command line. Only the last stage needs images of 1024 px: `data.image_size=256` spares the host and the
devices fifteen sixteenths of every batch of the four before it.
"""

from dalle2_jax.clip import CLIP, TextTransformer, VisionTransformer
from dalle2_jax.data.dataset import Data
from dalle2_jax.decoder import CaptionEncoder, Decoder, Upsampler
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

VOCABULARY, CONTEXT, EMBEDDING = 49_408, 256, 1024
COMPUTE = "bfloat16"


def system() -> System:
    """The cascade of Table 3."""
    computing = {"remat": True, "dtype": COMPUTE}

    clip = ClipRecipe(
        module=CLIP(
            vision=VisionTransformer(image_size=256, patch_size=16, width=1280, depth=32, heads=16, **computing),
            text=TextTransformer(
                vocabulary_size=VOCABULARY, context_length=CONTEXT, width=1024, depth=24, heads=16, **computing
            ),
            embedding_size=EMBEDDING,
        ),
        chunk=2048,  # of 32,768 captions
        steps=635_000,  # 32 epochs of 650 million images
        batch_size=32_768,
        optimizer=Optimizer(
            learning_rate=3e-4,
            warmup_steps=2000,
            schedule="cosine",
            beta2=0.98,
            epsilon=1e-6,
            weight_decay=0.2,
            ema_decay=0.9999,
        ),
    )
    prior = PriorRecipe(
        module=DiffusionPrior(
            embedding_size=EMBEDDING,
            width=2048,
            depth=24,
            heads=32,
            context_length=CONTEXT,
            text_embedding_size=EMBEDDING,
            embedding_scale=17.2,
            **computing,
        ),
        process=Process(schedule="cosine", timesteps=1000, prediction="x0", variance="fixed_small", clip=None),
        sampling=Sampling(sampler="ddpm", steps="64", guidance_scale=1.0, candidates=2, variance="analytic"),
        text_drop=0.1,
        steps=600_000,
        batch_size=4096,
        optimizer=Optimizer(
            learning_rate=1.1e-4,
            warmup_steps=1000,
            beta2=0.96,
            epsilon=1e-6,
            weight_decay=6e-2,
            ema_decay=0.9999,
        ),
    )
    autoregressive_prior = AutoregressivePriorRecipe(
        module=AutoregressivePrior(
            transformer=Transformer(width=1664, depth=24, heads=26, is_causal=True, **computing),
            text=CaptionEncoder(
                vocabulary_size=VOCABULARY, context_length=CONTEXT, width=2048, depth=24, heads=32, **computing
            ),
            embedding_size=EMBEDDING,
            components=319,
            buckets=1024,
            context_length=CONTEXT,
            dtype=COMPUTE,
        ),
        sampling=AutoregressiveSampling(top_similarity=0.5),
        text_drop=0.1,
        steps=1_000_000,
        batch_size=4096,
        optimizer=Optimizer(
            learning_rate=1.6e-4,
            warmup_steps=1000,
            beta2=0.91,
            epsilon=1e-10,
            weight_decay=4e-2,
            ema_decay=0.999,
        ),
    )
    decoder = DecoderRecipe(
        module=Decoder(
            unet=UNet(
                image_size=64,
                out_channels=6,
                channels=512,
                channel_multipliers=(1, 2, 3, 4),
                depth=3,
                attention_resolutions=(32, 16, 8),
                head_channels=64,
                dropout=0.1,
                **computing,
            ),
            image_tokens=4,
            text=CaptionEncoder(
                vocabulary_size=VOCABULARY, context_length=CONTEXT, width=2048, depth=24, heads=32, **computing
            ),
            dtype=COMPUTE,
        ),
        process=Process(schedule="cosine", timesteps=1000, prediction="epsilon", variance="learned_range", clip=1.0),
        sampling=Sampling(sampler="ddpm", steps="250", guidance_scale=1.25),
        loss_kind="hybrid",
        image_drop=0.1,
        text_drop=0.5,
        steps=800_000,
        batch_size=2048,
        optimizer=Optimizer(learning_rate=1.2e-4, warmup_steps=1000, ema_decay=0.9999),
    )
    upsampler = UpsamplerRecipe(
        module=Upsampler(
            unet=UNet(
                image_size=256,
                out_channels=3,
                channels=320,
                channel_multipliers=(1, 2, 3, 4),
                depth=3,
                attention_resolutions=(),
                middle_attention=False,
                scale_shift=False,
                dropout=0.1,
                **computing,
            )
        ),
        low_size=64,
        crop_fraction=0.25,
        blur_sigma=0.6,
        process=Process(schedule="cosine", timesteps=1000, prediction="epsilon", variance="fixed_small", clip=1.0),
        sampling=Sampling(sampler="ddim", steps="fast27"),
        steps=1_000_000,
        batch_size=1024,
        optimizer=Optimizer(learning_rate=1.2e-4, warmup_steps=1000, ema_decay=0.9999),
    )
    upsampler_1024 = UpsamplerRecipe(
        module=Upsampler(
            unet=UNet(
                image_size=1024,
                out_channels=3,
                channels=192,
                channel_multipliers=(1, 1, 2, 2, 4, 4),
                depth=2,
                attention_resolutions=(),
                middle_attention=False,
                scale_shift=False,
                **computing,
            )
        ),
        low_size=256,
        crop_fraction=0.25,
        degradation="bsr",
        process=Process(schedule="linear", timesteps=1000, prediction="epsilon", variance="fixed_small", clip=1.0),
        sampling=Sampling(sampler="ddim", steps="15"),
        steps=1_000_000,
        batch_size=512,
        optimizer=Optimizer(learning_rate=1.0e-4, warmup_steps=1000, ema_decay=0.9999),
    )
    return System(
        name="paper",
        data=Data(
            name="coco_captions",
            validation_split="val",
            test_split="test",
            image_size=1024,
            cache=False,
        ),
        vocabulary_size=VOCABULARY,
        context_length=CONTEXT,
        stages={
            "clip": clip,
            "prior": prior,
            "decoder": decoder,
            "upsampler": upsampler,
            "upsampler_1024": upsampler_1024,
            "autoregressive_prior": autoregressive_prior,
        },
        optional=("autoregressive_prior",),
    )
