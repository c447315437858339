"""BSR degradation: small images as bad as they come, for training the second upsampler (App. C).

The order and the strengths are those of BSRGAN (Zhang et al. 2021, Sec. 3) as latent diffusion uses it for its own
upsampler (`degradation_bsrgan`), which the paper names: two blurs, two changes of size, noise and JPEG in random order,
and JPEG in the end. There is no model of a camera's sensor in it, as there is none in theirs by default.
"""

import io

import numpy as np

from dalle2_jax.errors import InputError

SMALLEST = 8
METHODS = ("linear", "cubic", "area")


def bsr(original: np.ndarray, factor: int, rng: np.random.Generator) -> np.ndarray:
    """An original uint8 [h, w, 3], made `factor` times smaller and worse: uint8 [h / factor, w / factor, 3].

    Raises InputError unless the factor divides the sides and leaves at least 8 pixels.
    """
    height, width = original.shape[0] // factor, original.shape[1] // factor
    if original.shape != (height * factor, width * factor, 3) or min(height, width) < SMALLEST:
        raise InputError(
            f"an image of shape {original.shape} cannot be made {factor} times smaller; its sides must be multiples of "
            f"that, and {SMALLEST * factor} at least"
        )
    image, left = original.astype(np.float32) / 255, factor
    if factor == 4 and rng.random() < 0.25:
        half = (original.shape[0] // 2, original.shape[1] // 2)
        image = _resize_antialiased(image, half) if rng.random() < 0.5 else _resize_somehow(image, half, rng)
        left = 2
    operations = ["blur", "blur again", "shrink", "to size", "noise", "jpeg"]
    order = [operations[i] for i in rng.permutation(len(operations))]
    first, second = order.index("shrink"), order.index("to size")
    if first > second:
        order[first], order[second] = "to size", "shrink"
    for operation in order:
        if operation.startswith("blur"):
            image = convolve(image, blur_kernel(left, rng))
        elif operation == "shrink":
            image = _shrink(image, left, rng)
        elif operation == "to size":
            image = _resize_somehow(image, (height, width), rng)
        elif operation == "noise":
            image = add_noise(image, rng)
        elif rng.random() < 0.9:
            image = jpeg(image, int(rng.integers(30, 96)))
    return np.rint(jpeg(image, int(rng.integers(30, 96))) * 255).astype(np.uint8)


def blur_kernel(factor: int, rng: np.random.Generator) -> np.ndarray:
    """A Gaussian of 7 to 25 pixels, round or drawn out in some direction, [size, size], of sum 1."""
    size = 2 * int(rng.integers(2, 12)) + 3
    if rng.random() < 0.5:
        variances, angle = (4.0 + factor) * rng.random(2), np.pi * rng.random()
        return gaussian_kernel(size, variances, angle)
    return gaussian_kernel(size, np.full(2, ((2.0 + 0.2 * factor) * rng.random()) ** 2), 0.0)


def gaussian_kernel(size: int, variances: np.ndarray, angle: float) -> np.ndarray:
    """The density of a Gaussian with these variances along axes turned by `angle`, on pixels, of sum 1."""
    x = np.arange(size) - (size - 1) / 2
    along = np.cos(angle) * x[None, :] + np.sin(angle) * x[:, None]
    across = -np.sin(angle) * x[None, :] + np.cos(angle) * x[:, None]
    first, second = np.maximum(variances, 1e-2)  # narrower is no blur
    kernel = np.exp(-0.5 * (along**2 / first + across**2 / second))
    return kernel / kernel.sum()


def convolve(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Every channel of a float image [h, w, c] convolved with a kernel [k, k]; mirrored at the border."""
    from scipy.signal import oaconvolve

    margin = kernel.shape[0] // 2
    padded = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), mode="reflect")
    return oaconvolve(padded, kernel.astype(np.float32)[..., None], mode="valid", axes=(0, 1))


def _shrink(image: np.ndarray, factor: int, rng: np.random.Generator) -> np.ndarray:
    """To a random size up to twice as small as `factor` asks, or blurred and every `factor`-th pixel of it."""
    if rng.random() < 0.75:
        ratio = rng.uniform(1, 2 * factor)
        size = tuple(max(1, int(side / ratio)) for side in image.shape[:2])
        return _resize_somehow(image, size, rng)
    kernel = gaussian_kernel(25, np.full(2, rng.uniform(0.1, 0.6 * factor) ** 2), 0.0)
    # Moved by half of what is left out, so that the pixels that stay are at the middle of those that go.
    shift = (factor - 1) / 2
    return np.clip(convolve(image, _shifted(kernel, shift))[::factor, ::factor], 0, 1)


def _shifted(kernel: np.ndarray, shift: float) -> np.ndarray:
    places = np.clip(np.arange(kernel.shape[0]) + shift, 0, kernel.shape[0] - 1)
    low = np.floor(places).astype(int)
    high, share = np.minimum(low + 1, kernel.shape[0] - 1), places - low
    kernel = kernel[low] * (1 - share)[:, None] + kernel[high] * share[:, None]
    kernel = kernel[:, low] * (1 - share) + kernel[:, high] * share
    return kernel / kernel.sum()


def add_noise(image: np.ndarray, rng: np.random.Generator, low: int = 2, high: int = 25) -> np.ndarray:
    """Gaussian noise of `low` to `high` levels: a channel apart, gray, or with the channels mixed."""
    level, kind = rng.integers(low, high + 1) / 255, rng.random()
    if kind > 0.6:
        noise = rng.normal(0, level, image.shape)
    elif kind < 0.4:
        noise = rng.normal(0, level, (*image.shape[:2], 1))
    else:
        axes = np.linalg.qr(rng.random((3, 3)))[0]
        covariance = np.abs((high / 255) ** 2 * axes.T @ np.diag(rng.random(3)) @ axes)
        values, vectors = np.linalg.eigh(covariance)  # the absolute values may leave it without a root
        root = vectors * np.sqrt(np.maximum(values, 0))
        noise = rng.normal(size=image.shape) @ root.T
    return np.clip(image + noise.astype(np.float32), 0, 1)


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """A float image [h, w, 3] in [0, 1] as it comes back from a JPEG file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file), np.float32) / 255


