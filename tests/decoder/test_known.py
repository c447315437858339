"""What networks are told of what is known, and that it comes out, with guidance and in tiles."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.decoder import Caption, Known, invert_decoder, sample_decoder, sample_upsampler
from dalle2_jax.diffusion import Process, Resampling, Sampling

SIZE = 8
PROCESS = Process(schedule="cosine", prediction="x0", variance="fixed_small", clip=1.0)
KEYS = jax.random.split(jax.random.key(0), 2)
RNG = np.random.default_rng(0)
IMAGE = RNG.uniform(-1, 1, (2, SIZE, SIZE, 3)).astype(np.float32)
MASK = RNG.uniform(size=(2, SIZE, SIZE, 1)) < 0.5
KNOWN = Known(jnp.where(MASK, IMAGE, jnp.nan), jnp.asarray(MASK))  # of any values where it is not known
SAMPLING = Sampling(sampler="ddim", steps="3")
LOW = RNG.uniform(-1, 1, (2, SIZE // 2, SIZE // 2, 3)).astype(np.float32)


class Formula:
    """A network of a formula for every pixel by itself, which remembers what it is told."""

    unet = SimpleNamespace(image_size=SIZE)
    reads_image = True

    def __init__(self, inpainting):
        self.inpainting, self.told = inpainting, []

    def apply(self, variables, x_t, timesteps, low_resolution=None, known=None, keep_text=None, **condition):
        self.told.append(known)
        level = 0.3 if keep_text is None else jnp.where(keep_text, 0.3, -0.2)[:, None, None, None]
        if low_resolution is not None:
            level = level + self.resize_input(low_resolution, x_t.shape[1:3])
        seen = 0.0 if known is None else 0.5 * known[..., :3].mean((1, 2), keepdims=True) + 0.1 * known[..., 3:]
        return 0.2 * x_t + level + seen

    def resize_input(self, low_resolution, size):
        return jax.image.resize(low_resolution, (low_resolution.shape[0], *size, 3), "nearest")


def decoded(network, known, **sampling):
    caption = Caption({"text": None, "text_mask": None}, jnp.ones(2, bool))
    settings = Sampling(**{"sampler": "ddim", "steps": "3", **sampling})
    arguments = network, {}, PROCESS, settings, jnp.zeros((2, 4)), caption
    return np.asarray(sample_decoder(KEYS, *arguments, known=known, resampling=Resampling(1, 2)))


def test_a_decoder_that_paints_is_inverted_as_one_that_knows_nothing():
    caption = Caption({"text": None, "text_mask": None}, jnp.ones(2, bool))
    settings = SAMPLING, jnp.asarray(IMAGE), jnp.zeros((2, 4)), caption
    painting, plain = (Formula(inpainting) for inpainting in (True, False))
    found = invert_decoder(painting, {}, PROCESS, *settings)
    np.testing.assert_allclose(found, invert_decoder(plain, {}, PROCESS, *settings), rtol=1e-4)
    assert painting.told[0].shape == (2, SIZE, SIZE, 4) and plain.told[0] is None


@pytest.mark.parametrize("inpainting", [True, False])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_what_is_known_comes_out_of_the_decoder(inpainting, guidance):
    network = Formula(inpainting)
    with jax.disable_jit():
        found = decoded(network, KNOWN, guidance_scale=guidance)
    np.testing.assert_array_equal(found[np.repeat(MASK, 3, -1)], IMAGE[np.repeat(MASK, 3, -1)])
    assert np.isfinite(found).all() and np.abs(found - IMAGE)[~np.repeat(MASK, 3, -1)].mean() > 0.1
    # Three steps, and with RePaint the first two stretches of one step twice.
    assert len(network.told) == (3 if inpainting else 5)
    expected = np.concatenate([np.where(MASK, IMAGE, 0), MASK], axis=-1)
    for told in network.told:
        if not inpainting:
            assert told is None
        elif guidance == 1.0:
            np.testing.assert_array_equal(told, expected)
        else:  # the half without the conditions too
            np.testing.assert_array_equal(told, np.concatenate([expected, expected]))


def test_nothing_known_is_zeros_to_a_network_that_looks():
    network = Formula(True)
    with jax.disable_jit():
        decoded(network, None)
    assert all(told.shape == (2, SIZE, SIZE, 4) and not told.any() for told in network.told)


@pytest.mark.parametrize("inpainting", [True, False])
def test_upsamplers_keep_it_in_tiles_too(inpainting):
    """A tile that is the whole is the same; in smaller ones every tile is told its own part."""

    def run(tile):
        network = Formula(inpainting)
        arguments = KEYS, network, {}, PROCESS, SAMPLING, LOW, SIZE, tile
        return np.asarray(sample_upsampler(*arguments, known=KNOWN)), network

    (whole, _), (same, _), (found, network) = run(None), run(SIZE), run(4)
    np.testing.assert_allclose(same, whole, atol=1e-6)
    for images in (whole, found):
        np.testing.assert_array_equal(images[np.repeat(MASK, 3, -1)], IMAGE[np.repeat(MASK, 3, -1)])
    if inpainting:
        assert {told.shape for told in network.told} == {(2, 4, 4, 4)}
    else:
        np.testing.assert_allclose(found, whole, atol=1e-5)
