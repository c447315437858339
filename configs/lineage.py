"""The systems that led to DALL-E 2, and DALL-E 2, on captioned shapes, at one budget of training time each.

    python -m train configs/lineage.py vae
    dalle2 generate runs/lineage/vae --count 16 --grid
    python -m train configs/lineage.py all                  # every one, and the cascade: 45 minutes on one CPU core

The budget is five minutes of one CPU core; images are 32 px. What each one reaches: docs/results/lineage.md. DALL-E 1
is two stages, `dvae` and `dalle1`; DALL-E 2 four: those of shapes.py, trained for a shorter time and to 32 px.
"""

import dataclasses

from configs import shapes
from dalle2_jax.data.dataset import Data
from dalle2_jax.diffusion import Sampling
from dalle2_jax.layers.caption_encoder import CaptionEncoder
from dalle2_jax.layers.transformer import Transformer
from dalle2_jax.layers.unet import UNet
from dalle2_jax.lineage.autoencoder import Autoencoder, ConvDecoder, ConvEncoder
from dalle2_jax.lineage.dalle1 import DALLE1
from dalle2_jax.lineage.dalle1_sampling import DALLE1Sampling
from dalle2_jax.lineage.ddpm import DDPM
from dalle2_jax.lineage.dvae import DVAE, CosineSchedule
from dalle2_jax.lineage.encoder_decoder import EncoderDecoder
from dalle2_jax.lineage.gan import GAN, ConvDiscriminator, ConvGenerator, MaxoutDiscriminator, MLPGenerator
from dalle2_jax.lineage.sequence_tasks import SequenceTask
from dalle2_jax.lineage.vae import VAE
from train.config.optimizer import Optimizer
from train.config.system import System
from train.recipes.autoencoder import AutoencoderRecipe, VAERecipe
from train.recipes.dalle1 import DALLE1Recipe
from train.recipes.ddpm import DDPMRecipe
from train.recipes.dvae import DVAERecipe
from train.recipes.encoder_decoder import EncoderDecoderRecipe
from train.recipes.gan import GANRecipe

SIZE, GRID, CODES = 32, 8, 128


