"""Reading one picture file of any mode as the pixels that a viewer would show."""

import io
import re
import warnings

import numpy as np

from dalle2_jax.errors import InputError
from dalle2_jax.images.resize import to_square_rgb

MOST_PIXELS = 100_000_000
_QUIET = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


class PictureError(InputError):
    """A file that is no picture, or none that can be trained on; says what is wrong in a few words."""


def open_picture(file: bytes | str):
    """A decoded `PIL.Image` of mode L, RGB or RGBA, turned as its EXIF data say; the first frame where there are more.

    Palettes, CMYK, 16 bits, bilevel and gray with alpha are converted. Raises PictureError for what is no picture, is
    cut short or has more than `MOST_PIXELS`. Pillow's warnings (of large pictures, odd EXIF data and palettes) are
    ignored from then on.
    """
    from PIL import Image, UnidentifiedImageError

    if warnings.filters[:1] != [_QUIET]:  # catch_warnings here would, in several threads, leave all warnings ignored
        warnings.filterwarnings("ignore", module=_QUIET[3].pattern)
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as picture:
            width, height = picture.size
            if width * height > MOST_PIXELS:
                raise PictureError(f"it has {width} x {height} pixels, more than {MOST_PIXELS:,}")
            picture.load()
            mode = picture.mode
            return _turned(_plain(picture), picture), mode
    except PictureError:
        raise
    except Image.DecompressionBombError:
        raise PictureError(f"it has more than {MOST_PIXELS:,} pixels") from None
    except UnidentifiedImageError:
        raise PictureError("it is not a picture that Pillow can read") from None
    except Exception as error:  # Pillow's many readers raise anything
        raise PictureError(f"it is damaged or cut short ({' '.join(str(error).split())})") from None


def _turned(picture, original):
    """The picture as the EXIF data of the original say; as it is where these are broken."""
    from PIL.Image import Transpose

    try:
        orientation = original.getexif().get(0x0112)
    except Exception:
        return picture
    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return picture.transpose(turns[orientation]) if orientation in turns else picture


def _plain(picture):
    """The picture in a mode that holds 8 bits a channel."""
    from PIL import Image

    if picture.mode in ("L", "RGB", "RGBA"):
        has_transparency = "transparency" in picture.info
        return picture.convert("RGBA") if has_transparency else picture
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        values = np.asarray(picture).astype(np.float64)
        # 16 bits a pixel is what such files hold, or fractions; what lies beyond is scaled to its own range.
        top = 65535.0 if values.max() > 255 else 255.0
        top = 1.0 if picture.mode == "F" and values.max() <= 1 else top
        return Image.fromarray(np.rint(np.clip(values / max(top, values.max()), 0, 1) * 255).astype(np.uint8))
    transparent = "transparency" in picture.info or picture.mode in ("LA", "La", "PA", "RGBa")
    return picture.convert("RGBA" if transparent else "RGB")


def read_square(file: bytes | str):
    """The central square of a picture, a `PIL.Image` of mode RGB; what is transparent turns white.

    Raises PictureError.
    """
    from PIL import Image

    picture = open_picture(file)[0]
    if picture.mode != "RGB":
        return Image.fromarray(to_square_rgb(np.asarray(picture)))
    (width, height), side = picture.size, min(picture.size)
    left, top = (width - side) // 2, (height - side) // 2
    return picture if width == height else picture.crop((left, top, left + side, top + side))


def read_picture(file: bytes | str) -> np.ndarray:
    """The central square of a picture, uint8 [s, s, 3]; what is transparent turns white. Raises PictureError."""
    return np.asarray(read_square(file))
