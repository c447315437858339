"""What XLA is told beside a step: which networks, where, and that the numbers stay."""

import jax
import numpy as np
import pytest

from dalle2_jax.decoder import Decoder, Upsampler
from dalle2_jax.layers.convolution import ResBlock
from dalle2_jax.layers.unet import UNet
from dalle2_jax.prior import DiffusionPrior
from train.machine import compiler
from train.machine.compiler import KERNELS, compiler_options

WIDE = UNet(image_size=16, channels=128, channel_multipliers=(1, 2), depth=1)


@pytest.mark.parametrize(
    ("module", "platform", "takes"),
    [
        (Decoder(WIDE), "cpu", True),
        (Upsampler(WIDE), "cpu", True),
        (WIDE, "cpu", True),
        (Decoder(WIDE), "tpu", False),
        (Decoder(WIDE), "gpu", False),
        (Decoder(WIDE.clone(channels=96)), "cpu", False),
        (DiffusionPrior(embedding_size=16, width=256, depth=1, heads=2), "cpu", False),
    ],
)
def test_which_networks_take_other_kernels(monkeypatch, module, platform, takes):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    assert (compiler_options(module, platform) is not None) is takes


def test_the_users_flags_and_another_jaxlib_are_heeded(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--{KERNELS}=LIBRARY_FUSION_TYPE_DOT")
    assert compiler_options(WIDE, "cpu") is None
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(compiler, "KERNELS", "xla_cpu_kernels_of_another_day")
    assert compiler_options(WIDE, "cpu") is None


def test_the_numbers_stay(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    block = ResBlock(channels=128)
    random = np.random.default_rng(0)
    x, embedding = (random.normal(size=shape).astype(np.float32) for shape in ((2, 8, 8, 128), (2, 32)))
    shapes = jax.eval_shape(block.init, jax.random.key(0), x, embedding)
    params = jax.tree.map(lambda leaf: random.normal(0, 0.1, leaf.shape).astype(np.float32), shapes)

    def loss(params):
        return (block.apply(params, x, embedding) ** 2).mean()

    plain, other = (
        jax.jit(jax.value_and_grad(loss), compiler_options=options)(params)
        for options in (None, compiler_options(WIDE, "cpu"))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(a).max()), plain, other)