def system() -> System:
    """One stage a system, in the order of the article."""
    cascade = shapes.system().stages
    adam = Optimizer(name="adam", learning_rate=1e-3, warmup_steps=50, schedule="cosine", ema_decay=0.99)
    # As published for MNIST, with a layer less for each player and their sizes for colour; two steps are one of each.
    gan = GANRecipe(
        module=GAN(MLPGenerator((256, 256)), MaxoutDiscriminator((64, 64)), image_size=SIZE, channels=3),
        optimizer=Optimizer(
            name="sgd",
            learning_rate=0.05,
            warmup_steps=0,
            gradient_clip=0.0,
            momentum=0.5,
            momentum_final=0.7,
            momentum_ramp_steps=2000,
            ema_decay=0.99,
        ),
        bias_batches=20,
        steps=8000,
        batch_size=100,
        preview_every=4000,
    )
    players = Optimizer(name="adam", learning_rate=1e-3, warmup_steps=0, beta1=0.5, gradient_clip=0.0, ema_decay=0.99)
    # A norm would take each image's brightness and contrast from the discriminator, which are most of these images.
    gan_conv = GANRecipe(
        module=GAN(
            ConvGenerator(width=32, groups=8),
            ConvDiscriminator(width=32, norm="none"),
            64,
            image_size=SIZE,
            channels=3,
            noise="normal",
        ),
        optimizer=players,
        discriminator_optimizer=dataclasses.replace(players, learning_rate=2e-4),
        steps=1650,
        batch_size=32,
        preview_every=550,
    )
    networks = {"encoder": ConvEncoder((32, 64, 128), "silu"), "decoder": ConvDecoder((128, 64, 32), "silu")}
    latent = {**networks, "latent_size": 12, "image_size": SIZE, "channels": 3}
    autoencoder = AutoencoderRecipe(
        module=Autoencoder(**latent), optimizer=adam, steps=3500, batch_size=64, preview_every=1750
    )
    vae = VAERecipe(
        module=VAE(**latent, likelihood="gaussian", sigma=0.3),
        optimizer=adam,
        steps=3500,
        batch_size=64,
        preview_every=1750,
    )
    unet = UNet(
        image_size=SIZE,
        out_channels=3,
        channels=32,
        channel_multipliers=(1, 2, 2),
        depth=1,
        attention_resolutions=(4,),
        head_channels=32,
        patch=2,
        groups=8,
    )
    ddpm = DDPMRecipe(
        module=DDPM(unet=unet),
        sampling=Sampling(sampler="ddim", steps="50"),
        optimizer=dataclasses.replace(adam, learning_rate=2e-3),
        steps=1300,
        batch_size=32,
        preview_every=650,
    )
    text = CaptionEncoder(shapes.VOCABULARY, shapes.CONTEXT, width=64, depth=2, heads=2, scan_layers=False)
    # It predicts x_0, as DALL-E 2's decoder here: flat colours take fewer steps than with the paper's epsilon.
    ddpm_captions = dataclasses.replace(
        ddpm,
        process=cascade["decoder"].process,
        weighting=cascade["decoder"].weighting,
        weight_limit=cascade["decoder"].weight_limit,
        module=DDPM(unet=unet, condition="caption", text=text),
        sampling=Sampling(sampler="ddim", steps="50", guidance_scale=2.0),
        steps=1050,
    )
    encoder_decoder = EncoderDecoderRecipe(
        module=EncoderDecoder(vocabulary_size=23, width=64, depth=2, heads=4, hidden=128, dropout=0.0, max_length=16),
        sequences=SequenceTask("reverse", symbols=20, length=10),
        label_smoothing=0.0,
        optimizer=dataclasses.replace(adam, learning_rate=2e-3, warmup_steps=100, beta2=0.98, epsilon=1e-9),
        steps=800,
        batch_size=64,
        validate_every=400,
        preview_every=0,
    )
    # Flat colours would be hit exactly by a likelihood as narrow as the paper's, and nothing else be learned any more.
    # The KL divergence falls in weight: without it at first, all places agree on a few codes and never part again.
    dvae = DVAERecipe(
        module=DVAE(
            image_size=SIZE,
            codebook_size=CODES,
            code_width=64,
            code_scale=1.0,
            width=32,
            multipliers=(1, 2, 2),
            blocks=1,
            least_scale=0.3,
        ),
        temperature=CosineSchedule(1.0, 1 / 16, 800),
        kl_weight=CosineSchedule(8.0, 0.3, 800),
        optimizer=dataclasses.replace(adam, learning_rate=6e-3),
        steps=900,
        batch_size=32,
        preview_every=450,
    )
    dalle1 = DALLE1Recipe(
        module=DALLE1(
            transformer=Transformer(width=128, depth=4, heads=4, is_causal=True, scan_layers=False),
            vocabulary_size=shapes.VOCABULARY,
            context_length=shapes.CONTEXT,
            codebook_size=CODES,
            grid=GRID,
            window=5,
        ),
        sampling=DALLE1Sampling(),
        optimizer=adam,
        steps=600,
        batch_size=32,
        preview_every=300,
    )
    # To 32 pixels, as the others, and not to 64.
    upsampler = cascade["upsampler"]
    upsampler = dataclasses.replace(
        upsampler,
        module=upsampler.module.clone(unet=upsampler.module.unet.clone(image_size=SIZE, patch=2)),
        steps=300,
    )
    stages = {
        "gan": gan,
        "gan_conv": gan_conv,
        "autoencoder": autoencoder,
        "vae": vae,
        "ddpm": ddpm,
        "ddpm_captions": ddpm_captions,
        "encoder_decoder": encoder_decoder,
        "dvae": dvae,
        "dalle1": dalle1,
        "clip": dataclasses.replace(cascade["clip"], steps=600),
        "prior": dataclasses.replace(cascade["prior"], steps=400),
        "decoder": dataclasses.replace(cascade["decoder"], steps=2200),
        "upsampler": upsampler,
    }
    return System(
        name="lineage",
        data=Data(name="captioned_shapes", config="one_object"),
        vocabulary_size=shapes.VOCABULARY,
        context_length=shapes.CONTEXT,
        stages=stages,
    )
