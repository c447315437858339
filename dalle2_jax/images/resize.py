"""Changes of images on the host: to RGB, to a square, to another size."""

from collections.abc import Sequence

import numpy as np

MOST_ELONGATED = 32
STRIP = 2**20  # pixels that are computed with at once, in float32


def to_rgb(image: np.ndarray) -> np.ndarray:
    """uint8 [h, w] or [h, w, 1, 3 or 4] to uint8 [h, w, 3]; what is transparent turns white."""
    image = image[..., None] if image.ndim == 2 else image
    if image.shape[-1] == 4:
        white = np.empty((*image.shape[:2], 3), np.uint8)
        rows = max(1, STRIP // max(image.shape[1], 1))
        for top in range(0, len(image), rows):
            strip = image[top : top + rows]
            alpha = strip[..., 3:].astype(np.float32) / 255
            white[top : top + rows] = np.rint(strip[..., :3] * alpha + 255 * (1 - alpha))
        image = white
    return image.repeat(3, axis=-1) if image.shape[-1] == 1 else image


def to_square_rgb(image: np.ndarray) -> np.ndarray:
    """uint8 [h, w] or [h, w, 1, 3 or 4] to its central square, uint8 [s, s, 3]; what is transparent turns white."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return to_rgb(image[top : top + side, left : left + side])


def squares(images: Sequence[np.ndarray], size: int) -> np.ndarray:
    """The central squares of images as `to_square_rgb` takes them, each of any size, uint8 [batch, size, size, 3]."""
    return np.concatenate([resize(to_square_rgb(image)[None], size) for image in images])


def clip_pixels(image: np.ndarray, size: int) -> np.ndarray:
    """An image uint8 [h, w, 3] as CLIP's own preprocessing makes it: its central square, uint8 [size, size, 3].

    The shorter side is brought to `size` by Pillow's bicubic filter, whichever way, and the square is cut out after.
    """
    from PIL import Image

    height, width = image.shape[:2]
    side = MOST_ELONGATED * min(height, width)
    if max(height, width) > side:  # what lies further out is not seen, and would be resized with the rest
        top, left = max(height - side, 0) // 2, max(width - side, 0) // 2
        return clip_pixels(image[top : top + side, left : left + side], size)
    scale = size / min(height, width)
    shape = (size, int(size * width / height)) if height <= width else (int(size * height / width), size)
    if scale == 1.0:
        shape = (height, width)
    resized = np.asarray(Image.fromarray(image).resize(shape[::-1], Image.Resampling.BICUBIC))
    top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    return resized[top : top + size, left : left + size]


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """Square images uint8 [batch, s, s, 3] to uint8 [batch, size, size, 3], each as `scaled` does it."""
    from PIL import Image

    if images.shape[1] == size:
        return images
    out = np.empty((len(images), size, size, 3), np.uint8)
    for row, image in enumerate(images):
        out[row] = np.asarray(scaled(Image.fromarray(image), size))
    return out


def shrink(images: np.ndarray, at_most: int | None) -> np.ndarray:
    """Square images uint8 [batch, s, s, 3], made smaller where their sides are longer than `at_most`."""
    return images if at_most is None or at_most >= images.shape[1] else resize(images, at_most)


def scaled(image, size: int):
    """A square `PIL.Image` of mode RGB at `size` x `size` pixels.

    By area averaging, rounded, where `size` divides its side, otherwise by Pillow's bicubic filter, which averages when
    it shrinks.
    """
    from PIL import Image

    side = image.width
    if side == size:
        return image
    if side % size:
        return image.resize((size, size), Image.Resampling.BICUBIC)
    factor = side // size
    if factor.bit_count() == 1:  # Pillow multiplies by 1 / factor^2 in fixed point: exact for powers of two alone
        return image.reduce(factor)
    rows = np.asarray(image).reshape(size, factor, side, 3).sum(1, dtype=np.uint32).reshape(size, size, factor, 3)
    sums = sum(rows[:, :, column] for column in range(factor))
    return Image.fromarray(((sums + factor**2 // 2) // factor**2).astype(np.uint8))
