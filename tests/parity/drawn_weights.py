"""Weights from names alone, so that a reference for a network of a megabyte need not carry them; numpy only."""

import zlib

import numpy as np


def draw(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Random float32 tensors for a PyTorch state dict, the same for the same names and shapes anywhere.

    Kernels have variance 1/fan_in, gains (rank 1 and called weight) lie around one, everything else is smaller. Nothing
    is zero, so no layer that is initialised at zero escapes a comparison. `RandomState` streams are frozen by numpy.
    """
    tensors = {}
    for name, shape in shapes.items():
        noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        if len(shape) == 1:
            tensor = 1 + 0.2 * noise if name.endswith("weight") else 0.2 * noise
        else:
            tensor = noise / np.sqrt(np.prod(shape[1:]))
        tensors[name] = np.asarray(tensor, np.float32)
    return tensors


def noise(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 numbers that follow from a name."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
