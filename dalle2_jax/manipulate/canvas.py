"""Images and masks of any size as the square that is painted in, and what of it is known at each stage's size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dalle2_jax.errors import InputError
from dalle2_jax.images.resize import resize, to_rgb

LARGEST_FACTOR = 8.0
MOST_OVER = 8  # a canvas is not made larger than this many times the painted image


@dataclass(frozen=True)
class Canvas:
    """A square image uint8 `[s, s, 3]`, and where it is painted, bool `[s, s]`."""

    image: np.ndarray
    mask: np.ndarray


def square_canvas(image: np.ndarray, mask: np.ndarray, size: int, least: int, of: str = "") -> Canvas:
    """The central square of an image and of its mask, `size` pixels wide.

    image: uint8 `[h, w]` or `[h, w, 1, 3 or 4]`, of which what is transparent turns white; by `images.resize.resize`.
    mask: `[h, w]`, bool, True where to paint, or uint8, from 128 on. A pixel of the square is painted if any pixel is
    that it covers. least: the smallest side that an image may have. of: which image it is, for what is raised.

    Raises:
        InputError: for a mask of another size, one that paints nothing or all of the square, or an image too small.
    """
    image, mask = np.asarray(image), np.asarray(mask)
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise InputError(f"the image{of} is {image.dtype} {list(image.shape)}; it must be uint8 [h, w, 3]")
    if mask.ndim != 2 or mask.dtype not in (np.bool_, np.uint8):
        raise InputError(f"the mask{of} is {mask.dtype} {list(mask.shape)}; it must be bool or uint8 [h, w]")
    height, width = image.shape[:2]
    if mask.shape != (height, width):
        raise InputError(
            f"the mask{of} is {mask.shape[1]} x {mask.shape[0]} pixels and the image {width} x {height}; give one of "
            "the image's size"
        )
    if min(height, width) < least:
        raise InputError(
            f"the image{of} is {width} x {height} pixels, too small to paint in; its sides must be at least {least}"
        )
    paint = _central_square(mask if mask.dtype == np.bool_ else mask >= 128)
    within = "" if height == width else " of the image's central square, which is all that is seen"
    if not paint.any():
        raise InputError(f"the mask{of} paints nothing{within}; make it white (True) where to paint")
    painted = any_in_cells(paint[None], size)[0]
    if painted.all():
        raise InputError(
            f"the mask{of} paints all{within or ' of the image'} and leaves nothing known; make it black (False) where "
            "the image is to stay, or generate an image of the caption"
        )
    return Canvas(resize(to_rgb(_central_square(image))[None], size)[0], painted)


def any_in_cells(mask: np.ndarray, size: int) -> np.ndarray:
    """Square masks bool `[b, s, s]` at `size` pixels: True where any pixel is of those covered, even in part."""
    side = mask.shape[1]
    first = np.arange(size) * side // size
    last = -(-(np.arange(size) + 1) * side // size)
    sums = np.pad(mask, ((0, 0), (1, 0), (1, 0))).cumsum(1, dtype=np.int32).cumsum(2, dtype=np.int32)
    rows = sums[:, last] - sums[:, first]
    return rows[:, :, last] - rows[:, :, first] > 0


def extended(
    image: np.ndarray, factor: float, place: tuple[float, float], size: int, of: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """A whole image on a square `factor` times as wide as its longer side, uint8 `[s, s, 3]`, and bool `[s, s]`: where
    that is to be painted.

    place: how much of the free space is left of it and above it, as shares. What is to be painted repeats the image's
    edge, so that nothing else is seen in pixels at it that are made smaller. size: of the painted image; a canvas of
    many times that is made of the image made smaller.

    Raises:
        InputError: for a factor or a place that there is not, or a canvas that the image fills.
    """
    if not 1 <= factor <= LARGEST_FACTOR:
        raise InputError(f"factor is {factor}; it must lie in 1 to {LARGEST_FACTOR:g}")
    if len(place) != 2 or not all(0 <= share <= 1 for share in place):
        raise InputError(f"place is {place}; it must be two shares from 0 to 1: from the left, and from above")
    image = to_rgb(np.asarray(image))
    longer = max(image.shape[:2])
    if round(longer * factor) > MOST_OVER * size:
        image = _scaled(image, MOST_OVER * size / (longer * factor))
        longer = max(image.shape[:2])
    (height, width), side = image.shape[:2], max(round(longer * factor), longer)
    if height == width == side:
        raise InputError(f"the image{of} fills its canvas and leaves nothing to paint; give a factor above {factor:g}")
    left, top = round((side - width) * place[0]), round((side - height) * place[1])
    around = ((top, side - height - top), (left, side - width - left))
    mask = np.pad(np.zeros((height, width), bool), around, constant_values=True)
    return np.pad(image, (*around, (0, 0)), mode="edge"), mask


def _central_square(array: np.ndarray) -> np.ndarray:
    height, width = array.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return array[top : top + side, left : left + side]


def _scaled(image: np.ndarray, scale: float) -> np.ndarray:
    from PIL import Image

    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
