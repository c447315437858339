"""Reading one image file of any mode as the pixels that a viewer would show."""

import contextlib
import functools
import io
import re
import threading
import warnings
from collections.abc import Iterator

import numpy as np

from dalle2_jax.errors import InputError
from dalle2_jax.images.resize import STRIP, to_rgb

MOST_PIXELS = 100_000_000
MOST_BYTES = 2**29  # of a file
# What files may be inside, whatever they are called. Pillow knows many more, and runs another program for some: EPS by
# Ghostscript.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "GIF", "TIFF", "JPEG2000", "AVIF", "HEIF")
AT_ONCE = 3 * 2**29  # bytes of decoded images in all threads together, unless a single one needs more
_QUIET = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


class ImageError(InputError):
    """A file that is no image, or none that can be trained on; says what is wrong in a few words."""


def open_image(file: bytes | str):
    """A decoded `PIL.Image` of mode L, RGB or RGBA, turned as its EXIF data say; the first frame where there are more.

    Palettes, CMYK, 16 bits, bilevel and gray with alpha are converted. Raises ImageError for what is no image, is
    cut short or has more than `MOST_PIXELS`. Pillow's warnings (of large images, odd EXIF data and palettes) are
    ignored from then on.
    """
    with _opened(file) as image:
        return _decoded(image), image.mode


def _opened(file: bytes | str):
    """The file as a `PIL.Image` of which no pixel is decoded. Raises ImageError."""
    from PIL import Image

    if warnings.filters[:1] != [_QUIET]:  # catch_warnings here would, in several threads, leave all warnings ignored
        warnings.filterwarnings("ignore", module=_QUIET[3].pattern)
    with _as_image_errors():
        image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=_formats())
    width, height = image.size
    if width * height > MOST_PIXELS:
        image.close()
        raise ImageError(f"it has {width} x {height} pixels, more than {MOST_PIXELS:,}")
    return image


def _decoded(image):
    """Its pixels in a mode of 8 bits a channel, turned. Raises ImageError."""
    with _as_image_errors():
        image.load()
        return _turned(_plain(image), image)


@contextlib.contextmanager
def _as_image_errors() -> Iterator[None]:
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except Image.DecompressionBombError:
        raise ImageError(f"it has more than {MOST_PIXELS:,} pixels") from None
    except UnidentifiedImageError:
        raise ImageError("it is not an image that Pillow can read") from None
    except Exception as error:  # Pillow's many readers raise anything
        raise ImageError(f"it is damaged or cut short ({' '.join(str(error).split())})") from None


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow knows, or a plugin of it that was registered before."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _turned(image, original):
    """The image as the EXIF data of the original say; as it is where these are broken."""
    from PIL.Image import Transpose

    try:
        orientation = original.getexif().get(0x0112)
    except Exception:
        return image
    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image


def _plain(image):
    """The image in a mode that holds 8 bits a channel."""
    from PIL import Image

    if image.mode in ("L", "RGB", "RGBA"):
        has_transparency = "transparency" in image.info
        return image.convert("RGBA") if has_transparency else image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        highest = max(float(values.max()) for _, values in _strips(image))
        # 16 bits a pixel is what such files hold, or fractions; what lies beyond is scaled to its own range.
        top = 65535.0 if highest > 255 else 255.0
        top = 1.0 if image.mode == "F" and highest <= 1 else top
        found = Image.new("L", image.size)
        for place, values in _strips(image):
            levels = np.rint(np.clip(values.astype(np.float64) / max(top, highest), 0, 1) * 255)
            found.paste(Image.fromarray(levels.astype(np.uint8)), place)
        return found
    transparent = "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBa")
    return image.convert("RGBA" if transparent else "RGB")


def _strips(image) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    """((left, top), pixels) of strips of an image, so that what is computed of them is never that of the whole."""
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        yield (0, top), np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))


def _square(image):
    """Its central square in mode RGB; what is transparent turns white."""
    from PIL import Image

    (width, height), side = image.size, min(image.size)
    left, top = (width - side) // 2, (height - side) // 2
    image = image if width == height else image.crop((left, top, left + side, top + side))
    if image.mode == "RGB":
        return image
    found = Image.new("RGB", image.size)
    for place, pixels in _strips(image):
        found.paste(Image.fromarray(to_rgb(pixels)), place)
    return found


class _Budget:
    """Bytes that several threads share: who wants more than there are left waits."""

    def __init__(self, limit: int):
        self._limit, self._taken, self._changed = limit, 0, threading.Condition()

    @contextlib.contextmanager
    def take(self, count: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + count <= self._limit)
            self._taken += count
        try:
            yield
        finally:
            with self._changed:
                self._taken -= count
                self._changed.notify_all()


_BUDGET = _Budget(AT_ONCE)


@contextlib.contextmanager
def open_square(file: bytes | str) -> Iterator:
    """The central square of an image, a `PIL.Image` of mode RGB; what is transparent turns white.

    `with open_square(file) as image:` waits where other threads have as many pixels open as memory should hold; so
    make it small before the block ends. Raises ImageError.
    """
    with _opened(file) as image:
        width, height = image.size
        # The file's own channels, these as 8 bits each, and RGB.
        with _BUDGET.take(width * height * (2 * len(image.getbands()) + 3)):
            yield _square(_decoded(image))


def read_image(file: bytes | str) -> np.ndarray:
    """The central square of an image, uint8 [s, s, 3]; what is transparent turns white. Raises ImageError."""
    with open_square(file) as image:
        return np.asarray(image)
