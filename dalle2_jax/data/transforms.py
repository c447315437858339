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
    """Square pictures uint8 [batch, s, s, 3] to uint8 [batch, size, size, 3].

    By area averaging where `size` divides s, otherwise by Pillow's bicubic filter, which averages when it shrinks.
    """
    batch, side = pictures.shape[:2]
    if side == size:
        return pictures
    out = np.empty((batch, size, size, 3), np.uint8)
    if side % size == 0:
        factor = side // size
        area = factor * factor
        for start in range(0, batch, 256):  # keeps the intermediate sums small
            blocks = pictures[start : start + 256].reshape(-1, size, factor, size, factor, 3)
            out[start : start + 256] = (blocks.sum((2, 4), dtype=np.uint32) + area // 2) // area
        return out
    from PIL import Image

    for row, picture in enumerate(pictures):
        out[row] = np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC))
    return out
