"""Changes of pictures on the host: to RGB, to a square, to another size."""

import numpy as np

MOST_ELONGATED = 32


def to_rgb(picture: np.ndarray) -> np.ndarray:
    """uint8 [h, w] or [h, w, 1, 3 or 4] to uint8 [h, w, 3]; what is transparent turns white."""
    picture = picture[..., None] if picture.ndim == 2 else picture
    if picture.shape[-1] == 4:
        alpha = picture[..., 3:].astype(np.float32) / 255
        picture = np.rint(picture[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    return picture.repeat(3, axis=-1) if picture.shape[-1] == 1 else picture


def to_square_rgb(picture: np.ndarray) -> np.ndarray:
    """uint8 [h, w] or [h, w, 1, 3 or 4] to its central square, uint8 [s, s, 3]; what is transparent turns white."""
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return to_rgb(picture[top : top + side, left : left + side])


def clip_pixels(picture: np.ndarray, size: int) -> np.ndarray:
    """A picture uint8 [h, w, 3] as CLIP's own preprocessing makes it: its central square, uint8 [size, size, 3].

    The shorter side is brought to `size` by Pillow's bicubic filter, whichever way, and the square is cut out after.
    """
    from PIL import Image

    height, width = picture.shape[:2]
    side = MOST_ELONGATED * min(height, width)
    if max(height, width) > side:  # what lies further out is not seen, and would be enlarged with the rest
        top, left = max(height - side, 0) // 2, max(width - side, 0) // 2
        return clip_pixels(picture[top : top + side, left : left + side], size)
    scale = size / min(height, width)
    shape = (size, int(size * width / height)) if height <= width else (int(size * height / width), size)
    if scale == 1.0:
        shape = (height, width)
    resized = np.asarray(Image.fromarray(picture).resize(shape[::-1], Image.Resampling.BICUBIC))
    top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    return resized[top : top + size, left : left + size]


def resize(pictures: np.ndarray, size: int) -> np.ndarray:
    """Square pictures uint8 [batch, s, s, 3] to uint8 [batch, size, size, 3], each as `scaled` does it."""
    from PIL import Image

    if pictures.shape[1] == size:
        return pictures
    out = np.empty((len(pictures), size, size, 3), np.uint8)
    for row, picture in enumerate(pictures):
        out[row] = np.asarray(scaled(Image.fromarray(picture), size))
    return out


def shrink(pictures: np.ndarray, at_most: int | None) -> np.ndarray:
    """Square pictures uint8 [batch, s, s, 3], made smaller where their sides are longer than `at_most`."""
    return pictures if at_most is None or at_most >= pictures.shape[1] else resize(pictures, at_most)


def scaled(picture, size: int):
    """A square `PIL.Image` of mode RGB at `size` x `size` pixels.

    By area averaging, rounded, where `size` divides its side, otherwise by Pillow's bicubic filter, which averages when
    it shrinks.
    """
    from PIL import Image

    side = picture.width
    if side == size:
        return picture
    if side % size:
        return picture.resize((size, size), Image.Resampling.BICUBIC)
    factor = side // size
    if factor.bit_count() == 1:  # Pillow multiplies by 1 / factor^2 in fixed point: exact for powers of two alone
        return picture.reduce(factor)
    rows = np.asarray(picture).reshape(size, factor, side, 3).sum(1, dtype=np.uint32).reshape(size, size, factor, 3)
    sums = sum(rows[:, :, column] for column in range(factor))
    return Image.fromarray(((sums + factor**2 // 2) // factor**2).astype(np.uint8))
