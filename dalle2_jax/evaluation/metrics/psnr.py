"""Peak signal-to-noise ratio."""

from __future__ import annotations

import numpy as np


def psnr(images: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 images, over the mean squared error of the whole batch."""
    error = np.mean((images.astype(np.float64) - reference.astype(np.float64)) ** 2)
    return float(10 * np.log10(255.0**2 / max(error, 1e-12)))
