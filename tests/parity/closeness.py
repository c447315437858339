"""The one measure of the comparisons: the largest difference, as a share of the largest value."""

import os
from typing import Any

import numpy as np

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}


def close(ours: Any, theirs: np.ndarray, name: str = "", dtype: str = "float32") -> None:
    """Asserts that two arrays are the same within `TOLERANCE`, ours computed in `dtype`; prints what was seen (-s)."""
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape and theirs.std() > 0
    seen = np.abs(ours - theirs).max() / np.abs(theirs).max()
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition("::")[2].removesuffix(" (call)")
    print(f"{test} {name}: {seen:.1e}")
    assert seen <= TOLERANCE[dtype]
