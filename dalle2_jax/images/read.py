"""Reading one image file of any mode as the pixels that a viewer would show."""

import io
import re
import warnings

import numpy as np

from dalle2_jax.errors import InputError
from dalle2_jax.images.resize import to_square_rgb

MOST_PIXELS = 100_000_000
_QUIET = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


class ImageError(InputError):
    """A file that is no image, or none that can be trained on; says what is wrong in a few words."""


def open_image(file: bytes | str):
    """A decoded `PIL.Image` of mode L, RGB or RGBA, turned as its EXIF data say; the first frame where there are more.

    Palettes, CMYK, 16 bits, bilevel and gray with alpha are converted. Raises ImageError for what is no image, is
    cut short or has more than `MOST_PIXELS`. Pillow's warnings (of large images, odd EXIF data and palettes) are
    ignored from then on.
    """
    from PIL import Image, UnidentifiedImageError

    if warnings.filters[:1] != [_QUIET]:  # catch_warnings here would, in several threads, leave all warnings ignored
        warnings.filterwarnings("ignore", module=_QUIET[3].pattern)
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise ImageError(f"it has {width} x {height} pixels, more than {MOST_PIXELS:,}")
            image.load()
            mode = image.mode
            return _turned(_plain(image), image), mode
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError(f"it has more than {MOST_PIXELS:,} pixels") from None
    except UnidentifiedImageError:
        raise ImageError("it is not an image that Pillow can read") from None
    except Exception as error:  # Pillow's many readers raise anything
        raise ImageError(f"it is damaged or cut short ({' '.join(str(error).split())})") from None


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
        values = np.asarray(image).astype(np.float64)
        # 16 bits a pixel is what such files hold, or fractions; what lies beyond is scaled to its own range.
        top = 65535.0 if values.max() > 255 else 255.0
        top = 1.0 if image.mode == "F" and values.max() <= 1 else top
        return Image.fromarray(np.rint(np.clip(values / max(top, values.max()), 0, 1) * 255).astype(np.uint8))
    transparent = "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBa")
    return image.convert("RGBA" if transparent else "RGB")


def read_square(file: bytes | str):
    """The central square of an image, a `PIL.Image` of mode RGB; what is transparent turns white.

    Raises ImageError.
    """
    from PIL import Image

    image = open_image(file)[0]
    if image.mode != "RGB":
        return Image.fromarray(to_square_rgb(np.asarray(image)))
    (width, height), side = image.size, min(image.size)
    left, top = (width - side) // 2, (height - side) // 2
    return image if width == height else image.crop((left, top, left + side, top + side))


def read_image(file: bytes | str) -> np.ndarray:
    """The central square of an image, uint8 [s, s, 3]; what is transparent turns white. Raises ImageError."""
    return np.asarray(read_square(file))
