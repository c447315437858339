"""The one measure of the comparisons: the largest difference, as a share of the largest value."""

import os
from typing import Any

import numpy as np

TOLERANCE = 1e-4


def close(ours: Any, theirs: np.ndarray, name: str = "") -> None:
    """Asserts that two float32 arrays are the same within `TOLERANCE`, and prints what was seen (pytest -s)."""
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape and theirs.std() > 0
    seen = np.abs(ours - theirs).max() / np.abs(theirs).max()
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition("::")[2].removesuffix(" (call)")
    print(f"{test} {name}: {seen:.1e}")
    assert seen <= TOLERANCE
