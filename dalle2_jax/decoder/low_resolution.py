"""The gaussian blur of the first upsampler's low-resolution input in training (Sec. 2.1; kernel 3, sigma 0.6)."""

import jax
import jax.numpy as jnp

from dalle2_jax.errors import InputError


def gaussian_blur(images: jax.Array, sigma: float | jax.Array, kernel_size: int = 3) -> jax.Array:
    """Blurs every channel of `images` [batch, height, width, channels] on its own; any float range, same shape out.

    The kernel is the gaussian at whole pixels, normalised to sum 1; the border repeats the edge pixels, so a constant
    image stays as it is. `sigma` is one number of pixels for the whole batch, and may be traced.

    Raises:
        InputError: if `kernel_size` is not odd, a known `sigma` is not positive, or `images` has not rank 4.
    """
    if images.ndim != 4:
        raise InputError(f"gaussian_blur wants images [batch, height, width, channels], not shape {images.shape}.")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise InputError(f"gaussian_blur's kernel_size must be odd and positive, not {kernel_size}.")
    if isinstance(sigma, (int, float)) and sigma <= 0:
        raise InputError(f"gaussian_blur's sigma must be positive, not {sigma}.")
    radius = kernel_size // 2
    offsets = jnp.arange(-radius, radius + 1, dtype=jnp.float32)
    weights = jnp.exp(-0.5 * (offsets / sigma) ** 2)
    weights = (weights / weights.sum()).astype(images.dtype)
    for axis in (1, 2):
        padding = [(0, 0)] * 4
        padding[axis] = (radius, radius)
        padded = jnp.pad(images, padding, mode="edge")
        length = images.shape[axis]
        images = sum(weights[i] * jax.lax.slice_in_dim(padded, i, i + length, axis=axis) for i in range(kernel_size))
    return images


def random_crop(key: jax.Array, image: jax.Array, low_resolution: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Cuts the same random square, another for every example, out of an image and out of its small version.

    `image` is [batch, height, width, channels], `low_resolution` [batch, height/r, width/r, channels] for a whole r,
    and `size` the crop's side in pixels of `image`, a multiple of r (the paper: a quarter of the width). Corners fall
    on whole pixels of the small image. Returns ([batch, size, size, channels], [batch, size/r, size/r, channels]) in
    the dtypes that came. Can be jitted with `size` static.

    Raises:
        InputError: if the ratio of the two images is not one whole number, or `size` does not fit it or the image.
    """
    batch, height, width, channels = image.shape
    low_batch, low_height, low_width, low_channels = low_resolution.shape
    ratio = height // low_height
    if low_batch != batch or low_height * ratio != height or low_width * ratio != width:
        raise InputError(
            f"random_crop wants a low_resolution of image's shape {image.shape} with height and width divided by "
            f"one whole number, not {low_resolution.shape}."
        )
    if size % ratio or not 0 < size <= min(height, width):
        raise InputError(
            f"random_crop's size must be a multiple of {ratio} and at most {min(height, width)}, not {size}."
        )
    low_size = size // ratio
    limits = jnp.array([low_height - low_size + 1, low_width - low_size + 1])
    corners = jax.random.randint(key, (batch, 2), 0, limits[None, :])

    def cut(image: jax.Array, corner: jax.Array, side: int) -> jax.Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (side, side, image.shape[-1]))

    images = jax.vmap(lambda image, corner: cut(image, corner, size))(image, corners * ratio)
    return images, jax.vmap(lambda image, corner: cut(image, corner, low_size))(low_resolution, corners)
