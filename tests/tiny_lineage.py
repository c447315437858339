"""The systems of configs/lineage.py with everything shrunk, for tests and for processes that tests start."""

import dataclasses

from configs import lineage
from dalle2_jax.data.dataset import Data
from dalle2_jax.diffusion import Sampling
from dalle2_jax.lineage.autoencoder import ConvDecoder, ConvEncoder
from dalle2_jax.lineage.gan import ConvDiscriminator, ConvGenerator, MaxoutDiscriminator, MLPGenerator
from dalle2_jax.lineage.sequence_tasks import SequenceTask
from train.config.system import System

SIZE, GRID, CODES, STEPS = 8, 2, 8, 4
STAGES = (
    "gan",
    "gan_conv",
    "autoencoder",
    "vae",
    "ddpm",
    "ddpm_captions",
    "encoder_decoder",
    "dvae",
    "dalle1",
)


def tiny_lineage(data: Data, steps: int = STEPS) -> System:
    """Without the cascade; images of 8 px."""
    full = lineage.system()
    latent = {"encoder": ConvEncoder((4,)), "decoder": ConvDecoder((4,)), "latent_size": 3, "image_size": SIZE}
    transformer = full.stages["dalle1"].module.transformer.clone(width=16, depth=2, heads=2, scan_layers=True)
    text = full.stages["ddpm_captions"].module.text.clone(width=16, depth=1)
    unet = full.stages["ddpm"].module.unet.clone(
        image_size=SIZE, channels=8, channel_multipliers=(1,), head_channels=8, groups=4, patch=2
    )
    changes = {
        "gan": {"generator": MLPGenerator((8,)), "discriminator": MaxoutDiscriminator((4,), 2), "image_size": SIZE},
        "gan_conv": {
            "generator": ConvGenerator(4, groups=2),
            "discriminator": ConvDiscriminator(4, groups=2),
            "image_size": SIZE,
        },
        "autoencoder": latent,
        "vae": latent,
        "ddpm": {"unet": unet},
        "ddpm_captions": {"unet": unet, "text": text},
        "encoder_decoder": {"width": 8, "depth": 1, "heads": 2, "hidden": 8, "max_length": 5},
        "dvae": {"image_size": SIZE, "codebook_size": CODES, "code_width": 4, "width": 8},
        "dalle1": {"transformer": transformer, "codebook_size": CODES, "grid": GRID},
    }
    own = {
        "gan": {"bias_batches": 2},
        "ddpm": {"sampling": Sampling(steps="3")},
        "ddpm_captions": {"sampling": Sampling(steps="3", guidance_scale=2.0)},
        "encoder_decoder": {"sequences": SequenceTask("reverse", symbols=20, length=4)},
    }
    short = {
        "steps": steps,
        "batch_size": 8,
        "log_every": 1,
        "validate_every": steps,
        "validation_batches": 1,
        "preview_every": steps,
        "preview_count": 2,
        "checkpoint_every": 2,
    }
    stages = {}
    for name in STAGES:
        recipe = full.stages[name]
        module = recipe.module.clone(**changes[name])
        stages[name] = dataclasses.replace(recipe, module=module, **short, **own.get(name, {}))
    return dataclasses.replace(full, name="tiny_lineage", data=data, stages=stages)
