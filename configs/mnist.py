"""GAN, VAE and DDPM on any TFDS set of labelled images by its name: mnist, fashion_mnist, cifar10, ...

    python -m train configs/mnist.py mnist vae
    dalle2 generate runs/mnist/vae --count 64 --grid
    python -m train configs/mnist.py fashion_mnist ddpm --run fashion
    dalle2 generate runs/fashion/ddpm 7 --count 8 --grid        # of class 7

TFDS downloads a set at its first use. Sets that are not in `SETS` are taken at 32 px in colour with ten classes; say
otherwise by fields: ddpm.module.num_classes=100. The last twentieth of the training split is held out to validate on.
"""

from dalle2_jax.data.dataset import Data
from dalle2_jax.diffusion import Sampling
from dalle2_jax.layers.unet import UNet
from dalle2_jax.lineage.autoencoder import MLPDecoder, MLPEncoder
from dalle2_jax.lineage.ddpm import DDPM
from dalle2_jax.lineage.gan import GAN, MaxoutDiscriminator, MLPGenerator
from dalle2_jax.lineage.vae import VAE
from train.config.optimizer import Optimizer
from train.config.system import System
from train.recipes.autoencoder import VAERecipe
from train.recipes.ddpm import DDPMRecipe
from train.recipes.gan import GANRecipe

SETS = {"mnist": (28, 1, 10), "fashion_mnist": (28, 1, 10), "kmnist": (28, 1, 10), "cifar10": (32, 3, 10)}


def system(dataset: str) -> System:
    """One stage each; on a grey set the VAE's pixels are black or white, and its nats those of dynamic MNIST."""
    size, channels, classes = SETS.get(dataset, (32, 3, 10))
    grey = channels == 1
    adam = Optimizer(name="adam", learning_rate=1e-3, warmup_steps=100, ema_decay=0.999)
    # goodfeli/adversarial, mnist.yaml: 250 epochs or more of 500 batches, with one step each for every batch.
    gan = GANRecipe(
        module=GAN(MLPGenerator(), MaxoutDiscriminator(), image_size=size, channels=channels),
        optimizer=Optimizer(
            name="sgd",
            learning_rate=0.1,
            warmup_steps=0,
            schedule="exponential",
            decay_rate=1 / 1.000004,
            least_learning_rate=1e-6,
            gradient_clip=0.0,
            momentum=0.5,
            momentum_final=0.7,
            momentum_ramp_steps=125_000,
            ema_decay=0.99,
        ),
        bias_batches=100,
        steps=250_000,
        batch_size=100,
        log_every=500,
        validate_every=10_000,
        preview_every=10_000,
        checkpoint_every=10_000,
    )
    vae = VAERecipe(
        module=VAE(
            MLPEncoder((500,)),
            MLPDecoder((500,)),
            latent_size=20,
            image_size=size,
            channels=channels,
            likelihood="bernoulli" if grey else "discretized_gaussian",
        ),
        binarise="sample" if grey else None,
        optimizer=adam,
        steps=5000,
        batch_size=128,
    )
    ddpm = DDPMRecipe(
        module=DDPM(
            unet=UNet(
                image_size=size,
                out_channels=channels,
                channels=64,
                channel_multipliers=(1, 2, 2),
                depth=1,
                attention_resolutions=(size // 4,),
                head_channels=64,
                dropout=0.1,
            ),
            condition="class",
            num_classes=classes,
            channels=channels,
        ),
        horizontal_flip=not grey,
        sampling=Sampling(sampler="ddim", steps="100", guidance_scale=1.0),
        optimizer=Optimizer(name="adam", learning_rate=2e-4, warmup_steps=1000, ema_decay=0.9995),
        steps=20_000,
        batch_size=128,
    )
    data = Data(
        name=dataset,
        train_split="train[:95%]",
        validation_split="train[95%:]",
        test_split="test",
        unseen_split="unseen",
    )
    return System(name=dataset, data=data, stages={"gan": gan, "vae": vae, "ddpm": ddpm})
