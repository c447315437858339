"""An image denoised in tiles is the image, where what is asked of a pixel lies within its tile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.diffusion import tiled
from dalle2_jax.diffusion.tiling import tile_starts


def _local(x_t, t, condition):
    """A blur of 3 x 3 pixels, what lies at the pixel, and more channels than x_t has."""
    kernel = jnp.full((3, 3, 1, 3), 1 / 9)
    blurred = jax.lax.conv_general_dilated(
        x_t, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=3
    )
    said = blurred + condition["low"] + 0.01 * t[:, None, None, None].astype(jnp.float32)
    return jnp.concatenate([said, condition["more"]], axis=-1)


@pytest.fixture
def arguments():
    keys = jax.random.split(jax.random.key(0), 3)
    x_t, low = (jax.random.normal(key, (2, 40, 28, 3)) for key in keys[:2])
    return x_t, jnp.asarray([3, 900]), {"low": low, "more": jax.random.normal(keys[2], (2, 40, 28, 1))}


@pytest.mark.parametrize(("tile", "overlap"), [(16, 4), (12, 6), (28, 8), (39, 1)])
def test_tiles_of_a_local_denoiser(arguments, tile, overlap):
    x_t, t, condition = arguments
    whole = np.asarray(_local(x_t, t, condition))
    found = np.asarray(jax.jit(tiled(_local, condition, tile, overlap))(x_t, t))
    assert found.shape == (2, 40, 28, 4)
    # What is said of a pixel alone is the same in every tile that has it.
    np.testing.assert_allclose(found[..., 3], whole[..., 3], atol=1e-5)
    # A pixel at a tile's own border misses its neighbours, and counts least there.
    difference = np.abs(found - whole)
    rows, columns = (tile_starts(side, tile, overlap) for side in (40, 28))
    away = np.ones((40, 28), bool)
    for starts, mask in ((rows, away), (columns, away.T)):
        for before, after in zip(starts, starts[1:], strict=False):
            mask[after : before + tile] = False
    assert away.any() and difference[:, away].max() < 1e-5
    assert difference.mean() < 0.05


def test_an_image_no_larger_than_a_tile_is_denoised_whole(arguments):
    x_t, t, condition = arguments
    np.testing.assert_array_equal(tiled(_local, condition, 40, 8)(x_t, t), _local(x_t, t, condition))


def test_tiles_cover_a_side_and_share_what_they_should():
    for length, tile, overlap in ((1024, 256, 64), (100, 30, 10), (31, 30, 29), (40, 40, 0)):
        starts = tile_starts(length, tile, overlap)
        assert starts[0] == 0 and starts[-1] + tile == length
        assert all(after - before <= tile - overlap for before, after in zip(starts, starts[1:], strict=False))
    assert tile_starts(20, 40, 8) == [0]


def test_memory_follows_the_tile():
    """What the compiled denoiser needs beside its arguments, for an image of 16 tiles."""

    def heavy(x_t, t, condition):
        wide = jnp.tanh(x_t @ jnp.ones((3, 256)) + condition @ jnp.ones((3, 256)))
        return wide @ jnp.ones((256, 3))

    shape = jax.ShapeDtypeStruct((1, 128, 128, 3), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.int32)

    def needed(function):
        return jax.jit(function).lower(shape, t, shape).compile().memory_analysis().temp_size_in_bytes

    whole = needed(heavy)
    in_tiles = needed(lambda x_t, t, condition: tiled(heavy, condition, 32, 0)(x_t, t))
    assert in_tiles < whole / 4


@pytest.mark.parametrize(("tile", "overlap"), [(8, 8), (8, -1)])
def test_refusals(tile, overlap):
    with pytest.raises(ValueError, match=f"tiles of 8 pixels cannot share {overlap}"):
        tiled(_local, {}, tile, overlap)