def _resize_somehow(image: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    return np.clip(resize_without_smoothing(image, size, METHODS[rng.integers(3)]), 0, 1)


def resize_without_smoothing(image: np.ndarray, size: tuple[int, int], method: str) -> np.ndarray:
    """A float image [h, w, c] at `size`, as OpenCV does it: "linear" and "cubic" look at 2 or 4 pixels however much
    smaller it gets, and so alias; "area" averages where it shrinks, and keeps pixels apart where it does not."""
    if method == "area" and (size[0] > image.shape[0] or size[1] > image.shape[1]):
        method = "enlarged area"
    rows, columns = (_weights(old, new, method) for old, new in zip(image.shape[:2], size, strict=True))
    return np.einsum("yh,hwc,xw->yxc", rows, image, columns, optimize=True).astype(np.float32)


def _weights(old: int, new: int, method: str) -> np.ndarray:
    """How much each of `old` pixels counts in each of `new` ones, [new, old]."""
    ratio = old / new
    if method == "area":
        edges = np.arange(new + 1) * ratio
        pixels = np.arange(old)
        covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
        return np.maximum(covered, 0) / ratio
    weights = np.zeros((new, old))
    if method == "enlarged area":
        base = np.floor(np.arange(new) * ratio).astype(int)
        beyond = np.arange(1, new + 1) - (base + 1) / ratio
        share = np.where(beyond > 0, beyond - np.floor(beyond), 0.0)
        np.add.at(weights, (np.arange(new), base), 1 - share)
        np.add.at(weights, (np.arange(new), np.minimum(base + 1, old - 1)), share)
        return weights
    places = (np.arange(new) + 0.5) * ratio - 0.5
    taps = (0, 1) if method == "linear" else (-1, 0, 1, 2)
    base = np.floor(places).astype(int)
    for tap in taps:
        distance = np.abs(places - (base + tap))
        share = 1 - distance if method == "linear" else _cubic(distance)
        np.add.at(weights, (np.arange(new), np.clip(base + tap, 0, old - 1)), share)
    return weights


def _cubic(x: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Keys' cubic with OpenCV's constant."""
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _resize_antialiased(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    from PIL import Image

    channels = [
        Image.fromarray(channel).resize(size[::-1], Image.Resampling.BICUBIC) for channel in np.moveaxis(image, 2, 0)
    ]
    return np.clip(np.stack([np.asarray(channel) for channel in channels], axis=-1), 0, 1)
