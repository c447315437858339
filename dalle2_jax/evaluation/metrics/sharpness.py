"""How sharp images are: the size of their finest detail."""

import numpy as np


def sharpness(images: np.ndarray) -> float:
    """The mean square of the discrete Laplacian of images uint8 `[n, h, w, c]` in [0, 1], inside the border: of each
    pixel less the mean of its four neighbours. Compare images of one size; noise counts as detail."""
    pixels = np.asarray(images, np.float64) / 255.0
    around = pixels[:, :-2, 1:-1] + pixels[:, 2:, 1:-1] + pixels[:, 1:-1, :-2] + pixels[:, 1:-1, 2:]
    return float(np.mean((pixels[:, 1:-1, 1:-1] - around / 4.0) ** 2))
